//! From a wanted length to a sample: the most units whose prompt is not longer.

use super::filler::Filler;
use super::sample::Sample;
use super::tasks::{Seed, Task};

/// A sample and the tokens of its first prompt.
#[derive(Debug)]
pub(crate) struct Fitted {
    pub(crate) sample: Sample,
    pub(crate) prompt: Vec<u32>,
}

/// Why there is no sample of a length.
#[derive(Debug)]
pub(crate) enum Misfit<E> {
    /// The shortest sample has this many tokens.
    TooShort { least: usize },
    /// The prompt could not be encoded.
    Encode(E),
}

/// The sample of a seed whose prompt has at most `seed.len` tokens. It has fewer by about a unit (a word of
/// prose, a pair, a document, a list entry): at most by one or by 2 %, because pairs and documents are
/// drawn anew for each number of them.
pub(crate) fn fit<E>(
    task: Task,
    seed: Seed,
    filler: &Filler,
    encode: &mut dyn FnMut(&Sample) -> Result<Vec<u32>, E>,
) -> Result<Fitted, Misfit<E>> {
    let (least, most) = task.units();
    let mut make = |n_units| {
        let sample = task.sample(seed, n_units, filler);
        let prompt = encode(&sample).map_err(Misfit::Encode)?;
        Ok(Fitted { sample, prompt })
    };
    let mut best = make(least)?;
    if best.prompt.len() > seed.len {
        return Err(Misfit::TooShort { least: best.prompt.len() });
    }
    // `fits` units fit, `over` do not; lengths between are found by halving.
    let (mut fits, mut over) = (least, most + 1);
    while over - fits > 1 {
        let middle = if over > most { (2 * fits).min(most) } else { fits.midpoint(over) };
        if middle == fits {
            break; // all units that there are
        }
        let next = make(middle)?;
        if next.prompt.len() <= seed.len {
            (fits, best) = (middle, next);
        } else {
            over = middle;
        }
    }
    Ok(best)
}

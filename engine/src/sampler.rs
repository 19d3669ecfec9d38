//! From logits to a token: greedy, temperature, top-k, top-p, min-p, repetition penalty.
//!
//! Filters apply in the order that Hugging Face's `generate` uses: repetition penalty, temperature, top-k,
//! top-p, min-p; then one draw. The draw takes its randomness from a counter-based generator, so a seed
//! gives the same tokens on every machine that gives the same logits.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use loris_loader::GenerationDefaults;
use xxhash_rust::xxh3::xxh3_64;

use crate::backend::Draw;
use crate::engine::Model;
use crate::error::Error;
use crate::memory;

/// How the next token is chosen. The default is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerParams {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Only the `top_k` likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens whose probabilities reach `top_p` together; 1: all.
    pub top_p: f32,
    /// Only tokens at least `min_p` times as likely as the likeliest; 0: all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occurred; 1: off.
    pub repetition_penalty: f32,
    /// Start of the random sequence; `None`: a random one, which [`Sampler::seed`] tells.
    pub seed: Option<u64>,
}

impl Default for SamplerParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: None,
        }
    }
}

impl SamplerParams {
    /// What a model's authors advise (`generation_config.json`): greedy unless they say `do_sample`.
    pub fn advised(advice: &GenerationDefaults) -> Self {
        let greedy = Self {
            repetition_penalty: advice.repetition_penalty.unwrap_or(1.0),
            ..Self::default()
        };
        if advice.do_sample != Some(true) {
            return greedy;
        }
        Self {
            temperature: advice.temperature.unwrap_or(1.0),
            top_k: advice.top_k.unwrap_or(50), // what transformers takes where the file is silent
            top_p: advice.top_p.unwrap_or(1.0),
            min_p: advice.min_p.unwrap_or(0.0),
            ..greedy
        }
    }

    /// Refuses values that have no meaning.
    pub fn check(&self) -> Result<(), Error> {
        let bad = |name, value: f32, expected: &str| Err(Error::option(name, value, expected));
        if !(0.0..=100.0).contains(&self.temperature) {
            return bad("temp", self.temperature, "0 to 100");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top-p", self.top_p, "above 0, at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return bad("min-p", self.min_p, "0 to 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty <= 100.0) {
            return bad("repeat-penalty", self.repetition_penalty, "above 0, at most 100");
        }
        Ok(())
    }
}

/// Chooses tokens for one session. A clone makes the same choices; a [fork](Sampler::fork) draws its own.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplerParams,
    seed: u64,
    state: u64,
    n_forks: u64,
    /// Ids that are never chosen: the padding of a vocabulary.
    mask: Mask,
    /// These and those that are not chosen for now; `None`: there are none of these.
    mask_for_now: Option<Mask>,
    candidates: Vec<Candidate>,
    /// Of the candidates, likeliest first.
    weights: Vec<f64>,
    /// Which tokens occurred; filled where there is a repetition penalty.
    seen: Vec<bool>,
}

/// Ids that are not chosen.
#[derive(Clone, Debug, Default)]
struct Mask {
    /// By id; empty: none.
    masked: Vec<bool>,
    /// The same as a bit set, for devices; `None`: none.
    bits: Option<Arc<[u32]>>,
}

impl Mask {
    fn new(masked: Vec<bool>) -> Self {
        let word = |ids: &[bool]| ids.iter().rev().fold(0, |word, &bit| word << 1 | u32::from(bit));
        let bits = (!masked.is_empty()).then(|| masked.chunks(32).map(word).collect());
        Self { masked, bits }
    }

    fn holds(&self, id: u32) -> bool {
        self.masked.get(id as usize).copied().unwrap_or(false)
    }
}

/// What a sampler's memory is for.
const LISTS: &str = "a sampler's lists";

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    logit: f32,
}

impl Sampler {
    /// A sampler for a model: ids that its tokenizer does not have are never chosen.
    pub fn new(params: SamplerParams, model: &Model) -> Result<Self, Error> {
        let vocab_size = model.config().vocab_size;
        let mut masked: Vec<bool> = Vec::new();
        for id in model.tokenizer().iter().flat_map(|t| t.padded_ids(vocab_size)) {
            if masked.is_empty() {
                masked = memory::zeros(vocab_size, LISTS)?;
            }
            masked[id as usize] = true;
        }
        let sampler = Self::with_mask(params, masked)?;
        sampler.with_room(vocab_size)
    }

    /// Asks for what a choice among `vocab_size` tokens takes.
    fn with_room(self, vocab_size: usize) -> Result<Self, Error> {
        Ok(Self {
            candidates: memory::empty(vocab_size, LISTS)?,
            weights: memory::empty(vocab_size, LISTS)?,
            seen: memory::empty(vocab_size, LISTS)?,
            ..self
        })
    }

    /// A sampler that never chooses the ids that are true in `masked`; empty: all may be chosen.
    pub fn with_mask(params: SamplerParams, masked: Vec<bool>) -> Result<Self, Error> {
        params.check()?;
        let seed = params.seed.unwrap_or_else(random_seed);
        let (candidates, weights, seen) = Default::default();
        let (state, mask) = (seed, Mask::new(masked));
        Ok(Self {
            params,
            seed,
            state,
            n_forks: 0,
            mask,
            mask_for_now: None,
            candidates,
            weights,
            seen,
        })
    }

    /// Chooses none of these ids, of `vocab_size`, until [`allow`](Self::allow). Fails where no other is left.
    pub(crate) fn forbid(&mut self, ids: &[u32], vocab_size: usize) -> Result<(), Error> {
        let mut masked = match self.mask.masked.is_empty() {
            true => memory::zeros(vocab_size, LISTS)?,
            false => memory::copy(&self.mask.masked, LISTS)?,
        };
        ids.iter().for_each(|&id| {
            masked.get_mut(id as usize).into_iter().for_each(|is_masked| *is_masked = true);
        });
        if masked.iter().all(|&is_masked| is_masked) {
            let expected = "0, as every token of the model ends an answer";
            return Err(Error::option("min-tokens", "given", expected));
        }
        self.mask_for_now = Some(Mask::new(masked));
        Ok(())
    }

    /// Takes back [`forbid`](Self::forbid).
    pub(crate) fn allow(&mut self) {
        self.mask_for_now = None;
    }

    fn mask(&self) -> &Mask {
        self.mask_for_now.as_ref().unwrap_or(&self.mask)
    }

    /// The seed in use, which was given or drawn: a sampler that is given it makes the same choices.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// A sampler for a fork of the session, with a random sequence of its own. Its seed follows from this one's and from how
    /// many forks came before: the upper 53 bits of XXH3 (64 bits) over both numbers, 8 bytes each, little-endian.
    pub fn fork(&mut self) -> Result<Self, Error> {
        let seed = seed_of_fork(self.seed, self.n_forks);
        let fork = Self {
            params: self.params.clone(),
            seed,
            state: seed,
            n_forks: 0,
            mask: Mask {
                masked: memory::copy(&self.mask.masked, LISTS)?,
                bits: self.mask.bits.clone(),
            },
            mask_for_now: None,
            candidates: Vec::new(),
            weights: Vec::new(),
            seen: Vec::new(),
        };
        let fork = fork.with_room(self.candidates.capacity())?;
        self.n_forks += 1;
        Ok(fork)
    }

    /// The next token's choice for a device to make; `None`: it needs the tokens so far, so it is
    /// [`sample`](Self::sample)'s. Where the device makes it, [`advance`](Self::advance) comes next.
    pub(crate) fn draw_on_device(&self) -> Option<Draw> {
        let SamplerParams { temperature, top_k, top_p, min_p, repetition_penalty, .. } =
            self.params;
        let mut state = self.state;
        (repetition_penalty == 1.0).then(|| Draw {
            temperature,
            top_k: u32::try_from(top_k).unwrap_or(0), // more than any vocabulary: all
            top_p,
            min_p,
            uniform: if temperature == 0.0 { 0.0 } else { uniform(&mut state) },
            masked: self.mask().bits.clone(),
        })
    }

    /// The choice of [`draw_on_device`](Self::draw_on_device) was made.
    pub(crate) fn advance(&mut self) {
        if self.params.temperature > 0.0 {
            uniform(&mut self.state);
        }
    }

    /// How far its random sequence is.
    pub(crate) fn state(&self) -> u64 {
        self.state
    }

    /// Back to what [`state`](Self::state) said.
    pub(crate) fn go_back(&mut self, state: u64) {
        self.state = state;
    }

    /// The next token. `history` is what the repetition penalty looks at, as [`Session::history`](crate::Session::history)
    /// gives it.
    pub fn sample<'h>(
        &mut self,
        logits: &[f32],
        history: impl IntoIterator<Item = &'h u32>,
    ) -> u32 {
        let p = &self.params;
        let mask = self.mask_for_now.as_ref().unwrap_or(&self.mask);
        let all = (0..).zip(logits).map(|(id, &logit)| Candidate { id, logit });
        let choices = all.filter(|c| !mask.holds(c.id));
        if p.temperature == 0.0 && p.repetition_penalty == 1.0 {
            return likeliest(choices);
        }
        self.candidates.clear();
        self.candidates.extend(choices);
        if p.repetition_penalty != 1.0 {
            self.seen.clear();
            self.seen.resize(logits.len(), false);
            history.into_iter().for_each(|&id| {
                self.seen.get_mut(id as usize).into_iter().for_each(|seen| *seen = true);
            });
            penalise(&mut self.candidates, &self.seen, p.repetition_penalty);
        }
        if p.temperature == 0.0 {
            return likeliest(self.candidates.iter().copied());
        }
        self.draw()
    }

    fn draw(&mut self) -> u32 {
        let p = self.params.clone();
        for c in &mut self.candidates {
            c.logit /= p.temperature;
        }
        let by_logit = |a: &Candidate, b: &Candidate| {
            b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id)) // ties by id: the order is total
        };
        if p.top_k > 0 && p.top_k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(p.top_k - 1, by_logit);
            self.candidates.truncate(p.top_k);
        }
        self.candidates.sort_unstable_by(by_logit);
        let top = self.candidates.first().map_or(0.0, |c| c.logit);
        let weights = &mut self.weights;
        weights.clear();
        weights.extend(self.candidates.iter().map(|c| f64::from(c.logit - top).exp()));
        if p.top_p < 1.0 {
            let total: f64 = weights.iter().sum();
            let mut reached = 0.0;
            let enough = f64::from(p.top_p) * total;
            let n = weights.iter().take_while(|&&w| {
                let below = reached < enough;
                reached += w;
                below
            });
            let n = n.count().max(1);
            weights.truncate(n);
        }
        // The likeliest has weight 1, so min-p is a threshold on the weight itself.
        let n = weights.partition_point(|&w| w >= f64::from(p.min_p)).max(1);
        weights.truncate(n);
        let mut left = uniform(&mut self.state) * weights.iter().sum::<f64>();
        for (c, w) in self.candidates.iter().zip(&*weights) {
            left -= w;
            if left < 0.0 {
                return c.id;
            }
        }
        self.candidates[weights.len() - 1].id
    }
}

/// A seed that nobody has had: the keys that the standard library gives its hash maps come from the system. Its 53 bits are
/// exact in any reader of JSON, and it is never `u64::MAX`.
fn random_seed() -> u64 {
    RandomState::new().hash_one(()) >> 11
}

fn seed_of_fork(seed: u64, n_before: u64) -> u64 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..].copy_from_slice(&n_before.to_le_bytes());
    xxh3_64(&bytes) >> 11
}

/// SplitMix64 (Steele, Lea, Flood 2014), its top 53 bits as a number in [0, 1).
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    #[allow(clippy::cast_precision_loss)] // 53 bits fit
    let mantissa = (z >> 11) as f64;
    mantissa / (1_u64 << 53) as f64
}

/// The first of the largest.
fn likeliest(choices: impl Iterator<Item = Candidate>) -> u32 {
    let mut best = Candidate { id: 0, logit: f32::NEG_INFINITY };
    for c in choices {
        if c.logit > best.logit {
            best = c;
        }
    }
    best.id
}

fn penalise(candidates: &mut [Candidate], seen: &[bool], penalty: f32) {
    for c in candidates.iter_mut().filter(|c| seen[c.id as usize]) {
        c.logit = if c.logit > 0.0 { c.logit / penalty } else { c.logit * penalty };
    }
}

//! A rendering: what a template's program, its loops and the calls in it have in common.

use std::rc::Rc;

use super::fault::{Fault, fault};
use super::parser::{For, Name, Program};
use super::text::{Meter, Str};
use super::value::{Dict, Items, Value, View};

pub(crate) type R<T> = Result<T, Fault>;

/// Variables of a block.
pub(super) struct Scope {
    pub(super) vars: Vec<(Name, Value)>,
    pub(super) parent: Option<usize>,
    /// Whether a macro was defined here or further in, so that it must outlive its block.
    pub(super) kept: bool,
}

pub(crate) struct Loop<'t> {
    pub(super) definition: &'t For,
    pub(super) scope: usize,
    pub(super) walk: Walk,
    pub(super) len: usize,
    pub(crate) index: usize,
    pub(crate) depth: usize,
    pub(crate) last_changed: Option<Vec<Value>>,
}

/// What a loop walks over.
#[derive(Clone)]
pub(super) enum Walk {
    List(Rc<Items>),
    /// A text by its characters, with the place of the one that is up. They are made as the loop comes to them,
    /// because a value weighs fifty times what a character does.
    Chars(Str, usize),
}

impl Walk {
    /// The entry that is up, by its number, or with 1 and -1 one of its neighbours.
    pub(super) fn get(&self, index: usize, from: isize) -> Option<Value> {
        match self {
            Walk::List(items) => items.list.get(index.checked_add_signed(from)?).cloned(),
            Walk::Chars(text, at) => {
                let (before, rest) = text.as_str().split_at_checked(*at)?;
                let up = rest.chars().next().map_or(0, char::len_utf8);
                let (start, c) = match from {
                    0 => (*at, rest.chars().next()?),
                    1 => (at + up, rest.get(up..)?.chars().next()?),
                    _ => (at - before.chars().next_back()?.len_utf8(), before.chars().next_back()?),
                };
                Some(Value::Str(text.slice(start..start + c.len_utf8())))
            }
        }
    }
}

/// A rendering.
pub(crate) struct Run<'t> {
    pub(super) program: &'t Program,
    pub(crate) meter: &'t Meter,
    pub(super) texts: Vec<Str>,
    pub(super) scopes: Vec<Scope>,
    pub(super) implicit: [Option<Name>; 3],
    pub(super) loop_name: Option<Name>,
    pub(super) depth: usize,
    pub(crate) loops: Vec<Loop<'t>>,
    pub(crate) namespaces: Vec<Vec<(Value, Value)>>,
    pub(crate) cyclers: Vec<(Rc<Items>, usize)>,
    /// Separators, and whether they were used.
    pub(crate) joiners: Vec<(Str, bool)>,
    /// The clock, in seconds since 1970.
    pub(crate) now: u64,
    /// Whether there is a filter of a name: a test asks for it, and filters stand above tests.
    pub(super) is_filter: fn(&str) -> bool,
}

/// The arguments of a call.
#[derive(Default)]
pub(crate) struct CallArgs {
    pub(crate) pos: Vec<Value>,
    pub(crate) named: Vec<(Str, Value)>,
}

impl CallArgs {
    /// The arguments by the names of parameters.
    pub(crate) fn bind<const N: usize>(
        self,
        what: &str,
        names: [&str; N],
    ) -> R<[Option<Value>; N]> {
        if self.pos.len() > N {
            return Err(fault(format!(
                "{what}: takes {N} arguments, {} were given",
                self.pos.len()
            )));
        }
        let mut bound = std::array::from_fn(|_| None);
        for (slot, value) in bound.iter_mut().zip(self.pos) {
            *slot = Some(value);
        }
        for (key, value) in self.named {
            let slot = names.iter().position(|name| *name == key.as_str());
            match slot.and_then(|at| bound.get_mut(at)) {
                Some(slot @ None) => *slot = Some(value),
                Some(_) => {
                    return Err(fault(format!("{what}: argument {} is given twice", key.as_str())));
                }
                None => return Err(fault(format!("{what}: unknown argument {}", key.as_str()))),
            }
        }
        Ok(bound)
    }

    /// Fails where there are arguments.
    pub(crate) fn none(self, what: &str) -> R<()> {
        self.bind::<0>(what, []).map(|_| ())
    }
}

/// Where the character of this number begins.
pub(crate) fn char_offset(text: &Str, n: usize) -> usize {
    let plain = text.as_str();
    if plain.is_ascii() {
        return n.min(plain.len());
    }
    plain.char_indices().nth(n).map_or(plain.len(), |(at, _)| at)
}

/// A dict's view.
pub(crate) fn view(kind: View, dict: &Dict, meter: &Meter) -> R<Value> {
    let mut list = Vec::with_capacity(dict.entries.len());
    for (key, value) in &dict.entries {
        list.push(match kind {
            View::Keys => key.clone(),
            View::Values => value.clone(),
            View::Items => Value::tuple(vec![key.clone(), value.clone()], meter)?,
        });
    }
    Ok(Value::View(kind, Items::new(list, meter)?))
}

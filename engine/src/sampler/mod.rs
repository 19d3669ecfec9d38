//! From logits to a token: biases and penalties, then greedy or a draw from what filters leave (`choose`).
//!
//! The order is that of Hugging Face's `generate`: bias, repetition penalty (then presence and frequency penalty, which it
//! lacks), ids that are never chosen, temperature, top-k, top-p, min-p, typical; then one draw. It takes its randomness from a counter-based generator, so a seed
//! gives the same tokens on every machine that gives the same logits.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use loris_loader::GenerationDefaults;
use xxhash_rust::xxh3::xxh3_64;

use crate::backend::{Draw, LogitChange};
use crate::error::Error;
use crate::memory;

use choose::{Candidate, Filters};

mod choose;
pub(crate) mod exp;

/// How the next token is chosen. The default is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerParams {
    /// Divides the logits; 0 is greedy, and so is what is too small to divide by.
    pub temperature: f32,
    /// Only the `top_k` likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens whose probabilities reach `top_p` together; 1: all.
    pub top_p: f32,
    /// Only tokens at least `min_p` times as likely as the likeliest; 0: all.
    pub min_p: f32,
    /// Only tokens whose surprise is nearest to the expected one, until they reach `typical_p` together; 1: all.
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occurred in prompt or answer; 1: off.
    pub repetition_penalty: f32,
    /// Taken off the logits of tokens that occurred in the answer; 0: off.
    pub presence_penalty: f32,
    /// The same for each time that they occurred; 0: off.
    pub frequency_penalty: f32,
    /// Added to the logits of these ids.
    pub logit_bias: Vec<(u32, f32)>,
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
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
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
        if !(self.typical_p > 0.0 && self.typical_p <= 1.0) {
            return bad("typical-p", self.typical_p, "above 0, at most 1");
        }
        if !(-100.0..=100.0).contains(&self.presence_penalty) {
            return bad("presence-penalty", self.presence_penalty, "-100 to 100");
        }
        if !(-100.0..=100.0).contains(&self.frequency_penalty) {
            return bad("frequency-penalty", self.frequency_penalty, "-100 to 100");
        }
        match self.logit_bias.iter().find(|(_, bias)| !(-1000.0..=1000.0).contains(bias)) {
            Some(&(_, bias)) => bad("logit-bias", bias, "-1000 to 1000"),
            None => Ok(()),
        }
    }

    fn penalises(&self) -> bool {
        let is_off = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty);
        is_off != (1.0, 0.0, 0.0)
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
    mask_for_now: Mask,
    /// Biases by id, ascending.
    biases: Vec<(u32, f32)>,
    /// What biases and penalties do to logits.
    changes: Vec<LogitChange>,
    /// Logits after these and the mask.
    adjusted: Vec<f32>,
    candidates: Vec<Candidate>,
    /// Of the history that a repetition penalty counts.
    seen: Counts,
    /// Of the answer.
    answered: Counts,
}

/// Ids that are not chosen, as devices take them: bit `id % 32` of word `id / 32`; `None`: none.
type Mask = Option<Arc<[u32]>>;

/// Words of a bit set of so many ids.
pub(crate) fn n_words(vocab_size: usize) -> usize {
    vocab_size.div_ceil(32)
}

/// What a sampler's memory is for.
const LISTS: &str = "a sampler's lists";

impl Sampler {
    /// A sampler for logits of `vocab_size` tokens that never chooses the ids `padding`. A model makes its own:
    /// [`Model::sampler`](crate::Model::sampler).
    pub fn new(
        params: SamplerParams,
        vocab_size: usize,
        padding: impl IntoIterator<Item = u32>,
    ) -> Result<Self, Error> {
        let mut masked = Vec::new();
        for id in padding.into_iter().filter(|&id| (id as usize) < vocab_size) {
            if masked.is_empty() {
                masked = memory::zeros(n_words(vocab_size), LISTS)?;
            }
            set(&mut masked, id);
        }
        let mask = (!masked.is_empty()).then(|| masked.into());
        Self::with(params, mask)?.with_room(vocab_size)
    }

    /// Asks for what a choice among `vocab_size` tokens takes.
    fn with_room(self, vocab_size: usize) -> Result<Self, Error> {
        let n_changes = if self.changes_logits() { vocab_size } else { 0 };
        Ok(Self {
            changes: memory::empty(n_changes, LISTS)?,
            adjusted: memory::empty(vocab_size, LISTS)?,
            candidates: memory::empty(vocab_size, LISTS)?,
            seen: Counts::with_room(vocab_size)?,
            answered: Counts::with_room(vocab_size)?,
            ..self
        })
    }

    /// A sampler that never chooses the ids that are true in `masked`; empty: all may be chosen.
    pub fn with_mask(params: SamplerParams, masked: &[bool]) -> Result<Self, Error> {
        let word = |ids: &[bool]| ids.iter().rev().fold(0, |word, &bit| word << 1 | u32::from(bit));
        let mask = (!masked.is_empty()).then(|| masked.chunks(32).map(word).collect());
        Self::with(params, mask)
    }

    fn with(params: SamplerParams, mask: Mask) -> Result<Self, Error> {
        params.check()?;
        let seed = params.seed.unwrap_or_else(random_seed);
        let (adjusted, candidates, seen, answered) = Default::default();
        Ok(Self {
            biases: merged(&params.logit_bias)?,
            params,
            seed,
            state: seed,
            n_forks: 0,
            mask,
            mask_for_now: None,
            changes: Vec::new(),
            adjusted,
            candidates,
            seen,
            answered,
        })
    }

    /// From now on chooses, of `vocab_size` tokens, only those whose bits are set in `allowed` (`None`: all), and none of
    /// `forbidden`. False: there is no such token.
    pub(crate) fn restrict(
        &mut self,
        allowed: Option<&[u32]>,
        forbidden: &[u32],
        vocab_size: usize,
    ) -> Result<bool, Error> {
        self.mask_for_now = None;
        if allowed.is_none() && forbidden.is_empty() {
            return Ok(true);
        }
        let mut masked: Vec<u32> = memory::zeros(n_words(vocab_size), LISTS)?;
        masked
            .iter_mut()
            .zip(self.mask.iter().flat_map(|mask| &**mask))
            .for_each(|(to, from)| *to = *from);
        if let Some(allowed) = allowed {
            masked.iter_mut().zip(allowed).for_each(|(masked, allowed)| *masked |= !allowed);
        }
        forbidden.iter().for_each(|&id| set(&mut masked, id));
        let is_left = |(idx, &masked): (usize, &u32)| {
            let n_ids = (vocab_size - idx * 32).min(32); // of the last word
            masked.count_ones() < 32 && (!masked).trailing_zeros() < n_ids as u32
        };
        let is_any_left = masked.iter().enumerate().any(is_left);
        self.mask_for_now = Some(masked.into());
        Ok(is_any_left)
    }

    /// Takes back [`restrict`](Self::restrict).
    pub(crate) fn allow(&mut self) {
        self.mask_for_now = None;
    }

    fn mask(&self) -> &Mask {
        if self.mask_for_now.is_some() { &self.mask_for_now } else { &self.mask }
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
            mask: self.mask.clone(),
            mask_for_now: None,
            biases: merged(&self.biases)?,
            changes: Vec::new(),
            adjusted: Vec::new(),
            candidates: Vec::new(),
            seen: Counts::default(),
            answered: Counts::default(),
        };
        let fork = fork.with_room(self.candidates.capacity())?;
        self.n_forks += 1;
        Ok(fork)
    }

    /// The choice of the token behind `next`, for a device to make. `history` is that of the tokens before `next`; `None`: what
    /// it will be is not this and `next`. `None` comes out where the choice is [`sample`](Self::sample)'s: it needs a filter that
    /// devices lack, or a history. Where the device makes it, [`advance`](Self::advance) comes next.
    pub(crate) fn draw_on_device(
        &mut self,
        history: Option<&History<'_>>,
        next: u32,
        vocab_size: usize,
    ) -> Option<Draw> {
        if self.params.typical_p < 1.0 {
            return None;
        }
        let history = match self.params.penalises() {
            true => *history?,
            false => History::default(),
        };
        self.find_changes(&[history.tokens[0], &[next]], &[history.answer, &[next]], vocab_size);
        let mut changes = memory::empty(self.changes.len(), LISTS).ok()?;
        changes.extend_from_slice(&self.changes);
        let p = &self.params;
        let temperature = if self.is_greedy() { 0.0 } else { p.temperature };
        let mut state = self.state;
        Some(Draw {
            temperature,
            top_k: u32::try_from(p.top_k).unwrap_or(0), // more than any vocabulary: all
            top_p: p.top_p,
            min_p: p.min_p,
            uniform: if temperature == 0.0 { 0.0 } else { uniform(&mut state) },
            masked: self.mask().clone(),
            changes,
        })
    }

    /// The choice of [`draw_on_device`](Self::draw_on_device) was made.
    pub(crate) fn advance(&mut self) {
        if !self.is_greedy() {
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

    /// The next token.
    pub fn sample<'h>(&mut self, logits: &[f32], history: impl Into<History<'h>>) -> u32 {
        let logits = match self.changes_logits() || self.mask().is_some() {
            true => {
                self.adjust(logits, &history.into());
                &self.adjusted
            }
            false => logits,
        };
        if self.is_greedy() {
            return choose::likeliest(logits);
        }
        let p = &self.params;
        let filters = Filters {
            temperature: p.temperature,
            top_k: p.top_k,
            top_p: p.top_p,
            min_p: p.min_p,
            typical_p: p.typical_p,
        };
        choose::draw(logits, &filters, uniform(&mut self.state), &mut self.candidates)
    }

    /// The next token, of those whose bits are set in `allowed`: bit `id % 32` of word `id / 32`, a word for every 32 ids. `None`: no
    /// token that may be chosen is among them; then nothing was drawn.
    pub fn sample_masked<'h>(
        &mut self,
        logits: &[f32],
        history: impl Into<History<'h>>,
        allowed: &[u32],
    ) -> Result<Option<u32>, Error> {
        let expected = n_words(logits.len());
        if allowed.len() != expected {
            return Err(Error::option("allowed", allowed.len(), format!("{expected} words")));
        }
        let is_any = self.restrict(Some(allowed), &[], logits.len());
        let id = is_any.map(|is_any| is_any.then(|| self.sample(logits, history)));
        self.allow();
        id
    }

    /// Dividing by less makes every logit infinite.
    fn is_greedy(&self) -> bool {
        self.params.temperature < f32::MIN_POSITIVE
    }

    fn changes_logits(&self) -> bool {
        self.params.penalises() || !self.biases.is_empty()
    }

    /// Finds what biases and penalties do to logits behind these tokens, of which those are the answer.
    fn find_changes(&mut self, tokens: &[&[u32]; 2], answer: &[&[u32]; 2], vocab_size: usize) {
        let Self { params: p, biases, changes, seen, answered, .. } = self;
        if p.repetition_penalty != 1.0 {
            seen.count(tokens, vocab_size);
        }
        if (p.presence_penalty, p.frequency_penalty) != (0.0, 0.0) {
            answered.count(answer, vocab_size);
        }
        let bias =
            |id: u32| biases.binary_search_by_key(&id, |&(id, _)| id).ok().map(|at| biases[at].1);
        let change = |id: u32| LogitChange {
            id,
            bias: bias(id).unwrap_or(0.0),
            factor: if seen.of(id) > 0 { p.repetition_penalty } else { 1.0 },
            minus: match answered.of(id) {
                0 => 0.0,
                #[allow(clippy::cast_precision_loss)] // counts of tokens
                n => p.frequency_penalty * n as f32 + p.presence_penalty,
            },
        };
        changes.clear();
        changes.extend(seen.ids.iter().map(|&id| change(id)));
        let others = answered.ids.iter().filter(|&&id| seen.of(id) == 0);
        changes.extend(others.map(|&id| change(id)));
        let others = biases
            .iter()
            .map(|&(id, _)| id)
            .filter(|&id| (id as usize) < vocab_size && seen.of(id) == 0 && answered.of(id) == 0);
        changes.extend(others.map(change));
    }

    /// Logits with biases, penalties and the mask, in the order of `transformers`.
    fn adjust(&mut self, logits: &[f32], history: &History<'_>) {
        self.find_changes(&history.tokens, &[history.answer, &[]], logits.len());
        let adjusted = &mut self.adjusted;
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        for &LogitChange { id, bias, factor, minus } in &self.changes {
            let logit = &mut adjusted[id as usize];
            *logit += bias;
            *logit = if *logit > 0.0 { *logit / factor } else { *logit * factor };
            *logit -= minus;
        }
        let mask = if self.mask_for_now.is_some() { &self.mask_for_now } else { &self.mask };
        for (logits, &masked) in adjusted.chunks_mut(32).zip(mask.as_deref().unwrap_or_default()) {
            match masked {
                0 => {}
                u32::MAX => logits.fill(f32::NEG_INFINITY),
                _ => (0..).zip(logits).filter(|(bit, _)| masked >> bit & 1 == 1).for_each(
                    |(_, logit)| {
                        *logit = f32::NEG_INFINITY;
                    },
                ),
            }
        }
    }
}

/// Biases by id, ascending; those of one id are added up.
fn merged(biases: &[(u32, f32)]) -> Result<Vec<(u32, f32)>, Error> {
    let mut sorted = memory::empty(biases.len(), LISTS)?;
    sorted.extend_from_slice(biases);
    sorted.sort_by_key(|&(id, _)| id);
    sorted.dedup_by(|next, first| {
        let is_same = next.0 == first.0;
        first.1 += if is_same { next.1 } else { 0.0 };
        is_same
    });
    Ok(sorted)
}

/// Masks an id; one that there is not is passed over.
fn set(masked: &mut [u32], id: u32) {
    if let Some(word) = masked.get_mut(id as usize / 32) {
        *word |= 1 << (id % 32);
    }
}

/// Tokens that came before, for penalties; see [`Session::history`](crate::Session::history).
#[derive(Clone, Copy, Debug, Default)]
pub struct History<'a> {
    /// What a repetition penalty counts, in two parts.
    pub tokens: [&'a [u32]; 2],
    /// What presence and frequency penalties count: the answer so far.
    pub answer: &'a [u32],
}

impl<'a> From<&'a [u32]> for History<'a> {
    fn from(tokens: &'a [u32]) -> Self {
        Self { tokens: [tokens, &[]], answer: &[] }
    }
}

impl<'a, const N: usize> From<&'a [u32; N]> for History<'a> {
    fn from(tokens: &'a [u32; N]) -> Self {
        tokens.as_slice().into()
    }
}

/// How often each token of a vocabulary occurred. It goes on from call to call: only new tokens are counted.
#[derive(Clone, Debug, Default)]
struct Counts {
    /// What was counted.
    tokens: Vec<u32>,
    /// By id.
    counts: Vec<u32>,
    /// Those that occurred, in order.
    ids: Vec<u32>,
}

impl Counts {
    fn with_room(vocab_size: usize) -> Result<Self, Error> {
        let (counts, ids) = (memory::empty(vocab_size, LISTS)?, memory::empty(vocab_size, LISTS)?);
        Ok(Self { tokens: Vec::new(), counts, ids })
    }

    /// How often a token occurred.
    fn of(&self, id: u32) -> u32 {
        self.counts.get(id as usize).copied().unwrap_or(0)
    }

    /// Counts a history of ids below `n_vocab`; others are passed over.
    fn count(&mut self, history: &[&[u32]; 2], n_vocab: usize) {
        let [first, second] = history;
        let n = self.tokens.len();
        let is_more = |parts: &[&[u32]; 2]| {
            let (a, b) = self.tokens.split_at(n.min(parts[0].len()));
            parts[0].starts_with(a) && parts[1].starts_with(b)
        };
        let is_known = n > 0 && n <= first.len() + second.len() && is_more(history);
        if self.counts.len() != n_vocab || !is_known {
            self.counts.clear();
            self.counts.resize(n_vocab, 0);
            self.ids.clear();
            self.tokens.clear();
        }
        let n = self.tokens.len();
        let new = || first.iter().chain(*second).skip(n);
        // Without memory for it, all is counted again the next time.
        match self.tokens.try_reserve(new().count()) {
            Ok(()) => self.tokens.extend(new()),
            Err(_) => self.tokens.clear(),
        }
        for &id in new() {
            let Some(count) = self.counts.get_mut(id as usize) else { continue };
            *count += 1;
            if *count == 1 {
                self.ids.push(id);
            }
        }
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

//! Which full pages hold which prompt prefix, so that a new session can share them.
//!
//! A chain of full pages is found by walking from its first page: each entry is keyed by a hash of the
//! entry before it and of its own tokens, and the tokens are compared, so a hash collision cannot give a
//! session somebody else's cache. An entry lives as long as some session holds its page: the index
//! holds none itself. Only pages that were written by prefill from the very first token are entered,
//! because their bits do not depend on chunking or on the rest of the batch. They are entered as they fill, in the midst of
//! a prompt: what becomes of the prompt changes nothing in a full page, and a page that is to be written again is forgotten first.
//!
//! Sessions that prune share the layers before their first prune point, with others whose first point is the
//! same. For that the hidden states behind these layers are needed too, which a session gives back as its
//! tokens move on. So where the model was opened to keep them, the index is one more holder of their
//! pages, until the KV pages go or somebody else needs the room.

use std::collections::HashMap;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::error::Error;
use crate::memory;
use crate::store::{PageId, PageLayout};

/// Names a chain of full pages.
pub type ChainKey = u64;

/// Full pages by the tokens that lead to them.
#[derive(Debug, Default)]
pub struct PrefixIndex {
    entries: HashMap<ChainKey, Entry>,
    key_of: HashMap<PageId, ChainKey>,
}

#[derive(Debug)]
struct Entry {
    parent: ChainKey,
    tokens: Vec<u32>,
    column: Vec<PageId>,
    /// Hidden states of the same tokens, in transit.
    hidden: Option<PageId>,
}

/// The leading full pages of a prompt.
#[derive(Debug, Default)]
pub struct Found {
    /// KV pages, column by column.
    pub columns: Vec<PageId>,
    /// A page of hidden states for each column, where sessions prune.
    pub hidden: Vec<PageId>,
}

impl Found {
    /// Leaves out the first columns.
    pub fn skip(&mut self, n_columns: usize, n_layers: usize) {
        self.columns.drain(..n_columns * n_layers);
        self.hidden.drain(..n_columns.min(self.hidden.len()));
    }
}

/// Pages that a prompt has filled.
#[derive(Clone, Copy, Debug)]
pub struct Filled<'a> {
    /// KV pages, `n_layers` a column.
    pub page_table: &'a [PageId],
    /// Layers of a column.
    pub n_layers: usize,
    /// A page of hidden states for each column; none: of sessions that do not prune.
    pub hidden: Option<&'a [PageId]>,
}

/// The key of the empty chain of sessions that do not prune.
pub const ROOT: ChainKey = 0;

impl PrefixIndex {
    /// Room for `n` columns more.
    pub fn reserve(&mut self, n: usize) -> Result<(), Error> {
        let what = "the index of prefixes";
        let bytes = n.saturating_mul(size_of::<(ChainKey, Entry)>());
        let refused = |_| Error::OutOfMemory { what, bytes };
        self.entries.try_reserve(n).map_err(refused)?;
        self.key_of.try_reserve(n).map_err(refused)?;
        memory::room_for(0, what)
    }

    /// The leading full pages of `tokens`. `root` keeps apart what must not be shared: [`ROOT`], or the number of
    /// layers before the first prune point.
    pub fn find(&self, root: ChainKey, tokens: &[u32], layout: &PageLayout) -> Found {
        let mut parent = root;
        let mut found = Found::default();
        for page in layout.full_pages(tokens) {
            let key = chain_key(parent, page);
            match self.entries.get(&key) {
                Some(e) if e.parent == parent && e.tokens == page => {
                    found.columns.extend_from_slice(&e.column);
                    found.hidden.extend(e.hidden);
                }
                _ => break,
            }
            parent = key;
        }
        found
    }

    /// Enters the full pages of `tokens`; gives the pages of hidden states that the index holds from here on.
    pub fn enter(
        &mut self,
        root: ChainKey,
        tokens: &[u32],
        layout: &PageLayout,
        filled: Filled<'_>,
    ) -> Vec<PageId> {
        let mut parent = root;
        let mut held = Vec::new();
        let columns = filled.page_table.chunks_exact(filled.n_layers);
        for (idx, (page, column)) in layout.full_pages(tokens).zip(columns).enumerate() {
            let hidden = match filled.hidden.map(|pages| pages.get(idx)) {
                Some(None) => break,
                hidden => hidden.flatten().copied(),
            };
            let key = chain_key(parent, page);
            let entry = self.entries.entry(key).or_insert_with(|| {
                self.key_of.insert(column[0], key);
                held.extend(hidden);
                Entry { parent, tokens: page.to_vec(), column: column.to_vec(), hidden }
            });
            if entry.parent != parent || entry.tokens != page {
                break; // a collision: the chain ends here
            }
            parent = key;
        }
        held
    }

    /// Forgets the column that starts with `page`, whose contents are about to go; gives the page of hidden
    /// states that the index held with it.
    #[must_use]
    pub fn forget(&mut self, page: PageId) -> Option<PageId> {
        let key = self.key_of.remove(&page)?;
        self.entries.remove(&key)?.hidden
    }

    /// Forgets everything that has hidden states, and gives their pages.
    #[must_use]
    pub fn forget_hidden(&mut self) -> Vec<PageId> {
        let (key_of, mut pages) = (&mut self.key_of, Vec::new());
        self.entries.retain(|_, entry| {
            let Some(hidden) = entry.hidden else { return true };
            key_of.remove(&entry.column[0]);
            pages.push(hidden);
            false
        });
        pages
    }
}

fn chain_key(parent: ChainKey, tokens: &[u32]) -> ChainKey {
    // Never the key of the empty chain.
    xxh3_64_with_seed(bytemuck::cast_slice(tokens), parent).max(ROOT + 1)
}

//! Which full pages hold which prompt prefix, so that a new session can share them.
//!
//! A chain of full pages is found by walking from its first page: each entry is keyed by a hash of the
//! entry before it and of its own tokens, and the tokens are compared, so a hash collision cannot give a
//! session somebody else's cache. An entry lives as long as some session holds its page: the index
//! holds none itself. Only pages that were written by prefill from the very first token are entered,
//! because their bits do not depend on chunking or on the rest of the batch.

use std::collections::HashMap;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::pages::PageId;

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
}

/// The key of the empty chain.
const ROOT: ChainKey = 0;

impl PrefixIndex {
    /// Page columns, first to last, that hold the leading full pages of `tokens`.
    pub fn find(&self, tokens: &[u32], page_len: usize) -> Vec<&[PageId]> {
        let mut parent = ROOT;
        let mut columns = Vec::new();
        for page in tokens.chunks_exact(page_len) {
            let key = chain_key(parent, page);
            match self.entries.get(&key) {
                Some(e) if e.parent == parent && e.tokens == page => columns.push(&e.column[..]),
                _ => break,
            }
            parent = key;
        }
        columns
    }

    /// Enters the full pages of `tokens`; `page_table` holds `n_layers` pages a column.
    pub fn enter(
        &mut self,
        tokens: &[u32],
        page_len: usize,
        page_table: &[PageId],
        n_layers: usize,
    ) {
        let mut parent = ROOT;
        for (page, column) in tokens.chunks_exact(page_len).zip(page_table.chunks_exact(n_layers)) {
            let key = chain_key(parent, page);
            let entry = self.entries.entry(key).or_insert_with(|| {
                self.key_of.insert(column[0], key);
                Entry { parent, tokens: page.to_vec(), column: column.to_vec() }
            });
            if entry.parent != parent || entry.tokens != page {
                break; // a collision: the chain ends here
            }
            parent = key;
        }
    }

    /// Forgets the column that starts with `page`, whose contents are about to go.
    pub fn forget(&mut self, page: PageId) {
        if let Some(key) = self.key_of.remove(&page) {
            self.entries.remove(&key);
        }
    }
}

fn chain_key(parent: ChainKey, tokens: &[u32]) -> ChainKey {
    // Never the key of the empty chain.
    xxh3_64_with_seed(bytemuck::cast_slice(tokens), parent).max(ROOT + 1)
}

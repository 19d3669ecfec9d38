//! What a session cost: counts of work done and bytes held.

/// Work and memory of one session so far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Receipt {
    /// Bytes of KV pages that the session holds; pages shared with others are counted in full.
    pub kv_bytes: usize,
    /// Prompt tokens that were computed.
    pub n_prefilled: usize,
    /// Prompt tokens whose pages came from another session's identical prefix.
    pub n_shared: usize,
    /// Generated tokens that were computed.
    pub n_decoded: usize,
    /// Passes that the device replayed from a recording instead of being told op by op.
    pub n_replayed: usize,
    /// Generated tokens that the device drew itself, so that their logits stayed there.
    pub n_drawn: usize,
    /// (token, layer) pairs that were computed.
    pub token_layers: usize,
    /// Tokens that wait at prune points.
    pub n_waiting: usize,
    /// Bytes of the pages of their hidden states.
    pub aux_bytes: usize,
    /// Times that an earlier call's token was revived at a prune point.
    pub n_revived: usize,
    /// The smallest share of the attention of a prompt's last rows that went to the tokens which went on from a prune
    /// point; 1 if nothing was pruned.
    pub mass_kept: f64,
    /// Tokens that were evicted, of each layer.
    pub n_evicted: usize,
}

impl Default for Receipt {
    fn default() -> Self {
        Self {
            kv_bytes: 0,
            n_prefilled: 0,
            n_shared: 0,
            n_decoded: 0,
            n_replayed: 0,
            n_drawn: 0,
            token_layers: 0,
            n_waiting: 0,
            aux_bytes: 0,
            n_revived: 0,
            mass_kept: 1.0,
            n_evicted: 0,
        }
    }
}

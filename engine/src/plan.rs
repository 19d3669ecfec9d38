//! Every size, decided once.
//!
//! A [`Plan`] is made from the facts of a checkpoint and the options of its user before anything is
//! allocated. All arithmetic on sizes happens here, checked; whoever allocates later takes the number
//! from the plan, and `loris inspect` prints it.

use std::ops::RangeInclusive;

use loris_loader::{LoadMode, ModelConfig, RopeScaling};

use crate::error::Error;
use crate::recipe::Facts;
use crate::recipe::rules::Is;
use crate::store::{AttentionShape, KvFormats, PageLayout, Part};

/// How a model is opened.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// How the weights reach memory.
    pub load: LoadMode,
    /// Number formats of the KV cache.
    pub kv: KvFormats,
    /// Tokens a KV page holds: a power of two from 16 to 256.
    pub page_len: usize,
    /// Tokens the page pool holds, all sessions together; `None`: one session of the model's full
    /// context, at most 131,072, or for one stream. Memory is committed as pages are written.
    pub kv_tokens: Option<usize>,
    /// Prompt tokens that go through the layers together.
    pub chunk: usize,
    /// Sessions that decode in one pass, and rows whose logits one pass can give.
    pub batch: usize,
    /// Tokens that can be between segments of the layers, all sessions that prune together: those that wait
    /// at prune points, and as many that a call moves through the layers. One for each token of such
    /// sessions; a call that revives tokens and prunes them at a later point keeps both until it is
    /// done, so that it can be undone. Memory is committed as it is written.
    pub aux_tokens: usize,
    /// Keeps the hidden states that prompts of sessions that prune have behind the first segment, 4 bytes a
    /// number, as long as their KV pages are held and the room of `aux_tokens` is not needed: later prompts
    /// that begin alike skip that segment, if their first prune point is the same. Needs a chunk that is a multiple
    /// of the page length.
    pub keep_prefixes: bool,
}

impl ModelOptions {
    /// Lengths of pages: of these the powers of two.
    pub const PAGE_LENS: RangeInclusive<usize> = 16..=256;
    /// Chunks.
    pub const CHUNKS: RangeInclusive<usize> = 1..=65_536;
    /// Batches.
    pub const BATCHES: RangeInclusive<usize> = 1..=4_096;
    /// Tokens of the page pool; of hidden states too, and none of these.
    pub const KV_TOKENS: RangeInclusive<usize> = 1..=1 << 32;
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            load: LoadMode::Mmap,
            kv: KvFormats::default(),
            page_len: 64,
            kv_tokens: None,
            chunk: 512,
            batch: 16,
            aux_tokens: 0,
            keep_prefixes: false,
        }
    }
}

/// The sizes of an opened model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Head counts and widths.
    pub shape: AttentionShape,
    /// Layers, each with pages of its own.
    pub n_layers: usize,
    /// Number formats of the cache.
    pub kv: KvFormats,
    /// Shape of a page.
    pub layout: PageLayout,
    /// Pages in the pool.
    pub n_pages: usize,
    /// Pages of hidden states that wait at prune points.
    pub n_aux_pages: usize,
    /// Bytes of such a page: the KV cache's format.
    pub aux_page_bytes: usize,
    /// Pages of hidden states on their way through the layers.
    pub n_transit_pages: usize,
    /// Bytes of such a page: f32.
    pub transit_page_bytes: usize,
    /// Hidden states of prompts are kept for prompts that begin alike.
    pub keep_prefixes: bool,
    /// Rows a pass can hold.
    pub max_rows: usize,
    /// Prompt rows a pass takes.
    pub chunk: usize,
    /// Decode rows a pass takes, and rows of logits it can give.
    pub batch: usize,
    /// Longest context a session may ask for.
    pub ctx_len: usize,
    /// Bytes of weights as stored.
    pub weight_bytes: u64,
    /// Bytes of KV a token takes in all layers, the first ones excepted where the others are coded.
    pub kv_bytes_per_token: usize,
    /// Bytes of the whole page pool.
    pub kv_bytes: usize,
    /// Bytes of the activations of one pass.
    pub activation_bytes: usize,
    /// Bytes of the logits of one pass.
    pub logits_bytes: usize,
}

impl Plan {
    /// Checks the options and works out the sizes.
    pub fn new(
        config: &ModelConfig,
        weight_bytes: u64,
        options: &ModelOptions,
    ) -> Result<Self, Error> {
        check_range("page-len", options.page_len, ModelOptions::PAGE_LENS)?;
        if !options.page_len.is_power_of_two() {
            return Err(Error::option("page-len", options.page_len, "a power of two"));
        }
        check_range("chunk", options.chunk, ModelOptions::CHUNKS)?;
        check_range("batch", options.batch, ModelOptions::BATCHES)?;
        let kv_tokens = options.kv_tokens.unwrap_or_else(|| {
            // A session of the model's context, or the longest stream: a chunk enters before what it pushes out leaves.
            config.ctx_len.min(131_072) + options.chunk + 2 * options.page_len
        });
        check_range("kv-tokens", kv_tokens, ModelOptions::KV_TOKENS)?;

        let shape = AttentionShape {
            n_q_heads: config.n_q_heads,
            n_kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
        };
        options.kv.check(config.head_dim)?;
        let (n_kv_heads, head_dim) = (config.n_kv_heads, config.head_dim);
        let too_large = |what| move || Error::OutOfMemory { what, bytes: usize::MAX };
        // In f32, the widest format; what follows on pages cannot overflow then.
        product(&[2, n_kv_heads, options.page_len, head_dim, 4])
            .ok_or_else(too_large("a KV page"))?;
        let layout = PageLayout::new(n_kv_heads, options.page_len, head_dim, options.kv);
        if let Some(expected) = Is::KeepsPrefixes.why_not(Is::Coded)
            && options.keep_prefixes
            && layout.skew() > 0
        {
            return Err(Error::option("keep-prefixes", true, expected));
        }
        let page_bytes = layout.bytes();
        let n_pages = layout
            .n_pages_at_most(kv_tokens)
            .checked_mul(config.n_layers)
            .filter(|&n| u32::try_from(n).is_ok())
            .ok_or_else(too_large("the KV page pool"))?;
        let kv_bytes = n_pages.checked_mul(page_bytes).ok_or_else(too_large("the KV page pool"))?;

        check_range("aux-tokens", options.aux_tokens, 0..=*ModelOptions::KV_TOKENS.end())?;
        let max_rows = options.chunk.max(options.batch);
        let n_aux_pages = options.aux_tokens.div_ceil(options.page_len);
        // What a pass writes, while what it read is kept.
        let n_transit_pages = match n_aux_pages {
            0 => 0,
            n => n + max_rows.div_ceil(options.page_len),
        };
        let aux_width = options.page_len * config.hidden_dim;
        let aux_page_bytes = aux_width * layout.kv.wide().code_bytes(1);
        let transit_page_bytes = aux_width * size_of::<f32>();
        n_transit_pages
            .checked_mul(transit_page_bytes + aux_page_bytes)
            .filter(|_| u32::try_from(n_transit_pages * options.page_len).is_ok()) // rows are counted in u32
            .ok_or_else(too_large("the aux cache"))?;
        let q_dim = config.n_q_heads * config.head_dim;
        // The residual stream, Q, the attention output, the MLP's hidden row, and the operand of a product,
        // which is one of them laid out for the kernel.
        let widest = config.hidden_dim.max(q_dim).max(config.ffn_dim);
        let row_width = config.hidden_dim + 2 * q_dim + config.ffn_dim + widest;
        let activation_bytes =
            product(&[max_rows, row_width, 4]).ok_or_else(too_large("the activations"))?;
        let logits_bytes =
            product(&[options.batch, config.vocab_size, 4]).ok_or_else(too_large("the logits"))?;
        Ok(Self {
            shape,
            n_layers: config.n_layers,
            kv: options.kv,
            layout,
            n_pages,
            n_aux_pages,
            aux_page_bytes,
            n_transit_pages,
            transit_page_bytes,
            keep_prefixes: options.keep_prefixes,
            max_rows,
            chunk: options.chunk,
            batch: options.batch,
            ctx_len: config.ctx_len,
            weight_bytes,
            kv_bytes_per_token: layout.form_of(Part::Body).slot_bytes() * config.n_layers,
            kv_bytes,
            activation_bytes,
            logits_bytes,
        })
    }

    /// What decides what sessions may do.
    pub(crate) fn facts(&self, config: &ModelConfig) -> Facts {
        Facts {
            layout: self.layout,
            n_pages: self.n_pages,
            n_aux_pages: self.n_aux_pages,
            n_layers: self.n_layers,
            chunk: self.chunk,
            ctx_len: self.ctx_len,
            least_window: config.windows.iter().flatten().min().copied(),
            is_dynamic: matches!(config.rope.scaling, RopeScaling::Dynamic { .. }),
            keeps_prefixes: self.keep_prefixes,
        }
    }

    /// Bytes of the store of hidden states that wait at prune points.
    pub fn aux_bytes(&self) -> usize {
        self.n_aux_pages * self.aux_page_bytes
    }

    /// Bytes of the store of those on their way through the layers.
    pub fn transit_bytes(&self) -> usize {
        self.n_transit_pages * self.transit_page_bytes
    }

    /// Bytes of KV that a session of `len` tokens holds, whole pages counted.
    pub fn kv_bytes_of(&self, len: usize) -> usize {
        let n_sealed = len.checked_sub(1).map_or(0, |last| self.layout.n_due(last));
        self.layout.with_sealed(n_sealed).n_pages(len) * self.n_layers * self.layout.bytes()
    }
}

fn product(factors: &[usize]) -> Option<usize> {
    factors.iter().try_fold(1_usize, |product, &f| product.checked_mul(f))
}

fn check_range(
    name: &'static str,
    value: usize,
    range: RangeInclusive<usize>,
) -> Result<(), Error> {
    if range.contains(&value) {
        Ok(())
    } else {
        Err(Error::option(name, value, format!("{} to {}", range.start(), range.end())))
    }
}

//! What the host passes to kernels: `include/abi.h`, written by `driver/tests/bindings.rs`.

pub const LORIS_DECODE_ROWS: u32 = 16;
pub const LORIS_SPLIT_LEN: u32 = 256;
pub const LORIS_SCORE_ROWS: u32 = 64;
pub const LORIS_ROW_PAIRS: u32 = 256;
pub const LORIS_DENSE: u32 = 4294967295;
pub const LORIS_NO_WINDOW: u32 = 4294967295;
/// One sequence of a batch.
#[repr(C)]
#[derive(Debug, Copy, Clone, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct LorisSeq {
    /// first of its rows in the batch
    pub row_start: u32,
    /// rows in the batch
    pub n_rows: u32,
    /// slots in use before the batch: row i is appended to slot kv_start + i
    pub kv_start: u32,
    /// where its table begins in `page_tables`: [page_idx][n_layers]
    pub page_table_start: u32,
    /// where its slot positions begin in `slot_positions`, or LORIS_DENSE
    pub positions_start: u32,
    /// pages of its table between the first and the tail, where it has one
    pub n_sealed: u32,
    /** slots behind the first page that were given back, of whole pages: its table
 lacks them, and attention counts slots as if they were there*/
    pub n_gone: u32,
    /// of a stream: first positions, which a row sees besides its window
    pub sink: u32,
    /// of a stream: what a row sees from position sink + window on; else 0
    pub window: u32,
}
/// A batch as `begin` uploads it; every kernel that looks at sequences holds one.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LorisBatch {
    /// [n_seqs]
    pub seqs: *const LorisSeq,
    /// [n_rows] index into seqs
    pub row_seq: *const u32,
    /// [n_rows] absolute position of a row
    pub positions: *const u32,
    /// positions of the slots of sequences that are not dense
    pub slot_positions: *const u32,
    /// page ids
    pub page_tables: *const u32,
    /** [n_rows][head_dim / 2][2]: what turns a query to where it meets
 the sinks; there if a sequence has some*/
    pub sink_cos_sin: *const f32,
    pub n_rows: u32,
    pub n_seqs: u32,
    /// stride of a page table
    pub n_layers: u32,
}
/** A pool of KV pages: page p begins at base + p * page_bytes and holds [K|V][n_kv_heads], each a
 run of [page_len][head_dim] numbers and behind it what they are multiplied with,
 [page_len][params], as `kernels-cuda/formats/src/layout.rs` says. Where a side is coded the first
 page of a table holds [K|V][n_kv_heads][WIDE_SLOTS][head_dim] in bf16; where the keys are coded
 channel by channel the pages behind `n_sealed` others do too, with as many slots as a tail's page
 has.*/
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LorisPages {
    pub base: *mut ::std::os::raw::c_void,
    /// multiple of 16
    pub page_bytes: u64,
    /// page_len is a power of two, 16 to 256
    pub page_len_log2: u32,
    /// of a page of a tail
    pub tail_len_log2: u32,
    pub n_kv_heads: u32,
    /// as formats.h numbers them
    pub k_coding: u32,
    pub v_coding: u32,
    /// queries and keys are multiplied with a Hadamard matrix
    pub k_rotated: u32,
    /// values are, and what attention gives is rotated back
    pub v_rotated: u32,
}
/// The page table of one sequence.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LorisTable {
    /// [page_idx][n_layers] page ids
    pub pages: *const u32,
    pub n_layers: u32,
}
/// x[r] = table[tokens[r]]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct EmbedArgs {
    /// bf16 [vocab_size][hidden_dim]
    pub table: *const u16,
    /// [n_rows], each below vocab_size
    pub tokens: *const u32,
    /// [n_rows][hidden_dim]
    pub x: *mut f32,
    /// multiple of 8
    pub hidden_dim: u32,
    pub n_rows: u32,
}
/// out[r] = bf16(x[row] / sqrt(mean(x[row]^2) + eps) * weight)
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct RmsnormArgs {
    /// [..][hidden_dim]
    pub x: *const f32,
    /// [hidden_dim]
    pub weight: *const f32,
    /// bf16 [n_rows][hidden_dim]
    pub out: *mut u16,
    /// multiple of 8
    pub hidden_dim: u32,
    pub n_rows: u32,
    pub eps: f32,
}
/// y = a W^T in prefill, with the epilogue that the kernel's name says.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LinearPrefillArgs {
    /// bf16 [n_rows][k]
    pub a: *const u16,
    /// bf16 [n][k]
    pub w: *const u16,
    /// [n_rows][n], added to in place
    pub x: *mut f32,
    pub n_rows: u32,
    /// multiple of 8
    pub n: u32,
    /// multiple of 8
    pub k: u32,
}
/// h = bf16(silu(a Wg^T) * (a Wu^T)) in prefill
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct GateUpPrefillArgs {
    /// bf16 [n_rows][k], normalised
    pub a: *const u16,
    /// bf16 [n][k]
    pub gate: *const u16,
    /// bf16 [n][k]
    pub up: *const u16,
    /// bf16 [n_rows][n]
    pub h: *mut u16,
    pub n_rows: u32,
    /// ffn_dim, multiple of 8
    pub n: u32,
    /// multiple of 8
    pub k: u32,
}
/// Where Q, K and V go once they are projected: bias, q/k norm, rotation, append.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LorisHeads {
    /// [(n_q_heads + 2 n_kv_heads) * head_dim], q then k then v, or NULL
    pub bias: *const f32,
    /// [head_dim] or NULL; NULL together with k_norm
    pub q_norm: *const f32,
    /// [head_dim] or NULL
    pub k_norm: *const f32,
    /// [n_rows][head_dim / 2][2]: cosine and sine, times the attention factor
    pub cos_sin: *const f32,
    /// bf16 [n_rows][n_q_heads][head_dim]
    pub q: *mut u16,
    pub pages: LorisPages,
    pub batch: LorisBatch,
    /// inside the segment
    pub layer: u32,
    pub n_q_heads: u32,
    pub head_dim: u32,
    /// of the q/k norm
    pub eps: f32,
}
/// Q, K, V of many rows, to where they belong.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct QkvPrefillArgs {
    /// bf16 [n_rows][k], normalised
    pub a: *const u16,
    /// bf16 [n_q_heads * head_dim][k]
    pub wq: *const u16,
    /// bf16 [n_kv_heads * head_dim][k]
    pub wk: *const u16,
    /// bf16 [n_kv_heads * head_dim][k]
    pub wv: *const u16,
    pub heads: LorisHeads,
    /// multiple of 8
    pub k: u32,
}
/** The rows that a decode kernel multiplies by: either f32 rows that are normalised on the way
 (`norm` is not NULL), or bf16 rows as they are.*/
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LorisDecodeInput {
    /// [..][k], if norm
    pub x: *const f32,
    /// [k] or NULL
    pub norm: *const f32,
    /// bf16 [n_rows][k], if not norm
    pub a: *const u16,
    /// [n_rows]: row i reads x[row_idx[i]]; NULL: x[i]
    pub row_idx: *const u32,
    pub n_rows: u32,
    /// multiple of 8
    pub k: u32,
    pub eps: f32,
}
/// x[r] += a[r] W^T for few rows
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LinearDecodeArgs {
    pub in_: LorisDecodeInput,
    /// bf16 [n][k]
    pub w: *const u16,
    /// [n_rows][n]; added to by linear_decode_add, written by linear_decode_store
    pub y: *mut f32,
    pub n: u32,
}
/// h = bf16(silu(norm(x) Wg^T) * (norm(x) Wu^T)) for few rows
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct GateUpDecodeArgs {
    pub in_: LorisDecodeInput,
    /// bf16 [n][k]
    pub gate: *const u16,
    /// bf16 [n][k]
    pub up: *const u16,
    /// bf16 [n_rows][n]
    pub h: *mut u16,
    pub n: u32,
}
/** Q, K, V of few rows. They go where they belong at once; with a q/k norm and to coded pages the
 projections go to `raw` and qkv_finish takes them from there.*/
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct QkvDecodeArgs {
    pub in_: LorisDecodeInput,
    /// bf16 [n_q_heads * head_dim][k]
    pub wq: *const u16,
    /// bf16 [n_kv_heads * head_dim][k]
    pub wk: *const u16,
    /// bf16 [n_kv_heads * head_dim][k]
    pub wv: *const u16,
    /// [n_rows][(n_q_heads + 2 n_kv_heads) * head_dim], or NULL
    pub raw: *mut f32,
    pub heads: LorisHeads,
}
/// Bias, q/k norm, rotation and append of projections that are in memory.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct QkvFinishArgs {
    /// [n_rows][(n_q_heads + 2 n_kv_heads) * head_dim]
    pub raw: *const f32,
    pub heads: LorisHeads,
}
/** A run of packed query rows of one sequence and one kv head: packed row m is row m / group_size,
 query head m % group_size of the group.*/
#[repr(C)]
#[derive(Debug, Copy, Clone, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct LorisQTile {
    pub seq_idx: u32,
    /// multiple of BLOCK_Q
    pub packed_start: u32,
}
/// Flash attention of many rows over pages.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AttentionPrefillArgs {
    /// bf16 [n_rows][n_q_heads][head_dim]
    pub q: *const u16,
    /// bf16 [n_rows][n_q_heads][head_dim]
    pub out: *mut u16,
    /// [n_rows][n_q_heads] natural log of the sum of exp(score), or NULL
    pub lse: *mut f32,
    /// [gridDim.x], longest first
    pub tiles: *const LorisQTile,
    pub pages: LorisPages,
    pub batch: LorisBatch,
    pub layer: u32,
    pub n_q_heads: u32,
    /// LORIS_NO_WINDOW: all
    pub window: u32,
    /// 1 / sqrt(head_dim)
    pub scale: f32,
}
/// One split of decode attention: blockIdx = (split, kv head, row).
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AttentionDecodeArgs {
    /// bf16 [n_rows][n_q_heads][head_dim]
    pub q: *const u16,
    /// [n_rows][n_q_heads][max_splits][head_dim], not normalised
    pub partial_out: *mut f32,
    /// [n_rows][n_q_heads][max_splits][2]: row_max (base 2) and row_sum
    pub partial_ml: *mut f32,
    pub pages: LorisPages,
    pub batch: LorisBatch,
    pub layer: u32,
    pub n_q_heads: u32,
    pub window: u32,
    /** gridDim.x: splits beyond a row's length return at once. Splits of which
 all slots were given back are left out (kv/page.cuh)*/
    pub max_splits: u32,
    pub scale: f32,
}
/// out = the splits of a row put together: blockIdx = (query head, row).
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AttentionMergeArgs {
    /// as above
    pub partial_out: *const f32,
    pub partial_ml: *const f32,
    /// bf16 [n_rows][n_q_heads][head_dim]
    pub out: *mut u16,
    /// [n_rows][n_q_heads] or NULL
    pub lse: *mut f32,
    pub batch: LorisBatch,
    pub n_q_heads: u32,
    pub max_splits: u32,
    /// CODED_SKEW where pages hold codes, else 0
    pub skew: u32,
    /// the values were: rotate back
    pub rotated: u32,
}
/** score[slot] += the sum over score rows, one after another, of the mean over query heads of
 exp(q . k * scale - lse)*/
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AttentionMassArgs {
    /// bf16 [n_rows][n_q_heads][head_dim]
    pub q: *const u16,
    /// [n_rows][n_q_heads]
    pub lse: *const f32,
    /// [slots of the sequence]; from n_so_far on they begin at 0
    pub scores: *mut f32,
    pub pages: LorisPages,
    pub batch: LorisBatch,
    pub seq_idx: u32,
    /// score rows: row_start .. row_start + n_mass_rows of the batch
    pub row_start: u32,
    /// up to LORIS_SCORE_ROWS
    pub n_mass_rows: u32,
    pub n_so_far: u32,
    pub layer: u32,
    pub n_q_heads: u32,
    pub window: u32,
    pub scale: f32,
}
/** The `n_keep` best of `n` scores, with the first n_head and the last n_tail always among them;
 indices ascending. Of equal scores the lower index is kept.*/
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TokenSelectArgs {
    /// [n], none NaN
    pub scores: *const f32,
    /// [n_keep]
    pub keep: *mut u32,
    /// [n - n_keep], or NULL
    pub drop: *mut u32,
    pub n: u32,
    /// n_head + n_tail <= n_keep <= n
    pub n_keep: u32,
    pub n_head: u32,
    pub n_tail: u32,
}
/// A row that is copied.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LorisRowPair {
    pub from: u32,
    pub to: u32,
}
/** to[pairs[i].to] = from[pairs[i].from]; each of the two is f32 or bf16, as the kernel's name says.
 No row of `to` is in two pairs, and none is read. The pairs travel with the launch, so that there
 is nothing to upload or to keep for it.*/
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct RowCopyArgs {
    /// [..][width]
    pub from: *const ::std::os::raw::c_void,
    /// [..][width]
    pub to: *mut ::std::os::raw::c_void,
    /// multiple of 8
    pub width: u32,
    /// the first gridDim.x count
    pub pairs: [LorisRowPair; 256usize],
}
/// Copies pages: pairs[i] = {from, to}.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct PageCopyArgs {
    pub pages: LorisPages,
    /// [n_pairs][2]
    pub pairs: *const u32,
    pub n_pairs: u32,
}
/** Slot i of each layer becomes what slot keep[layer][i] held: blockIdx = (side and kv head, layer).
 Each list rises. Where pages hold codes the slots of the first page stay.*/
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SlotMoveArgs {
    pub pages: LorisPages,
    pub table: LorisTable,
    /// [gridDim.y][n_keep]
    pub keep: *const u32,
    pub n_keep: u32,
}
/// norms[slot] = mean over kv heads of the length of the key
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct KeyNormArgs {
    pub pages: LorisPages,
    pub table: LorisTable,
    /// [n_slots]
    pub norms: *mut f32,
    pub n_slots: u32,
    pub layer: u32,
}
/** Codes pages of keys by channel: what the bf16 pages of a tail hold, in the order of their slots,
 goes to one page. Block (seal, kv head, side).*/
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct PageSealArgs {
    pub pages: LorisPages,
    /// [n_seals][n_from + 1]: page_len / tail_len pages, and what they become
    pub seals: *const u32,
}
/// How a row's token is drawn: as `SamplerParams` of the engine.
#[repr(C)]
#[derive(Debug, Copy, Clone, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct LorisSampling {
    /// 0: the first of the largest
    pub temperature: f32,
    /// 0: all
    pub top_k: u32,
    /// 1: all
    pub top_p: f32,
    /// 0: all
    pub min_p: f32,
    /// the draw, in [0, 1)
    pub uniform: f64,
}
/// tokens[r] = a token drawn from logits[r]: blockIdx.x = row.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SampleArgs {
    /// [n_rows][vocab_size]
    pub logits: *const f32,
    /// [n_rows]
    pub sampling: *const LorisSampling,
    /// bit set of ids that are never drawn, [ceil(vocab_size / 32)], or NULL
    pub masked: *const u32,
    /// [n_rows]; UINT32_MAX where a logit is not finite
    pub tokens: *mut u32,
    pub vocab_size: u32,
}
/// How a logit changes before a token is drawn: as biases and penalties of `SamplerParams`.
#[repr(C)]
#[derive(Debug, Copy, Clone, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct LorisLogitChange {
    pub id: u32,
    /// added first
    pub bias: f32,
    /// then divides what is positive and multiplies what is not; 1: neither
    pub factor: f32,
    /// then taken off
    pub minus: f32,
}
/// out = logits, with the changes.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LogitAdjustArgs {
    /// [vocab_size]
    pub logits: *const f32,
    /// [n_changes], no id twice
    pub changes: *const LorisLogitChange,
    /// [vocab_size]
    pub out: *mut f32,
    pub vocab_size: u32,
    pub n_changes: u32,
}
/// Random bf16 weights, uniform in -scale .. scale, from a counter: the same on every device.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct FillRandomArgs {
    /// bf16 [n]
    pub out: *mut u16,
    pub n: u64,
    pub seed: u64,
    pub scale: f32,
}
/** One product by each matrix instruction, operands and result placed by frag.h, and what ldmatrix
 gives: a test compares them with plain sums, on the twin and on a GPU.*/
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct FragmentsArgs {
    /// 16 bits [16][16]: bf16 and f16 by turns
    pub a: *const u16,
    /// 16 bits [16][8]
    pub b: *const u16,
    /// [16][32]
    pub a8: *const i8,
    /// [32][8]
    pub b8: *const i8,
    /// a b of bf16, [16][8]
    pub bf16: *mut f32,
    /// a b of f16, [16][8]
    pub f16: *mut f32,
    /// a8 b8, [16][8]
    pub s8: *mut i32,
    /// elements that ldmatrix puts where frag.h does not say; added to
    pub n_wrong: *mut u32,
}

/* What the host passes to kernels: one POD struct per kernel, with a shape on every pointer.
 *
 * Plain C99, read by nvcc, by the host compiler of the twin, and by bindgen for `src/abi.rs`. A
 * kernel takes exactly one of these structs by value. Pointers are device addresses; `[rows][k]` is
 * row-major. `bf16` stands for uint16_t bit patterns. Reserved fields do not exist: both sides are
 * built together.
 */
#ifndef LORIS_ABI_H
#define LORIS_ABI_H

#include <stdint.h>

/* Rows that one pass over the weights serves in decode; more rows are further passes. */
#define LORIS_DECODE_ROWS 16
/* Slots that one split of decode attention covers: fixed, so that bits do not depend on the batch.
 */
#define LORIS_SPLIT_LEN 256
/* Rows that a launch of attention_mass takes: it has room for the score of each with each slot. */
#define LORIS_SCORE_ROWS 64
/* Pairs that a launch of row_copy takes along. */
#define LORIS_ROW_PAIRS 256
/* `Seq.positions_start` of a sequence whose slot i, as attention counts, holds position i: nothing
 * is stored for it. */
#define LORIS_DENSE UINT32_MAX
/* `window` of a layer that sees everything. */
#define LORIS_NO_WINDOW UINT32_MAX
/* One sequence of a batch. */
typedef struct LorisSeq {
    uint32_t row_start; /* first of its rows in the batch */
    uint32_t n_rows;    /* rows in the batch */
    uint32_t kv_start;  /* slots in use before the batch: row i is appended to slot kv_start + i */
    uint32_t page_table_start; /* where its table begins in `page_tables`: [page_idx][n_layers] */
    uint32_t
        positions_start; /* where its slot positions begin in `slot_positions`, or LORIS_DENSE */
    uint32_t n_sealed;   /* pages of its table between the first and the tail, where it has one */
    uint32_t n_gone; /* slots behind the first page that were given back, of whole pages: its table
                      * lacks them, and attention counts slots as if they were there */
    uint32_t sink;   /* of a stream: first positions, which a row sees besides its window */
    uint32_t window; /* of a stream: what a row sees from position sink + window on; else 0 */
} LorisSeq;

/* A batch as `begin` uploads it; every kernel that looks at sequences holds one. */
typedef struct LorisBatch {
    const LorisSeq *seqs;           /* [n_seqs] */
    const uint32_t *row_seq;        /* [n_rows] index into seqs */
    const uint32_t *positions;      /* [n_rows] absolute position of a row */
    const uint32_t *slot_positions; /* positions of the slots of sequences that are not dense */
    const uint32_t *page_tables;    /* page ids */
    const float *sink_cos_sin; /* [n_rows][head_dim / 2][2]: what turns a query to where it meets
                                * the sinks; there if a sequence has some */
    uint32_t n_rows;
    uint32_t n_seqs;
    uint32_t n_layers; /* stride of a page table */
} LorisBatch;

/* A pool of KV pages: page p begins at base + p * page_bytes and holds [K|V][n_kv_heads], each a
 * run of [page_len][head_dim] numbers and behind it what they are multiplied with,
 * [page_len][params], as `kernels-cuda/formats/src/layout.rs` says. Where a side is coded the first
 * page of a table holds [K|V][n_kv_heads][WIDE_SLOTS][head_dim] in bf16; where the keys are coded
 * channel by channel the pages behind `n_sealed` others do too, with as many slots as a tail's page
 * has. */
typedef struct LorisPages {
    void *base;
    uint64_t page_bytes;    /* multiple of 16 */
    uint32_t page_len_log2; /* page_len is a power of two, 16 to 256 */
    uint32_t tail_len_log2; /* of a page of a tail */
    uint32_t n_kv_heads;
    uint32_t k_coding; /* as formats.h numbers them */
    uint32_t v_coding;
    uint32_t k_rotated; /* queries and keys are multiplied with a Hadamard matrix */
    uint32_t v_rotated; /* values are, and what attention gives is rotated back */
} LorisPages;

/* The page table of one sequence. */
typedef struct LorisTable {
    const uint32_t *pages; /* [page_idx][n_layers] page ids */
    uint32_t n_layers;
} LorisTable;

/* x[r] = table[tokens[r]] */
typedef struct EmbedArgs {
    const uint16_t *table;  /* bf16 [vocab_size][hidden_dim] */
    const uint32_t *tokens; /* [n_rows], each below vocab_size */
    float *x;               /* [n_rows][hidden_dim] */
    uint32_t hidden_dim;    /* multiple of 8 */
    uint32_t n_rows;
} EmbedArgs;

/* out[r] = bf16(x[row] / sqrt(mean(x[row]^2) + eps) * weight) */
typedef struct RmsnormArgs {
    const float *x;      /* [..][hidden_dim] */
    const float *weight; /* [hidden_dim] */
    uint16_t *out;       /* bf16 [n_rows][hidden_dim] */
    uint32_t hidden_dim; /* multiple of 8 */
    uint32_t n_rows;
    float eps;
} RmsnormArgs;

/* y = a W^T in prefill, with the epilogue that the kernel's name says. */
typedef struct LinearPrefillArgs {
    const uint16_t *a; /* bf16 [n_rows][k] */
    const uint16_t *w; /* bf16 [n][k] */
    float *x;          /* [n_rows][n], added to in place */
    uint32_t n_rows;
    uint32_t n; /* multiple of 8 */
    uint32_t k; /* multiple of 8 */
} LinearPrefillArgs;

/* h = bf16(silu(a Wg^T) * (a Wu^T)) in prefill */
typedef struct GateUpPrefillArgs {
    const uint16_t *a;    /* bf16 [n_rows][k], normalised */
    const uint16_t *gate; /* bf16 [n][k] */
    const uint16_t *up;   /* bf16 [n][k] */
    uint16_t *h;          /* bf16 [n_rows][n] */
    uint32_t n_rows;
    uint32_t n; /* ffn_dim, multiple of 8 */
    uint32_t k; /* multiple of 8 */
} GateUpPrefillArgs;

/* Where Q, K and V go once they are projected: bias, q/k norm, rotation, append. */
typedef struct LorisHeads {
    const float *bias;   /* [(n_q_heads + 2 n_kv_heads) * head_dim], q then k then v, or NULL */
    const float *q_norm; /* [head_dim] or NULL; NULL together with k_norm */
    const float *k_norm; /* [head_dim] or NULL */
    const float
        *cos_sin; /* [n_rows][head_dim / 2][2]: cosine and sine, times the attention factor */
    uint16_t *q;  /* bf16 [n_rows][n_q_heads][head_dim] */
    LorisPages pages;
    LorisBatch batch;
    uint32_t layer; /* inside the segment */
    uint32_t n_q_heads;
    uint32_t head_dim;
    float eps; /* of the q/k norm */
} LorisHeads;

/* Q, K, V of many rows, to where they belong. */
typedef struct QkvPrefillArgs {
    const uint16_t *a;  /* bf16 [n_rows][k], normalised */
    const uint16_t *wq; /* bf16 [n_q_heads * head_dim][k] */
    const uint16_t *wk; /* bf16 [n_kv_heads * head_dim][k] */
    const uint16_t *wv; /* bf16 [n_kv_heads * head_dim][k] */
    LorisHeads heads;
    uint32_t k; /* multiple of 8 */
} QkvPrefillArgs;

/* The rows that a decode kernel multiplies by: either f32 rows that are normalised on the way
 * (`norm` is not NULL), or bf16 rows as they are. */
typedef struct LorisDecodeInput {
    const float *x;          /* [..][k], if norm */
    const float *norm;       /* [k] or NULL */
    const uint16_t *a;       /* bf16 [n_rows][k], if not norm */
    const uint32_t *row_idx; /* [n_rows]: row i reads x[row_idx[i]]; NULL: x[i] */
    uint32_t n_rows;
    uint32_t k; /* multiple of 8 */
    float eps;
} LorisDecodeInput;

/* x[r] += a[r] W^T for few rows */
typedef struct LinearDecodeArgs {
    LorisDecodeInput in;
    const uint16_t *w; /* bf16 [n][k] */
    float *y; /* [n_rows][n]; added to by linear_decode_add, written by linear_decode_store */
    uint32_t n;
} LinearDecodeArgs;

/* h = bf16(silu(norm(x) Wg^T) * (norm(x) Wu^T)) for few rows */
typedef struct GateUpDecodeArgs {
    LorisDecodeInput in;
    const uint16_t *gate; /* bf16 [n][k] */
    const uint16_t *up;   /* bf16 [n][k] */
    uint16_t *h;          /* bf16 [n_rows][n] */
    uint32_t n;
} GateUpDecodeArgs;

/* Q, K, V of few rows. They go where they belong at once; with a q/k norm and to coded pages the
 * projections go to `raw` and qkv_finish takes them from there. */
typedef struct QkvDecodeArgs {
    LorisDecodeInput in;
    const uint16_t *wq; /* bf16 [n_q_heads * head_dim][k] */
    const uint16_t *wk; /* bf16 [n_kv_heads * head_dim][k] */
    const uint16_t *wv; /* bf16 [n_kv_heads * head_dim][k] */
    float *raw;         /* [n_rows][(n_q_heads + 2 n_kv_heads) * head_dim], or NULL */
    LorisHeads heads;
} QkvDecodeArgs;

/* Bias, q/k norm, rotation and append of projections that are in memory. */
typedef struct QkvFinishArgs {
    const float *raw; /* [n_rows][(n_q_heads + 2 n_kv_heads) * head_dim] */
    LorisHeads heads;
} QkvFinishArgs;

/* A run of packed query rows of one sequence and one kv head: packed row m is row m / group_size,
 * query head m % group_size of the group. */
typedef struct LorisQTile {
    uint32_t seq_idx;
    uint32_t packed_start; /* multiple of BLOCK_Q */
} LorisQTile;

/* Flash attention of many rows over pages. */
typedef struct AttentionPrefillArgs {
    const uint16_t *q;       /* bf16 [n_rows][n_q_heads][head_dim] */
    uint16_t *out;           /* bf16 [n_rows][n_q_heads][head_dim] */
    float *lse;              /* [n_rows][n_q_heads] natural log of the sum of exp(score), or NULL */
    const LorisQTile *tiles; /* [gridDim.x], longest first */
    LorisPages pages;
    LorisBatch batch;
    uint32_t layer;
    uint32_t n_q_heads;
    uint32_t window; /* LORIS_NO_WINDOW: all */
    float scale;     /* 1 / sqrt(head_dim) */
} AttentionPrefillArgs;

/* One split of decode attention: blockIdx = (split, kv head, row). */
typedef struct AttentionDecodeArgs {
    const uint16_t *q;  /* bf16 [n_rows][n_q_heads][head_dim] */
    float *partial_out; /* [n_rows][n_q_heads][max_splits][head_dim], not normalised */
    float *partial_ml;  /* [n_rows][n_q_heads][max_splits][2]: row_max (base 2) and row_sum */
    LorisPages pages;
    LorisBatch batch;
    uint32_t layer;
    uint32_t n_q_heads;
    uint32_t window;
    uint32_t max_splits; /* gridDim.x: splits beyond a row's length return at once. Splits of which
                          * all slots were given back are left out (kv/page.cuh) */
    float scale;
} AttentionDecodeArgs;

/* out = the splits of a row put together: blockIdx = (query head, row). */
typedef struct AttentionMergeArgs {
    const float *partial_out; /* as above */
    const float *partial_ml;
    uint16_t *out; /* bf16 [n_rows][n_q_heads][head_dim] */
    float *lse;    /* [n_rows][n_q_heads] or NULL */
    LorisBatch batch;
    uint32_t n_q_heads;
    uint32_t max_splits;
    uint32_t skew;    /* CODED_SKEW where pages hold codes, else 0 */
    uint32_t rotated; /* the values were: rotate back */
} AttentionMergeArgs;

/* score[slot] += the sum over score rows, one after another, of the mean over query heads of
 * exp(q . k * scale - lse) */
typedef struct AttentionMassArgs {
    const uint16_t *q; /* bf16 [n_rows][n_q_heads][head_dim] */
    const float *lse;  /* [n_rows][n_q_heads] */
    float *scores;     /* [slots of the sequence]; from n_so_far on they begin at 0 */
    LorisPages pages;
    LorisBatch batch;
    uint32_t seq_idx;
    uint32_t row_start;   /* score rows: row_start .. row_start + n_mass_rows of the batch */
    uint32_t n_mass_rows; /* up to LORIS_SCORE_ROWS */
    uint32_t n_so_far;
    uint32_t layer;
    uint32_t n_q_heads;
    uint32_t window;
    float scale;
} AttentionMassArgs;

/* The `n_keep` best of `n` scores, with the first n_head and the last n_tail always among them;
 * indices ascending. Of equal scores the lower index is kept. */
typedef struct TokenSelectArgs {
    const float *scores; /* [n], none NaN */
    uint32_t *keep;      /* [n_keep] */
    uint32_t *drop;      /* [n - n_keep], or NULL */
    uint32_t n;
    uint32_t n_keep; /* n_head + n_tail <= n_keep <= n */
    uint32_t n_head;
    uint32_t n_tail;
} TokenSelectArgs;

/* A row that is copied. */
typedef struct LorisRowPair {
    uint32_t from;
    uint32_t to;
} LorisRowPair;

/* to[pairs[i].to] = from[pairs[i].from]; each of the two is f32 or bf16, as the kernel's name says.
 * No row of `to` is in two pairs, and none is read. The pairs travel with the launch, so that there
 * is nothing to upload or to keep for it. */
typedef struct RowCopyArgs {
    const void *from;                    /* [..][width] */
    void *to;                            /* [..][width] */
    uint32_t width;                      /* multiple of 8 */
    LorisRowPair pairs[LORIS_ROW_PAIRS]; /* the first gridDim.x count */
} RowCopyArgs;

/* Copies pages: pairs[i] = {from, to}. */
typedef struct PageCopyArgs {
    LorisPages pages;
    const uint32_t *pairs; /* [n_pairs][2] */
    uint32_t n_pairs;
} PageCopyArgs;

/* Slot i of each layer becomes what slot keep[layer][i] held: blockIdx = (side and kv head, layer).
 * Each list rises. Where pages hold codes the slots of the first page stay. */
typedef struct SlotMoveArgs {
    LorisPages pages;
    LorisTable table;
    const uint32_t *keep; /* [gridDim.y][n_keep] */
    uint32_t n_keep;
} SlotMoveArgs;

/* norms[slot] = mean over kv heads of the length of the key */
typedef struct KeyNormArgs {
    LorisPages pages;
    LorisTable table;
    float *norms; /* [n_slots] */
    uint32_t n_slots;
    uint32_t layer;
} KeyNormArgs;

/* Codes pages of keys by channel: what the bf16 pages of a tail hold, in the order of their slots,
 * goes to one page. Block (seal, kv head, side). */
typedef struct PageSealArgs {
    LorisPages pages;
    const uint32_t
        *seals; /* [n_seals][n_from + 1]: page_len / tail_len pages, and what they become */
} PageSealArgs;

/* How a row's token is drawn: as `SamplerParams` of the engine. */
typedef struct LorisSampling {
    float temperature; /* 0: the first of the largest */
    uint32_t top_k;    /* 0: all */
    float top_p;       /* 1: all */
    float min_p;       /* 0: all */
    double uniform;    /* the draw, in [0, 1) */
} LorisSampling;

/* tokens[r] = a token drawn from logits[r]: blockIdx.x = row. */
typedef struct SampleArgs {
    const float *logits;           /* [n_rows][vocab_size] */
    const LorisSampling *sampling; /* [n_rows] */
    const uint32_t
        *masked;      /* bit set of ids that are never drawn, [ceil(vocab_size / 32)], or NULL */
    uint32_t *tokens; /* [n_rows]; UINT32_MAX where a logit is not finite */
    uint32_t vocab_size;
} SampleArgs;

/* How a logit changes before a token is drawn: as biases and penalties of `SamplerParams`. */
typedef struct LorisLogitChange {
    uint32_t id;
    float bias;   /* added first */
    float factor; /* then divides what is positive and multiplies what is not; 1: neither */
    float minus;  /* then taken off */
} LorisLogitChange;

/* out = logits, with the changes. */
typedef struct LogitAdjustArgs {
    const float *logits;             /* [vocab_size] */
    const LorisLogitChange *changes; /* [n_changes], no id twice */
    float *out;                      /* [vocab_size] */
    uint32_t vocab_size;
    uint32_t n_changes;
} LogitAdjustArgs;

/* Random bf16 weights, uniform in -scale .. scale, from a counter: the same on every device. */
typedef struct FillRandomArgs {
    uint16_t *out; /* bf16 [n] */
    uint64_t n;
    uint64_t seed;
    float scale;
} FillRandomArgs;

/* One product by each matrix instruction, operands and result placed by frag.h, and what ldmatrix
 * gives: a test compares them with plain sums, on the twin and on a GPU. */
typedef struct FragmentsArgs {
    const uint16_t *a; /* 16 bits [16][16]: bf16 and f16 by turns */
    const uint16_t *b; /* 16 bits [16][8] */
    const int8_t *a8;  /* [16][32] */
    const int8_t *b8;  /* [32][8] */
    float *bf16;       /* a b of bf16, [16][8] */
    float *f16;        /* a b of f16, [16][8] */
    int32_t *s8;       /* a8 b8, [16][8] */
    uint32_t *n_wrong; /* elements that ldmatrix puts where frag.h does not say; added to */
} FragmentsArgs;

#endif

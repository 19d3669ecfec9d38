//! One safe launcher for each kernel: checks sizes, chooses the variant, launches.

pub mod attention;
pub mod aux_gather;
pub mod batch;
pub mod embed;
pub mod fill_random;
pub mod linear;
pub mod linear_decode;
pub mod lm_head;
pub mod mlp_gate;
pub mod mlp_gate_decode;
pub mod page_copy;
pub mod qkv;
pub mod qkv_decode;
pub mod rmsnorm;
pub mod sample;
pub mod token_score;
pub mod token_select;

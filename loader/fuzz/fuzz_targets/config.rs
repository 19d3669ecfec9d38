//! No configuration panics, and what is accepted gives finite frequencies.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use loris_loader::ModelConfig;

fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("config.json");
    let Ok(mut config) = ModelConfig::parse(bytes, path) else { return };
    let (inv_freq, factor) = config.rope.inv_freq(config.head_dim, config.ctx_len);
    assert_eq!(inv_freq.len(), config.head_dim / 2);
    assert!(factor.is_finite() && inv_freq.iter().all(|f| f.is_finite()));
    assert_eq!(config.windows.len(), config.n_layers);
    assert!(config.group_size() * config.n_kv_heads == config.n_q_heads);
    drop(config.add_generation_config(bytes, path));
});

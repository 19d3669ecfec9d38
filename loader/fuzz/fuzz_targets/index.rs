//! No shard index panics, and none leads out of its folder.
#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(index) = loris_loader::parse_index(bytes, Path::new(loris_loader::INDEX)) else {
        return;
    };
    for shard in index.values() {
        let parts: Vec<_> = Path::new(shard).components().collect();
        assert!(matches!(parts[..], [Component::Normal(_)]), "{shard:?}");
    }
});

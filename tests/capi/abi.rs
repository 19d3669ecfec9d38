//! `loris.h` is what cbindgen makes of the sources. `LORIS_BLESS=1` writes it.

use std::path::{Path, PathBuf};

pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Fails unless a committed file holds what was just made; writes it under `LORIS_BLESS=1`.
pub(crate) fn check(path: &Path, made: &str) {
    if std::env::var_os("LORIS_BLESS").is_some() {
        std::fs::write(path, made).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    let differs = committed.lines().zip(made.lines()).position(|(a, b)| a != b);
    let name = path.display();
    assert!(
        committed == made,
        "{name} is stale from line {}; LORIS_BLESS=1 cargo test --test capi writes it",
        differs.map_or(committed.lines().count().min(made.lines().count()), |i| i) + 1
    );
}

#[test]
fn the_header_is_fresh() {
    let sources = ["status", "handle", "params", "guard", "engine", "model", "text", "session"];
    let folder = root().join("engine/src/capi");
    let config = cbindgen::Config::from_file(root().join("engine/cbindgen.toml")).unwrap();
    let mut builder = cbindgen::Builder::new().with_config(config);
    for name in sources {
        builder = builder.with_src(folder.join(name).with_extension("rs"));
    }
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    check(&root().join("engine/include/loris.h"), &String::from_utf8(made).unwrap());
}

//! `loris.h` is what cbindgen makes of the sources. `LORIS_BLESS=1` writes it.

use std::ffi::CString;
use std::path::{Path, PathBuf};

use loris::KvFormat;
use loris::keep;

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

/// Every format and policy that can be asked for, and what the header says of features.
#[test]
fn no_feature_is_left_out() {
    let has = |name: &str| {
        let text = CString::new(name).unwrap();
        // SAFETY: a text that ends with a NUL.
        unsafe { loris::capi::loris_has_feature(text.as_ptr()) == 1 }
    };
    for format in KvFormat::ALL {
        assert!(has(&format!("kv-{format}")), "{format}");
    }
    for keep::Policy { name: policy, .. } in keep::TABLE {
        assert!(has(&format!("evict-{policy}")), "{policy}");
    }
    let header = std::fs::read_to_string(root().join("engine/include/loris.h")).unwrap();
    let (comment, _) = header.split_once("int32_t loris_has_feature").unwrap();
    let (_, comment) = comment.rsplit_once("Returns 1 if this build has the feature").unwrap();
    let named: Vec<&str> = comment.split('"').skip(1).step_by(2).collect();
    assert!(named.contains(&"keep-prefixes") && named.len() > 10, "{named:?}");
    // A build without nvcc has no kernels.
    for name in named.into_iter().filter(|name| *name != "cuda" && !name.ends_with('-')) {
        assert!(has(name), "{name}");
    }
    assert!(!has("telepathy") && !has("kv-int3") && !has("kv-"));
}

/// Sizes, offsets and signatures as a C compiler sees them. What is in the committed dump may only be added to;
/// a struct that grows gets its new size in `params.rs` and the ABI a new minor version.
#[test]
fn the_abi_is_the_recorded_one() {
    let header = root().join("engine/include/loris.h");
    let Some(made) = dump(&header) else { return };
    check(&root().join("tests/capi/abi.txt"), &made);
}

/// What bindgen makes of the header; `None` where there is no libclang, which `scripts/cuda-tools` brings.
fn dump(header: &Path) -> Option<String> {
    let python = root().join(".venv/lib").read_dir().ok()?.flatten();
    let mut libraries = python.map(|p| p.path().join("site-packages/clang/native"));
    let library = libraries.find(|folder| folder.join("libclang.so").exists())?;
    // SAFETY: no other test of this file reads or writes the environment's list.
    unsafe { std::env::set_var("LIBCLANG_PATH", library) };
    let include = std::process::Command::new("cc").arg("-print-file-name=include").output().ok()?;
    let include = String::from_utf8(include.stdout).ok()?;
    let bindings = bindgen::builder()
        .header(header.to_str()?)
        .clang_arg(format!("-I{}", include.trim()))
        .allowlist_item("loris_.*|LORIS_.*")
        .generate_comments(false)
        .derive_debug(false)
        .derive_copy(false)
        .disable_header_comment()
        .generate()
        .ok()?;
    Some(bindings.to_string())
}

/// The functions of the dump, and nothing else, are what the library exports.
#[test]
fn only_the_headers_functions_are_exported() {
    let dump = std::fs::read_to_string(root().join("tests/capi/abi.txt")).unwrap();
    let declared = dump.lines().filter_map(|line| line.trim().strip_prefix("pub fn "));
    let mut allowed: Vec<&str> = declared.filter_map(|rest| rest.split('(').next()).collect();
    if cfg!(debug_assertions) {
        allowed.push("loris_debug_panic");
    }
    allowed.sort_unstable();
    let symbols = output("nm", &["-D", "--defined-only"]);
    let mut exported: Vec<&str> =
        symbols.lines().filter_map(|line| line.split_whitespace().last()).collect();
    exported.sort_unstable();
    assert_eq!(exported, allowed);
    assert!(allowed.len() > 40);
}

#[test]
fn the_library_has_its_soname_and_needs_no_driver() {
    let dynamic = output("readelf", &["-d"]);
    assert!(dynamic.contains("soname: [libloris.so.0]"), "{dynamic}");
    let needed: Vec<&str> = dynamic.lines().filter(|line| line.contains("(NEEDED)")).collect();
    assert!(needed.iter().all(|line| !line.contains("cuda")), "{needed:?}");
}

/// The shared library that was built with this test.
pub(crate) fn library() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("libloris.so")
}

/// What a program of binutils says of the library.
fn output(program: &str, args: &[&str]) -> String {
    let run = std::process::Command::new(program).args(args).arg(library()).output();
    let run = run.unwrap_or_else(|e| panic!("{program}: {e}; binutils is needed"));
    assert!(run.status.success(), "{program}: {}", String::from_utf8_lossy(&run.stderr));
    String::from_utf8(run.stdout).unwrap()
}

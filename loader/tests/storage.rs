//! Weight files as they are mapped, read and changed under us.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Folder, tiny_weights};
use loris_loader::{Dtype, Error, LoadMode, OpenOptions, Storage, Weights, open};

fn load(folder: &Folder, mode: LoadMode) -> Weights {
    open(folder.path(), &OpenOptions { load: mode }).unwrap().weights
}

#[test]
fn both_modes_give_the_same_aligned_bytes() {
    let folder = Folder::tiny();
    let (map, read) = (load(&folder, LoadMode::Mmap), load(&folder, LoadMode::Read));
    assert!(map.files()[0].is_mapped() && !read.files()[0].is_mapped());
    assert_eq!(map.fingerprint(), read.fingerprint());
    assert_eq!(read.files()[0].as_ptr() as usize % 64, 0);
    for (a, b) in map.tensors().zip(read.tensors()) {
        assert_eq!(
            (&a.name, a.dtype, &a.shape, &a.bytes[..]),
            (&b.name, b.dtype, &b.shape, &b.bytes[..])
        );
        assert_eq!(a.bytes.as_ptr() as usize % a.dtype.size(), 0);
    }
    assert_eq!(map.get("model.norm.weight").unwrap().name, "norm.weight");
    assert_eq!(map.get("language_model.model.norm.weight").unwrap().shape, [16]);
    assert!(map.get("model.nothing").is_none());
}

/// As the engine does before a prompt.
fn check(weights: &Weights) -> Result<(), Error> {
    weights.files().iter().try_for_each(|file| file.check_unchanged())
}

#[test]
fn reading_survives_truncation_and_a_map_notices_it() {
    let folder = Folder::tiny();
    let (map, read) = (load(&folder, LoadMode::Mmap), load(&folder, LoadMode::Read));
    check(&map).unwrap();
    let before = read.fingerprint();
    std::fs::File::options()
        .write(true)
        .open(folder.file("model.safetensors"))
        .unwrap()
        .set_len(100)
        .unwrap();
    assert_eq!(read.fingerprint(), before);
    check(&read).unwrap();
    let error = check(&map).unwrap_err();
    assert!(matches!(error, Error::FileChanged { .. }));
    assert!(error.to_string().contains("100 bytes"), "{error}");
}

#[test]
fn a_map_survives_a_replaced_and_a_removed_file() {
    let folder = Folder::tiny();
    let map = load(&folder, LoadMode::Mmap);
    let before = map.fingerprint();
    folder.write("new", [tiny_weights(), tiny_weights()].concat());
    std::fs::rename(folder.file("new"), folder.file("model.safetensors")).unwrap();
    assert_eq!(map.fingerprint(), before);
    check(&map).unwrap();
    folder.remove("model.safetensors");
    assert_eq!(map.fingerprint(), before);
    check(&map).unwrap();
}

#[test]
fn short_files_are_not_mapped() {
    let folder = Folder::tiny();
    folder.write("short", b"1234567");
    assert!(!Storage::open(&folder.file("short"), LoadMode::Mmap).unwrap().is_mapped());
}

#[test]
fn tensors_outlive_weights_and_cross_threads() {
    let tensor = load(&Folder::tiny(), LoadMode::Mmap).get("norm.weight").unwrap();
    let len = std::thread::spawn(move || tensor.bytes.iter().filter(|&&byte| byte == 0).count())
        .join()
        .unwrap();
    assert_eq!(len, 32);
}

#[test]
fn weights_can_be_made_in_memory() {
    let one = |bytes: Vec<u8>| vec![("model.w".to_owned(), Dtype::F32, vec![1, 2], bytes)];
    let weights = Weights::from_memory(one(vec![1; 8])).unwrap();
    let tensor = weights.expect("model.w", &[1, 2]).unwrap();
    assert_eq!((tensor.name.as_str(), &tensor.bytes[..]), ("w", &[1u8; 8][..]));
    assert_eq!(tensor.bytes.as_ptr() as usize % 64, 0);
    check(&weights).unwrap();
    assert!(matches!(weights.expect("w", &[2]), Err(Error::TensorShape { .. })));
    assert!(matches!(Weights::from_memory(one(vec![1; 7])), Err(Error::TensorData { .. })));
    let other = Weights::from_memory(one(vec![2; 8])).unwrap();
    assert_ne!(weights.fingerprint(), other.fingerprint());
    let empty = |name: &str| (name.to_owned(), Dtype::U8, vec![0], Vec::<u8>::new());
    let twice = vec![empty("w"), empty("model.w")];
    assert!(matches!(Weights::from_memory(twice), Err(Error::NameCollision { .. })));
}

//! Weight files as they are mapped, read and changed under us.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Folder, tiny_config, tiny_weights};
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

/// The tiny model's file with its data moved by one byte.
fn odd_weights() -> Vec<u8> {
    let file = tiny_weights();
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let text = String::from_utf8(file[8..8 + header].to_vec()).unwrap();
    let text = text.trim_end();
    let text = format!("{text}{}", " ".repeat(1 - text.len() % 2));
    let mut data = file[8 + header..].to_vec();
    data.iter_mut().zip(0..).for_each(|(byte, i): (_, usize)| *byte = (i % 251) as u8);
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &data].concat()
}

#[test]
fn data_may_begin_at_an_odd_byte() {
    let folder = Folder::tiny();
    folder.write("model.safetensors", odd_weights());
    for mode in [LoadMode::Mmap, LoadMode::Read] {
        let weights = load(&folder, mode);
        for tensor in weights.tensors() {
            assert_eq!(tensor.bytes.as_ptr() as usize % tensor.dtype.size(), 0);
            assert_eq!(tensor.file(), folder.file("model.safetensors"));
        }
        // The bytes count up from where the tensor lies.
        let q = weights.get("layers.0.self_attn.q_proj.weight").unwrap();
        assert!(
            q.bytes.windows(2).all(|pair| pair[1] == (pair[0] + 1) % 251),
            "{:?}",
            &q.bytes[..4]
        );
    }
    assert_eq!(
        load(&folder, LoadMode::Mmap).fingerprint(),
        load(&folder, LoadMode::Read).fingerprint()
    );
}

/// The tiny model with these element types, and values that count up.
fn typed(folder: &Folder, dtype: impl Fn(&str) -> &'static str, head: Option<(&'static str, f32)>) {
    let mut tensors: Vec<_> =
        common::tiny_expected().into_iter().map(|t| (dtype(&t.name), t.name, t.shape)).collect();
    tensors.extend(head.map(|(dtype, _)| (dtype, "lm_head.weight".to_owned(), vec![32, 16])));
    tensors.sort_by_key(|t| t.0 != "F32");
    let named: Vec<_> = tensors.iter().map(|t| (t.1.clone(), t.0, t.2.clone())).collect();
    let mut file = common::weights(&named);
    let mut at = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    for (dtype, name, shape) in &tensors {
        for i in 0..shape.iter().product::<usize>() {
            let mut x = (i % 16) as f32;
            if let Some((_, shift)) = head.filter(|_| name == "lm_head.weight") {
                x += shift;
            }
            let bytes = match *dtype {
                "F32" => x.to_le_bytes().to_vec(),
                "F16" => half::f16::from_f32(x).to_le_bytes().to_vec(),
                _ => half::bf16::from_f32(x).to_le_bytes().to_vec(),
            };
            file[at..at + bytes.len()].copy_from_slice(&bytes);
            at += bytes.len();
        }
    }
    folder.write("model.safetensors", file);
}

#[test]
fn tensors_that_are_multiplied_together_get_one_type() {
    let folder = Folder::tiny();
    let types = |name: &str| match name {
        name if name.contains("q_proj") => "F32",
        name if name.contains("k_proj") || name.contains("up_proj") => "F16",
        _ => "BF16",
    };
    typed(&folder, types, None);
    for mode in [LoadMode::Mmap, LoadMode::Read] {
        let weights = load(&folder, mode);
        for (name, dtype) in [
            ("self_attn.q_proj", Dtype::F32),
            ("self_attn.k_proj", Dtype::F32),
            ("self_attn.v_proj", Dtype::F32),
            ("self_attn.o_proj", Dtype::BF16),
            ("mlp.gate_proj", Dtype::F32),
            ("mlp.up_proj", Dtype::F32),
            ("mlp.down_proj", Dtype::BF16),
        ] {
            let tensor = weights.get(&format!("layers.0.{name}.weight")).unwrap();
            assert_eq!(tensor.dtype, dtype, "{name}");
            assert_eq!(tensor.bytes.len(), tensor.shape.iter().product::<usize>() * dtype.size());
            if dtype == Dtype::F32 {
                let values =
                    tensor.bytes.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap()));
                assert!(values.zip(0..).all(|(x, i)| x == (i % 16) as f32), "{name}");
            }
        }
    }
    typed(&folder, |_| "F16", None);
    assert!(load(&folder, LoadMode::Mmap).tensors().all(|tensor| tensor.dtype == Dtype::F16));
}

#[test]
fn a_head_of_its_own_counts() {
    let folder = Folder::tiny();
    let open_it = || open(folder.path(), &OpenOptions::default()).unwrap();
    for (dtype, shift, tied) in
        [("BF16", 0.0, true), ("F32", 0.0, true), ("BF16", 1.0, false), ("F32", 0.5, false)]
    {
        typed(&folder, |_| "BF16", Some((dtype, shift)));
        let checkpoint = open_it();
        assert_eq!(checkpoint.config.tied_embeddings, tied, "{dtype} {shift}");
        assert_eq!(checkpoint.warnings.len(), usize::from(!tied));
        assert!(checkpoint.warnings.iter().all(|warning| warning.contains("lm_head.weight")));
    }
    // A head without an embedding is the embedding.
    let renamed = common::tiny_expected()
        .into_iter()
        .map(|t| (t.name.replace("model.embed_tokens", "lm_head"), "BF16", t.shape));
    folder.write("model.safetensors", common::weights(&renamed.collect::<Vec<_>>()));
    let checkpoint = open_it();
    assert!(checkpoint.config.tied_embeddings);
    checkpoint.weights.expect("embed_tokens.weight", &[32, 16]).unwrap();
}

#[test]
fn one_file_wins_over_an_index_and_both_are_named() {
    let folder = Folder::tiny();
    let index = |shard: &str| format!(r#"{{"weight_map": {{"model.norm.weight": "{shard}"}}}}"#);
    folder.write("model.safetensors.index.json", index("model-00001-of-00002.safetensors"));
    let checkpoint = open(folder.path(), &OpenOptions::default()).unwrap();
    let [warning] = &checkpoint.warnings[..] else { panic!("{:?}", checkpoint.warnings) };
    assert!(
        warning.contains("model.safetensors is used") && warning.contains("index.json"),
        "{warning}"
    );
    folder.write("model.safetensors.index.json", index("model.safetensors"));
    assert!(open(folder.path(), &OpenOptions::default()).unwrap().warnings.is_empty());
}

#[cfg(unix)]
#[test]
fn links_work_and_links_to_nothing_are_said() {
    let folder = Folder::tiny();
    for name in ["config.json", "model.safetensors"] {
        std::fs::rename(folder.file(name), folder.file("blob")).unwrap();
        std::os::unix::fs::symlink("blob", folder.file(name)).unwrap();
        if name == "config.json" {
            std::fs::copy(folder.file("blob"), folder.file("blob1")).unwrap();
            std::fs::remove_file(folder.file(name)).unwrap();
            std::os::unix::fs::symlink("blob1", folder.file(name)).unwrap();
        }
    }
    open(folder.path(), &OpenOptions::default()).unwrap();
    let names = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
        "chat_template.jinja",
        "adapter_config.json",
    ];
    for name in names {
        let folder = Folder::tiny();
        folder.write("tokenizer.json", common::byte_tokenizer().to_string());
        drop(std::fs::remove_file(folder.file(name)));
        std::os::unix::fs::symlink("nowhere", folder.file(name)).unwrap();
        let message =
            open(folder.path(), &OpenOptions::default()).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("a link to nowhere"), "{message}");
        std::fs::remove_file(folder.file(name)).unwrap();
        std::fs::create_dir(folder.file(name)).unwrap();
        let message =
            open(folder.path(), &OpenOptions::default()).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("directory"), "{message}");
    }
}

/// As the reference has it: Qwen2's biases are zeros where no file has any.
#[test]
fn biases_that_no_file_has_are_zeros() {
    let folder = Folder::tiny();
    let mut config = tiny_config();
    config["architectures"] = serde_json::json!(["Qwen2ForCausalLM"]);
    config["model_type"] = "qwen2".into();
    folder.write("config.json", config.to_string());
    let checkpoint = open(folder.path(), &OpenOptions::default()).unwrap();
    assert!(!checkpoint.config.qkv_bias);
    assert!(checkpoint.warnings.iter().any(|w| w.contains("biases of q, k and v")));
}

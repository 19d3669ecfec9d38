//! What our parser accepts the reference accepts too, with the same meaning.
#![no_main]

use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;

fuzz_target!(|bytes: &[u8]| {
    let Ok(ours) = loris_loader::safetensors::parse(bytes) else { return };
    let (_, theirs) =
        SafeTensors::read_metadata(bytes).expect("accepted what the reference refuses");
    let all = theirs.tensors();
    assert_eq!(ours.tensors.len(), all.len());
    for (name, info) in &ours.tensors {
        let other = all[name];
        assert_eq!(info.dtype.name(), other.dtype.to_string());
        assert_eq!(info.shape, other.shape);
        assert_eq!(info.range.start - ours.data_start, other.data_offsets.0);
        assert_eq!(info.range.end - ours.data_start, other.data_offsets.1);
    }
});

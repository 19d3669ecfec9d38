//! Kernels as this build embeds them: one image for each kernel file and architecture.

/// Written by the build script.
pub(crate) mod generated {
    use super::{Image, Kernel};

    include!(concat!(env!("OUT_DIR"), "/images.rs"));
}

/// One kernel file, built for one architecture.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// Name of the kernel file, without `.cu`.
    pub file: &'static str,
    /// `sm_80`, `sm_89` and `sm_90a` are cubins, `compute_80` is PTX.
    pub arch: &'static str,
    /// What the driver loads: a fatbin of one of them, compressed.
    pub data: &'static [u8],
}

/// Why [`images`] is empty; empty itself where it is not.
pub const NO_IMAGES: &str = generated::NO_IMAGES;

/// Registers, static shared memory, stack and spilled bytes of each kernel on each architecture, as
/// CSV with a header. The build fails on a kernel that spills or uses more registers than its row
/// in the source allows.
pub const RESOURCES: &str = include_str!(concat!(env!("OUT_DIR"), "/resources.csv"));

/// All images of this build; none where it was built without nvcc.
pub fn images() -> &'static [Image] {
    generated::IMAGES
}

/// The architecture whose images a device of this compute capability runs, if there are any: cubins
/// where they fit, PTX on newer devices. A cubin runs on its own major version from its own minor
/// version on; an `a` runs on that version alone.
pub fn choose(compute: (u32, u32), archs: &[&str]) -> Option<&'static str> {
    let candidates: &[&'static str] = match compute {
        (9, 0) => &["sm_90a", "compute_80"],
        (8, 9) => &["sm_89", "sm_80", "compute_80"],
        (8, _) => &["sm_80", "compute_80"],
        (9.., _) => &["compute_80"],
        _ => &[],
    };
    candidates.iter().find(|arch| archs.contains(arch)).copied()
}

/// A kernel of this build.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) name: &'static str,
    /// The file that it is in.
    pub(crate) file: &'static str,
    /// Bytes of shared memory of a block: what the kernel itself says.
    pub(crate) smem: u32,
}

/// The kernel of this name.
pub(crate) fn kernel(name: &str) -> Option<&'static Kernel> {
    generated::KERNELS.iter().find(|kernel| kernel.name == name)
}

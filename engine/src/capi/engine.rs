//! The library and its engines.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::PathBuf;

use super::guard::call;
use super::handle::{free, loris_engine, make};
use super::model::MODEL_FLAGS;
use super::out::{c_text, copy_text, optional, write};
use super::params::{check_flags, loris_engine_params, read};
use super::status::{Failure, LORIS_OK};
use crate::backend::cuda::CudaDevice;
use crate::device::{DeviceChoice, cuda_devices};
use crate::engine::{Engine, EngineOptions};
use crate::keep;
use crate::log::{Level, Log};
use crate::store::KvFormat;

/// Version of this interface: major << 16 | minor. A host runs with a library of the same major and of the same or a
/// higher minor version.
pub const LORIS_ABI_VERSION: u32 = 6;

/// What every build can do that is in no table.
const ALWAYS: [&str; 10] = [
    "cpu",
    "batch",
    "fork",
    "prefix-sharing",
    "save",
    "lazy",
    "window",
    "evict",
    "mask",
    "logprobs",
];

/// What this build can do, for [`loris_has_feature`]. What comes in kinds is taken from the table that its names are
/// looked up in, so that nothing can be asked for that is not said here.
fn features() -> Vec<String> {
    let mut features: Vec<String> = ALWAYS.map(str::to_owned).into();
    features.extend(KvFormat::ALL.map(|format| format!("kv-{format}")));
    features.extend(keep::TABLE.map(|policy| format!("evict-{}", policy.name)));
    features.extend(MODEL_FLAGS.map(|(_, name)| name.to_owned()));
    if !loris_kernels::images().is_empty() {
        features.push("cuda".into());
    }
    features
}

/// Returns the library's LORIS_ABI_VERSION. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn loris_abi_version() -> u32 {
    LORIS_ABI_VERSION
}

/// Returns the library's version, such as "0.1.0": a text that lives as long as the library. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn loris_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => c"",
        };
    VERSION.as_ptr()
}

/// Describes the build as JSON: version, abi, target, cuda_images, features, and commit if the packager named it. buf,
/// cap and n as in loris_detokenize. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_build_info(buf: *mut c_char, cap: usize, n: *mut usize) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let mut archs: Vec<&str> = loris_kernels::images().iter().map(|image| image.arch).collect();
        archs.sort_unstable();
        archs.dedup();
        let info = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "abi": format!("{}.{}", LORIS_ABI_VERSION >> 16, LORIS_ABI_VERSION & 0xffff),
            "target": format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            "cuda_images": archs,
            "features": features(),
            "commit": option_env!("LORIS_COMMIT"),
        });
        copy_text(&info.to_string(), buf, cap, n)
    })
}

/// Returns 1 if this build has the feature, else 0 (an unknown name included): "cpu", "cuda", "batch", "fork",
/// "prefix-sharing", "save", "lazy", "window", "evict", "mask", "logprobs", "keep-prefixes" (the flag LORIS_KEEP_PREFIXES), and for each KV
/// format and each eviction policy "kv-" or "evict-" before its name, as in "kv-int4-channel" and "evict-snapkv".
/// loris_build_info lists them all. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_has_feature(name: *const c_char) -> i32 {
    let known = call(|| {
        // SAFETY: the caller keeps to the header.
        let name = unsafe { c_text("name", name) }?;
        Ok(i32::from(features().iter().any(|feature| feature == name)))
    });
    known.max(0)
}

/// Lists the CUDA devices of this machine as JSON: [{"index", "name", "compute", "memory", "why_not"}], where why_not
/// is null for a device that can be used. LORIS_E_NO_DEVICE, with the reason in the message, if there is no
/// driver. buf, cap and n as in loris_detokenize. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_cuda_devices(buf: *mut c_char, cap: usize, n: *mut usize) -> i32 {
    call(|| {
        let describe = |device: &CudaDevice| {
            serde_json::json!({
                "index": device.index,
                "name": device.name,
                "compute": format!("{}.{}", device.compute.0, device.compute.1),
                "memory": device.memory,
                "why_not": device.why_not,
            })
        };
        let list: serde_json::Value = cuda_devices(None)?.iter().map(describe).collect();
        // SAFETY: the caller keeps to the header.
        unsafe { copy_text(&list.to_string(), buf, cap, n) }
    })
}

/// Opens an engine: looks for the device, takes no memory of note. params may be NULL for the defaults. On
/// LORIS_OK *engine is a handle for loris_engine_free, else it is NULL. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_engine_open(
    params: *const loris_engine_params,
    engine: *mut *mut loris_engine,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        write("engine", engine, std::ptr::null_mut())?;
        let params = read(params)?;
        let opened = Engine::new(&options(&params)?)?;
        write("engine", engine, make(opened))?;
        Ok(LORIS_OK)
    })
}

/// Frees an engine; NULL is fine. Its models live on until they are freed themselves. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_engine_free(engine: *mut loris_engine) {
    // SAFETY: passed on.
    unsafe { free(engine) }
}

/// # Safety
/// The struct's texts are NULL or end with a NUL.
unsafe fn options(params: &loris_engine_params) -> Result<EngineOptions, Failure> {
    check_flags("loris_engine_params.flags", params.flags, 0)?;
    // SAFETY: the caller's promise.
    let device = match unsafe { optional("device", params.device) }? {
        Some(device) => device.parse()?,
        None => DeviceChoice::Auto,
    };
    Ok(EngineOptions {
        device,
        threads: (params.threads > 0).then_some(params.threads as usize),
        // SAFETY: the caller's promise.
        driver: unsafe { optional("cuda_driver", params.cuda_driver) }?.map(PathBuf::from),
        log: log(params)?,
        ..EngineOptions::default()
    })
}

fn log(params: &loris_engine_params) -> Result<Log, Failure> {
    let level = match params.log_level {
        1 => Level::Error,
        2 => Level::Warn,
        3 => Level::Info,
        other => return Err(Failure::invalid(format!("log_level: {other}, expected 1 to 3"))),
    };
    let Some(log) = params.log else { return Ok(Log::default()) };
    let host = Host { log, data: params.log_data };
    Ok(Log::new(level, move |level, message| host.say(level, message)))
}

/// A host's log callback.
struct Host {
    log: unsafe extern "C" fn(*mut c_void, i32, *const c_char),
    data: *mut c_void,
}

// SAFETY: the header says that the callback is called from any thread, with this pointer.
unsafe impl Send for Host {}
// SAFETY: as above, several at a time.
unsafe impl Sync for Host {}

impl Host {
    fn say(&self, level: Level, message: &str) {
        let text = CString::new(message.replace('\0', "\u{fffd}")).unwrap_or_default();
        // SAFETY: the text lives as long as the call.
        unsafe { (self.log)(self.data, level as i32, text.as_ptr()) };
    }
}

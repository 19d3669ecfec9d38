//! The driver beyond cust: which library it is, error texts, streams that do not block, shared
//! memory limits, launches by address.
//!
//! All of it goes through the trampolines of `driver/libcuda.c`, as cust does. They turn result
//! codes that cust cannot hold into 999; [`fail`] asks them for the true code.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use crate::Error;
use crate::cuda::{self, CUfunction, CUstream};
use crate::images::Kernel;
use crate::launch::{Function, Launch};

/// Name of the system's driver.
pub(crate) const DEFAULT_DRIVER: &str = "libcuda.so.1";
const NON_BLOCKING: u32 = 1;

unsafe extern "C" {
    fn loris_driver_open(path: *const c_char, message: *mut c_char, size: usize) -> c_int;
    fn loris_driver_code() -> u32;
    #[cfg(feature = "twin")]
    fn loris_driver_symbol(name: *const c_char) -> *mut c_void;
}

/// Makes the library at `path` this process's driver. It stays so: another path is an error from
/// then on.
pub(crate) fn open(path: Option<&Path>) -> Result<(), Error> {
    let path = path.unwrap_or(Path::new(DEFAULT_DRIVER));
    let no_driver = |why: String| Error::NoDriver { path: path.to_owned(), why };
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| no_driver("the path holds a zero byte".into()))?;
    let mut message = [0u8; 1024];
    // SAFETY: both strings end in zero; the message is written within its size.
    let status =
        unsafe { loris_driver_open(name.as_ptr(), message.as_mut_ptr().cast(), message.len()) };
    let text = CStr::from_bytes_until_nul(&message).map(CStr::to_string_lossy).unwrap_or_default();
    match status {
        0 => Ok(()),
        1 => Err(no_driver(text.into_owned())),
        _ => Err(no_driver(format!("this process already uses {text}"))),
    }
}

/// Whether the driver is the twin, which brings the kernels along.
pub(crate) fn is_twin() -> bool {
    #[cfg(feature = "twin")]
    // SAFETY: the name ends in zero.
    return unsafe { !loris_driver_symbol(c"loris_twin_last_fault".as_ptr()).is_null() };
    #[cfg(not(feature = "twin"))]
    return false;
}

/// The error of this thread's last driver call, which failed.
pub(crate) fn fail(call: &'static str, what: impl Into<String>) -> Error {
    // SAFETY: reads a thread's variable.
    let code = unsafe { loris_driver_code() };
    Error::Driver { call, what: what.into(), code, text: text(code) }
}

/// `Ok` of a result code 0, or what failed.
pub(crate) fn check(
    code: u32,
    call: &'static str,
    what: impl FnOnce() -> String,
) -> Result<(), Error> {
    if code == 0 { Ok(()) } else { Err(fail(call, what())) }
}

/// Name and explanation of a code, in the driver's words.
fn text(code: u32) -> String {
    type Ask = unsafe extern "C" fn(u32, *mut *const c_char) -> u32;
    let ask = |function: Ask| {
        let mut text: *const c_char = ptr::null();
        // SAFETY: the driver writes the address of a constant string, or nothing where it fails.
        let code = unsafe { function(code, &mut text) };
        if code != 0 || text.is_null() {
            return String::new();
        }
        // SAFETY: it ends in zero and is never freed.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    };
    match (ask(cuda::cuGetErrorName), ask(cuda::cuGetErrorString)) {
        (name, text) if !name.is_empty() && !text.is_empty() => format!("{name}, {text}"),
        (name, _) if !name.is_empty() => name,
        _ => match code {
            100 => "no CUDA device".into(),
            500 => "the driver lacks this function".into(),
            _ => "unknown error".into(),
        },
    }
}

/// A stream that does not wait for the legacy default stream, which cust cannot make: it takes the
/// flag away.
pub(crate) fn stream() -> Result<cust::stream::Stream, Error> {
    let mut stream: CUstream = ptr::null_mut();
    // SAFETY: the driver writes a handle.
    let code = unsafe { cuda::cuStreamCreate(&mut stream, NON_BLOCKING) };
    check(code, "cuStreamCreate", || "the device's stream".into())?;
    // SAFETY: cust's stream is this handle and nothing else, as the compiler checks by their sizes;
    // it was made by the driver and is owned by nobody yet.
    Ok(unsafe { std::mem::transmute::<CUstream, cust::stream::Stream>(stream) })
}

/// A number about a device that cust has no name for.
pub(crate) fn attribute(device: &cust::device::Device, attribute: u32) -> Result<u32, Error> {
    let mut value: c_int = 0;
    // SAFETY: the driver writes a number.
    let code = unsafe { cuda::cuDeviceGetAttribute(&mut value, attribute, device.as_raw()) };
    check(code, "cuDeviceGetAttribute", || format!("attribute {attribute}"))?;
    Ok(u32::try_from(value).unwrap_or(0))
}

/// Allows launches of a kernel with the shared memory that it says.
///
/// # Safety
/// `function` is the kernel, of a loaded module.
pub(crate) unsafe fn allow_smem(function: CUfunction, kernel: &Kernel) -> Result<(), Error> {
    let bytes = c_int::try_from(kernel.smem).unwrap_or(c_int::MAX);
    let attribute = cuda::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the caller's.
    let code = unsafe { cuda::cuFuncSetAttribute(function, attribute, bytes) };
    check(code, "cuFuncSetAttribute", || {
        format!("{} bytes of shared memory for {}", kernel.smem, kernel.name)
    })
}

/// Queues a kernel whose one argument is at `args`.
///
/// # Safety `function` is of a loaded module and takes one argument of the type at `args`, whose
/// pointers are valid for what it does.
pub(crate) unsafe fn launch(
    function: Function,
    launch: &Launch,
    stream: &cust::stream::Stream,
    args: *const c_void,
) -> Result<(), Error> {
    let [x, y, z] = launch.grid;
    let mut parameters = [args.cast_mut()];
    // SAFETY: the driver copies the argument before it returns; the rest is the caller's.
    let code = unsafe {
        cuda::cuLaunchKernel(
            function.raw,
            x,
            y,
            z,
            launch.block,
            1,
            1,
            function.smem + launch.extra_smem,
            stream.as_inner().cast(),
            parameters.as_mut_ptr(),
            ptr::null_mut(),
        )
    };
    check(code, "cuLaunchKernel", || format!("{launch}"))
}

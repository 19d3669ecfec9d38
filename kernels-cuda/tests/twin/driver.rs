//! The twin as its driver calls: what the tests need of them, without the device layer above.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;
use std::sync::OnceLock;

use libloading::Library;

/// The twin, loaded once.
pub(crate) fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    // SAFETY: the twin has no initialisers that ask anything of its loader.
    LIBRARY.get_or_init(|| unsafe { Library::new(loris_kernels::TWIN) }.expect("the twin loads"))
}

/// Calls a function of the twin by its name: `cu!(cuMemFree_v2(address => u64) -> i32)`.
#[macro_export]
macro_rules! cu {
    ($name:ident($($value:expr => $type:ty),* $(,)?)) => {
        $crate::cu!($name($($value => $type),*) -> i32)
    };
    ($name:ident($($value:expr => $type:ty),* $(,)?) -> $out:ty) => {{
        type Function = unsafe extern "C" fn($($type),*) -> $out;
        // SAFETY: the types are those of the twin's sources; pointers are to live values of the caller.
        unsafe {
            let name = stringify!($name).as_bytes();
            let function = $crate::driver::library().get::<Function>(name).expect("exported");
            function($($value as $type),*)
        }
    }};
}

pub(crate) type Handle = *mut c_void;

pub(crate) const INVALID_VALUE: i32 = 1;
pub(crate) const OUT_OF_MEMORY: i32 = 2;
pub(crate) const INVALID_HANDLE: i32 = 400;
pub(crate) const NOT_FOUND: i32 = 500;
pub(crate) const NOT_READY: i32 = 600;
pub(crate) const ILLEGAL_ADDRESS: i32 = 700;
pub(crate) const LAUNCH_FAILED: i32 = 719;

/// The primary context of this test's thread, with the kernels.
pub(crate) struct Twin {
    module: Handle,
}

impl Twin {
    pub(crate) fn open() -> Self {
        let mut context: Handle = ptr::null_mut();
        let mut module: Handle = ptr::null_mut();
        assert_eq!(cu!(cuInit(0 => u32)), 0);
        assert_eq!(cu!(cuDevicePrimaryCtxRetain(&mut context => *mut Handle, 0 => i32)), 0);
        assert_eq!(cu!(cuCtxSetCurrent(context => Handle)), 0);
        let image = c"loris twin image";
        let code =
            cu!(cuModuleLoadData(&mut module => *mut Handle, image.as_ptr() => *const c_char));
        assert_eq!(code, 0);
        Self { module }
    }

    pub(crate) fn function(&self, name: &str) -> Result<Handle, i32> {
        let mut function: Handle = ptr::null_mut();
        let name = CString::new(name).unwrap();
        let out = &mut function;
        match cu!(cuModuleGetFunction(out => *mut Handle, self.module => Handle, name.as_ptr() => *const c_char))
        {
            0 => Ok(function),
            code => Err(code),
        }
    }

    /// Device memory for `n` words.
    pub(crate) fn alloc(&self, n: usize) -> u64 {
        let mut address = 0u64;
        assert_eq!(cu!(cuMemAlloc_v2(&mut address => *mut u64, 4 * n => usize)), 0);
        address
    }

    pub(crate) fn upload(&self, words: &[u32]) -> u64 {
        let address = self.alloc(words.len());
        assert_eq!(self.write(address, words), 0);
        address
    }

    pub(crate) fn write(&self, to: u64, words: &[u32]) -> i32 {
        cu!(cuMemcpyHtoD_v2(to => u64, words.as_ptr() => *const u32, size_of_val(words) => usize))
    }

    pub(crate) fn read(&self, from: u64, n: usize) -> Vec<u32> {
        let mut words = vec![0u32; n];
        let code =
            cu!(cuMemcpyDtoH_v2(words.as_mut_ptr() => *mut u32, from => u64, 4 * n => usize));
        assert_eq!(code, 0, "{}", text(code));
        words
    }

    /// Queues a kernel in `stream`.
    pub(crate) fn launch_in<A>(
        &self,
        stream: Handle,
        name: &str,
        grid: [u32; 3],
        shape: [u32; 2],
        args: &A,
    ) -> i32 {
        let function = self.function(name).unwrap_or_else(|_| panic!("no kernel {name}"));
        let mut params = [ptr::from_ref(args).cast_mut().cast::<c_void>()];
        let [n_threads, smem_bytes] = shape;
        cu!(cuLaunchKernel(
            function => Handle, grid[0] => u32, grid[1] => u32, grid[2] => u32, n_threads => u32, 1 => u32, 1 => u32,
            smem_bytes => u32, stream => Handle, params.as_mut_ptr() => *mut *mut c_void,
            ptr::null_mut() => *mut *mut c_void
        ))
    }

    /// Runs a kernel to its end.
    pub(crate) fn run<A>(
        &self,
        name: &str,
        grid: u32,
        shape: [u32; 2],
        args: &A,
    ) -> Result<(), (i32, String)> {
        let code = self.launch_in(ptr::null_mut(), name, [grid, 1, 1], shape, args);
        assert_eq!(code, 0, "{name}: {}", text(code));
        match cu!(cuCtxSynchronize()) {
            0 => Ok(()),
            code => Err((code, text(code))),
        }
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        cu!(cuModuleUnload(self.module => Handle));
        cu!(cuDevicePrimaryCtxRelease_v2(0 => i32));
    }
}

/// What the driver says about a code.
pub(crate) fn text(code: i32) -> String {
    let mut text: *const c_char = ptr::null();
    if cu!(cuGetErrorString(code => i32, &mut text => *mut *const c_char)) != 0 {
        return format!("code {code}");
    }
    // SAFETY: the twin never frees its texts.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Objects of this thread that live, in words.
pub(crate) fn leaks() -> String {
    let mut text: *const c_char = ptr::null();
    cu!(loris_twin_leaks(&mut text => *mut *const c_char) -> usize);
    // SAFETY: the text lives until this thread asks again.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

pub(crate) fn set_seed(seed: u64) {
    cu!(loris_twin_set_seed(seed => u64) -> ());
}

//! One GPU: context, stream, kernels.
//!
//! The context is the device's primary one, so other CUDA code in the process shares it. Everything
//! runs in one stream, in order. Buffers and graphs hold on to the context and the stream; the last
//! of them to go ends both.
//!
//! CUDA's current context is a property of a thread: every method sets it, so a device may move
//! between threads.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cust::context::{Context, CurrentContext};
use cust::device::DeviceAttribute as Attribute;
use cust::event::{Event, EventFlags};
use cust::memory::DeviceBuffer;
use cust::module::Module;
use cust::stream::Stream;

use crate::driver_ext::{self, DEFAULT_DRIVER, fail};
use crate::images::{self, NO_IMAGES};
use crate::launch::Function;
use crate::{Error, Launch, cuda};

/// What the twin loads: it has the kernels itself.
const TWIN_IMAGE: &str = "loris twin image";

/// Dynamic shared memory that a kernel may use without being allowed to.
const PLAIN_SMEM: u32 = 48 << 10;

/// Which device to open.
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    /// Index among the driver's devices.
    pub index: u32,
    /// The driver's library; `libcuda.so.1` if `None`. A process uses one driver: the first that it
    /// opens.
    pub driver: Option<PathBuf>,
}

/// Facts about a device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Index among the driver's devices.
    pub index: u32,
    /// The vendor's name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute: (u32, u32),
    /// Bytes of device memory.
    pub memory: u64,
    /// Streaming multiprocessors.
    pub n_sms: u32,
    /// Bytes of shared memory that a block may have.
    pub max_smem: u32,
    /// Bytes of the second-level cache.
    pub l2: u32,
    /// Version of CUDA that the driver is for, major and minor.
    pub driver_version: (u32, u32),
    /// The architecture of the kernels that this build has for it, or why there are none.
    pub kernels: Result<&'static str, String>,
}

/// One GPU.
#[derive(Debug)]
pub struct Device {
    // Modules end before what they are in.
    functions: RefCell<HashMap<&'static str, Function>>,
    modules: Vec<(&'static str, Module)>,
    info: DeviceInfo,
    pub(crate) synchronous: bool,
    pub(crate) shared: Arc<Shared>,
}

// SAFETY: the driver lets any thread use a handle.
unsafe impl Send for Device {}

/// What buffers and graphs need to outlive their device.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) freed: Mutex<Freed>,
    // The stream ends before its context.
    pub(crate) stream: Stream,
    context: Context,
}

/// Memory of dropped buffers that graphs may still name.
#[derive(Debug, Default)]
pub(crate) struct Freed {
    pub(crate) n_graphs: usize,
    pub(crate) memory: Vec<DeviceBuffer<u8>>,
}

impl Shared {
    /// Makes the context current on this thread.
    pub(crate) fn set_current(&self) -> Result<(), Error> {
        CurrentContext::set_current(&self.context)
            .map_err(|_| fail("cuCtxSetCurrent", "the device"))
    }

    /// Waits for the stream; the context is current.
    pub(crate) fn wait(&self, what: impl FnOnce() -> String) -> Result<(), Error> {
        self.stream.synchronize().map_err(|_| {
            let error = fail("cuStreamSynchronize", what());
            // Where only the call failed, work that uses the caller's memory is still under way.
            let _ = self.stream.synchronize();
            error
        })
    }

    /// Waits before something that work may use ends. Errors are those of earlier work, which its
    /// own callers hear of.
    pub(crate) fn settle(&self) {
        let _ = self.set_current();
        let _ = self.wait(String::new);
    }
}

impl Device {
    /// Opens a device and loads the kernels.
    pub fn open(options: &DeviceOptions) -> Result<Device, Error> {
        init(options.driver.as_deref())?;
        let count = count()?;
        if options.index >= count {
            return Err(Error::NoDevice { index: options.index, count });
        }
        let (device, info) = inspect(options.index)?;
        let arch =
            info.kernels.clone().map_err(|why| Error::NoImages { compute: info.compute, why })?;
        let context = Context::new(device)
            .map_err(|_| fail("cuDevicePrimaryCtxRetain", info.name.as_str()))?;
        CurrentContext::set_current(&context).map_err(|_| fail("cuCtxSetCurrent", "the device"))?;
        let stream = driver_ext::stream()?;
        let shared = Arc::new(Shared { freed: Mutex::default(), stream, context });
        Ok(Device {
            functions: RefCell::default(),
            modules: load(arch)?,
            info,
            synchronous: std::env::var_os("LORIS_CUDA_SYNC").is_some(),
            shared,
        })
    }

    /// Facts about it.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Waits until all work is done; an error if some of it failed.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.set_current()?;
        self.wait(|| "the device's stream".into())
    }

    /// Bytes of device memory that are free, and all.
    pub fn memory(&self) -> Result<(u64, u64), Error> {
        self.set_current()?;
        let (free, total) =
            cust::memory::mem_get_info().map_err(|_| fail("cuMemGetInfo", "the device"))?;
        Ok((free as u64, total as u64))
    }

    /// How long the device takes for what `work` queues.
    pub fn time(&self, work: impl FnOnce(&Device) -> Result<(), Error>) -> Result<Duration, Error> {
        self.set_current()?;
        let event =
            || Event::new(EventFlags::DEFAULT).map_err(|_| fail("cuEventCreate", "a timer"));
        let record = |event: &Event| {
            event.record(self.stream()).map_err(|_| fail("cuEventRecord", "a timer"))
        };
        let (start, end) = (event()?, event()?);
        record(&start)?;
        work(self)?;
        record(&end)?;
        self.wait(|| "timed work".into())?;
        end.elapsed(&start).map_err(|_| fail("cuEventElapsedTime", "a timer"))
    }

    /// Queues a kernel in the device's stream.
    ///
    /// Errors of the kernel itself come back from a later call, in most cases the one that waits
    /// for it; with the environment variable `LORIS_CUDA_SYNC` set, from this one.
    ///
    /// # Safety `A` is the argument struct of the kernel, and the pointers in `args` are valid for
    /// what it does until it has run.
    pub unsafe fn launch<A: Copy>(&self, launch: &Launch, args: &A) -> Result<(), Error> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.set_current()?;
        let function = self.function(launch.kernel)?;
        let args = (&raw const *args).cast();
        // SAFETY: the function belongs to a module of this device, the rest is the caller's.
        unsafe { driver_ext::launch(function, launch, self.stream(), args)? };
        if self.synchronous { self.wait(|| launch.to_string()) } else { Ok(()) }
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.shared.stream
    }

    pub(crate) fn set_current(&self) -> Result<(), Error> {
        self.shared.set_current()
    }

    /// Waits for the stream; the context is current.
    pub(crate) fn wait(&self, what: impl FnOnce() -> String) -> Result<(), Error> {
        self.shared.wait(what)
    }

    /// The kernel of this name; the context is current.
    pub(crate) fn function(&self, name: &'static str) -> Result<Function, Error> {
        if let Some(function) = self.functions.borrow().get(name) {
            return Ok(*function);
        }
        let found = images::kernel(name).and_then(|kernel| {
            let is_home = |file: &str| file == kernel.file || file == TWIN_IMAGE;
            let (_, module) = self.modules.iter().find(|(file, _)| is_home(file))?;
            Some((kernel, module))
        });
        let Some((kernel, module)) = found else {
            let (what, found) = ("kernel".into(), name.into());
            return Err(Error::Unsupported { what, found, expected: "the kernels of this build" });
        };
        let function = module.get_function(name).map_err(|_| fail("cuModuleGetFunction", name))?;
        let function = Function { raw: function.to_raw().cast(), smem: kernel.smem };
        if kernel.smem > PLAIN_SMEM {
            // SAFETY: the function belongs to a module of this device.
            unsafe { driver_ext::allow_smem(function.raw, kernel)? };
        }
        self.functions.borrow_mut().insert(name, function);
        Ok(function)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Kernels that run need their module, and modules a current context to be unloaded from.
        self.shared.settle();
    }
}

/// The devices of a driver (`libcuda.so.1` if `None`), whether or not this build has kernels for
/// them.
pub fn probe(driver: Option<&Path>) -> Result<Vec<DeviceInfo>, Error> {
    init(driver)?;
    (0..count()?).map(|index| Ok(inspect(index)?.1)).collect()
}

fn init(driver: Option<&Path>) -> Result<(), Error> {
    driver_ext::open(driver)?;
    let name = || driver.map_or(DEFAULT_DRIVER.into(), |path| path.display().to_string());
    cust::init(cust::CudaFlags::empty()).map_err(|_| fail("cuInit", name()))
}

fn count() -> Result<u32, Error> {
    cust::device::Device::num_devices().map_err(|_| fail("cuDeviceGetCount", "the driver"))
}

fn inspect(index: u32) -> Result<(cust::device::Device, DeviceInfo), Error> {
    let what = || format!("device {index}");
    let device =
        cust::device::Device::get_device(index).map_err(|_| fail("cuDeviceGet", what()))?;
    let get = |attribute: Attribute| driver_ext::attribute(&device, attribute as u32);
    let compute =
        (get(Attribute::ComputeCapabilityMajor)?, get(Attribute::ComputeCapabilityMinor)?);
    let version =
        cust::CudaApiVersion::get().map_err(|_| fail("cuDriverGetVersion", "the driver"))?;
    let info = DeviceInfo {
        index,
        name: device.name().map_err(|_| fail("cuDeviceGetName", what()))?,
        compute,
        memory: device.total_memory().map_err(|_| fail("cuDeviceTotalMem", what()))? as u64,
        n_sms: get(Attribute::MultiprocessorCount)?,
        max_smem: driver_ext::attribute(
            &device,
            cuda::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?,
        l2: get(Attribute::L2CacheSize)?,
        driver_version: (version.major().unsigned_abs(), version.minor().unsigned_abs()),
        kernels: kernels(compute),
    };
    Ok((device, info))
}

/// The architecture whose images a device runs.
fn kernels(compute: (u32, u32)) -> Result<&'static str, String> {
    if driver_ext::is_twin() {
        return Ok(TWIN_IMAGE);
    }
    let archs: Vec<_> = images::images().iter().map(|image| image.arch).collect();
    images::choose(compute, &archs).ok_or_else(|| match NO_IMAGES {
        "" => "it needs compute capability 8.0 or newer".into(),
        why => why.into(),
    })
}

fn load(arch: &'static str) -> Result<Vec<(&'static str, Module)>, Error> {
    let module = |file: &'static str, data: &[u8]| {
        let module = Module::from_fatbin(data, &[]);
        module
            .map(|m| (file, m))
            .map_err(|_| fail("cuModuleLoadDataEx", format!("{file} for {arch}")))
    };
    if arch == TWIN_IMAGE {
        return Ok(vec![module(TWIN_IMAGE, TWIN_IMAGE.as_bytes())?]);
    }
    let images = images::images().iter().filter(|image| image.arch == arch);
    images.map(|image| module(image.file, image.data)).collect()
}

//! A GPU: its context, one stream, its memory and the loaded kernels.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::blas::Blas;
use super::buffer::{Buffer, Event, Value};
use super::driver::{self, Copy2d, DevicePtr, Driver, Handle, Missing};
use super::gated::{GATED_BACK, GatedShape};

/// Oldest architecture that bf16 products and the kernels run on: Ampere.
const OLDEST: (c_int, c_int) = (8, 0);
/// Oldest driver that runs the embedded code: that of the toolkit's major version.
const OLDEST_DRIVER: c_int = 12000;

/// Machine code of the kernels; each file a fat binary.
const MODULES: [(&str, &[u8]); 6] = [
    ("rows.fatbin", include_bytes!(concat!(env!("OUT_DIR"), "/rows.fatbin"))),
    ("loss.fatbin", include_bytes!(concat!(env!("OUT_DIR"), "/loss.fatbin"))),
    ("adamw.fatbin", include_bytes!(concat!(env!("OUT_DIR"), "/adamw.fatbin"))),
    ("gated.fatbin", include_bytes!(concat!(env!("OUT_DIR"), "/gated.fatbin"))),
    ("attention.fatbin", include_bytes!(concat!(env!("OUT_DIR"), "/attention.fatbin"))),
    ("flash.fatbin", include_bytes!(concat!(env!("OUT_DIR"), "/flash.fatbin"))),
];

/// Why a GPU cannot be used, or failed; with what to do about it.
#[derive(Debug, Clone)]
pub struct CudaError {
    /// What happened.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
    /// Whether the device had no room.
    pub out_of_memory: bool,
}

impl std::fmt::Display for CudaError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CudaError {}

impl CudaError {
    pub(crate) fn new(message: impl Into<String>, hint: &str) -> Self {
        Self { message: message.into(), hint: Some(hint.to_owned()), out_of_memory: false }
    }
}

impl From<Missing> for CudaError {
    fn from(missing: Missing) -> Self {
        Self::new(missing.what, missing.hint)
    }
}

type Result<T> = std::result::Result<T, CudaError>;

/// An error of the driver by its number.
pub(super) fn check(driver: &Driver, code: c_int, doing: &str) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let text = |f: unsafe extern "C" fn(c_int, *mut *const std::ffi::c_char) -> c_int| {
        let mut text = std::ptr::null();
        // Safety: the driver gives a terminated static text, or null for an unknown number.
        unsafe {
            f(code, &mut text);
            if text.is_null() {
                None
            } else {
                Some(CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        }
    };
    let name = text(driver.error_name).unwrap_or_else(|| format!("error {code}"));
    let what = text(driver.error_text).unwrap_or_default();
    let hint = match code {
        2 => Some(
            "the GPU has no room: smaller batches, `gradient_checkpointing: true`, or a smaller model",
        ),
        35 | 803 => Some("the NVIDIA driver is too old for this program: update it"),
        100 => Some(
            "the driver sees no GPU: is one built in, and is it visible (CUDA_VISIBLE_DEVICES)?",
        ),
        209 | 218 => Some(
            "the program holds no code for this GPU: build it with `LORA_FLOW_CUDA_ARCHS` set to its compute capability",
        ),
        700 | 702 | 719 => {
            Some("the GPU cannot be used any more by this process; what was checkpointed is safe")
        }
        _ => None,
    };
    Err(CudaError {
        message: format!("the GPU failed ({doing}): {name}, {what}"),
        hint: hint.map(str::to_owned),
        out_of_memory: code == 2,
    })
}

/// What the driver says of a GPU.
#[derive(Debug, Clone)]
pub struct GpuInfo {
    /// `cuda:N`.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// Bytes of memory.
    pub memory: usize,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Version of CUDA that the driver speaks: 13000 is 13.0.
    pub driver: i32,
}

fn info(driver: &Driver, index: usize, device: c_int) -> Result<GpuInfo> {
    let mut name = [0i8; 128];
    let (mut memory, mut version) = (0usize, 0);
    let (mut major, mut minor) = (0, 0);
    // Safety: all pointers are valid for the writes.
    unsafe {
        check(driver, (driver.device_name)(name.as_mut_ptr().cast(), 127, device), "name")?;
        check(driver, (driver.device_memory)(&mut memory, device), "memory")?;
        check(driver, (driver.device_attribute)(&mut major, 75, device), "capability")?;
        check(driver, (driver.device_attribute)(&mut minor, 76, device), "capability")?;
        check(driver, (driver.version)(&mut version), "version")?;
        let name = CStr::from_ptr(name.as_ptr().cast()).to_string_lossy().into_owned();
        Ok(GpuInfo { index, name, memory, capability: (major, minor), driver: version })
    }
}

/// The GPUs of this machine.
///
/// # Errors
/// When there is no driver, or it sees no GPU.
pub fn gpus() -> Result<Vec<GpuInfo>> {
    let driver = driver::driver()?;
    let mut count = 0;
    // Safety: plain calls of the driver.
    unsafe {
        check(driver, (driver.init)(0), "start")?;
        check(driver, (driver.device_count)(&mut count), "count")?;
        let mut found = Vec::new();
        for index in 0..count {
            let mut device = 0;
            check(driver, (driver.device_get)(&mut device, index), "open")?;
            found.push(info(driver, index as usize, device)?);
        }
        Ok(found)
    }
}

/// An open GPU. Its methods queue work on one stream and return at once, except where they say
/// that they wait.
pub struct Gpu {
    pub(crate) driver: &'static Driver,
    info: GpuInfo,
    device: c_int,
    pub(super) context: Handle,
    pub(crate) stream: Handle,
    modules: Vec<Handle>,
    functions: HashMap<String, Handle>,
    flash: [FlashShape; 6],
    /// How [`super::gated`] is launched, where the device has the shared memory for it.
    pub(super) gated: Option<GatedShape>,
    /// Multiprocessors.
    pub(super) processors: usize,
    pub(crate) blas: Mutex<Blas>,
    pub(super) used: AtomicU64,
    peak: AtomicU64,
    /// What ran and the marks around it, while somebody asks.
    pub(super) profile: Mutex<Option<Vec<(String, Handle, Handle)>>>,
}

// Safety: handles of the driver may be used from any thread whose current context is set, which
// every call does; `Blas` is behind a lock.
unsafe impl Send for Gpu {}
unsafe impl Sync for Gpu {}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu(cuda:{}, {})", self.info.index, self.info.name)
    }
}

/// Passes of the fast attention.
const FLASH_PASSES: [&str; 3] = ["fwd", "dq", "dkv"];

/// How a kernel of the fast attention is launched.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct FlashShape {
    /// Rows of one block: queries, or keys for dk and dv.
    pub(crate) rows: usize,
    pub(crate) threads: u32,
    pub(crate) shared: usize,
    /// Rows of the other operand's block; 0 where the kernel takes addresses, not maps.
    pub(crate) block: usize,
}

/// Kernels that there are for f32 and for bf16.
const KERNELS: &[&str] = &[
    "gather",
    "rms_fwd",
    "rms_again",
    "rms_bwd",
    "add_bias",
    "head_norm",
    "head_norm_bwd",
    "rope",
    "gated_fwd",
    "gated_bwd",
    "copy2d",
    "dropout",
    "fill_uniform",
    "checksum",
    "cross_entropy",
    "adamw",
    "place",
    "attn_fwd",
    "attn_delta",
    "attn_dq",
    "attn_dkv",
];

impl Gpu {
    /// Opens a GPU by its index.
    ///
    /// # Errors
    /// When there is no driver or it is too old, no such GPU, one too old, no cuBLASLt, or the GPU
    /// does not answer.
    pub fn open(index: usize) -> Result<Arc<Self>> {
        let found = gpus()?;
        let Some(info) = found.get(index).cloned() else {
            return Err(CudaError::new(
                match found.len() {
                    0 => "this machine has no NVIDIA GPU".to_owned(),
                    1 => format!("there is no GPU {index}: this machine has one, `cuda:0`"),
                    n => format!(
                        "there is no GPU {index}: this machine has {n}, `cuda:0` to `cuda:{}`",
                        n - 1
                    ),
                },
                "`lora-flow doctor` lists the GPUs",
            ));
        };
        if info.driver < OLDEST_DRIVER {
            return Err(CudaError::new(
                format!(
                    "the NVIDIA driver is too old: it speaks CUDA {}.{}, {}.0 is needed",
                    info.driver / 1000,
                    info.driver % 1000 / 10,
                    OLDEST_DRIVER / 1000
                ),
                "update the driver",
            ));
        }
        if info.capability < OLDEST {
            let (major, minor) = info.capability;
            return Err(CudaError::new(
                format!(
                    "GPU {index} ({}) has compute capability {major}.{minor}, {}.{} is needed",
                    info.name, OLDEST.0, OLDEST.1
                ),
                "use a GPU of the Ampere generation or newer, or `--device cpu`",
            ));
        }
        let driver = driver::driver()?;
        let (mut device, mut context, mut stream) = (0, std::ptr::null_mut(), std::ptr::null_mut());
        // Safety: plain calls of the driver with valid pointers.
        unsafe {
            check(driver, (driver.device_get)(&mut device, index as c_int), "open")?;
            check(driver, (driver.context_retain)(&mut context, device), "open")?;
            check(driver, (driver.context_set)(context), "open")?;
            // 1: the stream does not wait for the legacy default stream.
            check(driver, (driver.stream_create)(&mut stream, 1), "open a stream")?;
        }
        let mut gpu = Self {
            driver,
            info,
            device,
            context,
            stream,
            modules: Vec::new(),
            functions: HashMap::new(),
            flash: Default::default(),
            gated: None,
            processors: 1,
            blas: Mutex::new(Blas::none()),
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            profile: Mutex::new(None),
        };
        gpu.load_kernels()?;
        let gpu = Arc::new(gpu);
        let blas = Blas::new(&gpu)?;
        *gpu.blas.lock().unwrap_or_else(PoisonError::into_inner) = blas;
        Ok(gpu)
    }

    fn load_kernels(&mut self) -> Result<()> {
        // Other builds of the kernels, to try them without building the program again.
        let other = std::env::var_os("LORA_FLOW_CUDA_KERNELS").map(std::path::PathBuf::from);
        for (name, image) in MODULES {
            let mut module = std::ptr::null_mut();
            let found = other.as_ref().and_then(|dir| std::fs::read(dir.join(name)).ok());
            let image = found.as_deref().unwrap_or(image);
            // Safety: the image is a complete fat binary.
            let code = unsafe { (self.driver.module_load)(&mut module, image.as_ptr().cast()) };
            check(self.driver, code, "load the kernels")?;
            self.modules.push(module);
        }
        let both = |name: &&str| [format!("{name}_f32"), format!("{name}_bf16")];
        let flash = FLASH_PASSES
            .into_iter()
            .flat_map(|pass| [64, 128].map(|dim| format!("flash_{pass}_{dim}")));
        let single = ["grad_squares", "clip_factor", "gated_low", "gated_thin"];
        let single = single.into_iter().chain(GATED_BACK).map(str::to_owned);
        for name in KERNELS.iter().flat_map(both).chain(flash).chain(single) {
            let c_name =
                CString::new(name.as_str()).map_err(|e| CudaError::new(e.to_string(), ""))?;
            let mut function = std::ptr::null_mut();
            // Safety: module and name are valid.
            let found = self.modules.iter().any(|module| unsafe {
                (self.driver.module_function)(&mut function, *module, c_name.as_ptr()) == 0
            });
            if !found {
                return Err(CudaError::new(
                    format!("the program has no kernel `{name}`"),
                    "this is a bug",
                ));
            }
            self.functions.insert(name, function);
        }
        let shapes = self.table::<24>(c"flash_shapes")?;
        for (i, shape) in shapes.chunks(4).enumerate() {
            let shape = FlashShape {
                rows: shape[0] as usize,
                threads: shape[1] as u32,
                shared: shape[2] as usize,
                block: shape[3] as usize,
            };
            self.flash[i] = shape;
            let name = format!("flash_{}_{}", FLASH_PASSES[i % 3], [64, 128][i / 3]);
            self.allow_shared(&name, shape.shared)?;
        }
        let [tokens, columns, threads, shared] = self.table::<4>(c"gated_shape")?;
        let shared = shared as usize;
        let (mut most, mut processors) = (0, 0);
        // Safety: valid pointers; 97: the most shared memory of a block, 16: multiprocessors.
        unsafe {
            let ask = self.driver.device_attribute;
            check(self.driver, ask(&mut most, 97, self.device), "shared memory")?;
            check(self.driver, ask(&mut processors, 16, self.device), "multiprocessors")?;
        }
        self.processors = processors.max(1) as usize;
        if most as usize >= shared {
            for name in GATED_BACK {
                self.allow_shared(name, shared)?;
            }
            let (tokens, columns) = (tokens as usize, columns as usize);
            self.gated = Some(GatedShape { tokens, columns, threads: threads as u32, shared });
        }
        Ok(())
    }

    /// A table of numbers that a module holds under this name.
    fn table<const N: usize>(&self, name: &CStr) -> Result<[i32; N]> {
        let (mut at, mut bytes) = (0, 0);
        // Safety: modules and name are valid.
        let found = self.modules.iter().any(|module| unsafe {
            (self.driver.module_global)(&mut at, &mut bytes, *module, name.as_ptr()) == 0
        });
        if !found || bytes != size_of::<[i32; N]>() {
            let name = name.to_string_lossy();
            return Err(CudaError::new(
                format!("the program has no table `{name}`"),
                "this is a bug",
            ));
        }
        let mut table = [0; N];
        self.read(at, &mut table)?;
        Ok(table)
    }

    /// Lets a kernel have so many bytes of shared memory.
    fn allow_shared(&self, name: &str, bytes: usize) -> Result<()> {
        // Safety: the function is loaded; 8 is the limit of dynamic shared memory.
        let code = unsafe { (self.driver.function_set)(self.functions[name], 8, bytes as c_int) };
        check(self.driver, code, "set the shared memory")
    }

    /// Rows of a block of the fast attention for a head width: of queries forward, of queries for
    /// dq, of keys for dk and dv. `None` if it does not take the width.
    pub fn flash_rows(&self, dim: usize) -> Option<[usize; 3]> {
        let first = match dim {
            64 => 0,
            128 => 3,
            _ => return None,
        };
        Some([0, 1, 2].map(|pass| self.flash[first + pass].rows))
    }

    /// Pass 0, 1 or 2 of [`Self::flash_rows`]; `dim` is 64 or 128.
    pub(crate) fn flash(&self, dim: usize, pass: usize) -> FlashShape {
        self.flash[if dim == 64 { pass } else { 3 + pass }]
    }

    /// What the driver says of it.
    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// Bytes that this program holds on it, and the most it has held.
    pub fn memory(&self) -> (u64, u64) {
        (self.used.load(Ordering::Relaxed), self.peak.load(Ordering::Relaxed))
    }

    /// Free and total bytes, as the driver sees them.
    ///
    /// # Errors
    /// When the GPU failed.
    pub fn free_memory(&self) -> Result<(usize, usize)> {
        let (mut free, mut total) = (0, 0);
        self.enter()?;
        // Safety: valid pointers.
        check(self.driver, unsafe { (self.driver.memory_info)(&mut free, &mut total) }, "memory")?;
        Ok((free, total))
    }

    /// Makes the context current in the calling thread.
    pub(crate) fn enter(&self) -> Result<()> {
        // Safety: the context lives as long as `self`.
        check(self.driver, unsafe { (self.driver.context_set)(self.context) }, "enter")
    }

    /// Memory for `len` values; not set to anything.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn alloc<T: Value>(self: &Arc<Self>, len: usize) -> Result<Buffer<T>> {
        let bytes = (len * size_of::<T>()).max(16);
        let mut at = 0;
        self.enter()?;
        // Safety: a valid pointer.
        let code = unsafe { (self.driver.alloc)(&mut at, bytes) };
        if code == 2 {
            let (free, total) = self.free_memory()?;
            let gib = |b: usize| b as f64 / (1u64 << 30) as f64;
            return Err(CudaError {
                message: format!(
                    "out of memory on `cuda:{}`: {:.2} GiB asked for, {:.2} GiB of {:.1} free, {:.2} GiB held by this program",
                    self.info.index, gib(bytes), gib(free), gib(total), gib(self.memory().0 as usize)
                ),
                hint: Some("smaller batches, shorter rows, or `gradient_checkpointing: true` take less memory".into()),
                out_of_memory: true,
            });
        }
        check(self.driver, code, "allocate")?;
        let used = self.used.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.peak.fetch_max(used, Ordering::Relaxed);
        Ok(Buffer { gpu: self.clone(), at, len, bytes, of: PhantomData })
    }

    /// Memory of zeros.
    ///
    /// # Errors
    /// When the device has no room or failed.
    pub fn zeros<T: Value>(self: &Arc<Self>, len: usize) -> Result<Buffer<T>> {
        let buffer = self.alloc(len)?;
        self.fill_bytes(buffer.at, 0, buffer.bytes)?;
        Ok(buffer)
    }

    /// Memory with these values. Waits.
    ///
    /// # Errors
    /// When the device has no room or failed.
    pub fn upload<T: Value>(self: &Arc<Self>, values: &[T]) -> Result<Buffer<T>> {
        let buffer = self.alloc(values.len())?;
        self.write(buffer.at, values)?;
        Ok(buffer)
    }

    /// Copies values to device memory that holds at least as many. Waits.
    ///
    /// # Errors
    /// When the device failed.
    pub fn write<T: Value>(&self, at: DevicePtr, values: &[T]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        self.enter()?;
        // Safety: the caller's memory is read before this returns, as it waits.
        let code = unsafe {
            (self.driver.to_device)(at, values.as_ptr().cast(), size_of_val(values), self.stream)
        };
        check(self.driver, code, "copy to the GPU")?;
        self.wait()
    }

    /// Copies device memory into values. Waits.
    ///
    /// # Errors
    /// When the device failed.
    pub fn read<T: Value>(&self, at: DevicePtr, values: &mut [T]) -> Result<()> {
        if values.is_empty() {
            return self.wait();
        }
        self.enter()?;
        // Safety: as many bytes as `values` holds, written before this returns.
        let code = unsafe {
            (self.driver.to_host)(values.as_mut_ptr().cast(), at, size_of_val(values), self.stream)
        };
        check(self.driver, code, "copy from the GPU")?;
        self.wait()
    }

    /// Sets bytes.
    ///
    /// # Errors
    /// When the device failed.
    pub fn fill_bytes(&self, at: DevicePtr, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // Safety: the range lies in one allocation of the caller.
        let code = unsafe { (self.driver.set_bytes)(at, byte, bytes, self.stream) };
        check(self.driver, code, "clear")
    }

    /// Copies `rows` rows of `width` bytes within the device.
    ///
    /// # Errors
    /// When the device failed.
    pub fn copy_rows(
        &self,
        to: (DevicePtr, usize),
        from: (DevicePtr, usize),
        width: usize,
        rows: usize,
    ) -> Result<()> {
        const DEVICE: c_uint = 2;
        let copy = Copy2d {
            src_type: DEVICE,
            src_device: from.0,
            src_pitch: from.1,
            dst_type: DEVICE,
            dst_device: to.0,
            dst_pitch: to.1,
            width,
            height: rows,
            ..Copy2d::default()
        };
        self.copy_2d(&copy)
    }

    /// Copies rows of `width` bytes, one after the other in `values`, to rows `pitch` bytes apart.
    /// Waits.
    ///
    /// # Errors
    /// When the device failed.
    pub fn write_rows(&self, to: (DevicePtr, usize), values: &[u8], width: usize) -> Result<()> {
        if width == 0 {
            return Ok(());
        }
        let copy = Copy2d {
            src_type: 1,
            src_host: values.as_ptr() as usize,
            src_pitch: width,
            dst_type: 2,
            dst_device: to.0,
            dst_pitch: to.1,
            width,
            height: values.len() / width,
            ..Copy2d::default()
        };
        self.copy_2d(&copy)?;
        self.wait()
    }

    fn copy_2d(&self, copy: &Copy2d) -> Result<()> {
        if copy.height == 0 || copy.width == 0 {
            return Ok(());
        }
        self.enter()?;
        // Safety: the ranges lie in allocations of the caller.
        check(self.driver, unsafe { (self.driver.copy_2d)(copy, self.stream) }, "copy rows")
    }

    /// Waits until all queued work is done.
    ///
    /// # Errors
    /// When any of it failed.
    pub fn wait(&self) -> Result<()> {
        self.enter()?;
        // Safety: a valid stream.
        check(self.driver, unsafe { (self.driver.stream_wait)(self.stream) }, "run")
    }

    /// Launches a kernel. The context must be current ([`Self::enter`]).
    pub(crate) fn launch(
        &self,
        name: &str,
        grid: (u32, u32),
        threads: u32,
        shared: usize,
        args: &mut [*mut c_void],
    ) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        self.noted(
            || name.to_owned(),
            || {
                // Safety: the callers in `ops` pass what the kernel declares.
                let code = unsafe {
                    (self.driver.launch)(
                        self.functions[name],
                        grid.0,
                        grid.1,
                        1,
                        threads,
                        1,
                        1,
                        shared as c_uint,
                        self.stream,
                        args.as_mut_ptr(),
                        std::ptr::null_mut(),
                    )
                };
                check(self.driver, code, name)
            },
        )
    }

    /// A mark in the stream, to time what lies between two.
    ///
    /// # Errors
    /// When the device failed.
    pub fn mark(self: &Arc<Self>) -> Result<Event> {
        self.enter()?;
        let mut event = std::ptr::null_mut();
        // Safety: valid pointers.
        unsafe {
            check(self.driver, (self.driver.event_create)(&mut event, 0), "mark")?;
            check(self.driver, (self.driver.event_record)(event, self.stream), "mark")?;
        }
        Ok(Event { gpu: self.clone(), event })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Safety: nothing uses the handles any more. Errors have nobody to go to.
        unsafe {
            (self.driver.context_set)(self.context);
            if let Ok(blas) = self.blas.get_mut() {
                blas.close(self.driver);
            }
            for module in &self.modules {
                (self.driver.module_unload)(*module);
            }
            (self.driver.stream_destroy)(self.stream);
            (self.driver.context_release)(self.device);
        }
    }
}

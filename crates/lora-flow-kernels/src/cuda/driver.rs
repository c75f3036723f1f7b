//! The CUDA driver and cuBLASLt, looked up when a GPU is first asked for: a program built with CUDA
//! starts on a machine that has neither.

#![allow(non_snake_case)]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// Address in the memory of a device.
pub type DevicePtr = u64;
/// An opaque handle of the driver or of cuBLASLt.
pub type Handle = *mut c_void;

/// What the caller can say about a library that is not there.
pub(crate) struct Missing {
    pub(crate) what: String,
    pub(crate) hint: &'static str,
}

/// An open shared library. Never closed: its functions live in statics.
struct Library(Handle);

impl Library {
    fn open(names: &[String]) -> Result<Self, String> {
        let mut first = None;
        for name in names {
            let Ok(c_name) = CString::new(name.as_str()) else { continue };
            // Safety: a terminated name; the loader runs the library's initialisers.
            let handle =
                unsafe { libc::dlopen(c_name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
            if !handle.is_null() {
                return Ok(Self(handle));
            }
            // Safety: dlerror gives a terminated text or null.
            let text = unsafe { libc::dlerror() };
            if !text.is_null() {
                let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
                first.get_or_insert(text);
            }
        }
        Err(first.unwrap_or_else(|| "not found".into()))
    }

    fn symbol(&self, name: &str) -> Result<Handle, String> {
        let c_name = CString::new(name).map_err(|e| e.to_string())?;
        // Safety: the handle is open, the name terminated.
        let address = unsafe { libc::dlsym(self.0, c_name.as_ptr()) };
        if address.is_null() { Err(format!("it has no `{name}`")) } else { Ok(address) }
    }
}

/// Declares a table of functions that [`Library`] fills.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $($field:ident = $symbol:literal ( $($arg:ty),* );)* }) => {
        $(#[$doc])*
        pub(crate) struct $table {
            $(pub(crate) $field: unsafe extern "C" fn($($arg),*) -> c_int,)*
        }
        impl $table {
            fn load(library: &Library) -> Result<Self, String> {
                Ok(Self {
                    // Safety: the signature is that of the header for this symbol.
                    $($field: unsafe {
                        std::mem::transmute::<Handle, unsafe extern "C" fn($($arg),*) -> c_int>(
                            library.symbol($symbol)?,
                        )
                    },)*
                })
            }
        }
    };
}

functions! {
    /// Functions of `libcuda.so.1`, all of CUDA 12 or older.
    Driver {
        init = "cuInit"(c_uint);
        version = "cuDriverGetVersion"(*mut c_int);
        error_name = "cuGetErrorName"(c_int, *mut *const c_char);
        error_text = "cuGetErrorString"(c_int, *mut *const c_char);
        device_count = "cuDeviceGetCount"(*mut c_int);
        device_get = "cuDeviceGet"(*mut c_int, c_int);
        device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
        device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
        device_memory = "cuDeviceTotalMem_v2"(*mut usize, c_int);
        context_retain = "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
        context_release = "cuDevicePrimaryCtxRelease_v2"(c_int);
        context_set = "cuCtxSetCurrent"(Handle);
        memory_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
        alloc = "cuMemAlloc_v2"(*mut DevicePtr, usize);
        free = "cuMemFree_v2"(DevicePtr);
        to_device = "cuMemcpyHtoDAsync_v2"(DevicePtr, *const c_void, usize, Handle);
        to_host = "cuMemcpyDtoHAsync_v2"(*mut c_void, DevicePtr, usize, Handle);
        host_alloc = "cuMemHostAlloc"(*mut *mut c_void, usize, c_uint);
        host_free = "cuMemFreeHost"(*mut c_void);
        copy_2d = "cuMemcpy2DAsync_v2"(*const Copy2d, Handle);
        set_bytes = "cuMemsetD8Async"(DevicePtr, u8, usize, Handle);
        stream_create = "cuStreamCreate"(*mut Handle, c_uint);
        stream_destroy = "cuStreamDestroy_v2"(Handle);
        stream_wait = "cuStreamSynchronize"(Handle);
        stream_wait_event = "cuStreamWaitEvent"(Handle, Handle, c_uint);
        event_create = "cuEventCreate"(*mut Handle, c_uint);
        event_destroy = "cuEventDestroy_v2"(Handle);
        event_record = "cuEventRecord"(Handle, Handle);
        event_elapsed = "cuEventElapsedTime"(*mut f32, Handle, Handle);
        module_load = "cuModuleLoadData"(*mut Handle, *const c_void);
        module_unload = "cuModuleUnload"(Handle);
        module_function = "cuModuleGetFunction"(*mut Handle, Handle, *const c_char);
        module_global = "cuModuleGetGlobal_v2"(*mut DevicePtr, *mut usize, Handle, *const c_char);
        function_set = "cuFuncSetAttribute"(Handle, c_int, c_int);
        tensor_map = "cuTensorMapEncodeTiled"(
            *mut TensorMap, c_int, c_uint, DevicePtr, *const u64, *const u64, *const c_uint, *const c_uint,
            c_int, c_int, c_int, c_int
        );
        launch = "cuLaunchKernel"(
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle,
            *mut *mut c_void, *mut *mut c_void
        );
    }
}

functions! {
    /// Functions of `libcublasLt`.
    BlasLt {
        create = "cublasLtCreate"(*mut Handle);
        destroy = "cublasLtDestroy"(Handle);
        desc_create = "cublasLtMatmulDescCreate"(*mut Handle, c_int, c_int);
        desc_destroy = "cublasLtMatmulDescDestroy"(Handle);
        desc_set = "cublasLtMatmulDescSetAttribute"(Handle, c_int, *const c_void, usize);
        layout_create = "cublasLtMatrixLayoutCreate"(*mut Handle, c_int, u64, u64, i64);
        layout_destroy = "cublasLtMatrixLayoutDestroy"(Handle);
        preference_create = "cublasLtMatmulPreferenceCreate"(*mut Handle);
        preference_destroy = "cublasLtMatmulPreferenceDestroy"(Handle);
        preference_set = "cublasLtMatmulPreferenceSetAttribute"(Handle, c_int, *const c_void, usize);
        heuristic = "cublasLtMatmulAlgoGetHeuristic"(
            Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Heuristic, *mut c_int
        );
        matmul = "cublasLtMatmul"(
            Handle, Handle, *const c_void, DevicePtr, Handle, DevicePtr, Handle, *const c_void,
            DevicePtr, Handle, DevicePtr, Handle, *const Algo, DevicePtr, usize, Handle
        );
    }
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct Copy2d {
    pub(crate) src_x: usize,
    pub(crate) src_y: usize,
    pub(crate) src_type: c_uint,
    pub(crate) src_host: usize,
    pub(crate) src_device: DevicePtr,
    pub(crate) src_array: usize,
    pub(crate) src_pitch: usize,
    pub(crate) dst_x: usize,
    pub(crate) dst_y: usize,
    pub(crate) dst_type: c_uint,
    pub(crate) dst_host: usize,
    pub(crate) dst_device: DevicePtr,
    pub(crate) dst_array: usize,
    pub(crate) dst_pitch: usize,
    pub(crate) width: usize,
    pub(crate) height: usize,
}

/// `CUtensorMap`: a matrix as Hopper's copy engine wants it described.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct TensorMap(pub(crate) [u64; 16]);

/// `cublasLtMatmulAlgo_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Algo(pub(crate) [u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Heuristic {
    pub(crate) algo: Algo,
    pub(crate) workspace: usize,
    pub(crate) state: c_int,
    pub(crate) waves: f32,
    pub(crate) reserved: [c_int; 4],
}

/// The driver, if this machine has one.
pub(crate) fn driver() -> Result<&'static Driver, Missing> {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    let found = DRIVER.get_or_init(|| {
        let names = [
            "libcuda.so.1",
            "/usr/local/nvidia/lib64/libcuda.so.1",
            "/usr/lib/wsl/lib/libcuda.so.1",
        ];
        Driver::load(&Library::open(&names.map(str::to_owned))?)
    });
    found.as_ref().map_err(|e| Missing {
        what: format!("there is no usable NVIDIA driver: {e}"),
        hint: "install the NVIDIA driver (it brings libcuda.so.1), or use `--device cpu`",
    })
}

/// cuBLASLt, if this machine has it.
pub(crate) fn blas() -> Result<&'static BlasLt, Missing> {
    static BLAS: OnceLock<Result<BlasLt, String>> = OnceLock::new();
    let found = BLAS.get_or_init(|| {
        let mut names: Vec<String> = Vec::new();
        let folders = ["CUDA_HOME", "CUDA_PATH"].map(std::env::var).into_iter().flatten();
        let folders: Vec<String> = folders
            .flat_map(|home| [format!("{home}/lib64/"), format!("{home}/lib/")])
            .chain(["/usr/local/cuda/lib64/".to_owned()])
            .collect();
        for version in [13, 12] {
            names.push(format!("libcublasLt.so.{version}"));
            names.extend(folders.iter().map(|dir| format!("{dir}libcublasLt.so.{version}")));
        }
        BlasLt::load(&Library::open(&names)?)
    });
    found.as_ref().map_err(|e| Missing {
        what: format!("cuBLASLt is not usable: {e}"),
        hint: "install the CUDA toolkit's cuBLAS 12 or 13 (package libcublas or \
               `pip install nvidia-cublas`) and put its folder into LD_LIBRARY_PATH",
    })
}

//! Memory of a device, the values it holds, and marks in its stream.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::driver::{DevicePtr, Handle};
use super::gpu::{CudaError, Gpu, check};

type Result<T> = std::result::Result<T, CudaError>;

/// A mark in the stream.
pub struct Event {
    pub(super) gpu: Arc<Gpu>,
    pub(super) event: Handle,
}

// Safety: as for `Gpu`.
unsafe impl Send for Event {}

impl Event {
    /// Milliseconds from `earlier` to this; both must have been reached.
    ///
    /// # Errors
    /// When the device failed.
    pub fn since(&self, earlier: &Self) -> Result<f32> {
        let mut ms = 0.0;
        self.gpu.enter()?;
        // Safety: valid pointers and events.
        let code = unsafe { (self.gpu.driver.event_elapsed)(&mut ms, earlier.event, self.event) };
        check(self.gpu.driver, code, "time")?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // Safety: the event is ours.
        unsafe { (self.gpu.driver.event_destroy)(self.event) };
    }
}

/// Plain values that travel to and from a device.
pub trait Value: Copy {}
impl Value for u8 {}
impl Value for i32 {}
impl Value for u64 {}
impl Value for f32 {}
impl Value for f64 {}
impl Value for half::bf16 {}

/// Memory of a device, freed when dropped.
pub struct Buffer<T> {
    pub(super) gpu: Arc<Gpu>,
    pub(super) at: DevicePtr,
    pub(super) len: usize,
    pub(super) bytes: usize,
    pub(super) of: PhantomData<fn() -> T>,
}

impl<T> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes)
    }
}

impl<T: Value> Buffer<T> {
    /// Address of the first value.
    pub fn ptr(&self) -> DevicePtr {
        self.at
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The values. Waits.
    ///
    /// # Errors
    /// When the device failed.
    pub fn to_vec(&self) -> Result<Vec<T>>
    where
        T: Default,
    {
        let mut values = vec![T::default(); self.len];
        self.gpu.read(self.at, &mut values)?;
        Ok(values)
    }

    /// Copies the first values in. Waits.
    ///
    /// # Errors
    /// When there are too many, or the device failed.
    pub fn write(&self, values: &[T]) -> Result<()> {
        if values.len() > self.len {
            return Err(CudaError::new("a buffer on the GPU is too small", "this is a bug"));
        }
        self.gpu.write(self.at, values)
    }

    /// Sets all bytes to zero.
    ///
    /// # Errors
    /// When the device failed.
    pub fn clear(&self) -> Result<()> {
        self.gpu.fill_bytes(self.at, 0, self.bytes)
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        self.gpu.used.fetch_sub(self.bytes as u64, Ordering::Relaxed);
        // Safety: the memory is ours; freeing waits for work that uses it.
        unsafe {
            (self.gpu.driver.context_set)(self.gpu.context);
            (self.gpu.driver.free)(self.at);
        }
    }
}

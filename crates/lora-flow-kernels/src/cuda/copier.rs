//! Copies between a GPU and pinned memory of the host that run beside the kernels, on a stream of
//! their own.

use std::ffi::c_void;
use std::sync::Arc;

use super::driver::{DevicePtr, Handle};
use super::gpu::{CudaError, Gpu, check};

type Result<T> = std::result::Result<T, CudaError>;

/// Pinned memory of the host. Freed when dropped, once the kernels queued until then are done.
pub struct HostBuffer {
    gpu: Arc<Gpu>,
    at: *mut c_void,
    bytes: usize,
}

// Safety: plain memory, which only the device touches.
unsafe impl Send for HostBuffer {}
unsafe impl Sync for HostBuffer {}

impl HostBuffer {
    /// Its address for kernels, which read it over the bus.
    pub fn ptr(&self) -> DevicePtr {
        // Host and device share one space of addresses wherever pinned memory can be had.
        self.at as DevicePtr
    }

    /// Where each part stands.
    fn places(
        &self,
        parts: &[(DevicePtr, usize)],
    ) -> Result<Vec<(*mut c_void, (DevicePtr, usize))>> {
        self.gpu.enter()?;
        let mut at = 0;
        let mut places = Vec::with_capacity(parts.len());
        for part in parts {
            places.push((self.at.wrapping_byte_add(at), *part));
            at += part.1;
        }
        if at > self.bytes {
            return Err(CudaError::new("a buffer on the host is too small", "this is a bug"));
        }
        Ok(places)
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        // Safety: the memory is ours; copies were waited for (`Copier::drop`), kernels are now.
        unsafe {
            (self.gpu.driver.context_set)(self.gpu.context);
            (self.gpu.driver.stream_wait)(self.gpu.stream);
            (self.gpu.driver.host_free)(self.at);
        }
    }
}

/// A point in one stream that the other can wait for.
struct Point {
    event: Handle,
    gpu: Arc<Gpu>,
}

impl Drop for Point {
    fn drop(&mut self) {
        // Safety: the event is ours.
        unsafe { (self.gpu.driver.event_destroy)(self.event) };
    }
}

/// The stream of copies, and for each of `count` numbered things the points that kernels and copies
/// have reached with it.
pub struct Copier {
    gpu: Arc<Gpu>,
    stream: Handle,
    worked: Vec<Point>,
    copied: Vec<Point>,
}

// Safety: as for `Gpu`.
unsafe impl Send for Copier {}

impl Drop for Copier {
    fn drop(&mut self) {
        // Safety: the stream is ours; waiting first, so that no copy outlives its memory.
        unsafe {
            (self.gpu.driver.context_set)(self.gpu.context);
            (self.gpu.driver.stream_wait)(self.stream);
            (self.gpu.driver.stream_destroy)(self.stream);
        }
    }
}

impl Copier {
    /// A stream of copies for `count` things.
    ///
    /// # Errors
    /// When the device failed.
    pub fn new(gpu: &Arc<Gpu>, count: usize) -> Result<Self> {
        gpu.enter()?;
        let mut stream = std::ptr::null_mut();
        // Safety: a valid pointer; 1: it does not wait for the legacy default stream.
        check(gpu.driver, unsafe { (gpu.driver.stream_create)(&mut stream, 1) }, "open a stream")?;
        let mut copier = Self { gpu: gpu.clone(), stream, worked: Vec::new(), copied: Vec::new() };
        for _ in 0..count {
            copier.worked.push(copier.point()?);
            copier.copied.push(copier.point()?);
        }
        Ok(copier)
    }

    fn point(&self) -> Result<Point> {
        let mut event = std::ptr::null_mut();
        // Safety: a valid pointer; 2: the time is not taken.
        let code = unsafe { (self.gpu.driver.event_create)(&mut event, 2) };
        check(self.gpu.driver, code, "mark")?;
        Ok(Point { event, gpu: self.gpu.clone() })
    }

    fn record(&self, point: &Point, stream: Handle) -> Result<()> {
        self.gpu.enter()?;
        // Safety: both are ours.
        let code = unsafe { (self.gpu.driver.event_record)(point.event, stream) };
        check(self.gpu.driver, code, "mark")
    }

    fn wait(&self, point: &Point, stream: Handle) -> Result<()> {
        self.gpu.enter()?;
        // Safety: both are ours.
        let code = unsafe { (self.gpu.driver.stream_wait_event)(stream, point.event, 0) };
        check(self.gpu.driver, code, "wait for a mark")
    }

    /// Pinned memory; `None` where the host has no room.
    pub fn host(&self, bytes: usize) -> Option<HostBuffer> {
        let mut at = std::ptr::null_mut();
        self.gpu.enter().ok()?;
        // Safety: a valid pointer.
        let code = unsafe { (self.gpu.driver.host_alloc)(&mut at, bytes, 0) };
        (code == 0).then(|| HostBuffer { gpu: self.gpu.clone(), at, bytes })
    }

    /// The kernels queued so far are those that thing `i` waits for.
    ///
    /// # Errors
    /// When the device failed.
    pub fn worked(&self, i: usize) -> Result<()> {
        self.record(&self.worked[i], self.gpu.stream)
    }

    /// Copies queued from here on wait for the kernels of [`Self::worked`].
    ///
    /// # Errors
    /// When the device failed.
    pub fn after_work(&self, i: usize) -> Result<()> {
        self.wait(&self.worked[i], self.stream)
    }

    /// Kernels queued from here on wait for the last copy of thing `i`.
    ///
    /// # Errors
    /// When the device failed.
    pub fn after_copy(&self, i: usize) -> Result<()> {
        self.wait(&self.copied[i], self.gpu.stream)
    }

    /// The copies queued so far are those that [`Self::after_copy`] waits for with `i`.
    ///
    /// # Errors
    /// When the device failed.
    pub fn copied(&self, i: usize) -> Result<()> {
        self.record(&self.copied[i], self.stream)
    }

    /// Queues a copy of thing `i` to the host: places and their bytes, one behind the other there.
    ///
    /// # Errors
    /// When they are more than the host's memory, or the device failed.
    pub fn send(&self, i: usize, to: &HostBuffer, parts: &[(DevicePtr, usize)]) -> Result<()> {
        for (host, (from, bytes)) in to.places(parts)? {
            // Safety: `bytes` bytes at both ends; the copier waits before the host's memory goes.
            let code = unsafe { (self.gpu.driver.to_host)(host, from, bytes, self.stream) };
            check(self.gpu.driver, code, "copy from the GPU")?;
        }
        self.copied(i)
    }

    /// Queues a copy of thing `i` back to the device, to places of the same sizes.
    ///
    /// # Errors
    /// When they are more than the host's memory, or the device failed.
    pub fn fetch(&self, i: usize, parts: &[(DevicePtr, usize)], from: &HostBuffer) -> Result<()> {
        for (host, (to, bytes)) in from.places(parts)? {
            // Safety: as above.
            let code = unsafe { (self.gpu.driver.to_device)(to, host, bytes, self.stream) };
            check(self.gpu.driver, code, "copy to the GPU")?;
        }
        self.copied(i)
    }

    /// Waits for all copies.
    ///
    /// # Errors
    /// When any failed.
    pub fn finish(&self) -> Result<()> {
        self.gpu.enter()?;
        // Safety: a valid stream.
        check(self.gpu.driver, unsafe { (self.gpu.driver.stream_wait)(self.stream) }, "copy")
    }
}

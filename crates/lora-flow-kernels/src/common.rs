//! Access to tensors as slices, argument checks, and the dtype that references compute in.

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};
use std::ops::{Deref, DerefMut, Range};

/// True if all tensors are `f32` on the CPU, so that the fused path can take them.
pub(crate) fn all_cpu_f32(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.dtype() == DType::F32 && t.device().is_cpu())
}

/// The dtype that the plain references compute in: `f64` for `f64`, else `f32`.
pub(crate) fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// `tensor` in the dtype that references compute in.
pub(crate) fn widen(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_dtype(wide(tensor.dtype()))
}

/// A contiguous CPU tensor seen as a slice of `f32`. Holds the read lock of its storage.
pub(crate) struct View<'a> {
    storage: Guard<'a>,
    range: Range<usize>,
    name: &'static str,
}

type Guard<'a> = candle_core::StorageRef<'a>;

impl<'a> View<'a> {
    /// Locks `tensor`; `name` is its name in errors.
    pub(crate) fn new(tensor: &'a Tensor, name: &'static str) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!(
                "`{name}` must be contiguous, its shape is {:?} with strides {:?}",
                layout.dims(),
                layout.stride()
            )
        };
        Ok(Self { storage, range: start..end, name })
    }

    /// The elements in row-major order.
    pub(crate) fn f32(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => Ok(&values[self.range.clone()]),
            _ => bail!("`{}` must be f32 on the CPU", self.name),
        }
    }

    /// The elements in row-major order, of a `bf16` tensor.
    pub(crate) fn bf16(&self) -> Result<&[half::bf16]> {
        match &*self.storage {
            Storage::Cpu(CpuStorage::BF16(values)) => Ok(&values[self.range.clone()]),
            _ => bail!("`{}` must be bf16 on the CPU", self.name),
        }
    }
}

/// A CPU tensor from its elements.
pub(crate) fn tensor(values: Vec<f32>, dims: &[usize]) -> Result<Tensor> {
    Tensor::from_vec(values, dims, &Device::Cpu)
}

/// A vector of `len` zeros from memory that the system has already zeroed.
pub(crate) fn zeros(len: usize) -> Vec<f32> {
    vec![0.0; len]
}

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Zeros that begin at a cache line, for buffers that are read in whole vectors.
#[derive(Clone)]
pub(crate) struct Aligned {
    lines: Vec<Line>,
    len: usize,
}

impl Aligned {
    pub(crate) fn zeros(len: usize) -> Self {
        Self { lines: vec![Line([0.0; 16]); len.div_ceil(16)], len }
    }
}

impl Deref for Aligned {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // Safety: `Line` is 16 floats without padding, and `len` is at most their number.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        // Safety: as above.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// The two dimensions of `tensor`, or an error that names it.
pub(crate) fn dims2(tensor: &Tensor, name: &str) -> Result<(usize, usize)> {
    match tensor.dims() {
        &[rows, columns] => Ok((rows, columns)),
        dims => bail!("`{name}` must have 2 dimensions, its shape is {dims:?}"),
    }
}

/// The three dimensions of `tensor`, or an error that names it.
pub(crate) fn dims3(tensor: &Tensor, name: &str) -> Result<(usize, usize, usize)> {
    match tensor.dims() {
        &[a, b, c] => Ok((a, b, c)),
        dims => bail!("`{name}` must have 3 dimensions, its shape is {dims:?}"),
    }
}

/// Checks that `tensor` has the shape `dims`.
pub(crate) fn expect_shape(tensor: &Tensor, name: &str, dims: &[usize]) -> Result<()> {
    if tensor.dims() != dims {
        bail!("`{name}` must have shape {dims:?}, its shape is {:?}", tensor.dims())
    }
    Ok(())
}

/// Checks cumulative document lengths: from 0 to `tokens`, never falling.
pub(crate) fn check_docs(docs: &[usize], tokens: usize) -> Result<()> {
    if docs.first() != Some(&0) || docs.last() != Some(&tokens) {
        bail!(
            "`docs` must run from 0 to the {tokens} tokens of the batch, it runs from {:?} to {:?}",
            docs.first(),
            docs.last()
        )
    }
    if let Some(pair) = docs.windows(2).find(|pair| pair[0] > pair[1]) {
        bail!("`docs` must not fall, {} comes before {}", pair[0], pair[1])
    }
    Ok(())
}

/// A buffer that parallel tasks write disjoint parts of.
///
/// Rows of one head lie strided in `[tokens, heads, width]`, so the parts cannot be split into
/// `&mut` slices.
#[derive(Clone, Copy)]
pub(crate) struct Shared {
    pointer: *mut f32,
    len: usize,
}

// Safety: `slice` is unsafe and its contract forbids overlapping use.
unsafe impl Send for Shared {}
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn new(values: &mut [f32]) -> Self {
        Self { pointer: values.as_mut_ptr(), len: values.len() }
    }

    /// The part `[start, start + len)`.
    ///
    /// # Safety
    /// The buffer must still be borrowed by its owner, and no two live slices may overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= self.len, "part of a shared buffer out of bounds");
        // Safety: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(start), len) }
    }
}

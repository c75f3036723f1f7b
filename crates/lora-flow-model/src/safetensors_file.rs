//! Safetensors files: a strict reader over a memory map and a writer that takes one tensor at a
//! time, so that a model is never in memory as a whole.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::DType;
use half::{bf16, f16};
use lora_flow_core::{Error, Result, ResultExt};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};

/// Values converted per unit of parallel work.
const CHUNK: usize = 1 << 16;

/// Place and type of one tensor.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Shape.
    pub shape: Vec<usize>,
    /// Storage type: `F32`, `BF16` or `F16`.
    pub dtype: DType,
    start: usize,
    end: usize,
}

/// An open safetensors file whose header has been read and checked.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, TensorInfo>,
    unsupported: BTreeMap<String, String>,
}

impl SafetensorsFile {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// When it cannot be read, its header is damaged, or its data is not exactly as long as the
    /// header says; the message names the file.
    pub fn open(path: &Path) -> Result<Self> {
        let damaged = |e: safetensors::SafeTensorError| {
            Error::new(format!("`{}` is not a usable safetensors file", path.display()))
                .with_source(e)
                .with_hint("the file is truncated or damaged; fetch it again")
        };
        let file = fs_err::File::open(path)?;
        // SAFETY: the files stand in a content-addressed store and are never written again; as
        // with every mapping, a file cut short by someone else while it is read ends the process.
        let map = unsafe { Mmap::map(file.file()) }
            .with_context(|| format!("cannot map `{}`", path.display()))?;
        let parsed = SafeTensors::deserialize(&map).map_err(damaged)?;
        let base = map.as_ptr() as usize;
        let mut tensors = BTreeMap::new();
        let mut unsupported = BTreeMap::new();
        for (name, view) in parsed.iter() {
            let dtype = match view.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::BF16 => DType::BF16,
                Dtype::F16 => DType::F16,
                other => {
                    unsupported.insert(name.to_owned(), format!("{other:?}"));
                    continue;
                }
            };
            let start = view.data().as_ptr() as usize - base;
            let end = start + view.data().len();
            let shape = view.shape().to_vec();
            tensors.insert(name.to_owned(), TensorInfo { shape, dtype, start, end });
        }
        Ok(Self { path: path.to_owned(), map, tensors, unsupported })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensors of floating-point types by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Tensors of types that cannot be used, with the type's name.
    pub fn unsupported(&self) -> &BTreeMap<String, String> {
        &self.unsupported
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| match self.unsupported.get(name) {
            Some(dtype) => Error::new(format!(
                "tensor `{name}` in `{}` is stored as {dtype}, which is not supported",
                self.path.display()
            ))
            .with_hint("only F32, BF16 and F16 weights can be loaded"),
            None => Error::new(format!("no tensor `{name}` in `{}`", self.path.display())),
        })
    }

    /// The bytes of a tensor.
    ///
    /// # Errors
    /// When it is missing or of an unsupported type.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let info = self.info(name)?;
        Ok(&self.map[info.start..info.end])
    }

    /// Takes the pages of a tensor out of the process again; they are read anew when they are
    /// asked for. Without this, a model that has been read is in memory twice.
    fn forget(&self, name: &str) {
        if let Some(info) = self.tensors.get(name) {
            forget(&self.map, info.start, info.end);
        }
    }

    /// A tensor's values as f32.
    ///
    /// # Errors
    /// When it is missing or of an unsupported type.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let dtype = self.info(name)?.dtype;
        let bytes = self.bytes(name)?;
        let values = match dtype {
            DType::F32 => convert(bytes, f32::from_le_bytes),
            DType::BF16 => convert(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            _ => convert(bytes, |b| f16::from_le_bytes(b).to_f32()),
        };
        self.forget(name);
        Ok(values)
    }

    /// A tensor's values as bf16, rounded to nearest where it is wider.
    ///
    /// # Errors
    /// When it is missing or of an unsupported type.
    pub fn read_bf16(&self, name: &str) -> Result<Vec<bf16>> {
        let dtype = self.info(name)?.dtype;
        let bytes = self.bytes(name)?;
        let values = match dtype {
            DType::F32 => convert(bytes, |b| bf16::from_f32(f32::from_le_bytes(b))),
            DType::BF16 => convert(bytes, bf16::from_le_bytes),
            _ => convert(bytes, |b| bf16::from_f32(f16::from_le_bytes(b).to_f32())),
        };
        self.forget(name);
        Ok(values)
    }
}

/// Takes the whole pages of `start..end` of a mapped file out of the process. A hint: where it
/// cannot be given, memory is all that is lost.
pub(crate) fn forget(map: &Mmap, start: usize, end: usize) {
    #[cfg(unix)]
    {
        const PAGE: usize = 4096;
        let start = start.next_multiple_of(PAGE);
        let end = end / PAGE * PAGE;
        if start < end {
            // SAFETY: a shared mapping of a file that nobody writes gives the same bytes again.
            let _ = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
            };
        }
    }
    #[cfg(not(unix))]
    let _ = (map, start, end);
}

/// Little-endian elements of `N` bytes to values, in parallel.
fn convert<const N: usize, T: Copy + Default + Send>(
    bytes: &[u8],
    f: impl Fn([u8; N]) -> T + Sync,
) -> Vec<T> {
    let mut out = vec![T::default(); bytes.len() / N];
    out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * N)).for_each(|(out, bytes)| {
        for (o, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
            *o = f(*b);
        }
    });
    out
}

/// f32 values as little-endian bytes of `dtype` (`F32`, `BF16` or `F16`), rounded to nearest.
pub fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    fn encode_as<const N: usize>(values: &[f32], f: impl Fn(f32) -> [u8; N] + Sync) -> Vec<u8> {
        let mut out = vec![0u8; values.len() * N];
        out.par_chunks_mut(CHUNK * N).zip(values.par_chunks(CHUNK)).for_each(|(out, values)| {
            for (o, v) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
                *o = f(*v);
            }
        });
        out
    }
    match dtype {
        DType::BF16 => encode_as(values, |v| bf16::from_f32(v).to_le_bytes()),
        DType::F16 => encode_as(values, |v| f16::from_f32(v).to_le_bytes()),
        _ => encode_as(values, f32::to_le_bytes),
    }
}

/// Name of a dtype in a safetensors header.
fn dtype_name(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("F32"),
        DType::BF16 => Ok("BF16"),
        DType::F16 => Ok("F16"),
        other => Err(Error::new(format!("cannot write {other:?} tensors"))),
    }
}

/// Writes one safetensors file, tensor by tensor in the order announced.
#[derive(Debug)]
pub struct SafetensorsWriter {
    path: PathBuf,
    out: BufWriter<fs_err::File>,
    pending: std::vec::IntoIter<(String, usize)>,
}

impl SafetensorsWriter {
    /// Writes the header of a file that will hold these tensors (name, dtype, shape), with the
    /// metadata `{"format": "pt"}` that Hugging Face's loaders ask for.
    ///
    /// # Errors
    /// When the file cannot be written or a dtype cannot stand in it.
    pub fn create(path: &Path, tensors: &[(String, DType, Vec<usize>)]) -> Result<Self> {
        let mut header = String::from(r#"{"__metadata__":{"format":"pt"}"#);
        let mut pending = Vec::new();
        let mut at = 0usize;
        for (name, dtype, shape) in tensors {
            let size = shape.iter().product::<usize>() * dtype.size_in_bytes();
            header.push_str(&format!(
                r#",{}:{{"dtype":"{}","shape":{},"data_offsets":[{at},{}]}}"#,
                serde_json::to_string(name)?,
                dtype_name(*dtype)?,
                serde_json::to_string(shape)?,
                at + size
            ));
            pending.push((name.clone(), size));
            at += size;
        }
        header.push('}');
        // The data starts at a multiple of eight bytes.
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let mut out = BufWriter::with_capacity(1 << 20, fs_err::File::create(path)?);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        Ok(Self { path: path.to_owned(), out, pending: pending.into_iter() })
    }

    /// Writes the next tensor.
    ///
    /// # Errors
    /// When it is not the one announced, or the file cannot be written.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        match self.pending.next() {
            Some((expected, size)) if expected == name && size == bytes.len() => {
                Ok(self.out.write_all(bytes)?)
            }
            expected => Err(Error::new(format!(
                "`{}`: tensor `{name}` of {} bytes written where {expected:?} was announced",
                self.path.display(),
                bytes.len()
            ))),
        }
    }

    /// Ends the file.
    ///
    /// # Errors
    /// When tensors are missing or the file cannot be written.
    pub fn finish(mut self) -> Result<()> {
        if let Some((name, _)) = self.pending.next() {
            return Err(Error::new(format!(
                "`{}`: tensor `{name}` was announced and not written",
                self.path.display()
            )));
        }
        Ok(self.out.flush()?)
    }
}

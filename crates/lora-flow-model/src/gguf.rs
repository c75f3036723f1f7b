//! Reader of GGUF files: header, metadata, and rows of tensors dequantised in parallel.
//!
//! Every count, length and offset of the file is checked against the file's size before anything
//! is allocated for it, so a truncated or hostile file gives an error that names it, never a
//! panic or a huge allocation. Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K,
    BlockQ8_0,
};
use candle_core::quantized::{GgmlDType, GgmlType};
use half::{bf16, f16};
use lora_flow_core::{Error, Result, ResultExt};
use memmap2::Mmap;
use rayon::prelude::*;

/// Nested arrays deeper than this are refused.
const MAX_DEPTH: usize = 4;
/// Longer arrays are refused: vocabularies and merge lists have at most some hundred thousand.
const MAX_ARRAY: usize = 1 << 23;
/// ggml knows four dimensions.
const MAX_DIMS: u32 = 4;

/// A metadata value. Integers of all widths are one variant, as are floats.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any signed or unsigned integer.
    Int(i128),
    /// f32 (as its shortest decimal) or f64.
    Float(f64),
    /// Truth value.
    Bool(bool),
    /// UTF-8 text; invalid bytes are replaced.
    String(String),
    /// List of values of one type.
    Array(Vec<Value>),
}

impl Value {
    /// What to call the value's type in an error message.
    fn type_name(&self) -> &'static str {
        match self {
            Self::Int(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Bool(_) => "a boolean",
            Self::String(_) => "a string",
            Self::Array(_) => "an array",
        }
    }
}

/// Place and type of one tensor.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Shape, slowest dimension first (as safetensors and torch have it).
    pub shape: Vec<usize>,
    /// Storage type.
    pub dtype: GgmlDType,
    /// First byte, from the start of the file.
    start: usize,
    /// Bytes of one row (the fastest dimension).
    row_bytes: usize,
}

/// An open GGUF file whose header has been read and checked.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl GgufFile {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// When it cannot be read, is no GGUF file, is truncated, or holds a tensor of a type that
    /// is not known; the message names the file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = fs_err::File::open(path)?;
        // SAFETY: the files stand in a content-addressed store and are never written again; as
        // with every mapping, a file cut short by someone else while it is read ends the process.
        let map = unsafe { Mmap::map(file.file()) }
            .with_context(|| format!("cannot map `{}`", path.display()))?;
        let (metadata, tensors) = parse(&map).map_err(|e| {
            let hint = e.hint().map(str::to_owned);
            let error = Error::new(format!("`{}` is not a usable GGUF file", path.display()))
                .with_source(e);
            match hint {
                Some(hint) => error.with_hint(hint),
                None => error,
            }
        })?;
        Ok(Self { path: path.to_owned(), map, metadata, tensors })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensors by their GGUF names.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Metadata keys in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// A metadata value that may be missing.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A string that may be missing.
    ///
    /// # Errors
    /// When the value has another type.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.wrong_type(key, "a string", other)),
        }
    }

    /// A non-negative integer that may be missing.
    ///
    /// # Errors
    /// When the value has another type or does not fit.
    pub fn integer(&self, key: &str) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Int(v)) => usize::try_from(*v)
                .map(Some)
                .map_err(|_| self.error(format!("metadata `{key}` is {v}, which is out of range"))),
            Some(other) => Err(self.wrong_type(key, "an integer", other)),
        }
    }

    /// A number that may be missing.
    ///
    /// # Errors
    /// When the value has another type.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(v)) => Ok(Some(*v)),
            Some(Value::Int(v)) => Ok(Some(*v as f64)),
            Some(other) => Err(self.wrong_type(key, "a number", other)),
        }
    }

    /// A boolean that may be missing.
    ///
    /// # Errors
    /// When the value has another type.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(*v)),
            Some(other) => Err(self.wrong_type(key, "a boolean", other)),
        }
    }

    /// An array that may be missing.
    ///
    /// # Errors
    /// When the value has another type.
    pub fn array(&self, key: &str) -> Result<Option<&[Value]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(v)) => Ok(Some(v)),
            Some(other) => Err(self.wrong_type(key, "an array", other)),
        }
    }

    /// An error about this file.
    pub fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::new(format!("`{}`: {message}", self.path.display()))
    }

    fn wrong_type(&self, key: &str, wanted: &str, found: &Value) -> Error {
        self.error(format!("metadata `{key}` is {}, not {wanted}", found.type_name()))
    }

    /// A tensor's values as f32, row `i` of the result being row `row_of(i)` of the file. A row
    /// is the fastest dimension; a one-dimensional tensor is taken as rows of one value where
    /// `by_element` is set (a bias that is permuted with its weight's rows).
    ///
    /// # Errors
    /// When the tensor is missing or its rows cannot be mapped so.
    pub fn read_f32(
        &self,
        name: &str,
        row_of: &(dyn Fn(usize) -> usize + Sync),
        by_element: bool,
    ) -> Result<Vec<f32>> {
        let (info, row, row_bytes) = self.rows(name, by_element)?;
        let mut out = vec![0f32; info.shape.iter().product()];
        self.for_rows(&mut out, row, |i, row_out| {
            self.dequantise(info, row_of(i), row_bytes, row_out);
        });
        self.forget(info);
        Ok(out)
    }

    /// As [`Self::read_f32`], rounded to bf16.
    ///
    /// # Errors
    /// As there.
    pub fn read_bf16(
        &self,
        name: &str,
        row_of: &(dyn Fn(usize) -> usize + Sync),
        by_element: bool,
    ) -> Result<Vec<bf16>> {
        let (info, row, row_bytes) = self.rows(name, by_element)?;
        let mut out = vec![bf16::ZERO; info.shape.iter().product()];
        self.for_rows(&mut out, row, |i, row_out| {
            let mut wide = vec![0f32; row_out.len()];
            self.dequantise(info, row_of(i), row_bytes, &mut wide);
            row_out.iter_mut().zip(wide).for_each(|(o, w)| *o = bf16::from_f32(w));
        });
        self.forget(info);
        Ok(out)
    }

    /// Takes the pages of a tensor that has been read out of the process.
    fn forget(&self, info: &TensorInfo) {
        let rows: usize = info.shape.iter().rev().skip(1).product();
        crate::safetensors_file::forget(&self.map, info.start, info.start + rows * info.row_bytes);
    }

    /// A tensor with the length and the bytes of its rows.
    fn rows(&self, name: &str, by_element: bool) -> Result<(&TensorInfo, usize, usize)> {
        let info =
            self.tensors.get(name).ok_or_else(|| self.error(format!("no tensor `{name}`")))?;
        let row = info.shape.last().copied().unwrap_or(1);
        if !by_element || info.shape.len() != 1 {
            return Ok((info, row, info.row_bytes));
        }
        if info.dtype.block_size() != 1 {
            return Err(self.error(format!("tensor `{name}` is quantised and cannot be permuted")));
        }
        Ok((info, 1, info.dtype.type_size()))
    }

    /// Calls `f(row index, row)` for every row of `out`, in parallel over groups of rows.
    fn for_rows<T: Send>(&self, out: &mut [T], row: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        if row == 0 {
            return;
        }
        let group = (1usize << 16).div_ceil(row);
        out.par_chunks_mut(group * row).enumerate().for_each(|(g, rows)| {
            rows.chunks_mut(row).enumerate().for_each(|(i, r)| f(g * group + i, r));
        });
    }

    /// Dequantises one row of the file into `out`. The header check guarantees that rows of
    /// `0..rows` lie inside the file and are whole blocks.
    fn dequantise(&self, info: &TensorInfo, row: usize, row_bytes: usize, out: &mut [f32]) {
        let start = info.start + row * row_bytes;
        let bytes = &self.map[start..start + row_bytes];
        match info.dtype {
            GgmlDType::F32 => out
                .iter_mut()
                .zip(bytes.chunks_exact(4))
                .for_each(|(o, b)| *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            GgmlDType::F16 => out
                .iter_mut()
                .zip(bytes.chunks_exact(2))
                .for_each(|(o, b)| *o = f16::from_le_bytes([b[0], b[1]]).to_f32()),
            GgmlDType::BF16 => out
                .iter_mut()
                .zip(bytes.chunks_exact(2))
                .for_each(|(o, b)| *o = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            GgmlDType::Q4_0 => blocks::<BlockQ4_0>(bytes, out),
            GgmlDType::Q4_1 => blocks::<BlockQ4_1>(bytes, out),
            GgmlDType::Q5_0 => blocks::<BlockQ5_0>(bytes, out),
            GgmlDType::Q5_1 => blocks::<BlockQ5_1>(bytes, out),
            GgmlDType::Q8_0 => blocks::<BlockQ8_0>(bytes, out),
            GgmlDType::Q2K => blocks::<BlockQ2K>(bytes, out),
            GgmlDType::Q3K => blocks::<BlockQ3K>(bytes, out),
            GgmlDType::Q4K => blocks::<BlockQ4K>(bytes, out),
            GgmlDType::Q5K => blocks::<BlockQ5K>(bytes, out),
            GgmlDType::Q6K => blocks::<BlockQ6K>(bytes, out),
            // `dtype` below lets no other type in.
            GgmlDType::Q8_1 | GgmlDType::Q8K => out.fill(f32::NAN),
        }
    }
}

/// Dequantises whole blocks, by way of an aligned copy where the file has them unaligned.
fn blocks<B: GgmlType>(bytes: &[u8], out: &mut [f32]) {
    // SAFETY: the block types are `repr(C)` structs of integers and half floats, for which every
    // bit pattern is valid; `align_to` takes care of size and alignment.
    let (before, aligned, after) = unsafe { bytes.align_to::<B>() };
    if before.is_empty() && after.is_empty() {
        return B::to_float(aligned, out);
    }
    let count = bytes.len() / size_of::<B>();
    let mut copy = vec![B::zeros(); count];
    // SAFETY: as above; the destination holds `count` blocks, the source at least as many bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(
            bytes.as_ptr(),
            copy.as_mut_ptr().cast::<u8>(),
            count * size_of::<B>(),
        );
    }
    B::to_float(&copy, out);
}

/// The storage types that can be read, by ggml's number.
fn dtype(number: u32) -> Option<GgmlDType> {
    Some(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// Metadata and tensors.
type Header = (BTreeMap<String, Value>, BTreeMap<String, TensorInfo>);

/// Reads the header: metadata and tensor places, all inside `bytes`.
pub(crate) fn parse(bytes: &[u8]) -> Result<Header> {
    let mut r = Cursor { bytes, at: 0 };
    let magic = r.take(4)?;
    if magic != b"GGUF" {
        return Err(Error::new("it does not start with `GGUF`"));
    }
    let version = r.u32()?;
    if !(2..=3).contains(&version) {
        return Err(Error::new(if version.swap_bytes() <= 3 {
            "it is big-endian, which is not supported".to_owned()
        } else {
            format!("GGUF version {version} is not supported, only 2 and 3")
        }));
    }
    let tensor_count = r.u64()?;
    let metadata_count = r.u64()?;

    // Counts are not trusted: entries are read one by one until the file ends.
    let mut metadata = BTreeMap::new();
    for i in 0..metadata_count {
        let key = r.string().with_context(|| format!("metadata entry {i} of {metadata_count}"))?;
        let kind = r.u32()?;
        let value = r.value(kind, 0).with_context(|| format!("metadata `{key}`"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(Error::new(format!("metadata `{key}` stands there twice")));
        }
    }
    let mut tensors = BTreeMap::new();
    for i in 0..tensor_count {
        let name = r.string().with_context(|| format!("tensor entry {i} of {tensor_count}"))?;
        let info = r.tensor_info().with_context(|| format!("tensor `{name}`"))?;
        if tensors.insert(name.clone(), info).is_some() {
            return Err(Error::new(format!("tensor `{name}` stands there twice")));
        }
    }

    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::Int(v)) if (1..=1 << 20).contains(v) => *v as usize,
        Some(_) => return Err(Error::new("metadata `general.alignment` makes no sense")),
    };
    let data = r.at.next_multiple_of(alignment);
    for (name, info) in &mut tensors {
        let rows: usize = info.shape.iter().rev().skip(1).product();
        let size = rows.checked_mul(info.row_bytes);
        let end = size.and_then(|s| data.checked_add(info.start)?.checked_add(s));
        match end {
            Some(end) if end <= bytes.len() => info.start += data,
            _ => {
                return Err(Error::new(format!(
                    "tensor `{name}` {:?} lies outside the file of {} bytes",
                    info.shape,
                    bytes.len()
                ))
                .with_hint("the file is truncated or damaged; fetch it again"));
            }
        }
    }
    Ok((metadata, tensors))
}

/// A bounds-checked little-endian reader.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|e| *e <= self.bytes.len()).ok_or_else(|| {
            Error::new(format!(
                "the file ends after {} bytes, where its header needs {n} more at {}",
                self.bytes.len(),
                self.at
            ))
            .with_hint("the file is truncated or damaged; fetch it again")
        })?;
        let out = &self.bytes[self.at..end];
        self.at = end;
        Ok(out)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn length(&mut self) -> Result<usize> {
        // A length that no address can hold fails in `take`.
        Ok(usize::try_from(self.u64()?).unwrap_or(usize::MAX))
    }

    fn string(&mut self) -> Result<String> {
        let n = self.length()?;
        Ok(String::from_utf8_lossy(self.take(n)?).into_owned())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::Int(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Int(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Int(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Int(self.u32()?.into()),
            5 => Value::Int(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(shortest(f32::from_le_bytes(self.array()?))),
            7 => match self.array::<1>()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [b] => return Err(Error::new(format!("a boolean has the byte {b}"))),
            },
            8 => Value::String(self.string()?),
            9 => {
                if depth >= MAX_DEPTH {
                    return Err(Error::new("arrays are nested too deeply"));
                }
                let kind = self.u32()?;
                let n = self.length()?;
                // Every element takes at least one byte of the file.
                if n > MAX_ARRAY.min(self.bytes.len() - self.at) {
                    return Err(Error::new(format!("an array of {n} elements is too long"))
                        .with_hint("the file is truncated or damaged; fetch it again"));
                }
                let mut out = Vec::new();
                for _ in 0..n {
                    out.push(self.value(kind, depth + 1)?);
                }
                Value::Array(out)
            }
            10 => Value::Int(self.u64()?.into()),
            11 => Value::Int(i64::from_le_bytes(self.array()?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(Error::new(format!("unknown metadata type {other}"))),
        })
    }

    /// A tensor's entry; `start` is still relative to the data section.
    fn tensor_info(&mut self) -> Result<TensorInfo> {
        let dims = self.u32()?;
        if dims == 0 || dims > MAX_DIMS {
            return Err(Error::new(format!(
                "{dims} dimensions, where 1 to {MAX_DIMS} are allowed"
            )));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            shape.push(self.length()?);
        }
        shape.reverse();
        let number = self.u32()?;
        let dtype = dtype(number).ok_or_else(|| {
            Error::new(format!("storage type {number} is not supported")).with_hint(
                "use a file in F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K",
            )
        })?;
        let start = self.length()?;
        if shape.contains(&0) {
            return Err(Error::new(format!("shape {shape:?} has an empty dimension")));
        }
        // The caller checks the size against the file; here it only must not overflow.
        shape
            .iter()
            .try_fold(1usize, |n, d| n.checked_mul(*d))
            .filter(|n| *n <= isize::MAX as usize / 4)
            .ok_or_else(|| Error::new(format!("shape {shape:?} is too large")))?;
        let row = shape.last().copied().unwrap_or(0);
        if row % dtype.block_size() != 0 {
            return Err(Error::new(format!(
                "rows of {row} values are not whole blocks of {} values",
                dtype.block_size()
            )));
        }
        let row_bytes = (row / dtype.block_size())
            .checked_mul(dtype.type_size())
            .ok_or_else(|| Error::new(format!("shape {shape:?} is too large")))?;
        Ok(TensorInfo { shape, dtype, start, row_bytes })
    }
}

/// The f64 whose decimal is the shortest that gives `v`: 1e-5, not 9.999999747378752e-6.
fn shortest(v: f32) -> f64 {
    format!("{v:e}").parse().unwrap_or(f64::from(v))
}

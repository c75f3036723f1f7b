//! BLAKE3 of a file, read and hashed in parts by all threads.
//!
//! BLAKE3 is a tree, so each thread reads a part into a buffer that stays in its cache and hashes
//! it there; nothing is read twice, and no file is mapped, which would kill the program when the
//! file is cut off meanwhile.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};
use lora_flow_core::{Digest, Result, ResultExt};

/// Bytes that are read at once. A power of two, so that each part is a whole subtree; small enough
/// for the nearest caches: from 128 KiB on the copy out of the kernel takes four times as long.
const PART: usize = 32 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Digest of a file's content, by several threads where it is large.
pub(crate) fn hash_file(path: &Path) -> Result<Digest> {
    let hash = || -> io::Result<Digest> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        if size <= PART as u64 {
            return hash_small(&mut file, size);
        }
        let left = left_subtree_len(size);
        let (l, r) = halves(&file, 0, left, size)?;
        Ok(Digest(*merge_subtrees_root(&l, &r, Mode::Hash).as_bytes()))
    };
    hash().with_context(|| format!("cannot read `{}`", path.display()))
}

/// To the end, whatever size was told: the files of `/proc` tell none.
fn hash_small(file: &mut File, size: u64) -> io::Result<Digest> {
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1);
    file.read_to_end(&mut bytes)?;
    Ok(Digest::of_bytes(&bytes))
}

fn halves(
    file: &File,
    start: u64,
    middle: u64,
    end: u64,
) -> io::Result<(ChainingValue, ChainingValue)> {
    let (l, r) = rayon::join(|| subtree(file, start, middle), || subtree(file, middle, end));
    Ok((l?, r?))
}

/// The chaining value of the bytes from `start` to `end`, which are a subtree and not the whole.
fn subtree(file: &File, start: u64, end: u64) -> io::Result<ChainingValue> {
    let length = end - start;
    if length > PART as u64 {
        let middle = start + left_subtree_len(length);
        let (l, r) = halves(file, start, middle, end)?;
        return Ok(merge_subtrees_non_root(&l, &r, Mode::Hash));
    }
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(PART, 0);
        let part = &mut buffer[..usize::try_from(length).unwrap_or(PART)];
        file.read_exact_at(part, start).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => io::Error::other("it was cut off while it was read"),
            _ => e,
        })?;
        Ok(blake3::Hasher::new().set_input_offset(start).update(part).finalize_non_root())
    })
}

//! BLAKE3 of a file, hashed in parts by all threads: it is a tree.
//!
//! A file is seen as memory where that is possible; else each thread reads parts into a buffer that
//! stays in its cache.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};
use lora_flow_core::{Digest, Result, ResultExt};

use super::view::View;

/// Bytes that are read at once. A power of two, so that each part is a whole subtree; small enough
/// for the nearest caches: from 128 KiB on the copy out of the kernel takes four times as long.
const PART: usize = 32 << 10;

/// Bytes of a view that a thread hashes at once, and has the kernel map at once: a page at a time would
/// cost a fault for each. A power of two as well.
const SEEN_PART: u64 = 2 << 20;

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
        let bytes = match View::of(&file, size) {
            Some(view) => Bytes::Seen(view),
            None => Bytes::Read(file),
        };
        let (l, r) = halves(&bytes, 0, left_subtree_len(size), size)?;
        if let Bytes::Seen(view) = &bytes {
            view.check()?;
        }
        Ok(Digest(*merge_subtrees_root(&l, &r, Mode::Hash).as_bytes()))
    };
    hash().with_context(|| format!("cannot read `{}`", path.display()))
}

/// A file's bytes, and how to come by them.
enum Bytes {
    Seen(View),
    Read(File),
}

/// To the end, whatever size was told: the files of `/proc` tell none.
fn hash_small(file: &mut File, size: u64) -> io::Result<Digest> {
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1);
    file.read_to_end(&mut bytes)?;
    Ok(Digest::of_bytes(&bytes))
}

fn halves(
    bytes: &Bytes,
    start: u64,
    middle: u64,
    end: u64,
) -> io::Result<(ChainingValue, ChainingValue)> {
    let (l, r) = rayon::join(|| subtree(bytes, start, middle), || subtree(bytes, middle, end));
    Ok((l?, r?))
}

/// The chaining value of the bytes from `start` to `end`, which are a subtree and not the whole.
fn subtree(bytes: &Bytes, start: u64, end: u64) -> io::Result<ChainingValue> {
    let length = end - start;
    let most = match bytes {
        Bytes::Seen(_) => SEEN_PART,
        Bytes::Read(_) => PART as u64,
    };
    if length > most {
        let middle = start + left_subtree_len(length);
        let (l, r) = halves(bytes, start, middle, end)?;
        return Ok(merge_subtrees_non_root(&l, &r, Mode::Hash));
    }
    let hash = |part: &[u8]| {
        blake3::Hasher::new().set_input_offset(start).update(part).finalize_non_root()
    };
    let length = usize::try_from(length).unwrap_or(PART);
    let file = match bytes {
        Bytes::Seen(view) => {
            let start = usize::try_from(start).unwrap_or(usize::MAX);
            return Ok(hash(view.part(start, length)));
        }
        Bytes::Read(file) => file,
    };
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(PART, 0);
        let part = &mut buffer[..length];
        file.read_exact_at(part, start).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => io::Error::other("it was cut off while it was read"),
            _ => e,
        })?;
        Ok(hash(part))
    })
}

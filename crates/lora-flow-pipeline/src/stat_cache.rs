//! Digests of outside files, remembered by what `stat` says of them.
//!
//! A file counts as unchanged if its size, its modification and change times and its inode are
//! those it had when it was hashed. A file touched within [`RACY`] of being hashed is not
//! remembered: it could be written again within the same tick of the clock (git's racy rule).
//!
//! On disk it is one line of JSON and one line with that line's BLAKE3 digest: a digest that a
//! flipped bit made another one would give its file's tasks wrong keys for good.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use lora_flow_core::{Digest, Error, Result, ResultExt};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::store::{Store, Sync, hash_file};

/// Times of a file closer to its hashing than this are not to be trusted, in nanoseconds.
const RACY: i64 = 2_000_000_000;

/// Version of the file; another one is thrown away.
const VERSION: u32 = 2;

/// Beyond this many files, those that are gone are forgotten.
const MANY: usize = 10_000;

/// What `stat` says of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    size: u64,
    mtime: i64,
    ctime: i64,
    inode: u64,
}

impl Stamp {
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let meta =
            fs::metadata(path).with_context(|| format!("cannot read `{}`", path.display()))?;
        if !meta.is_file() {
            return Err(Error::new(format!("`{}` is not a plain file", path.display())));
        }
        let nanos = |seconds: i64, nanos: i64| seconds * 1_000_000_000 + nanos;
        Ok(Self {
            size: meta.len(),
            mtime: nanos(meta.mtime(), meta.mtime_nsec()),
            ctime: nanos(meta.ctime(), meta.ctime_nsec()),
            inode: meta.ino(),
        })
    }

    /// Whether the file may change after `now` without its stamp changing.
    fn is_racy(&self, now: i64) -> bool {
        self.mtime.max(self.ctime) > now - RACY
    }
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Known {
    stamp: Stamp,
    digest: Digest,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Saved {
    version: u32,
    files: HashMap<PathBuf, Known>,
}

#[derive(Debug, Default)]
struct State {
    files: HashMap<PathBuf, Known>,
    changed: bool,
    /// Hashed in this process and not to be remembered beyond it.
    racy: HashMap<PathBuf, Known>,
}

/// The cache, shared by the threads of a run.
#[derive(Debug)]
pub(crate) struct StatCache {
    state: Mutex<State>,
}

impl StatCache {
    /// What earlier runs remembered. A cache that cannot be read is an empty one.
    pub(crate) fn load(store: &Store) -> Self {
        let saved: Saved = fs::read(store.stat_cache_path())
            .ok()
            .and_then(|bytes| serde_json::from_slice(checked(&bytes)?).ok())
            .filter(|saved: &Saved| saved.version == VERSION)
            .unwrap_or_default();
        Self { state: Mutex::new(State { files: saved.files, ..State::default() }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The digest of a file, if it is known without reading it.
    pub(crate) fn known(&self, path: &Path) -> Result<Option<Digest>> {
        let stamp = Stamp::of(path)?;
        let state = self.state();
        let known = state.files.get(path).or_else(|| state.racy.get(path));
        Ok(known.filter(|k| k.stamp == stamp).map(|k| k.digest))
    }

    /// The stamp of a file that is as it was when it was hashed, and cannot change unseen.
    pub(crate) fn lasting(&self, path: &Path) -> Option<Stamp> {
        let known = self.state().files.get(path)?.stamp;
        Stamp::of(path).ok().filter(|stamp| *stamp == known)
    }

    /// Digests of files, in their order; those not known are read, several at a time.
    pub(crate) fn digests(&self, paths: &[PathBuf]) -> Result<Vec<Digest>> {
        paths
            .par_iter()
            .map(|path| match self.known(path)? {
                Some(digest) => Ok(digest),
                None => self.hash(path),
            })
            .collect()
    }

    fn hash(&self, path: &Path) -> Result<Digest> {
        // A file that is being written gets a second chance.
        for _ in 0..2 {
            let stamp = Stamp::of(path)?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
            let digest = hash_file(path)?;
            if Stamp::of(path)? != stamp {
                continue;
            }
            let known = Known { stamp, digest };
            let mut state = self.state();
            if stamp.is_racy(i64::try_from(now).unwrap_or(i64::MAX)) {
                if state.files.remove(path).is_some() {
                    state.changed = true;
                }
                state.racy.insert(path.to_owned(), known);
            } else {
                state.racy.remove(path);
                state.files.insert(path.to_owned(), known);
                state.changed = true;
            }
            return Ok(digest);
        }
        Err(Error::new(format!("`{}` changes while it is being read", path.display()))
            .with_hint("run again when it is complete"))
    }

    /// The first of these files that is not as it was when it was hashed.
    pub(crate) fn first_changed<'a>(
        &self,
        paths: impl IntoIterator<Item = &'a PathBuf>,
    ) -> Option<&'a Path> {
        paths.into_iter().map(PathBuf::as_path).find(|p| !matches!(self.known(p), Ok(Some(_))))
    }

    /// Saves what was learnt, if anything was.
    pub(crate) fn save(&self, store: &Store) -> Result<()> {
        let mut state = self.state();
        if !state.changed {
            return Ok(());
        }
        if state.files.len() > MANY {
            state.files.retain(|path, _| path.exists());
        }
        // Paths that are not UTF-8 cannot be written; they are hashed each time.
        state.files.retain(|path, _| path.to_str().is_some());
        let saved = Saved { version: VERSION, files: std::mem::take(&mut state.files) };
        let bytes = serde_json::to_vec(&saved);
        state.files = saved.files;
        let bytes = with_checksum(bytes?);
        store.write_atomic(&store.stat_cache_path(), &bytes, Sync::No)?;
        state.changed = false;
        Ok(())
    }
}

/// JSON on a line, and its digest on the next.
pub(crate) fn with_checksum(mut json: Vec<u8>) -> Vec<u8> {
    let checksum = Digest::of_bytes(&json);
    json.extend_from_slice(format!("\n{checksum}\n").as_bytes());
    json
}

/// The JSON that [`with_checksum`] was given, if its checksum fits.
pub(crate) fn checked(bytes: &[u8]) -> Option<&[u8]> {
    let text = bytes.strip_suffix(b"\n")?;
    let end = text.iter().rposition(|b| *b == b'\n')?;
    let (json, checksum) = (&text[..end], &text[end + 1..]);
    (Digest::of_bytes(json).to_string().as_bytes() == checksum).then_some(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn age(path: &Path, seconds: u64) {
        let then = SystemTime::now() - std::time::Duration::from_secs(seconds);
        fs::File::options().write(true).open(path).unwrap().set_modified(then).unwrap();
    }

    fn digest(cache: &StatCache, path: &Path) -> Digest {
        cache.digests(&[path.to_owned()]).unwrap()[0]
    }

    #[test]
    fn a_fresh_file_is_hashed_again_and_an_old_one_is_not() {
        let now = 10 * RACY;
        let stamp = |mtime, ctime| Stamp { size: 1, mtime, ctime, inode: 1 };
        assert!(!stamp(now - RACY, now - RACY).is_racy(now));
        assert!(stamp(now - RACY + 1, 0).is_racy(now));
        assert!(stamp(0, now - RACY + 1).is_racy(now), "an old mtime can be faked, ctime cannot");
        assert!(stamp(now + RACY, 0).is_racy(now), "a time in the future says nothing");

        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let path = dir.path().join("data");
        fs::write(&path, "one").unwrap();
        let cache = StatCache::load(&store);
        assert_eq!(digest(&cache, &path), Digest::of_bytes(b"one"));
        cache.save(&store).unwrap();
        assert_eq!(StatCache::load(&store).known(&path).unwrap(), None, "racy: not remembered");
        assert!(!store.stat_cache_path().exists(), "nothing to save");
        assert!(cache.known(&path).unwrap().is_some(), "known within one run");
    }

    #[test]
    fn remembered_files_survive_a_reload_and_any_change_forgets_them() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let path = dir.path().join("data");
        fs::write(&path, "one").unwrap();
        let known = Known { stamp: Stamp::of(&path).unwrap(), digest: Digest::of_bytes(b"marker") };
        let cache = StatCache::load(&store);
        cache.state().files.insert(path.clone(), known);
        cache.state().changed = true;
        cache.save(&store).unwrap();
        let cache = StatCache::load(&store);
        assert_eq!(digest(&cache, &path), Digest::of_bytes(b"marker"), "not read");
        fs::write(&path, "two").unwrap();
        assert_eq!(digest(&cache, &path), Digest::of_bytes(b"two"));
        age(&path, 100);
        assert_eq!(cache.known(&path).unwrap(), None, "another time is a change");

        let whole = fs::read(store.stat_cache_path()).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            assert!(checked(&flipped).is_none(), "a flipped bit in byte {at} goes unseen");
        }
    }

    #[test]
    fn changed_files_are_found_and_damage_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        fs::write(store.stat_cache_path(), "{ not json").unwrap();
        let cache = StatCache::load(&store);
        let path = dir.path().join("data");
        fs::write(&path, "one").unwrap();
        digest(&cache, &path);
        assert_eq!(cache.first_changed([&path]), None);
        fs::write(&path, "three").unwrap();
        assert_eq!(cache.first_changed([&path]), Some(path.as_path()));
        let missing = dir.path().join("missing");
        let error = cache.digests(&[missing]).unwrap_err();
        assert!(error.chain().contains("missing"), "{}", error.chain());
    }
}

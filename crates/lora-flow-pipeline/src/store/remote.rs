//! The remote tier: results that other machines made, and that others may take from here.
//!
//! ```text
//! v1/objects/ab/cdef…       blobs under their BLAKE3 digest
//! v1/entries/ab/cdef….json  entries under their key, in the bytes of the local store
//! ```
//!
//! Three rules keep it safe to share, and safe to do without:
//!
//! - An entry is written after its blobs, so that whoever finds it finds a whole result. Objects
//!   are never changed into something else: equal names mean equal content.
//! - Nothing from the remote is trusted. An entry carries a checksum and must follow from its key;
//!   a blob enters the store only if its bytes have the digest of its name. What fails is reported,
//!   computed again, and replaced.
//! - The remote is never needed. The first failure is a warning; after it this run asks no more.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};

use lora_flow_core::{CancelToken, Digest, Error, Result};

use super::blob::seal;
use super::entry::Entry;
use super::{FileLock, Lookup, STORE_FORMAT, Store, hash_file, remove_all};

/// Transfers at once. More help little on one line, and a server may refuse them.
const TRANSFERS: usize = 8;

/// An entry larger than this is none: manifests and reports are small.
const LARGEST_ENTRY: u64 = 64 << 20;

/// Why a remote could not be asked.
#[derive(Debug)]
pub enum RemoteError {
    /// It answered that this is not allowed.
    Denied(Error),
    /// It did not answer, or not sensibly, or not in time.
    Away(Error),
    /// The run was stopped meanwhile.
    Cancelled,
    /// The local disk failed, not the remote.
    Local(Error),
}

/// A flat space of objects somewhere else. Every call blocks, for a bounded time, and is safe from
/// several threads; a name is `/`-separated.
pub trait Objects: Debug + Send + Sync {
    /// What users call it, like `s3://bucket/prefix`.
    fn url(&self) -> &str;

    /// A small object as a whole; `None` if there is none. Objects over `limit` bytes are refused
    /// as [`RemoteError::Away`].
    ///
    /// # Errors
    /// See [`RemoteError`]; so for all the others.
    fn get(
        &self,
        name: &str,
        limit: u64,
        cancel: &CancelToken,
    ) -> Result<Option<Vec<u8>>, RemoteError>;

    /// Size of an object in bytes; `None` if there is none.
    ///
    /// # Errors
    /// See [`RemoteError`].
    fn size(&self, name: &str, cancel: &CancelToken) -> Result<Option<u64>, RemoteError>;

    /// Writes an object into a new file and gives its size; `None` if there is none. An object over
    /// `limit` bytes is written up to there or a little further.
    ///
    /// # Errors
    /// See [`RemoteError`].
    fn download(
        &self,
        name: &str,
        to: &Path,
        limit: u64,
        cancel: &CancelToken,
    ) -> Result<Option<u64>, RemoteError>;

    /// Makes an object of some bytes. It appears whole or not at all, and replaces another.
    ///
    /// # Errors
    /// See [`RemoteError`].
    fn put(&self, name: &str, bytes: Vec<u8>, cancel: &CancelToken) -> Result<(), RemoteError>;

    /// Makes an object of a file. It appears whole or not at all, and replaces another.
    ///
    /// # Errors
    /// See [`RemoteError`].
    fn upload(&self, name: &str, from: &Path, cancel: &CancelToken) -> Result<(), RemoteError>;
}

/// The remote tier of a run's store.
#[derive(Debug)]
pub struct Remote {
    objects: Box<dyn Objects>,
    read_only: bool,
    /// Whether reading, and writing, was given up in this process.
    no_pull: AtomicBool,
    no_push: AtomicBool,
    /// Blobs that were found damaged there; uploaded although they are there.
    damaged: Mutex<HashSet<Digest>>,
}

/// What became of a push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// It is there now; this many bytes of blobs were sent.
    Sent(u64),
    /// It was not sent: the remote is away, read-only, or a file is damaged here. This was said.
    Not,
}

impl Remote {
    /// A remote that is read, and unless `read_only` written.
    pub fn new(objects: Box<dyn Objects>, read_only: bool) -> Self {
        let (no_pull, no_push) = (AtomicBool::new(false), AtomicBool::new(read_only));
        Self { objects, read_only, no_pull, no_push, damaged: Mutex::default() }
    }

    /// What users call it.
    pub fn url(&self) -> &str {
        self.objects.url()
    }

    fn damaged(&self) -> MutexGuard<'_, HashSet<Digest>> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The entry under a key, without its blobs; `None` also if it is damaged or the remote away.
    pub(crate) fn peek(&self, key: &Digest, cancel: &CancelToken) -> Result<Option<Entry>> {
        if self.no_pull.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let bytes = match self.objects.get(&entry_name(key), LARGEST_ENTRY, cancel) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(e) => return self.give_up_pulling(e).map(|()| None),
        };
        let entry = Entry::parse(&bytes, key).and_then(|entry| match entry.check_foreign() {
            Some(why) => Err(why),
            None => Ok(entry),
        });
        match entry {
            Ok(entry) => Ok(Some(entry)),
            Err(why) => {
                let (url, key) = (self.url(), key.short());
                tracing::warn!("the entry {key} in `{url}` is damaged and not used: {why}");
                Ok(None)
            }
        }
    }

    /// Brings a whole result into the store, if the remote has it.
    ///
    /// # Errors
    /// When the store cannot be written, or the run was stopped.
    pub(crate) fn pull(
        &self,
        store: &Store,
        key: &Digest,
        cancel: &CancelToken,
        waiting: impl FnOnce(),
    ) -> Result<Option<Box<Entry>>> {
        // Two runs on one store download once: the second waits, and finds the result.
        let lock = FileLock::exclusive(&store.lock_path(&format!("{key}.lock")), cancel, waiting)?;
        let found = match store.lookup(key)? {
            Lookup::Hit(entry) => Some(entry),
            _ => self.pull_locked(store, key, cancel)?,
        };
        lock.remove();
        Ok(found)
    }

    fn pull_locked(
        &self,
        store: &Store,
        key: &Digest,
        cancel: &CancelToken,
    ) -> Result<Option<Box<Entry>>> {
        let Some(entry) = self.peek(key, cancel)? else { return Ok(None) };
        let missing: Vec<_> =
            blobs(&entry).into_iter().filter(|(d, size)| !store.use_blob(d, *size)).collect();
        let whole = each(&missing, |(digest, size)| self.fetch(store, digest, *size, cancel));
        match whole {
            Ok(answers) if answers.iter().all(|got| *got) => {}
            Ok(_) => return Ok(None),
            Err(e) => return self.give_up_pulling(e).map(|()| None),
        }
        store.commit(&entry, &[])?;
        Ok(Some(Box::new(entry)))
    }

    /// Downloads one blob into the store; `false` if it is missing or not what its name says.
    fn fetch(
        &self,
        store: &Store,
        digest: &Digest,
        size: u64,
        cancel: &CancelToken,
    ) -> Result<bool, RemoteError> {
        let tmp = store.tmp_path().map_err(RemoteError::Local)?;
        let got = self.objects.download(&blob_name(digest), &tmp, size, cancel);
        let placed = got.and_then(|got| {
            let why = match got {
                None => "is missing".to_owned(),
                Some(n) if n != size => "has the wrong size".to_owned(),
                Some(_) if hash_file(&tmp).map_err(RemoteError::Local)? != *digest => {
                    "is damaged".to_owned()
                }
                Some(_) => {
                    let placed = seal(&tmp).and_then(|()| store.move_in(&tmp, digest));
                    return placed.map(|()| true).map_err(RemoteError::Local);
                }
            };
            let (url, digest_) = (self.url(), digest.short());
            tracing::warn!("the file {digest_} in `{url}` {why}; its task runs instead");
            self.damaged().insert(*digest);
            Ok(false)
        });
        remove_all(&tmp).map_err(RemoteError::Local)?;
        placed
    }

    /// Sends a result: first its blobs, as far as they are not there, then its entry.
    pub(crate) fn push(&self, store: &Store, entry: &Entry, cancel: &CancelToken) -> Pushed {
        if self.no_push.load(Ordering::Relaxed) {
            return Pushed::Not;
        }
        match self.send(store, entry, cancel) {
            Ok(bytes) => Pushed::Sent(bytes),
            Err(e) => {
                self.give_up_pushing(e);
                Pushed::Not
            }
        }
    }

    fn send(&self, store: &Store, entry: &Entry, cancel: &CancelToken) -> Result<u64, RemoteError> {
        let sent = each(&blobs(entry), |(digest, size)| {
            let name = blob_name(digest);
            let damaged = self.damaged().contains(digest);
            if !damaged && self.objects.size(&name, cancel)? == Some(*size) {
                return Ok(0);
            }
            let path = store.blob_path(digest);
            // What others will trust is worth reading once more.
            if hash_file(&path).map_err(RemoteError::Local)? != *digest {
                let message = format!("the file {} is damaged in the store", digest.short());
                let hint = "run `lora-flow cache verify`";
                return Err(RemoteError::Local(Error::new(message).with_hint(hint)));
            }
            self.objects.upload(&name, &path, cancel)?;
            self.damaged().remove(digest);
            Ok(*size)
        })?;
        let bytes = entry.to_bytes().map_err(RemoteError::Local)?;
        self.objects.put(&entry_name(&entry.key), bytes, cancel)?;
        Ok(sent.into_iter().sum())
    }

    /// Sends an entry of the store that the remote lacks.
    ///
    /// # Errors
    /// When the remote cannot be asked or written.
    pub(crate) fn complete(
        &self,
        store: &Store,
        entry: &Entry,
        cancel: &CancelToken,
    ) -> Result<Option<u64>> {
        let name = entry_name(&entry.key);
        let there = self.objects.size(&name, cancel).map_err(|e| self.error(e))?;
        match there {
            Some(_) => Ok(None),
            None => self.send(store, entry, cancel).map(Some).map_err(|e| self.error(e)),
        }
    }

    fn error(&self, e: RemoteError) -> Error {
        match e {
            RemoteError::Cancelled => Error::cancelled(),
            RemoteError::Local(e) => e,
            RemoteError::Denied(e) | RemoteError::Away(e) => {
                Error::new(format!("the remote cache `{}` cannot be used", self.url()))
                    .with_source(e)
            }
        }
    }

    fn give_up_pulling(&self, e: RemoteError) -> Result<()> {
        let (denied, e) = match e {
            RemoteError::Cancelled => return Err(Error::cancelled()),
            RemoteError::Local(e) => return Err(e),
            RemoteError::Denied(e) => (true, e),
            RemoteError::Away(e) => (false, e),
        };
        // What cannot be read is not written either. Two tasks at once may both find out.
        self.no_push.store(true, Ordering::Relaxed);
        if !self.no_pull.swap(true, Ordering::Relaxed) {
            let hint = match denied {
                true => {
                    "\n  hint: reading needs s3:GetObject and s3:ListBucket (without the \
                         latter a missing object looks forbidden)"
                }
                false => "",
            };
            let (url, why) = (self.url(), e.chain());
            tracing::warn!("the run goes on without the remote cache `{url}`: {why}{hint}");
        }
        Ok(())
    }

    fn give_up_pushing(&self, e: RemoteError) {
        let (denied, e) = match e {
            RemoteError::Cancelled => return,
            RemoteError::Local(e) => {
                tracing::warn!("a result was not sent to the remote cache: {}", e.chain());
                return;
            }
            RemoteError::Denied(e) => (true, e),
            RemoteError::Away(e) => (false, e),
        };
        let first = !self.no_push.swap(true, Ordering::Relaxed);
        // Whoever may only read goes on reading.
        let known = if denied { false } else { self.no_pull.swap(true, Ordering::Relaxed) };
        if first && !known {
            let (url, why) = (self.url(), e.chain());
            let hint = match denied {
                true => "\n  hint: `--remote-read-only` says that nothing is to be written there",
                false => "",
            };
            tracing::warn!("results of this run are not sent to `{url}`: {why}{hint}");
        }
    }
}

/// Runs `work` beside a thread that sends results to the remote, so that no task waits for that.
/// Returns when all is sent, given up, or cancelled.
pub(crate) fn pushing<T>(
    remote: Option<&Remote>,
    store: &Store,
    cancel: &CancelToken,
    work: impl FnOnce(Option<&mpsc::Sender<Box<Entry>>>) -> T,
) -> T {
    let Some(remote) = remote.filter(|r| !r.read_only) else { return work(None) };
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel::<Box<Entry>>();
        scope.spawn(move || {
            for entry in receiver {
                if !cancel.is_cancelled() {
                    remote.push(store, &entry, cancel);
                }
            }
        });
        let result = work(Some(&sender));
        drop(sender);
        result
    })
}

/// The blobs of an entry, each once, with their sizes.
fn blobs(entry: &Entry) -> Vec<(Digest, u64)> {
    let files = entry.outputs.values().flat_map(|a| &a.manifest.files);
    files.map(|f| (f.digest, f.size)).collect::<BTreeMap<_, _>>().into_iter().collect()
}

/// Does something with each item, several at a time; the first error ends it.
fn each<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R, RemoteError> + Sync,
) -> Result<Vec<R>, RemoteError> {
    if let [one] = items {
        return Ok(vec![work(one)?]);
    }
    let queue = Mutex::new(items.iter());
    let done = Mutex::new(Ok(Vec::with_capacity(items.len())));
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        for _ in 0..items.len().min(TRANSFERS) {
            scope.spawn(|| {
                while let Some(item) = next() {
                    let result = work(item);
                    let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                    let value = match result {
                        Ok(value) => value,
                        Err(e) => {
                            if done.is_ok() {
                                *done = Err(e);
                            }
                            return;
                        }
                    };
                    match done.as_mut() {
                        Ok(all) => all.push(value),
                        Err(_) => return,
                    }
                }
            });
        }
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn blob_name(digest: &Digest) -> String {
    let hex = digest.to_string();
    format!("v{STORE_FORMAT}/objects/{}/{}", &hex[..2], &hex[2..])
}

fn entry_name(key: &Digest) -> String {
    let hex = key.to_string();
    format!("v{STORE_FORMAT}/entries/{}/{}.json", &hex[..2], &hex[2..])
}

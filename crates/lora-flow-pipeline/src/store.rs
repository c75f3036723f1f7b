//! The artifact store: where results live between runs.
//!
//! ```text
//! .lora-flow/
//!   format               version of this layout
//!   objects/ab/cdef…     blobs: files of artifacts under their BLAKE3 digest, read-only
//!   entries/ab/cdef….json  what a task made, under its key (see `key.rs`)
//!   last/PIPELINE.jsonl  key last seen for each task, for reasons only
//!   runs/ID/             record, logs and metrics of each run
//!   pins/ID              runs whose results stay, whatever is cleaned
//!   state/KEY/           checkpoints of unfinished tasks
//!   plugins/DIGEST/      build products of plugins
//!   stat-cache.json      digests of outside files by size, times and inode
//!   tmp/ locks/ quarantine/
//! ```
//!
//! Three rules keep it valid at any instant, whatever dies when:
//!
//! - A file appears under its final name only whole: written elsewhere in the store, synced,
//!   renamed. Blobs are renamed before the entry that names them.
//! - A reader trusts nothing it can cheaply check: an entry carries a checksum, and each blob it
//!   names must exist with its size. What fails is put into `quarantine/` and computed again.
//! - All locks are kernel locks on files: they are free the moment their holder dies.

mod blob;
mod entry;
mod gc;
mod hash;
mod lock;
pub(crate) mod remote;
mod verify;
mod view;

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use lora_flow_core::{CancelToken, Digest, Error, Result, ResultExt};

pub(crate) use blob::Staged;
pub(crate) use entry::Lookup;
pub use entry::{Entry, EntryInfo, Manifest, ManifestFile, StoredArtifact};
pub use gc::{Freed, Keep};
pub(crate) use hash::hash_file;
pub(crate) use lock::FileLock;
pub use remote::{Objects, Remote, RemoteError};
pub use verify::VerifyReport;

/// Version of the store's layout. Raise it when an older program would misread a newer store.
pub const STORE_FORMAT: u32 = 1;

/// Name of the store's folder under a pipeline's root.
pub(crate) const STORE_DIR: &str = crate::publish::STORE;

const FORMAT_FILE: &str = "format";

/// Everything that may stand at the top of a store.
const NAMES: [&str; 15] = [
    FORMAT_FILE,
    ".gitignore",
    "stat-cache.json",
    "artifacts",
    "objects",
    "entries",
    "last",
    "runs",
    "settled",
    "pins",
    "state",
    "plugins",
    "tmp",
    "locks",
    "quarantine",
];

/// A content-addressed store on a local disk. Several processes may use one at once.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    gate: Arc<lock::Gate>,
}

impl Store {
    /// Opens the store in a folder, which is made if it does not exist.
    ///
    /// # Errors
    /// When the folder holds something else, or a store of a newer format.
    pub fn open(dir: &Path) -> Result<Self> {
        let dir =
            std::path::absolute(dir).context(format!("bad store path `{}`", dir.display()))?;
        let store = Self { dir, gate: Arc::default() };
        match fs::read_to_string(store.dir.join(FORMAT_FILE)) {
            Ok(text) => store.check_format(&text)?,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound) => store.create()?,
            Err(e) => {
                return Err(Error::new(format!("cannot open the store `{}`", store.dir.display()))
                    .with_source(e));
            }
        }
        Ok(store)
    }

    fn check_format(&self, text: &str) -> Result<()> {
        match text.trim().parse::<u32>() {
            Ok(STORE_FORMAT) => Ok(()),
            Ok(format) if format > STORE_FORMAT => Err(Error::new(format!(
                "the store `{}` has format {format}; this version of lora-flow knows format \
                 {STORE_FORMAT}",
                self.dir.display()
            ))
            .with_hint("update lora-flow, or use another store with `--cache-dir`")),
            _ => Err(Error::new(format!(
                "`{}` is damaged: it must hold the format number of the store",
                self.dir.join(FORMAT_FILE).display()
            ))
            .with_hint("delete the store; the next run computes everything again")),
        }
    }

    fn create(&self) -> Result<()> {
        fs_err::create_dir_all(&self.dir).context("cannot make the artifact store")?;
        for entry in fs_err::read_dir(&self.dir)? {
            let name = entry?.file_name();
            if !NAMES.iter().any(|n| name == *n) {
                return Err(Error::new(format!(
                    "`{}` is not an artifact store: it holds `{}`",
                    self.dir.display(),
                    name.display()
                ))
                .with_hint("name a new or empty folder"));
            }
        }
        for name in ["objects", "entries", "last", "runs", "state", "plugins", "tmp", "locks"] {
            fs_err::create_dir_all(self.dir.join(name))?;
        }
        // A run that starts beside this one must not clean away what is being written here.
        let _lock = self.lock_shared(&CancelToken::default())?;
        self.write_atomic(&self.dir.join(".gitignore"), b"*\n", Sync::No)?;
        // Last: a store whose making was interrupted is made again.
        let format = format!("{STORE_FORMAT}\n");
        self.write_atomic(&self.dir.join(FORMAT_FILE), format.as_bytes(), Sync::File)
    }

    /// The store's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the blob of a digest stands, whether it exists or not.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.to_string();
        self.dir.join("objects").join(&hex[..2]).join(&hex[2..])
    }

    fn entry_path(&self, key: &Digest) -> PathBuf {
        let hex = key.to_string();
        self.dir.join("entries").join(&hex[..2]).join(format!("{}.json", &hex[2..]))
    }

    pub(crate) fn runs_dir(&self) -> PathBuf {
        self.dir.join("runs")
    }

    /// The file of the last keys of a pipeline's tasks.
    pub(crate) fn last_path(&self, pipeline: &str) -> PathBuf {
        self.dir.join("last").join(format!("{}.jsonl", file_name_of(pipeline)))
    }

    pub(crate) fn stat_cache_path(&self) -> PathBuf {
        self.dir.join("stat-cache.json")
    }

    /// Folder that outlives a failed or killed try under a key.
    pub(crate) fn state_dir(&self, key: &Digest) -> PathBuf {
        self.dir.join("state").join(key.to_string())
    }

    /// The store that a [`Store::state_dir`] belongs to. A plugin's process host knows its task's
    /// context alone, and needs the store for build products that outlive the task.
    pub(crate) fn of_state_dir(state_dir: &Path) -> Option<Self> {
        let dir = state_dir.parent().filter(|p| p.ends_with("state"))?.parent()?;
        Some(Self { dir: dir.to_owned(), gate: Arc::default() })
    }

    /// Folder of a plugin's build products.
    pub(crate) fn plugin_dir(&self, digest: &Digest) -> PathBuf {
        self.dir.join("plugins").join(digest.to_string())
    }

    pub(crate) fn lock_path(&self, name: &str) -> PathBuf {
        self.dir.join("locks").join(name)
    }

    /// A new name below `tmp/`, which exists.
    pub(crate) fn tmp_path(&self) -> Result<PathBuf> {
        let tmp = self.dir.join("tmp");
        fs_err::create_dir_all(&tmp)?;
        Ok(tmp.join(unique_name()))
    }

    /// Writes a file so that it is there whole or not at all.
    pub(crate) fn write_atomic(&self, path: &Path, bytes: &[u8], sync: Sync) -> Result<()> {
        let tmp = self.tmp_path()?;
        write_file(&tmp, bytes, sync)?;
        rename_into(&tmp, path)?;
        Ok(())
    }

    /// Puts a file that cannot be trusted out of the way, for inspection.
    fn quarantine(&self, path: &Path) -> Result<()> {
        let dir = self.dir.join("quarantine");
        fs_err::create_dir_all(&dir)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match fs_err::rename(path, dir.join(format!("{name}.{}", unique_name()))) {
            // Another process was faster.
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            other => Ok(other?),
        }
    }
}

/// Whether a file must be on the disk before its name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sync {
    /// Losing it costs nothing but time.
    No,
    /// Its content must be whole wherever its name is.
    File,
}

pub(crate) fn write_file(path: &Path, bytes: &[u8], sync: Sync) -> Result<()> {
    let mut file = fs_err::File::create(path)?;
    file.write_all(bytes)?;
    if sync == Sync::File {
        file.sync_all()?;
    }
    Ok(())
}

/// Renames, making the target's folder if it is missing.
pub(crate) fn rename_into(from: &Path, to: &Path) -> Result<()> {
    match fs::rename(from, to) {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            if let Some(parent) = to.parent() {
                fs_err::create_dir_all(parent)?;
            }
            Ok(fs_err::rename(from, to)?)
        }
        Err(e) => {
            Err(Error::new(format!("cannot rename `{}` to `{}`", from.display(), to.display()))
                .with_source(e))
        }
        Ok(()) => Ok(()),
    }
}

/// Makes the names in a folder durable.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    Ok(File::open(path).and_then(|dir| dir.sync_all())?)
}

/// Removes a file or a whole folder; nothing there is fine.
pub(crate) fn remove_all(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs_err::remove_dir_all(path),
        Ok(_) => fs_err::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// A name that no other thread or process comes up with.
pub(crate) fn unique_name() -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    format!("{}-{nanos:x}-{count}", std::process::id())
}

/// A readable file name for any text: what file systems or shells may stumble over becomes `_`,
/// and a digest keeps such names apart.
pub(crate) fn file_name_of(text: &str) -> String {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_=,.[]+@".contains(c);
    let name: String = text.chars().map(|c| if good(c) { c } else { '_' }).take(80).collect();
    if name == text && !name.is_empty() && !name.starts_with('.') {
        return name;
    }
    let digest = Digest::of_bytes(text.as_bytes()).short();
    format!("{}-{digest}", name.trim_start_matches('.'))
}

/// All entries of a folder, in name order; none if it does not exist.
fn list_dir(path: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs_err::read_dir(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut paths = entries.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// The files of `objects/` or `entries/`: two levels, the first being two digits.
fn list_sharded(path: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for shard in list_dir(path)? {
        if shard.is_dir() {
            files.extend(list_dir(&shard)?);
        }
    }
    Ok(files)
}

/// The digest that the path of a blob or an entry stands for.
fn digest_of_path(path: &Path) -> Option<Digest> {
    let rest = path.file_name()?.to_str()?;
    let shard = path.parent()?.file_name()?.to_str()?;
    format!("{shard}{}", rest.strip_suffix(".json").unwrap_or(rest)).parse().ok()
}

#[cfg(test)]
mod tests;

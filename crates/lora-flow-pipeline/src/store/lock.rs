//! Kernel locks on files: free at once when their holder dies, so none is ever stale.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use lora_flow_core::{CancelToken, Error, Result};

use super::Store;

const FIRST_WAIT: Duration = Duration::from_millis(1);
const LONGEST_WAIT: Duration = Duration::from_millis(50);

/// A held lock; dropping it sets it free.
#[derive(Debug)]
pub(crate) struct FileLock {
    file: File,
    path: PathBuf,
}

#[derive(Debug, Clone, Copy)]
enum Mode {
    Shared,
    Exclusive,
}

impl FileLock {
    /// The lock, if nobody else has it.
    pub(crate) fn try_exclusive(path: &Path) -> Result<Option<Self>> {
        Self::attempt(path, Mode::Exclusive)
    }

    /// The lock, as soon as nobody else has it; `waiting` is called once if that takes time.
    ///
    /// # Errors
    /// [`Error::cancelled`] when `cancel` is set before.
    pub(crate) fn exclusive(
        path: &Path,
        cancel: &CancelToken,
        waiting: impl FnOnce(),
    ) -> Result<Self> {
        Self::wait(path, Mode::Exclusive, cancel, waiting)
    }

    /// The lock beside other holders of a shared one.
    fn shared(path: &Path, cancel: &CancelToken, waiting: impl FnOnce()) -> Result<Self> {
        Self::wait(path, Mode::Shared, cancel, waiting)
    }

    fn wait(path: &Path, mode: Mode, cancel: &CancelToken, waiting: impl FnOnce()) -> Result<Self> {
        let mut waiting = Some(waiting);
        let mut pause = FIRST_WAIT;
        loop {
            if let Some(lock) = Self::attempt(path, mode)? {
                return Ok(lock);
            }
            if cancel.is_cancelled() {
                return Err(Error::cancelled());
            }
            if pause == LONGEST_WAIT
                && let Some(waiting) = waiting.take()
            {
                waiting();
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_WAIT);
        }
    }

    fn attempt(path: &Path, mode: Mode) -> Result<Option<Self>> {
        loop {
            let file = open(path)?;
            let locked = match mode {
                Mode::Shared => file.try_lock_shared(),
                Mode::Exclusive => file.try_lock(),
            };
            match locked {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(e)) => {
                    return Err(Error::new(format!("cannot lock `{}`", path.display()))
                        .with_source(e)
                        .with_hint("the store must be on a file system with file locks"));
                }
            }
            // The last holder may have deleted the file between opening and locking it; then
            // this lock excludes nobody.
            let held = file.metadata()?;
            let same = std::fs::metadata(path)
                .is_ok_and(|m| (m.dev(), m.ino()) == (held.dev(), held.ino()));
            if same {
                return Ok(Some(Self { file, path: path.to_owned() }));
            }
        }
    }

    /// Writes into the lock's file what is to be known if its holder dies.
    pub(crate) fn note(&self, text: &[u8]) -> Result<()> {
        self.file.set_len(0)?;
        Ok((&self.file).write_all(text)?)
    }

    /// Whether somebody has the lock. Makes no file.
    pub(crate) fn is_held(path: &Path) -> bool {
        let file = File::open(path);
        file.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// The lock after its file was moved.
    pub(crate) fn moved_to(mut self, path: PathBuf) -> Self {
        self.path = path;
        self
    }

    /// Deletes the lock's file and sets it free.
    pub(crate) fn remove(self) {
        // While it is held: whoever opened this file meanwhile will see that it is gone.
        let _ = std::fs::remove_file(&self.path);
    }

    /// Lets others share the lock.
    fn downgrade(self) -> Result<Self> {
        self.file.lock_shared()?;
        Ok(self)
    }
}

fn open(path: &Path) -> Result<File> {
    let open = || OpenOptions::new().create(true).truncate(false).write(true).open(path);
    let opened = match open() {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                fs_err::create_dir_all(parent)?;
            }
            open()
        }
        other => other,
    };
    opened.map_err(|e| {
        let error = Error::new(format!("cannot open `{}`", path.display()));
        let hint = "the store must be writable; `--cache-dir` names another one";
        let denied =
            matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem);
        if denied { error.with_hint(hint).with_source(e) } else { error.with_source(e) }
    })
}

/// Name of the lock that runs share, and that whoever wants to be alone in the store takes.
pub(super) const STORE_LOCK: &str = "store.lock";

/// Name of the gate's lock.
const GATE_LOCK: &str = "gate.lock";

/// Locks whose files are never deleted: processes keep them open.
pub(super) const LASTING: [&str; 2] = [STORE_LOCK, GATE_LOCK];

/// A lock that is held while results are looked up or taken in, and that cleaning has for itself
/// while it deletes. Entering costs two system calls at most; threads of a process share one hold.
#[derive(Debug, Default)]
pub(super) struct Gate(Mutex<GateState>);

#[derive(Debug, Default)]
struct GateState {
    file: Option<File>,
    holders: usize,
}

/// Keeps cleaning out.
#[derive(Debug)]
pub(crate) struct GateGuard<'a>(&'a Gate);

impl Gate {
    fn state(&self) -> MutexGuard<'_, GateState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for GateGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.holders -= 1;
        if let (0, Some(file)) = (state.holders, &state.file)
            && let Err(e) = file.unlock()
        {
            tracing::debug!("the gate of the store does not open: {e}");
        }
    }
}

impl Store {
    /// For a run: nothing is cleaned away while this is held. What dead runs left in `tmp/` and
    /// `locks/` goes when nobody else is at work.
    /// What a lock's file notes goes to `noted` before.
    pub(crate) fn lock_for_run(
        &self,
        cancel: &CancelToken,
        noted: impl Fn(&[u8]),
    ) -> Result<FileLock> {
        let path = self.lock_path(STORE_LOCK);
        if let Some(lock) = FileLock::try_exclusive(&path)? {
            let locks = super::list_dir(&self.dir.join("locks"))?;
            let locks = locks.into_iter().filter(|p| !p.ends_with(STORE_LOCK));
            for leftover in locks.chain(super::list_dir(&self.dir.join("tmp"))?) {
                if leftover.extension().is_some_and(|e| e == "lock")
                    && let Ok(note) = std::fs::read(&leftover)
                    && !note.is_empty()
                {
                    noted(&note);
                }
                super::remove_all(&leftover)?;
            }
            return lock.downgrade();
        }
        self.lock_shared(cancel)
    }

    /// For a reader: nothing is cleaned away while this is held.
    pub(crate) fn lock_shared(&self, cancel: &CancelToken) -> Result<FileLock> {
        FileLock::shared(&self.lock_path(STORE_LOCK), cancel, || {
            tracing::info!("waiting for the cleaning of the store to end");
        })
    }

    /// Whether a run, a reader or a cleaning is at work in the store now.
    ///
    /// # Errors
    /// When the store cannot be locked at all.
    pub fn in_use(&self) -> Result<bool> {
        Ok(FileLock::try_exclusive(&self.lock_path(STORE_LOCK))?.is_none())
    }

    /// Keeps cleaning out for a moment; waits if one is deleting now.
    pub(crate) fn gate(&self) -> Result<GateGuard<'_>> {
        let mut state = self.gate.state();
        if state.holders == 0 {
            let file = match state.file.take() {
                Some(file) => file,
                None => open(&self.lock_path(GATE_LOCK))?,
            };
            file.lock_shared()?;
            state.file = Some(file);
        }
        state.holders += 1;
        Ok(GateGuard(&self.gate))
    }

    /// For cleaning: nothing is looked up or taken in while this is held.
    pub(super) fn gate_for_cleaning(&self) -> Result<FileLock> {
        FileLock::exclusive(&self.lock_path(GATE_LOCK), &CancelToken::default(), || {
            tracing::info!("waiting for others to let go of the store");
        })
    }

    /// Says that a run is at work, while it is held. The file's time is the run's beginning.
    pub(crate) fn lock_run(&self, id: &str) -> Result<FileLock> {
        let path = self.lock_path(&format!("run-{id}.lock"));
        FileLock::exclusive(&path, &CancelToken::default(), || {})
    }

    /// Runs that are at work, and when they began.
    pub(super) fn live_runs(&self) -> Result<BTreeMap<String, SystemTime>> {
        let mut live = BTreeMap::new();
        for path in super::list_dir(&self.dir.join("locks"))? {
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let id = name.strip_prefix("run-").and_then(|n| n.strip_suffix(".lock"));
            let Some(id) = id else { continue };
            let Ok(began) = std::fs::metadata(&path).and_then(|m| m.modified()) else { continue };
            match FileLock::try_exclusive(&path)? {
                Some(dead) => dead.remove(),
                None => {
                    live.insert(id.to_owned(), began);
                }
            }
        }
        Ok(live)
    }
}

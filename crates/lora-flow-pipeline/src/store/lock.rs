//! Kernel locks on files: free at once when their holder dies, so none is ever stale.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

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

/// Name of the lock that runs share and that cleaning takes for itself.
const STORE_LOCK: &str = "store.lock";

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

    /// For cleaning: no run is at work while this is held.
    pub(super) fn lock_for_cleaning(&self) -> Result<FileLock> {
        FileLock::try_exclusive(&self.lock_path(STORE_LOCK))?.ok_or_else(|| {
            Error::new("the store is in use by a running pipeline")
                .with_hint("clean it when the run has ended")
        })
    }
}

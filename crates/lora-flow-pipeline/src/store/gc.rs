//! Cleaning: what neither a recent run reaches nor is young goes.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

use lora_flow_core::{CancelToken, Digest, Result};

use super::{Store, digest_of_path, list_dir, list_sharded, remove_all};
use crate::record;

/// What [`Store::gc`] freed, or would free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    /// Bytes of everything removed.
    pub bytes: u64,
    /// Entries.
    pub entries: usize,
    /// Blobs.
    pub blobs: usize,
    /// Records of runs, with their logs.
    pub runs: usize,
}

impl Store {
    /// Removes entries that none of the newest `keep_runs` ended runs used and that are older than
    /// `age`, the blobs that no entry needs any more, and records of runs, states of unfinished
    /// tasks and plugin builds that are neither recent nor young. With `dry_run` only counts.
    ///
    /// # Errors
    /// When a pipeline is running in the store, or the store cannot be read or written.
    pub fn gc(&self, keep_runs: usize, age: Duration, dry_run: bool) -> Result<Freed> {
        let _lock = match dry_run {
            true => self.lock_shared(&CancelToken::default())?,
            false => self.lock_for_cleaning()?,
        };
        let now = SystemTime::now();
        let is_young = |path: &Path| {
            newest(path).is_none_or(|t| now.duration_since(t).map_or(true, |d| d < age))
        };
        let mut sweep = Sweep { dry_run, freed: Freed::default() };

        let mut reached: HashSet<Digest> = HashSet::new();
        let (mut recent, mut old) = (0, Vec::new());
        for id in record::run_ids(self)? {
            if recent == keep_runs {
                old.push(id);
            } else if let Ok(report) = record::load_report(self, &id) {
                // A run that was killed says nothing of its tasks; it must not take the place of
                // one that does.
                reached.extend(report.tasks.iter().filter_map(|t| t.key));
                recent += 1;
            }
        }

        let mut live: HashSet<Digest> = HashSet::new();
        for (path, entry) in self.entries()? {
            match entry {
                Ok(entry) if reached.contains(&entry.key) || is_young(&path) => {
                    let files = entry.outputs.values().flat_map(|a| &a.manifest.files);
                    live.extend(files.map(|f| f.digest));
                }
                _ => {
                    sweep.remove(&path)?;
                    sweep.freed.entries += 1;
                }
            }
        }
        for path in list_sharded(&self.dir.join("objects"))? {
            if !digest_of_path(&path).is_some_and(|digest| live.contains(&digest)) {
                sweep.remove(&path)?;
                sweep.freed.blobs += 1;
            }
        }
        for id in old {
            let path = self.runs_dir().join(id);
            if !is_young(&path) {
                sweep.remove(&path)?;
                sweep.freed.runs += 1;
            }
        }
        for folder in ["state", "plugins", "quarantine"] {
            for path in list_dir(&self.dir.join(folder))? {
                // A state that a recent run left is taken up again by the next one.
                let key = path.file_name().and_then(|n| n.to_str()?.parse::<Digest>().ok());
                if !is_young(&path) && !key.is_some_and(|key| reached.contains(&key)) {
                    sweep.remove(&path)?;
                }
            }
        }
        if !dry_run {
            // Nobody is at work, so nobody holds these.
            for folder in ["tmp", "locks"] {
                let leftovers = list_dir(&self.dir.join(folder))?;
                for path in leftovers.iter().filter(|p| !p.ends_with("store.lock")) {
                    sweep.remove(path)?;
                }
            }
        }
        Ok(sweep.freed)
    }
}

struct Sweep {
    dry_run: bool,
    freed: Freed,
}

impl Sweep {
    fn remove(&mut self, path: &Path) -> Result<()> {
        self.freed.bytes += size(path);
        if self.dry_run { Ok(()) } else { remove_all(path) }
    }
}

/// The last time anything directly in a folder (or the file itself) was written.
fn newest(path: &Path) -> Option<SystemTime> {
    let own = std::fs::symlink_metadata(path).ok()?.modified().ok();
    let children = list_dir(path).unwrap_or_default();
    let times = children.iter().filter_map(|p| std::fs::symlink_metadata(p).ok()?.modified().ok());
    times.chain(own).max()
}

/// Bytes of a file, or of all files below a folder.
fn size(path: &Path) -> u64 {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => {
            list_dir(path).unwrap_or_default().iter().map(|p| size(p)).sum()
        }
        Ok(meta) => meta.len(),
        Err(_) => 0,
    }
}

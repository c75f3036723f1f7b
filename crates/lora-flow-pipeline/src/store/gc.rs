//! Cleaning: what nobody reaches and nobody used lately goes.
//!
//! May run beside pipelines. Two things make that safe. A run touches what it uses: the entries
//! and blobs it finds, unless they were touched within [`TOUCH`]; and whatever was touched since
//! the oldest of the runs now at work began stays. And it looks and touches in one step, behind a
//! gate ([`super::lock`]) that cleaning has for itself while it decides and deletes.

use std::collections::{HashMap, HashSet};
use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use lora_flow_core::{CancelToken, Digest, Result, ResultExt};

use super::blob::{is_marked, mark};
use super::entry::info;
use super::{
    Entry, EntryInfo, FileLock, Store, digest_of_path, list_dir, list_sharded, remove_all,
};
use crate::record;

/// What was touched within this time is not touched again: times of use are that coarse.
const TOUCH: Duration = Duration::from_secs(3600);

/// Whether a file was used so lately that its time need not be set again.
pub(super) fn is_recent(meta: &Metadata) -> bool {
    let age = meta.modified().map(|m| SystemTime::now().duration_since(m));
    age.is_ok_and(|age| age.map_or(true, |age| age < TOUCH))
}

/// What [`Store::gc`] keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// What this many of the newest ended runs used.
    pub runs: usize,
    /// What was used within this time.
    pub age: Duration,
    /// If set, bytes of artifacts that may stay: beyond them the least recently used results go,
    /// whatever `runs` and `age` say. What is pinned or used by a run at work stays.
    pub max_bytes: Option<u64>,
}

/// What [`Store::gc`] freed, or would free.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Freed {
    /// Bytes of everything removed.
    pub bytes: u64,
    /// Number of entries, with those that could not be read.
    pub entries: usize,
    /// The results removed, those used last at the end.
    pub removed: Vec<EntryInfo>,
    /// Blobs.
    pub blobs: usize,
    /// Records of runs, with their logs.
    pub runs: usize,
    /// Bytes of the blobs that stay.
    pub left: u64,
    /// Whether runs were at work, so that what they use had to stay.
    pub beside_runs: bool,
}

/// An entry that may go.
struct Candidate {
    path: PathBuf,
    used: SystemTime,
    entry: Entry,
    /// Neither reached nor young.
    unwanted: bool,
    /// Pinned, or used by a run at work.
    held: bool,
}

impl Store {
    /// Removes entries that are neither pinned, nor used by the newest ended runs, nor by a run at
    /// work, nor lately; then the blobs that no entry needs any more. Where nobody is at work, old
    /// records of runs, states of unfinished tasks, plugin builds and leftovers go as well. With
    /// `dry_run` only counts.
    ///
    /// # Errors
    /// When the store cannot be read or written.
    pub fn gc(&self, keep: &Keep, dry_run: bool) -> Result<Freed> {
        let started = SystemTime::now();
        let alone = match dry_run {
            true => None,
            false => FileLock::try_exclusive(&self.lock_path(super::lock::STORE_LOCK))?,
        };
        let _beside = match alone {
            None => Some(self.lock_shared(&CancelToken::default())?),
            Some(_) => None,
        };
        let _gate = self.gate_for_cleaning()?;
        let live = self.live_runs()?;
        // A run that begins now has no lock yet.
        let oldest = live.values().copied().chain([started]).min().unwrap_or(started);
        let since = match (&alone, dry_run && live.is_empty()) {
            (Some(_), _) | (_, true) => None,
            _ => oldest.checked_sub(TOUCH),
        };
        let in_use =
            |path: &Path| since.is_some_and(|since| newest(path).is_none_or(|t| t >= since));
        let is_young = |path: &Path| {
            newest(path).is_none_or(|t| started.duration_since(t).map_or(true, |d| d < keep.age))
        };
        let mut sweep = Sweep { dry_run, freed: Freed::default() };
        sweep.freed.beside_runs = since.is_some();

        let pins: HashSet<String> = self.pins()?.into_iter().collect();
        let mut pinned: HashSet<Digest> = HashSet::new();
        let mut reached: HashSet<Digest> = HashSet::new();
        let (mut recent, mut old) = (0, Vec::new());
        for id in record::run_ids(self)? {
            let report = || record::load_report(self, &id);
            let is_pinned = pins.contains(&id);
            if is_pinned {
                let report =
                    report().with_context(|| format!("cannot read the pinned run {id}"))?;
                pinned.extend(report.tasks.iter().filter_map(|t| t.key));
            }
            if recent == keep.runs {
                old.extend((!is_pinned && !live.contains_key(&id)).then_some(id));
            } else if let Ok(report) = report() {
                // A run that was killed says nothing of its tasks; it must not take the place of
                // one that does.
                reached.extend(report.tasks.iter().filter_map(|t| t.key));
                recent += 1;
            }
        }

        let mut candidates = Vec::new();
        for (path, entry) in self.entries()? {
            match entry {
                Ok(entry) => candidates.push(Candidate {
                    used: newest(&path).unwrap_or(started),
                    unwanted: !reached.contains(&entry.key) && !is_young(&path),
                    held: pinned.contains(&entry.key) || in_use(&path),
                    entry,
                    path,
                }),
                Err(_) => {
                    sweep.remove(&path)?;
                    sweep.freed.entries += 1;
                }
            }
        }
        candidates.sort_by(|a, b| a.used.cmp(&b.used).then(a.path.cmp(&b.path)));
        let live_blobs = sweep.entries(candidates, keep.max_bytes)?;
        for path in list_sharded(&self.dir.join("objects"))? {
            let wanted = digest_of_path(&path).is_some_and(|d| live_blobs.contains_key(&d));
            if wanted || in_use(&path) {
                sweep.freed.left += size(&path);
            } else {
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
        if since.is_none() {
            reached.extend(pinned);
            self.sweep_leftovers(&mut sweep, &reached, &is_young)?;
        }
        Ok(sweep.freed)
    }

    /// What belongs to no result, where nobody is at work.
    fn sweep_leftovers(
        &self,
        sweep: &mut Sweep,
        reached: &HashSet<Digest>,
        is_young: &dyn Fn(&Path) -> bool,
    ) -> Result<()> {
        for folder in ["state", "plugins", "quarantine", "settled"] {
            for path in list_dir(&self.dir.join(folder))? {
                // A state that a recent run left is taken up again by the next one.
                let key = path.file_name().and_then(|n| n.to_str()?.parse::<Digest>().ok());
                if !is_young(&path) && !key.is_some_and(|key| reached.contains(&key)) {
                    sweep.remove(&path)?;
                }
            }
        }
        if !sweep.dry_run {
            // Nobody is at work, so nobody holds these.
            for folder in ["tmp", "locks"] {
                for path in list_dir(&self.dir.join(folder))? {
                    let lasting = super::lock::LASTING.iter().any(|name| path.ends_with(name));
                    if !lasting {
                        sweep.remove(&path)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Marks an entry or a blob, whose bytes are known to be right, as used now, unless it was
    /// lately; `false` if it is gone.
    pub(super) fn touch(path: &Path) -> bool {
        let Ok(meta) = std::fs::metadata(path) else { return false };
        if !is_marked(&meta) || !is_recent(&meta) {
            // A store that can only be read is not cleaned either.
            let _ = File::open(path).and_then(|file| mark(&file));
        }
        true
    }

    /// Protects what a run used from [`Store::gc`], until it is unpinned.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub fn pin(&self, run: &str) -> Result<()> {
        fs_err::create_dir_all(self.dir.join("pins"))?;
        Ok(fs_err::write(self.dir.join("pins").join(run), "")?)
    }

    /// Ends the protection of a run; `false` if it was not pinned.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub fn unpin(&self, run: &str) -> Result<bool> {
        let path = self.dir.join("pins").join(run);
        let was = path.exists();
        remove_all(&path)?;
        Ok(was)
    }

    /// Ids of the pinned runs.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn pins(&self) -> Result<Vec<String>> {
        let pins = list_dir(&self.dir.join("pins"))?;
        let name = |p: &PathBuf| Some(p.file_name()?.to_str()?.to_owned());
        Ok(pins.iter().filter_map(name).collect())
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

    /// Removes what is unwanted, then the least recently used until the rest fits; gives the blobs
    /// of what stays, with the number of entries that need each.
    fn entries(
        &mut self,
        candidates: Vec<Candidate>,
        max_bytes: Option<u64>,
    ) -> Result<HashMap<Digest, usize>> {
        let mut needed: HashMap<Digest, usize> = HashMap::new();
        let mut bytes = 0;
        let (mut gone, stay): (Vec<_>, Vec<_>) =
            candidates.into_iter().partition(|c| c.unwanted && !c.held);
        for file in stay.iter().flat_map(|c| files(&c.entry)) {
            let count = needed.entry(file.0).or_default();
            *count += 1;
            bytes += if *count == 1 { file.1 } else { 0 };
        }
        if let Some(max) = max_bytes {
            for candidate in stay.into_iter().filter(|c| !c.held) {
                if bytes <= max {
                    break;
                }
                for (digest, size) in files(&candidate.entry) {
                    if let Some(count) = needed.get_mut(&digest) {
                        *count -= 1;
                        if *count == 0 {
                            needed.remove(&digest);
                            bytes -= size;
                        }
                    }
                }
                gone.push(candidate);
            }
        }
        for candidate in gone {
            self.remove(&candidate.path)?;
            self.freed.entries += 1;
            self.freed.removed.push(info(&candidate.entry));
        }
        Ok(needed)
    }
}

fn files(entry: &Entry) -> impl Iterator<Item = (Digest, u64)> + '_ {
    entry.outputs.values().flat_map(|a| &a.manifest.files).map(|f| (f.digest, f.size))
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

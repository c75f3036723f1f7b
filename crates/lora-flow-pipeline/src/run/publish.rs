//! Publishing: copies of outputs in folders outside the store.
//!
//! A published folder carries a file [`MARKER`] that says what it is: the artifact, its pipeline
//! and task, and each file's size and time as they were written. By it the next run sees with a
//! few `stat` calls that all is in place, repairs what was changed or deleted, and knows a folder
//! of its own from one that it must not touch.
//!
//! Files are copied (by reference where the file system can), never hard-linked: whoever edits a
//! published file must not edit the store. The new folder is built beside the old one and takes
//! its place in one step. Files that others put into it move along.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use lora_flow_core::{CancelToken, Digest, Error, Result, ResultExt};
use serde::{Deserialize, Serialize};

use crate::plan::PlannedTask;
use crate::store::{
    FileLock, Store, StoredArtifact, Sync, hash_file, remove_all, sync_dir, unique_name, write_file,
};

/// Name of the file that a published folder carries.
pub(crate) const MARKER: &str = ".lora-flow.json";

#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    pipeline: String,
    task: String,
    output: String,
    artifact: Digest,
    files: BTreeMap<String, Published>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Published {
    digest: Digest,
    size: u64,
    /// Modification time in nanoseconds.
    mtime: i64,
}

/// An output and the folder it is to stand in.
pub(super) struct Publication<'a> {
    pub(super) store: &'a Store,
    pub(super) pipeline: &'a str,
    pub(super) task: &'a PlannedTask,
    pub(super) output: &'a str,
    pub(super) artifact: &'a StoredArtifact,
    pub(super) target: &'a Path,
}

/// Whether a folder holds what a pipeline published there, by sizes and times.
pub(super) fn is_current(target: &Path, pipeline: &str, artifact: &Digest) -> bool {
    let same = |(name, file): (&String, &Published)| {
        size_and_mtime(&target.join(name)).ok() == Some((file.size, file.mtime))
    };
    read_marker(target).is_some_and(|m| {
        m.artifact == *artifact && m.pipeline == pipeline && m.files.iter().all(same)
    })
}

impl Publication<'_> {
    /// Whether the folder is as it must be, by sizes and times.
    pub(super) fn is_current(&self) -> bool {
        is_current(self.target, self.pipeline, &self.artifact.digest)
    }

    /// Brings the folder up to date.
    ///
    /// # Errors
    /// When the target is not a folder of this pipeline, or cannot be written.
    pub(super) fn publish(&self, cancel: &CancelToken) -> Result<()> {
        if self.is_current() {
            return Ok(());
        }
        self.replace(cancel).with_context(|| {
            format!(
                "cannot publish `{}.{}` to `{}`",
                self.task.id,
                self.output,
                self.target.display()
            )
        })
    }

    fn replace(&self, cancel: &CancelToken) -> Result<()> {
        // A link to a folder stays a link.
        let target = fs::canonicalize(self.target).unwrap_or_else(|_| self.target.to_owned());
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(Error::new("the target is not a folder"));
        };
        let digest = Digest::of_bytes(target.as_os_str().as_encoded_bytes());
        let lock = self.store.lock_path(&format!("publish-{}.lock", digest.short()));
        let lock = FileLock::exclusive(&lock, cancel, || {})?;
        // Whoever finds this file after a kill knows where to look for leftovers.
        lock.note(target.as_os_str().as_encoded_bytes())?;
        // Before the target is looked at: what moves into it here moves along below.
        if parent.is_dir() {
            remove_leftovers(parent, name)?;
        }
        let kept = match self.inspect(&target)? {
            Found::Identical => {
                self.write_marker(&target)?;
                lock.remove();
                return Ok(());
            }
            Found::Free => Vec::new(),
            Found::Ours { others } => others,
        };
        fs_err::create_dir_all(parent)?;
        let mut fresh = sibling_prefix(name);
        fresh.push(unique_name());
        let fresh = parent.join(fresh);
        let placed = self
            .build(&fresh, cancel)
            .and_then(|()| swap(&fresh, &target))
            .and_then(|()| kept.iter().try_for_each(|name| move_along(&fresh, &target, name)));
        // Either what could not be placed, or what it replaced.
        let removed = if placed.is_ok() || read_marker(&fresh).is_none() {
            remove_all(&fresh)
        } else {
            Ok(())
        };
        placed.and(removed)?;
        sync_dir(parent)?;
        lock.remove();
        Ok(())
    }

    /// What stands at the target now.
    fn inspect(&self, target: &Path) -> Result<Found> {
        match fs::symlink_metadata(target) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Found::Free),
            Err(e) => return Err(e.into()),
            Ok(meta) if !meta.is_dir() => return Err(a_file()),
            Ok(_) => {}
        }
        let mut present = Vec::new();
        list(target, "", &mut present)?;
        let Some(marker) = read_marker(target) else {
            if present.is_empty() {
                return Ok(Found::Free);
            }
            if is_identical(self.artifact, target, &present) {
                return Ok(Found::Identical);
            }
            return Err(not_ours());
        };
        if marker.pipeline != self.pipeline {
            return Err(of_another(&marker));
        }
        let wanted = |name: &str| self.artifact.manifest.files.iter().find(|f| f.name == name);
        let others = present.into_iter().filter(|n| n != MARKER && !marker.files.contains_key(n));
        let mut kept = Vec::new();
        for name in others {
            match wanted(&name) {
                None => kept.push(name),
                Some(f) if hash_file(&target.join(&name)).ok() == Some(f.digest) => {}
                Some(_) => {
                    return Err(Error::new(format!(
                        "the folder holds a file `{name}` that lora-flow did not make"
                    ))
                    .with_hint("move it away"));
                }
            }
        }
        Ok(Found::Ours { others: kept })
    }

    /// A whole copy of the artifact, the marker last.
    fn build(&self, dir: &Path, cancel: &CancelToken) -> Result<()> {
        fs_err::create_dir(dir)?;
        for file in &self.artifact.manifest.files {
            if cancel.is_cancelled() {
                return Err(Error::cancelled());
            }
            if file.name == MARKER {
                return Err(Error::new(format!("a file of the artifact is named `{MARKER}`")));
            }
            let to = dir.join(&file.name);
            if let Some(parent) = to.parent() {
                fs_err::create_dir_all(parent)?;
            }
            // Not `fs::copy`: the copy is to be writable, with the permissions of a new file.
            let mut from = File::open(self.store.blob_path(&file.digest))?;
            let mut copy = File::create_new(&to)?;
            io::copy(&mut from, &mut copy)
                .and_then(|_| copy.sync_all())
                .with_context(|| format!("cannot write `{}`", to.display()))?;
            // What leaves the store is for others to trust: here its bytes are worth reading.
            if hash_file(&to)? != file.digest {
                let message = format!("the file `{}` is damaged in the store", file.name);
                return Err(Error::new(message)
                    .with_hint("run `lora-flow cache verify`, then run the pipeline again"));
            }
        }
        self.write_marker(dir)
    }

    fn write_marker(&self, dir: &Path) -> Result<()> {
        let files = self.artifact.manifest.files.iter().map(|file| {
            let (size, mtime) = size_and_mtime(&dir.join(&file.name))?;
            Ok((file.name.clone(), Published { digest: file.digest, size, mtime }))
        });
        let marker = Marker {
            pipeline: self.pipeline.to_owned(),
            task: self.task.id.clone(),
            output: self.output.to_owned(),
            artifact: self.artifact.digest,
            files: files.collect::<Result<_>>()?,
        };
        let text = serde_json::to_string_pretty(&marker)? + "\n";
        write_file(&dir.join(MARKER), text.as_bytes(), Sync::File)
    }
}

/// Whether the folder holds exactly the artifact, dot files aside.
fn is_identical(artifact: &StoredArtifact, target: &Path, present: &[String]) -> bool {
    let is_dot = |name: &&String| name.split('/').any(|part| part.starts_with('.'));
    let files = &artifact.manifest.files;
    present.iter().filter(|n| !is_dot(n)).all(|n| files.iter().any(|f| f.name == *n))
        && files.iter().all(|f| {
            let path = target.join(&f.name);
            fs::metadata(&path).is_ok_and(|m| m.len() == f.size)
                && hash_file(&path).ok() == Some(f.digest)
        })
}

/// Why a target cannot be published to, as far as that can be said before there is anything to
/// publish.
pub(super) enum Occupied {
    /// A folder with files, which lora-flow did not make.
    Foreign,
    /// Anything else.
    Refused(Error),
}

/// What is in the way at a target, if something is.
pub(super) fn occupied(pipeline: &str, target: &Path) -> Option<Occupied> {
    // As for publishing: a link to a folder stays a link.
    let target = fs::canonicalize(target).unwrap_or_else(|_| target.to_owned());
    let Ok(meta) = fs::symlink_metadata(&target) else {
        let above = target.ancestors().skip(1).find(|p| p.exists());
        return above.filter(|p| !p.is_dir()).map(|p| {
            let message = format!("`{}` is not a folder", p.display());
            Occupied::Refused(Error::new(message).with_hint("publish to another folder"))
        });
    };
    if !meta.is_dir() {
        return Some(Occupied::Refused(a_file()));
    }
    match read_marker(&target) {
        Some(marker) if marker.pipeline == pipeline => None,
        Some(marker) => Some(Occupied::Refused(of_another(&marker))),
        None => {
            let mut present = Vec::new();
            let listed = list(&target, "", &mut present);
            (listed.is_err() || !present.is_empty()).then_some(Occupied::Foreign)
        }
    }
}

/// Whether a folder that lora-flow did not make holds exactly an artifact.
pub(super) fn holds(artifact: &StoredArtifact, target: &Path) -> bool {
    let mut present = Vec::new();
    list(target, "", &mut present).is_ok() && is_identical(artifact, target, &present)
}

fn a_file() -> Error {
    Error::new("the target is a file")
        .with_hint("`publish` names a folder; the artifact's files are put into it")
}

pub(super) fn not_ours() -> Error {
    Error::new("the folder exists and lora-flow did not make it")
        .with_hint("remove it, or publish to another folder")
}

fn of_another(marker: &Marker) -> Error {
    Error::new(format!("the pipeline `{}` published this folder", marker.pipeline))
        .with_hint("remove it, or publish to another folder")
}

enum Found {
    /// Nothing, or an empty folder.
    Free,
    /// Exactly the artifact, made by someone else.
    Identical,
    /// A folder that this pipeline published, and files in it that are not of the artifact.
    Ours { others: Vec<String> },
}

fn read_marker(dir: &Path) -> Option<Marker> {
    serde_json::from_slice(&fs::read(dir.join(MARKER)).ok()?).ok()
}

fn size_and_mtime(path: &Path) -> io::Result<(u64, i64)> {
    let meta = fs::metadata(path)?;
    Ok((meta.len(), meta.mtime() * 1_000_000_000 + meta.mtime_nsec()))
}

/// Names of everything below a folder that is not a folder itself.
fn list(dir: &Path, prefix: &str, names: &mut Vec<String>) -> Result<()> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let Ok(file_name) = entry.file_name().into_string() else {
            return Err(Error::new("the folder holds a file whose name is not UTF-8"));
        };
        let name = format!("{prefix}{file_name}");
        if entry.file_type()?.is_dir() {
            list(&entry.path(), &format!("{name}/"), names)?;
        } else {
            names.push(name);
        }
    }
    Ok(())
}

fn sibling_prefix(name: &std::ffi::OsStr) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".lora-flow-");
    prefix
}

/// Puts a folder in the place of another in one step; afterwards `fresh` is the old one, if there
/// was one.
fn swap(fresh: &Path, target: &Path) -> Result<()> {
    let plain = fs::rename(fresh, target); // works if nothing or an empty folder is there
    let Err(e) = plain else { return Ok(()) };
    if !matches!(e.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) {
        return Err(Error::new(format!("cannot make `{}`", target.display())).with_source(e));
    }
    if exchange(fresh, target) {
        return Ok(());
    }
    let mut aside = fresh.as_os_str().to_owned();
    aside.push("-old");
    let aside = PathBuf::from(aside);
    fs_err::rename(target, &aside)?;
    fs_err::rename(fresh, target)?;
    fs_err::rename(&aside, fresh)?;
    Ok(())
}

#[cfg(target_os = "linux")]
fn exchange(a: &Path, b: &Path) -> bool {
    use std::ffi::CString;
    let path = |p: &Path| CString::new(p.as_os_str().as_encoded_bytes()).ok();
    let (Some(a), Some(b)) = (path(a), path(b)) else { return false };
    // SAFETY: both are NUL-terminated strings that outlive the call.
    let result = unsafe {
        libc::renameat2(
            libc::AT_FDCWD,
            a.as_ptr(),
            libc::AT_FDCWD,
            b.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn exchange(_: &Path, _: &Path) -> bool {
    false
}

fn move_along(old: &Path, new: &Path, name: &str) -> Result<()> {
    let to = new.join(name);
    if let Some(parent) = to.parent() {
        fs_err::create_dir_all(parent)?;
    }
    Ok(fs_err::rename(old.join(name), to)?)
}

/// Cleans up beside a target whose publishing was cut short, given what its lock's file notes. That
/// it cannot be done stops no run: the next publishing there tries again.
pub(super) fn sweep(noted: &[u8]) {
    let target = Path::new(OsStr::from_bytes(noted));
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else { return };
    if target.is_absolute()
        && let Err(e) = remove_leftovers(parent, name)
    {
        tracing::debug!("cannot clean up beside `{}`: {}", target.display(), e.chain());
    }
}

/// Removes what a killed run left beside a target. What others had put into the folder that was
/// replaced, and the kill kept from moving along, moves now if its place is free; otherwise it stays.
fn remove_leftovers(parent: &Path, name: &OsStr) -> Result<()> {
    let (prefix, target) = (sibling_prefix(name), parent.join(name));
    for entry in fs_err::read_dir(parent)? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) {
            continue;
        }
        let path = entry.path();
        let mut names = Vec::new();
        list(&path, "", &mut names)?;
        let mut displaced = false;
        if let Some(marker) = read_marker(&path) {
            let is_published = read_marker(&target).is_some();
            for name in names.iter().filter(|n| *n != MARKER && !marker.files.contains_key(*n)) {
                if is_published && fs::symlink_metadata(target.join(name)).is_err() {
                    move_along(&path, &target, name)?;
                } else {
                    displaced = true;
                }
            }
        }
        if !displaced {
            remove_all(&path)?;
        }
    }
    Ok(())
}

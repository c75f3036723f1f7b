//! Blobs: from the files of an output folder to read-only objects.
//!
//! A sealed blob carries a mark in the fraction of its modification time. Whatever writes to it
//! afterwards takes the mark away, so that the `stat` which every lookup makes anyway shows it,
//! and the bytes are hashed before they are trusted again. Only what changes bytes behind the file
//! system's back (a failing disk) needs `cache verify` to be found.

use std::fs::{self, File, Metadata, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use lora_flow_core::{ArtifactFile, Digest, Error, OutputDir, Result, ResultExt};
use rayon::prelude::*;

use super::hash::hash_file;
use super::{Manifest, ManifestFile, Store, StoredArtifact, rename_into};

/// The mark: nanoseconds of a sealed blob's modification time. A multiple of 100, since some file
/// systems keep no finer times.
const SEALED: u32 = 739_391_800;
const SEALED_NSEC: i64 = SEALED as i64;

/// An output that was hashed, and the files that become blobs when its task's entry is written.
#[derive(Debug)]
pub(crate) struct Staged {
    pub(crate) artifact: StoredArtifact,
    /// File → digest. Files that the store has already are not among them.
    pub(super) moves: Vec<(PathBuf, Digest)>,
}

impl Store {
    /// Takes stock of an output folder. `None` if nothing was made.
    ///
    /// # Errors
    /// When it holds anything but plain files, or an adopted file that is not in the store.
    pub(crate) fn stage(&self, output: &OutputDir) -> Result<Option<Staged>> {
        let mut written = Vec::new();
        walk(&output.path, "", &mut written)?;
        let mut files: Vec<(ManifestFile, Option<PathBuf>)> = written
            .into_par_iter()
            .map(|(name, path)| {
                let (digest, size, path) = self.stage_file(path)?;
                Ok((ManifestFile { name, digest, size }, path))
            })
            .collect::<Result<_>>()?;
        for (name, file) in &output.adopted {
            check_name(name)?;
            if files.iter().any(|(f, _)| f.name == *name) {
                let message = format!("the file `{name}` was both written and adopted");
                return Err(Error::new(message));
            }
            let path = self.stage_adopted(name, file)?;
            let (digest, size) = (file.digest, file.size);
            files.push((ManifestFile { name: name.clone(), digest, size }, path));
        }
        if files.is_empty() {
            return Ok(None);
        }
        files.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let (files, paths): (Vec<ManifestFile>, Vec<Option<PathBuf>>) = files.into_iter().unzip();
        let moves = paths.into_iter().zip(&files).filter_map(|(p, f)| Some((p?, f.digest)));
        let moves = moves.collect();
        let manifest = Manifest { kind: output.kind, files, meta: output.meta.clone() };
        Ok(Some(Staged { artifact: StoredArtifact::new(manifest), moves }))
    }

    fn stage_file(&self, path: PathBuf) -> Result<(Digest, u64, Option<PathBuf>)> {
        let meta = fs_err::symlink_metadata(&path)?;
        // Another name of the same file could change it behind the store's back.
        let path = if meta.nlink() > 1 { self.copy_in(&path)? } else { path };
        let digest = hash_file(&path)?;
        let present = self.use_blob(&digest, meta.len());
        Ok((digest, meta.len(), (!present).then_some(path)))
    }

    fn stage_adopted(&self, name: &str, file: &ArtifactFile) -> Result<Option<PathBuf>> {
        if self.use_blob(&file.digest, file.size) {
            return Ok(None);
        }
        let copy = self.copy_in(&file.path)?;
        if hash_file(&copy)? == file.digest {
            return Ok(Some(copy));
        }
        let path = file.path.display();
        Err(Error::new(format!("`{path}`, adopted as `{name}`, changed while it was taken over")))
    }

    fn copy_in(&self, path: &Path) -> Result<PathBuf> {
        let copy = self.tmp_path()?;
        fs_err::copy(path, &copy)?;
        Ok(copy)
    }

    /// Whether the blob is there and sound. Its bytes are read only if something wrote to it since
    /// it was sealed.
    pub(super) fn has_blob(&self, digest: &Digest, size: u64) -> bool {
        let path = self.blob_path(digest);
        let Ok(meta) = fs::metadata(&path) else { return false };
        if !meta.is_file() || meta.len() != size {
            return false;
        }
        // A file system that keeps whole seconds alone cannot keep the mark.
        if is_marked(&meta) || meta.mtime_nsec() == 0 {
            return true;
        }
        let sound = hash_file(&path).is_ok_and(|found| found == *digest);
        if sound && let Err(e) = File::open(&path).and_then(|file| mark(&file)) {
            tracing::debug!("cannot mark `{}`: {e}", path.display());
        }
        sound
    }

    /// Whether the blob is there, to be named by an entry that is written later: until then it is
    /// safe from cleaning, which leaves what was used since a run at work began.
    pub(super) fn use_blob(&self, digest: &Digest, size: u64) -> bool {
        let Ok(_gate) = self.gate() else { return false };
        self.has_blob(digest, size) && Self::touch(&self.blob_path(digest))
    }

    /// Gives a synced file its name among the objects.
    pub(super) fn move_in(&self, from: &Path, digest: &Digest) -> Result<()> {
        let to = self.blob_path(digest);
        match rename_into(from, &to) {
            Err(_) if !from.exists() && to.exists() => Ok(()), // the same bytes under two names
            other => other,
        }
    }
}

/// Makes a file read-only and its content durable.
pub(super) fn seal(path: &Path) -> Result<()> {
    match File::open(path) {
        // Two outputs of a task with the same bytes: the other one was moved.
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::new(format!("cannot open `{}`", path.display())).with_source(e)),
        Ok(file) => {
            file.set_permissions(Permissions::from_mode(0o444))?;
            mark(&file)?;
            file.sync_all().with_context(|| format!("cannot write `{}`", path.display()))
        }
    }
}

/// Puts the mark of a sealed blob, and the present time, on a file whose bytes are known to be right.
pub(super) fn mark(file: &File) -> std::io::Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    // A second back: no time of a file lies in the future.
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::new(now.as_secs().max(1) - 1, SEALED))
}

/// Whether a file carries the mark.
pub(super) fn is_marked(meta: &Metadata) -> bool {
    meta.mtime_nsec() == SEALED_NSEC
}

/// All files below a folder with their names relative to it.
fn walk(dir: &Path, prefix: &str, files: &mut Vec<(String, PathBuf)>) -> Result<()> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        let file_name = entry.file_name();
        let Some(file_name) = file_name.to_str() else {
            let shown = file_name.to_string_lossy();
            return Err(Error::new(format!(
                "the output file `{prefix}{shown}` has a name that is not UTF-8"
            )));
        };
        let name = format!("{prefix}{file_name}");
        let kind = entry.file_type()?;
        if kind.is_dir() {
            walk(&path, &format!("{name}/"), files)?;
        } else if kind.is_file() {
            files.push((name, path));
        } else {
            let what = if kind.is_symlink() { "a symbolic link" } else { "not a plain file" };
            return Err(Error::new(format!("the output file `{name}` is {what}"))
                .with_hint("an artifact holds plain files only: copy the content"));
        }
    }
    Ok(())
}

/// A name of an adopted file must stay inside its artifact.
pub(super) fn check_name(name: &str) -> Result<()> {
    let good = name.split('/').all(|part| !matches!(part, "" | "." | "..")) && !name.contains('\0');
    if good {
        return Ok(());
    }
    Err(Error::new(format!("`{name}` is not a file name of an artifact")))
}

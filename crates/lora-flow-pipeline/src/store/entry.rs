//! Entries: what a task made, under its key.
//!
//! An entry holds the manifests of its artifacts, so that finding a result costs one small read.
//! On disk it is one line of JSON and one line with that line's BLAKE3 digest.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lora_flow_core::{Artifact, ArtifactFile, ArtifactKind, Digest, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::blob::{Staged, check_name, is_marked, seal};
use super::gc::is_recent;
use super::{Store, Sync, list_sharded, rename_into, sync_dir, write_file};
use crate::key::Explained;
use crate::stat_cache::with_checksum;

/// Tasks shorter than this are not worth waiting for the disk to learn their entry's name: if the
/// machine dies within seconds, they run again.
const WORTH_A_SYNC: Duration = Duration::from_secs(1);

/// What an artifact is made of. Its canonical JSON's digest is the artifact's digest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Kind of the artifact.
    pub kind: ArtifactKind,
    /// Its files, by name.
    pub files: Vec<ManifestFile>,
    /// Small facts that its maker attached.
    pub meta: Value,
}

/// A file of an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Name relative to the artifact, with `/` as separator.
    pub name: String,
    /// Digest of its content, under which it stands in the store.
    pub digest: Digest,
    /// Size in bytes.
    pub size: u64,
}

/// An artifact's digest and manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredArtifact {
    /// Digest of the manifest.
    pub digest: Digest,
    /// What it is made of.
    pub manifest: Manifest,
}

impl StoredArtifact {
    pub(super) fn new(manifest: Manifest) -> Self {
        Self { digest: manifest.digest(), manifest }
    }

    /// Sum of the file sizes in bytes.
    pub fn size(&self) -> u64 {
        self.manifest.files.iter().map(|f| f.size).sum()
    }
}

impl Manifest {
    fn digest(&self) -> Digest {
        Digest::of_json(&serde_json::to_value(self).unwrap_or_default())
    }
}

/// What a task made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The key it stands under.
    pub key: Digest,
    /// What the key was made of.
    pub explained: Explained,
    /// Artifacts by output name; an optional output that was not made is not among them.
    pub outputs: BTreeMap<String, StoredArtifact>,
    /// Text to print when the task ends.
    pub report: String,
    /// Headlines.
    pub summary: Vec<(String, String)>,
    /// Why a gate said no.
    pub denied: Option<String>,
    /// When it was made, RFC 3339.
    pub created: String,
    /// Milliseconds it took.
    pub wall_ms: u64,
}

impl Entry {
    /// The entry in a file's bytes, or what is wrong with them.
    pub(super) fn parse(bytes: &[u8], key: &Digest) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is not text".to_owned())?;
        let (json, checksum) = text
            .strip_suffix('\n')
            .and_then(|t| t.rsplit_once('\n'))
            .ok_or_else(|| "it is cut short".to_owned())?;
        if checksum != Digest::of_bytes(json.as_bytes()).to_string() {
            return Err("its checksum is wrong".to_owned());
        }
        let entry: Self = serde_json::from_str(json).map_err(|e| e.to_string())?;
        if entry.key != *key {
            return Err("it stands under another key".to_owned());
        }
        Ok(entry)
    }

    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        Ok(with_checksum(serde_json::to_vec(self)?))
    }

    /// What is wrong with its key or its manifests, if anything is.
    pub(super) fn check(&self) -> Option<String> {
        if self.explained.key.digest() != self.key {
            return Some("its key does not follow from what it was made of".to_owned());
        }
        self.outputs.iter().find_map(|(name, artifact)| {
            (artifact.manifest.digest() != artifact.digest)
                .then(|| format!("the manifest of its output `{name}` is wrong"))
        })
    }
}

impl Entry {
    /// The same for an entry from elsewhere, of which nothing is taken for granted.
    pub(super) fn check_foreign(&self) -> Option<String> {
        let mut files = self.outputs.values().flat_map(|a| &a.manifest.files);
        let bad = || files.find_map(|f| check_name(&f.name).err()).map(|e| e.to_string());
        self.check().or_else(bad)
    }
}

/// A line of the list of entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EntryInfo {
    /// The key.
    pub key: Digest,
    /// Kind of the task.
    pub kind: String,
    /// When it was made, RFC 3339.
    pub created: String,
    /// Bytes of its artifacts; blobs that entries share count in each.
    pub size: u64,
    /// Milliseconds it took to make.
    pub wall_ms: u64,
}

/// What stands under a key.
#[derive(Debug)]
pub(crate) enum Lookup {
    /// A whole result.
    Hit(Box<Entry>),
    /// Nothing.
    Miss,
    /// Something damaged.
    Corrupt {
        /// What is wrong with it.
        why: String,
    },
}

/// An entry as a line of a list.
pub(super) fn info(entry: &Entry) -> EntryInfo {
    EntryInfo {
        key: entry.key,
        kind: entry.explained.key.kind.clone(),
        created: entry.created.clone(),
        size: entry.outputs.values().map(StoredArtifact::size).sum(),
        wall_ms: entry.wall_ms,
    }
}

impl Store {
    /// [`Store::inspect`] for a run: a whole result is safe from cleaning as long as that run goes on.
    pub(crate) fn find(&self, key: &Digest) -> Result<Lookup> {
        let _gate = self.gate()?;
        let found = self.inspect(key)?;
        if let Lookup::Hit(_) = found {
            Self::touch(&self.entry_path(key));
        }
        Ok(found)
    }

    /// [`Store::find`] for the one who holds the key's lock and will make the result anew: an entry
    /// that is not whole goes into quarantine. Its blobs stay, since others may be mending them this
    /// moment; a sound one takes the place of a damaged one.
    pub(crate) fn lookup(&self, key: &Digest) -> Result<Lookup> {
        let found = self.find(key)?;
        if let Lookup::Corrupt { why } = &found {
            tracing::warn!("the store's entry {} is damaged: {why}", key.short());
            self.quarantine(&self.entry_path(key))?;
        }
        Ok(found)
    }

    /// The result under a key, if it is whole: the entry's checksum fits, and each of its blobs is
    /// there and sound. Leaves everything where it is.
    pub(crate) fn inspect(&self, key: &Digest) -> Result<Lookup> {
        let path = self.entry_path(key);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Lookup::Miss),
            Err(e) => return Ok(Lookup::Corrupt { why: e.to_string() }),
        };
        let entry = match Entry::parse(&bytes, key) {
            Ok(entry) => entry,
            Err(why) => return Ok(Lookup::Corrupt { why }),
        };
        for file in entry.outputs.values().flat_map(|a| &a.manifest.files) {
            if self.has_blob(&file.digest, file.size) {
                continue;
            }
            let there = self.blob_path(&file.digest).exists();
            let how = if there { "is damaged" } else { "is missing" };
            return Ok(Lookup::Corrupt { why: format!("its file `{}` {how}", file.name) });
        }
        Ok(Lookup::Hit(Box::new(entry)))
    }

    /// The entry under a key as far as it can be read, for reasons; its blobs may be gone.
    pub(crate) fn peek(&self, key: &Digest) -> Option<Entry> {
        Entry::parse(&std::fs::read(self.entry_path(key)).ok()?, key).ok()
    }

    /// The same with the size of its file.
    pub(crate) fn sized_entry(&self, key: &Digest) -> Option<(Entry, u64)> {
        let bytes = std::fs::read(self.entry_path(key)).ok()?;
        Some((Entry::parse(&bytes, key).ok()?, bytes.len() as u64))
    }

    /// Whether the entry is there, was used lately, and was not written to since it was last read: by
    /// its size, time and mark alone.
    pub(crate) fn is_sealed_entry(&self, key: &Digest, size: u64) -> bool {
        let meta = std::fs::metadata(self.entry_path(key));
        meta.is_ok_and(|m| m.len() == size && is_marked(&m) && is_recent(&m))
    }

    /// Whether the blob is there and was not written to since it was sealed, likewise.
    pub(crate) fn is_sealed_blob(&self, digest: &Digest, size: u64) -> bool {
        let meta = std::fs::metadata(self.blob_path(digest));
        meta.is_ok_and(|m| m.is_file() && m.len() == size && is_marked(&m))
    }

    /// The entry under a key, to read only; its blobs may be gone, and nothing is set aside.
    pub fn entry(&self, key: &Digest) -> Option<Entry> {
        self.peek(key)
    }

    /// Makes a result part of the store: its files become blobs, then its entry appears.
    pub(crate) fn commit(&self, entry: &Entry, staged: &[Staged]) -> Result<()> {
        let tmp = self.tmp_path()?;
        write_file(&tmp, &entry.to_bytes()?, Sync::No)?;
        // All syncs at once: the disk then writes its journal once.
        let moves: Vec<_> = staged.iter().flat_map(|s| &s.moves).collect();
        let files: Vec<&Path> =
            moves.iter().map(|(path, _)| path.as_path()).chain([tmp.as_path()]).collect();
        files.par_iter().try_for_each(|path| seal(path))?;
        // A blob that no entry names yet must not be taken for one that none names any more.
        let _gate = self.gate()?;
        for (path, digest) in moves {
            self.move_in(path, digest)?;
        }
        let path = self.entry_path(&entry.key);
        rename_into(&tmp, &path)?;
        if Duration::from_millis(entry.wall_ms) >= WORTH_A_SYNC
            && let Some(folder) = path.parent()
        {
            for digest in staged.iter().flat_map(|s| s.moves.iter().map(|(_, digest)| digest)) {
                self.blob_path(digest).parent().map_or(Ok(()), sync_dir)?;
            }
            sync_dir(folder)?;
        }
        Ok(())
    }

    /// An artifact as tasks see it.
    pub fn artifact(&self, stored: &StoredArtifact) -> Artifact {
        let file = |f: &ManifestFile| {
            let path = self.blob_path(&f.digest);
            (f.name.clone(), ArtifactFile { digest: f.digest, size: f.size, path })
        };
        Artifact {
            kind: stored.manifest.kind,
            digest: stored.digest,
            files: stored.manifest.files.iter().map(file).collect(),
            meta: stored.manifest.meta.clone(),
        }
    }

    /// All entries, newest first. Damaged ones are left out; [`Store::verify`] finds them.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn ls(&self) -> Result<Vec<EntryInfo>> {
        let mut entries: Vec<EntryInfo> =
            self.entries()?.into_iter().filter_map(|(_, entry)| Some(info(&entry.ok()?))).collect();
        entries.sort_by(|a, b| b.created.cmp(&a.created).then(a.key.cmp(&b.key)));
        Ok(entries)
    }

    /// Paths of all entries, with the entries or what is wrong with them.
    pub(super) fn entries(&self) -> Result<Vec<(PathBuf, Result<Entry, String>)>> {
        let paths = list_sharded(&self.dir.join("entries"))?;
        let read = |path: PathBuf| {
            let entry = super::digest_of_path(&path)
                .ok_or_else(|| "its name is not a key".to_owned())
                .and_then(|key| {
                    let bytes = std::fs::read(&path).map_err(|e| e.to_string())?;
                    Entry::parse(&bytes, &key)
                });
            (path, entry)
        };
        Ok(paths.into_par_iter().map(read).collect())
    }
}

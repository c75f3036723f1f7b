//! Artifacts: what tasks hand to each other. A closed set of kinds, each a folder of files.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Digest, Error, Result};

/// The closed set of artifact kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ArtifactKind {
    /// `*.parquet` parts (read in name order) + `dataset.json` (rows, columns).
    Dataset,
    /// `tokens.parquet` (input_ids, loss_mask, doc_lengths) + `tokens.json`.
    Tokens,
    /// HF folder (`config.json`, tokenizer files, `*.safetensors`) or the same with `model.gguf`.
    Model,
    /// PEFT folder: `adapter_config.json` + `adapter_model.safetensors`.
    Adapter,
    /// Adapter + optimizer + RNG + data cursor.
    Checkpoint,
    /// `metrics.json` (flat name → number) and, where there are samples, `samples.parquet`.
    Metrics,
    /// `verdict.json` of a gate.
    Verdict,
    /// Anything else, for plugins.
    Files,
}

impl fmt::Display for ArtifactKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One file of an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArtifactFile {
    /// Digest of its content.
    pub digest: Digest,
    /// Size in bytes.
    pub size: u64,
    /// Where the bytes are: read-only, inside the store, under a name that says nothing.
    pub path: PathBuf,
}

impl ArtifactFile {
    /// A file that stands in no store.
    fn at(path: PathBuf) -> Result<Self> {
        let digest = Digest::of_file(&path)?;
        let size = fs_err::metadata(&path)?.len();
        Ok(Self { digest, size, path })
    }
}

/// An artifact in the store: read-only files under relative names.
#[derive(Debug, Clone)]
pub struct Artifact {
    /// Its kind.
    pub kind: ArtifactKind,
    /// Digest of its manifest.
    pub digest: Digest,
    /// Files by relative name (`/` as separator).
    pub files: BTreeMap<String, ArtifactFile>,
    /// Small facts its maker attached ([`OutputDir::set_meta`]).
    pub meta: Value,
}

impl Artifact {
    /// Path of a file that must be there.
    ///
    /// # Errors
    /// When the artifact has no such file; the message lists those it has.
    pub fn file(&self, name: &str) -> Result<&Path> {
        self.get(name).ok_or_else(|| {
            let names: Vec<_> = self.files.keys().map(|n| format!("`{n}`")).collect();
            Error::new(format!(
                "this {} has no file `{name}`; it has {}",
                self.kind,
                names.join(", ")
            ))
        })
    }

    /// Path of a file that may be there.
    pub fn get(&self, name: &str) -> Option<&Path> {
        self.files.get(name).map(|f| f.path.as_path())
    }

    /// Names and paths of the files whose name ends in `suffix`, in name order.
    pub fn with_suffix<'a>(
        &'a self,
        suffix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a Path)> + 'a {
        self.files
            .iter()
            .filter(move |(name, _)| name.ends_with(suffix))
            .map(|(name, file)| (name.as_str(), file.path.as_path()))
    }

    /// Sum of the file sizes in bytes.
    pub fn size(&self) -> u64 {
        self.files.values().map(|f| f.size).sum()
    }

    /// An artifact made of a plain folder, for tests and for commands outside a pipeline.
    /// Files and sub-folders whose name starts with a dot are left out.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn from_dir(kind: ArtifactKind, dir: &Path) -> Result<Self> {
        fn walk(
            dir: &Path,
            prefix: &str,
            files: &mut BTreeMap<String, ArtifactFile>,
        ) -> Result<()> {
            for entry in fs_err::read_dir(dir)? {
                let entry = entry?;
                let file_name = entry.file_name();
                let Some(file_name) = file_name.to_str().filter(|n| !n.starts_with('.')) else {
                    continue;
                };
                let name = format!("{prefix}{file_name}");
                let path = entry.path();
                if path.is_dir() {
                    walk(&path, &format!("{name}/"), files)?;
                } else {
                    files.insert(name, ArtifactFile::at(path)?);
                }
            }
            Ok(())
        }
        let mut files = BTreeMap::new();
        walk(dir, "", &mut files)?;
        Ok(Self::from_files(kind, files))
    }

    /// An artifact of a single file, as [`Self::from_dir`] makes one of a folder with that file under
    /// the name `name`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn from_file(kind: ArtifactKind, name: &str, path: &Path) -> Result<Self> {
        let file = ArtifactFile::at(path.to_owned())?;
        Ok(Self::from_files(kind, [(name.to_owned(), file)].into()))
    }

    fn from_files(kind: ArtifactKind, files: BTreeMap<String, ArtifactFile>) -> Self {
        let listing: BTreeMap<_, _> = files.iter().map(|(n, f)| (n, f.digest)).collect();
        let digest = Digest::of_json(&serde_json::json!({ "kind": kind, "files": listing }));
        Self { kind, digest, files, meta: Value::Null }
    }
}

/// The folder a task writes one output into; becomes an artifact when the task ends well.
#[derive(Debug)]
pub struct OutputDir {
    /// The port it belongs to.
    pub port: String,
    /// Kind of the artifact.
    pub kind: ArtifactKind,
    /// The folder, empty at start.
    pub path: PathBuf,
    /// Files taken over from other artifacts without a copy.
    pub adopted: BTreeMap<String, ArtifactFile>,
    /// Facts for [`Artifact::meta`].
    pub meta: Value,
}

impl OutputDir {
    /// Path for a file to be written; its parent folders are made.
    ///
    /// # Errors
    /// When a parent folder cannot be made.
    pub fn file(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        if let Some(parent) = path.parent() {
            fs_err::create_dir_all(parent)?;
        }
        Ok(path)
    }

    /// Writes a whole file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<()> {
        fs_err::write(self.file(name)?, bytes)?;
        Ok(())
    }

    /// Writes a value as indented JSON with a final line feed.
    ///
    /// # Errors
    /// When it cannot be serialised or written.
    pub fn write_json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        self.write(name, serde_json::to_string_pretty(value)? + "\n")
    }

    /// Makes a file of another artifact part of this one, without copying its bytes.
    pub fn adopt(&mut self, name: &str, file: &ArtifactFile) {
        self.adopted.insert(name.to_owned(), file.clone());
    }

    /// Attaches small facts to the artifact; they enter its digest.
    pub fn set_meta(&mut self, meta: Value) {
        self.meta = meta;
    }
}

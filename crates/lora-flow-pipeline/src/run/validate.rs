//! What an output must hold to count as an artifact of its kind. Light: names, and JSON that can
//! be read; the bulk is the business of its makers and readers.

use std::path::PathBuf;

use lora_flow_core::{ArtifactKind, Error, OutputDir, Result, ResultExt};
use serde_json::{Map, Value};

use crate::store::Staged;

/// Checks a staged output.
///
/// # Errors
/// What is missing or malformed.
pub(super) fn validate(output: &OutputDir, staged: &Staged) -> Result<()> {
    let check = Check { output, staged };
    check.kind().context(format!("output `{}` is not a valid {}", output.port, output.kind))
}

struct Check<'a> {
    output: &'a OutputDir,
    staged: &'a Staged,
}

impl Check<'_> {
    fn kind(&self) -> Result<()> {
        match self.output.kind {
            ArtifactKind::Dataset => {
                if !self.names().any(|n| n.ends_with(".parquet")) {
                    return Err(Error::new("it has no `.parquet` file"));
                }
                self.object("dataset.json").map(drop)
            }
            ArtifactKind::Tokens => {
                self.has("tokens.parquet")?;
                self.object("tokens.json").map(drop)
            }
            ArtifactKind::Model => self.object("config.json").map(drop),
            ArtifactKind::Adapter => {
                self.has("adapter_model.safetensors")?;
                self.object("adapter_config.json").map(drop)
            }
            ArtifactKind::Metrics => self.metrics(),
            ArtifactKind::Verdict => self.object("verdict.json").map(drop),
            ArtifactKind::Checkpoint | ArtifactKind::Files => Ok(()),
        }
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.staged.artifact.manifest.files.iter().map(|f| f.name.as_str())
    }

    fn has(&self, name: &str) -> Result<()> {
        if self.names().any(|n| n == name) {
            return Ok(());
        }
        Err(Error::new(format!("it has no file `{name}`")))
    }

    fn path(&self, name: &str) -> PathBuf {
        match self.output.adopted.get(name) {
            Some(file) => file.path.clone(),
            None => self.output.path.join(name),
        }
    }

    /// A file that must hold a JSON object.
    fn object(&self, name: &str) -> Result<Map<String, Value>> {
        self.has(name)?;
        let bytes =
            std::fs::read(self.path(name)).with_context(|| format!("cannot read `{name}`"))?;
        serde_json::from_slice(&bytes).with_context(|| format!("`{name}` is not a JSON object"))
    }

    /// Flat names to numbers; `null` stands for a number that is not finite, and `meta` for
    /// anything.
    fn metrics(&self) -> Result<()> {
        for (name, value) in self.object("metrics.json")? {
            if name != "meta" && !value.is_number() && !value.is_null() {
                return Err(Error::new(format!("`{name}` in `metrics.json` is not a number"))
                    .with_hint("put what is not a number under `meta`"));
            }
        }
        Ok(())
    }
}

//! Verification: every byte of the store read again.

use std::collections::HashSet;

use lora_flow_core::{CancelToken, Digest, Result};
use rayon::prelude::*;

use super::{Store, digest_of_path, hash_file, list_sharded};

/// What [`Store::verify`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Blobs read.
    pub blobs: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Entries read.
    pub entries: usize,
    /// What was wrong and is now in quarantine, one line each.
    pub problems: Vec<String>,
}

impl Store {
    /// Hashes every blob and checks every entry. What is damaged goes into quarantine, and the
    /// next run that needs it computes it again. May run beside pipelines.
    ///
    /// # Errors
    /// When the store cannot be read or written.
    pub fn verify(&self) -> Result<VerifyReport> {
        let _lock = self.lock_shared(&CancelToken::default())?;
        // What a cleaning takes away meanwhile would look like damage.
        let _gate = self.gate()?;
        let mut report = VerifyReport::default();
        // Entries first: a run beside this one may add blobs and entries meanwhile, and an entry
        // read now must find its blobs in the list made later.
        let entries = self.entries()?;
        let blobs = list_sharded(&self.dir.join("objects"))?;
        let checked: Vec<_> = blobs
            .into_par_iter()
            .map(|path| {
                let size = std::fs::metadata(&path).map_or(0, |m| m.len());
                let wanted = digest_of_path(&path);
                let sound = wanted.is_some() && hash_file(&path).ok() == wanted;
                (path, size, wanted.filter(|_| sound))
            })
            .collect();
        let mut sound: HashSet<Digest> = HashSet::new();
        for (path, size, digest) in checked {
            report.blobs += 1;
            report.bytes += size;
            if let Some(digest) = digest {
                sound.insert(digest);
                continue;
            }
            // A run beside this one may have put a sound blob in its place meanwhile.
            if let (Some(wanted), Ok(found)) = (digest_of_path(&path), hash_file(&path))
                && wanted == found
            {
                sound.insert(wanted);
                continue;
            }
            report
                .problems
                .push(format!("`{}`: its bytes are not those of its name", path.display()));
            self.quarantine(&path)?;
        }
        for (path, entry) in entries {
            report.entries += 1;
            let problem = match &entry {
                Err(why) => Some(why.clone()),
                Ok(entry) => entry.check().or_else(|| {
                    let mut files = entry.outputs.values().flat_map(|a| &a.manifest.files);
                    let bad = files.find(|f| !sound.contains(&f.digest))?;
                    let kind = &entry.explained.key.kind;
                    Some(format!(
                        "this result of `{kind}` needs `{}`, which is damaged or missing",
                        bad.name
                    ))
                }),
            };
            if let Some(problem) = problem {
                report.problems.push(format!("`{}`: {problem}", path.display()));
                self.quarantine(&path)?;
            }
        }
        Ok(report)
    }
}

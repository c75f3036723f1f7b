//! The lock file: digests of everything that comes into a pipeline from outside.
//!
//! `PIPELINE.lock` stands beside `PIPELINE.yaml` and belongs into version control. It pins the
//! outside files that tasks read, the plugins, the values of the declared environment variables,
//! and what the tasks of plugins with network access made (for what they download cannot be known
//! before). Files, plugins and variables are compared before anything runs, downloads as soon as
//! they are made.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lora_flow_core::{CancelToken, DeviceSpec, Digest, Error, Result, ResultExt};
use serde::{Deserialize, Serialize};

use crate::plan::{Plan, PlannedTask};
use crate::run::Engine;
use crate::source::{Diagnostic, Diagnostics, Span};

/// Version of the lock file.
const LOCK_FORMAT: u32 = 1;

/// What is pinned.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockFile {
    /// Version of the file.
    pub version: u32,
    /// By the pattern written in the pipeline: path relative to the root → digest of the content.
    pub files: BTreeMap<String, BTreeMap<String, Digest>>,
    /// Name of a plugin → digest of its folder.
    pub plugins: BTreeMap<String, Digest>,
    /// Name of a declared variable → digest of its value; none if it is not set.
    pub env: BTreeMap<String, Option<Digest>>,
    /// Task of a plugin with network access → its outputs → digest of the artifact.
    pub downloads: BTreeMap<String, BTreeMap<String, Digest>>,
}

/// Digests that the outputs of tasks must have, by task and output.
pub type Pinned = BTreeMap<String, BTreeMap<String, Digest>>;

impl LockFile {
    /// Where the lock of a pipeline file stands.
    pub fn path_of(pipeline: &Path) -> PathBuf {
        pipeline.with_extension("lock")
    }

    /// Reads a lock; `None` if there is none.
    ///
    /// # Errors
    /// When it cannot be read, or is not one of this version.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let bytes = match std::fs::read(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.with_context(|| format!("cannot read `{}`", path.display()))?,
        };
        let bad = || format!("`{}` is not a lock file", path.display());
        let lock: Self = serde_json::from_slice(&bytes).with_context(bad)?;
        if lock.version == LOCK_FORMAT {
            return Ok(Some(lock));
        }
        let message = format!("`{}` has version {}", path.display(), lock.version);
        Err(Error::new(message)
            .with_hint(format!("this version of lora-flow knows version {LOCK_FORMAT}")))
    }

    /// Writes the lock.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        Ok(fs_err::write(path, text)?)
    }

    /// Takes over what another one pins, leaving the rest.
    pub fn extend(&mut self, other: Self) {
        self.version = other.version;
        self.files.extend(other.files);
        self.plugins.extend(other.plugins);
        self.env.extend(other.env);
        self.downloads.extend(other.downloads);
    }
}

/// The plugin that a task is of, and the digest of its folder.
fn plugin(task: &PlannedTask) -> Option<(String, Digest)> {
    let extra = task.task.fingerprint_extra();
    let name = extra.get("plugin")?.as_str()?;
    Some((name.to_owned(), extra.get("digest")?.as_str()?.parse().ok()?))
}

fn name_of(plan: &Plan, path: &Path) -> String {
    path.strip_prefix(&plan.root).unwrap_or(path).to_string_lossy().into_owned()
}

impl Engine {
    /// The lock of a plan as things are now, and the tasks whose downloads are not known yet:
    /// their results are not in the store.
    ///
    /// # Errors
    /// When an outside file or the store cannot be read.
    pub fn lock(&self, plan: &Plan, device: DeviceSpec) -> Result<(LockFile, Vec<String>)> {
        let _lock = self.store().lock_shared(&CancelToken::default())?;
        let session = self.session(plan, &[], device);
        let mut lock = LockFile { version: LOCK_FORMAT, ..LockFile::default() };
        for files in plan.tasks.iter().flat_map(|t| &t.files) {
            let digests = session.stats.digests(&files.paths)?;
            let names = files.paths.iter().map(|path| name_of(plan, path));
            lock.files.insert(files.pattern.clone(), names.zip(digests).collect());
        }
        lock.plugins = plan.tasks.iter().filter_map(plugin).collect();
        lock.env = plan.env.iter().map(|(name, value, _)| (name.clone(), *value)).collect();
        let mut open = Vec::new();
        if plan.tasks.iter().any(|t| t.network) {
            let results = session.results()?;
            for (task, done) in plan.tasks.iter().zip(results).filter(|(t, _)| t.network) {
                match done {
                    Some(outputs) => _ = lock.downloads.insert(task.id.clone(), outputs),
                    None => open.push(task.id.clone()),
                }
            }
        }
        session.stats.save(self.store())?;
        Ok((lock, open))
    }

    /// Everything of a plan that is not as the lock says, with its place in the pipeline file.
    ///
    /// # Errors
    /// When an outside file or the store cannot be read.
    pub fn check_lock(
        &self,
        plan: &Plan,
        lock: &LockFile,
        device: DeviceSpec,
    ) -> Result<Diagnostics> {
        let (now, _) = self.lock(plan, device)?;
        let hint = format!(
            "if that is wanted, write the lock again: `lora-flow lock {}`",
            plan.source.path.display()
        );
        let mut found = Diagnostics::default();
        let mut report = |span: Span, message: String| {
            let mut problem = Diagnostic::new(&plan.source, span, message).with_hint(hint.clone());
            plan.sources.localise(&mut problem);
            found.push(problem);
        };
        let (mut seen, mut seen_plugins) = (BTreeSet::new(), BTreeSet::new());
        for task in &plan.tasks {
            for files in task.files.iter().filter(|f| seen.insert(&f.pattern)) {
                let span = task.param_span(&files.pointer);
                let Some(pinned) = lock.files.get(&files.pattern) else {
                    report(span, format!("`{}` is not in the lock", files.pattern));
                    continue;
                };
                let is = &now.files[&files.pattern];
                for name in pinned.keys().chain(is.keys()).collect::<BTreeSet<_>>() {
                    let what = format!("file `{name}`");
                    if let Some(message) = difference(&what, pinned.get(name), is.get(name)) {
                        report(span, message);
                    }
                }
            }
            if let Some((name, digest)) = plugin(task)
                && seen_plugins.insert(name.clone())
                && let Some(message) =
                    difference(&format!("plugin `{name}`"), lock.plugins.get(&name), Some(&digest))
            {
                report(task.span, message);
            }
            if task.network && !lock.downloads.contains_key(&task.id) {
                let message = format!("what `{}` downloads is not in the lock", task.id);
                report(task.span, message);
            }
        }
        for (name, value, span) in &plan.env {
            let what = format!("environment variable `{name}`");
            match lock.env.get(name) {
                None => report(*span, format!("{what} is not in the lock")),
                Some(pinned) if pinned == value => {}
                Some(pinned) => {
                    let show = |v: &Option<Digest>| v.map_or("not set".to_owned(), |d| d.short());
                    let (pinned, value) = (show(pinned), show(value));
                    report(*span, format!("{what} differs: pinned {pinned}, found {value}"));
                }
            }
        }
        found.sort(&plan.source.path);
        Ok(found)
    }
}

fn difference(what: &str, pinned: Option<&Digest>, found: Option<&Digest>) -> Option<String> {
    match (pinned, found) {
        (Some(a), Some(b)) if a == b => None,
        (Some(a), Some(b)) => {
            Some(format!("{what} differs: pinned {}, found {}", a.short(), b.short()))
        }
        (None, Some(b)) => Some(format!("{what} is not in the lock: found {}", b.short())),
        (Some(a), None) => Some(format!("{what} is missing: pinned {}", a.short())),
        (None, None) => None,
    }
}

/// Whether a task's outputs are those pinned.
pub(crate) fn check_outputs<'a>(
    pinned: &Pinned,
    task: &str,
    outputs: impl Iterator<Item = (&'a String, Digest)>,
) -> Result<()> {
    let Some(pinned) = pinned.get(task) else { return Ok(()) };
    for (output, found) in outputs {
        let wanted = pinned.get(output);
        if wanted != Some(&found) {
            let what = format!("output `{output}`");
            let message = difference(&what, wanted, Some(&found)).unwrap_or_default();
            return Err(Error::new(format!("this is not what the lock says: {message}"))
                .with_hint("what it downloads has changed; `run --update-lock` accepts it"));
        }
    }
    Ok(())
}

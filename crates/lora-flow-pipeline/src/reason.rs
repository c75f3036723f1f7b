//! Why a task will run: its key's parts against those of the last result under its name.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use lora_flow_core::{Digest, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::key::{Explained, TaskKey};
use crate::store::{Store, Sync};

/// More files than this are counted, not named.
const NAMED_FILES: usize = 3;

/// Longer values are cut, in characters.
const SHOWN_VALUE: usize = 60;

/// One reason why a task runs. `Display` gives one line.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Reason {
    /// It has no result yet under this name.
    NeverRun,
    /// The user wants it.
    Forced,
    /// Its result was damaged.
    Corrupt,
    /// Its last result is no longer in the store.
    Removed,
    /// The rules by which keys are made changed.
    KeyFormat,
    /// Another kind of task stands under the name.
    Kind {
        /// Kind before.
        old: String,
        /// Kind now.
        new: String,
    },
    /// The kind's implementation changed.
    Version {
        /// Version before.
        old: u32,
        /// Version now.
        new: u32,
    },
    /// A parameter changed.
    Param {
        /// Place below `with`, like `split.train`; empty for the whole of it.
        path: String,
        /// Value before, if there was one.
        old: Option<Value>,
        /// Value now, if there is one.
        new: Option<Value>,
    },
    /// An input has other content.
    Input {
        /// The port.
        port: String,
        /// What it comes from, if its number of artifacts did not change.
        reference: Option<String>,
        /// Digest before, if its number of artifacts did not change.
        old: Option<Digest>,
        /// Digest now, likewise.
        new: Option<Digest>,
    },
    /// An outside file.
    File {
        /// Its path as seen from the pipeline's root.
        name: String,
        /// What happened to it.
        change: FileChange,
        /// Digest before, if it was there.
        old: Option<Digest>,
        /// Digest now, if it is there.
        new: Option<Digest>,
    },
    /// Further outside files.
    MoreFiles(usize),
    /// An environment variable changed.
    Env {
        /// Its name.
        name: String,
        /// Digest of the value before, if it was declared and set.
        old: Option<Digest>,
        /// Digest of the value now, likewise.
        new: Option<Digest>,
    },
    /// A plugin's files changed.
    Plugin {
        /// Its name.
        name: String,
        /// Digest of its files before.
        old: Option<String>,
        /// Digest of its files now.
        new: Option<String>,
    },
    /// Something else that the task's implementation depends on changed.
    Extra,
    /// The class of device changed.
    Device {
        /// Class before.
        old: String,
        /// Class now.
        new: String,
    },
    /// A task that it takes an input from will or may run, and may yield something else.
    Upstream(String),
}

/// What happened to an outside file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileChange {
    /// It has other content.
    Changed,
    /// It was not there before.
    Added,
    /// It is no longer there.
    Removed,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeverRun => f.write_str("never run"),
            Self::Forced => f.write_str("forced"),
            Self::Corrupt => f.write_str("entry was corrupt"),
            Self::Removed => f.write_str("its last result is no longer in the store"),
            Self::KeyFormat => f.write_str("keys are made in a new way"),
            Self::Kind { old, new } => write!(f, "`uses` changed: {old} → {new}"),
            Self::Version { old, new } => write!(f, "implementation version {old} → {new}"),
            Self::Param { path, old, new } => {
                let dot = if path.is_empty() || path.starts_with('[') { "" } else { "." };
                write!(f, "`with{dot}{path}` ")?;
                match (old, new) {
                    (Some(old), Some(new)) => write!(f, "changed: {} → {}", show(old), show(new)),
                    (None, Some(new)) => write!(f, "added: {}", show(new)),
                    (Some(old), None) => write!(f, "removed: was {}", show(old)),
                    (None, None) => f.write_str("changed"),
                }
            }
            Self::Input { port, reference: Some(reference), .. } => {
                write!(f, "input `{port}` changed: `{reference}` has new content")
            }
            Self::Input { port, reference: None, .. } => write!(f, "input `{port}` changed"),
            Self::File { name, change, .. } => write!(f, "file `{name}` {}", change.word()),
            Self::MoreFiles(1) => f.write_str("1 more file changed"),
            Self::MoreFiles(n) => write!(f, "{n} more files changed"),
            Self::Env { name, .. } => write!(f, "environment variable `{name}` changed"),
            Self::Plugin { name, .. } => write!(f, "plugin `{name}` changed"),
            Self::Extra => f.write_str("implementation changed"),
            Self::Device { old, new } => write!(f, "device changed: {old} → {new}"),
            Self::Upstream(task) => write!(f, "depends on `{task}`"),
        }
    }
}

impl FileChange {
    fn word(self) -> &'static str {
        match self {
            Self::Changed => "changed",
            Self::Added => "added",
            Self::Removed => "removed",
        }
    }
}

impl Reason {
    /// For machines: `reason` says which one, `text` is the line for people, and what changed has
    /// its `old` and `new` value.
    pub fn to_json(&self) -> Value {
        let mut fields = match self {
            Self::NeverRun => json!({ "reason": "never-run" }),
            Self::Forced => json!({ "reason": "forced" }),
            Self::Corrupt => json!({ "reason": "corrupt" }),
            Self::Removed => json!({ "reason": "removed" }),
            Self::KeyFormat => json!({ "reason": "key-format" }),
            Self::Kind { old, new } => json!({ "reason": "kind", "old": old, "new": new }),
            Self::Version { old, new } => json!({ "reason": "version", "old": old, "new": new }),
            Self::Param { path, old, new } => {
                // A value that is not there is left out: `null` is a value.
                let mut fields = json!({ "reason": "parameter", "parameter": path });
                for (name, value) in [("old", old), ("new", new)] {
                    if let Some(value) = value {
                        fields[name] = value.clone();
                    }
                }
                fields
            }
            Self::Input { port, reference, old, new } => json!({
                "reason": "input", "input": port, "reference": reference, "old": old, "new": new,
            }),
            Self::File { name, change, old, new } => json!({
                "reason": "file", "file": name, "change": change.word(), "old": old, "new": new,
            }),
            Self::MoreFiles(count) => json!({ "reason": "more-files", "count": count }),
            Self::Env { name, old, new } => {
                json!({ "reason": "environment", "variable": name, "old": old, "new": new })
            }
            Self::Plugin { name, old, new } => {
                json!({ "reason": "plugin", "plugin": name, "old": old, "new": new })
            }
            Self::Extra => json!({ "reason": "implementation" }),
            Self::Device { old, new } => json!({ "reason": "device", "old": old, "new": new }),
            Self::Upstream(task) => json!({ "reason": "upstream", "task": task }),
        };
        fields["text"] = self.to_string().into();
        fields
    }
}

fn show(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_VALUE) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// What differs between the last result and now. `pending` are ports whose inputs are not known
/// yet; they are not compared.
pub(crate) fn differences(
    old: &Explained,
    new: &Explained,
    pending: &BTreeSet<&str>,
) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let (was, is) = (&old.key, &new.key);
    if was.kind != is.kind {
        // Parameters and inputs of another kind of task are not comparable.
        return vec![Reason::Kind { old: was.kind.clone(), new: is.kind.clone() }];
    }
    if was.format != is.format {
        reasons.push(Reason::KeyFormat);
    }
    if was.version != is.version {
        reasons.push(Reason::Version { old: was.version, new: is.version });
    }
    extra(was, is, &mut reasons);
    if was.device != is.device {
        let name = |device: &Option<String>| device.clone().unwrap_or_else(|| "any".to_owned());
        reasons.push(Reason::Device { old: name(&was.device), new: name(&is.device) });
    }
    params("", Some(&was.params), Some(&is.params), &mut reasons);
    inputs(old, new, pending, &mut reasons);
    files(old, new, &mut reasons);
    for name in union(&was.env, &is.env) {
        let (old, new) = (was.env.get(name).copied(), is.env.get(name).copied());
        if old != new {
            reasons.push(Reason::Env { name: name.clone(), old, new });
        }
    }
    reasons
}

fn union<'a, V>(a: &'a BTreeMap<String, V>, b: &'a BTreeMap<String, V>) -> BTreeSet<&'a String> {
    a.keys().chain(b.keys()).collect()
}

fn extra(was: &TaskKey, is: &TaskKey, reasons: &mut Vec<Reason>) {
    if was.extra == is.extra {
        return;
    }
    let text = |key: &TaskKey, name: &str| Some(key.extra.get(name)?.as_str()?.to_owned());
    reasons.push(match text(is, "plugin") {
        Some(name) => Reason::Plugin { name, old: text(was, "digest"), new: text(is, "digest") },
        None => Reason::Extra,
    });
}

/// The innermost parameters that differ.
fn params(path: &str, old: Option<&Value>, new: Option<&Value>, reasons: &mut Vec<Reason>) {
    match (old, new) {
        _ if old == new => {}
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for name in names {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                params(&path, a.get(name), b.get(name), reasons);
            }
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                params(&format!("{path}[{i}]"), Some(a), Some(b), reasons);
            }
        }
        _ => reasons.push(Reason::Param {
            path: path.to_owned(),
            old: old.cloned(),
            new: new.cloned(),
        }),
    }
}

fn inputs(old: &Explained, new: &Explained, pending: &BTreeSet<&str>, reasons: &mut Vec<Reason>) {
    for port in union(&old.key.inputs, &new.key.inputs) {
        if pending.contains(port.as_str()) {
            continue;
        }
        let was = old.key.inputs.get(port).map_or(&[][..], Vec::as_slice);
        let is = new.key.inputs.get(port).map_or(&[][..], Vec::as_slice);
        if was.len() != is.len() {
            let (reference, old, new) = (None, None, None);
            reasons.push(Reason::Input { port: port.clone(), reference, old, new });
            continue;
        }
        let references = new.references.get(port).map_or(&[][..], Vec::as_slice);
        for (i, (old, new)) in was.iter().zip(is).enumerate().filter(|(_, (a, b))| a != b) {
            let (reference, old, new) = (references.get(i).cloned(), Some(*old), Some(*new));
            reasons.push(Reason::Input { port: port.clone(), reference, old, new });
        }
    }
}

fn files(old: &Explained, new: &Explained, reasons: &mut Vec<Reason>) {
    let mut changes: Vec<Reason> = Vec::new();
    for pointer in union(&old.key.files, &new.key.files) {
        let (was, is) = (old.key.files.get(pointer), new.key.files.get(pointer));
        if was == is {
            continue;
        }
        let (was, is) = (named(old, pointer), named(new, pointer));
        let names: BTreeSet<&str> = was.keys().chain(is.keys()).copied().collect();
        let before = changes.len();
        for name in names {
            let (old, new) = (was.get(name).copied(), is.get(name).copied());
            let change = match (old, new) {
                (Some(a), Some(b)) if a == b => continue,
                (Some(_), Some(_)) => FileChange::Changed,
                (None, _) => FileChange::Added,
                (Some(_), None) => FileChange::Removed,
            };
            changes.push(Reason::File { name: name.to_owned(), change, old, new });
        }
        if changes.len() == before
            && let Some((name, digest)) = is.first_key_value()
        {
            // Only their order changed, or the pointer they stand under.
            let (name, change, same) = ((*name).to_owned(), FileChange::Changed, Some(*digest));
            changes.push(Reason::File { name, change, old: same, new: same });
        }
    }
    let more = changes.len().saturating_sub(NAMED_FILES);
    reasons.extend(changes.into_iter().take(NAMED_FILES));
    if more > 0 {
        reasons.push(Reason::MoreFiles(more));
    }
}

fn named<'a>(explained: &'a Explained, pointer: &str) -> BTreeMap<&'a str, Digest> {
    let names = explained.files.get(pointer).map_or(&[][..], Vec::as_slice);
    let digests = explained.key.files.get(pointer).map_or(&[][..], Vec::as_slice);
    names.iter().map(String::as_str).zip(digests.iter().copied()).collect()
}

/// The key last seen for each task of a pipeline: a file of lines to which runs append. It serves
/// reasons only, so that losing a line costs nothing but an explanation.
#[derive(Debug)]
pub(crate) struct LastKeys {
    path: PathBuf,
    keys: HashMap<String, Digest>,
}

#[derive(Serialize, Deserialize)]
struct Line {
    task: String,
    key: Digest,
}

impl LastKeys {
    pub(crate) fn load(store: &Store, pipeline: &str) -> Self {
        let path = store.last_path(pipeline);
        // One spoilt byte must not make the rest of the file unreadable.
        let bytes = std::fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let mut lines = 0;
        let mut keys = HashMap::new();
        // A line cut short by a crash is skipped.
        for line in text.lines().filter_map(|l| serde_json::from_str::<Line>(l).ok()) {
            lines += 1;
            keys.insert(line.task, line.key);
        }
        let last = Self { path, keys };
        if lines > 2 * last.keys.len() + 100 {
            last.compact(store);
        }
        last
    }

    fn compact(&self, store: &Store) {
        let lines: String = self.keys.iter().map(|(task, key)| line(task, *key)).collect();
        if let Err(e) = store.write_atomic(&self.path, lines.as_bytes(), Sync::No) {
            tracing::debug!("cannot rewrite `{}`: {e}", self.path.display());
        }
    }

    pub(crate) fn get(&self, task: &str) -> Option<Digest> {
        self.keys.get(task).copied()
    }

    /// Remembers the key of a task's result.
    pub(crate) fn set(&mut self, task: &str, key: Digest) -> Result<()> {
        if self.keys.insert(task.to_owned(), key) == Some(key) {
            return Ok(());
        }
        if let Some(parent) = self.path.parent() {
            fs_err::create_dir_all(parent)?;
        }
        // One write to a file opened for appending: lines of two processes do not mix. The first
        // line feed ends a line that a crash may have cut short.
        let mut file = OpenOptions::new().append(true).create(true).open(&self.path)?;
        file.write_all(format!("\n{}", line(task, key)).as_bytes())?;
        Ok(())
    }
}

fn line(task: &str, key: Digest) -> String {
    let line = serde_json::to_string(&Line { task: task.to_owned(), key }).unwrap_or_default();
    line + "\n"
}

#[cfg(test)]
mod tests;

//! A run with nothing to do, remembered by what it looked at.
//!
//! A run that found every result in the store leaves a note: the texts, plugins, outside files and
//! variables that its plan was made of, and the entries, blobs and published folders that it found.
//! While all that is as it was, the same command finds the same, and the next run neither makes a
//! plan nor a key: it reads the texts and asks `stat` about the rest. Whatever differs, or cannot be
//! told so cheaply, is left to a run of the usual kind, so that a note can save time and nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use jiff::Timestamp;
use lora_flow_core::{CancelToken, Digest, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Engine, Observer, RunReport, Session, Status, TaskOutcome, publish};
use crate::external::{digest_of, folder_digest};
use crate::files;
use crate::record::{RunFolder, RunRecord};
use crate::stat_cache::{Stamp, checked, with_checksum};
use crate::store::{STORE_DIR, Store, Sync};

/// Version of the note; another one is not looked at.
const VERSION: u32 = 1;

/// A command that may have nothing to do.
#[derive(Debug, Clone)]
pub struct Request {
    name: Digest,
    env: BTreeMap<String, String>,
}

impl Request {
    /// The command that runs a pipeline file. `options` is all that a plan depends on besides files
    /// and the environment; the program itself and the working folder are added.
    pub fn new(pipeline: &Path, options: &str, env: BTreeMap<String, String>) -> Option<Self> {
        let program = Stamp::of(&std::env::current_exe().ok()?).ok()?;
        let here = std::env::current_dir().ok()?;
        let name = json!([VERSION, program, here, pipeline, options]);
        Some(Self { name: Digest::of_json(&name), env })
    }

    fn path(&self, store: &Path) -> PathBuf {
        store.join("settled").join(self.name.to_string())
    }

    fn env(&self, name: &str) -> Option<Digest> {
        self.env.get(name).map(|value| Digest::of_bytes(value.as_bytes()))
    }
}

/// What a run looked at, and what it found.
#[derive(Debug, Serialize, Deserialize)]
struct Settled {
    /// The pipeline file, then what it includes.
    texts: Vec<(PathBuf, Digest)>,
    plugins: Vec<(PathBuf, Digest)>,
    env: Vec<(String, Option<Digest>)>,
    root: PathBuf,
    /// Outside files by the pattern that named them.
    files: BTreeMap<String, Vec<(PathBuf, Stamp)>>,
    /// Keys of the results, with the sizes of their entries.
    entries: Vec<(Digest, u64)>,
    /// Files of the results, with their sizes.
    blobs: BTreeMap<Digest, u64>,
    published: Vec<(PathBuf, Digest)>,
    /// The file of the last keys: another run of the pipeline may have left others.
    last: Stamp,
    record: RunRecord,
}

/// The store that has a note of this command, if one has: that of `cache_dir`, or one in a folder
/// around the pipeline file.
pub fn store_of(request: &Request, pipeline: &Path, cache_dir: Option<&Path>) -> Option<Store> {
    let has = |dir: &PathBuf| request.path(dir).is_file();
    let dir = match cache_dir {
        Some(dir) => Some(dir.to_owned()).filter(has),
        None => {
            let file = std::path::absolute(pipeline).ok()?;
            file.ancestors().skip(1).map(|folder| folder.join(STORE_DIR)).find(has)
        }
    };
    Store::open(&dir?).ok()
}

impl Engine {
    /// Reports a run that has nothing to do, if that can be told from a note of an earlier one.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub fn run_settled(
        &self,
        request: &Request,
        command_line: Vec<String>,
        observer: &dyn Observer,
    ) -> Result<Option<RunReport>> {
        let started = Instant::now();
        let timestamp = Timestamp::now();
        let store = self.store();
        let _lock = store.lock_for_run(&CancelToken::default(), publish::sweep)?;
        let Some((mut record, text)) = Settled::load(store, request) else { return Ok(None) };
        for task in &record.report.tasks {
            observer.task_finished(&task.id, task);
        }
        record.command_line = command_line;
        record.report.wall = started.elapsed();
        let report = RunFolder::settled(store, timestamp, &text, record)?;
        Ok(Some(report))
    }
}

impl Settled {
    /// The record of the run that left the note, and the text of its pipeline, if all is still as it
    /// was then.
    fn load(store: &Store, request: &Request) -> Option<(RunRecord, String)> {
        let bytes = fs::read(request.path(store.dir())).ok()?;
        let note: Self = serde_json::from_slice(checked(&bytes)?).ok()?;
        let mut texts = Vec::with_capacity(note.texts.len());
        for (path, digest) in &note.texts {
            let text = fs::read_to_string(path).ok()?;
            (Digest::of_bytes(text.as_bytes()) == *digest).then_some(())?;
            texts.push(text);
        }
        note.holds(store, request)?.then(|| (note.record, texts.join("\n")))
    }

    fn holds(&self, store: &Store, request: &Request) -> Option<bool> {
        let stamp = |path: &Path| Stamp::of(path).ok();
        let mut files = self.files.iter().map(|(pattern, known)| {
            let found = files::resolve(&self.root, pattern).ok()?;
            let same = |(path, (known, was)): (&PathBuf, &(PathBuf, Stamp))| {
                path == known && stamp(path).as_ref() == Some(was)
            };
            Some(found.len() == known.len() && found.iter().zip(known).all(same))
        });
        let plugin = |(dir, digest): &(PathBuf, Digest)| folder_digest(dir).ok() == Some(*digest);
        let published = |(target, artifact): &(PathBuf, Digest)| {
            publish::is_current(target, &self.record.report.name, artifact)
        };
        let last = store.last_path(&self.record.report.name);
        let same = self.env.iter().all(|(name, value)| request.env(name) == *value)
            && stamp(&last) == Some(self.last)
            && self.plugins.iter().all(plugin)
            && files.all(|same| same == Some(true));
        if !same {
            return Some(false);
        }
        let _gate = store.gate().ok()?;
        let found = self.entries.iter().all(|(key, size)| store.is_sealed_entry(key, *size))
            && self.blobs.iter().all(|(digest, size)| store.is_sealed_blob(digest, *size))
            && self.published.iter().all(published);
        Some(found)
    }
}

impl Session<'_> {
    /// Leaves a note of a run that had nothing to do. That it cannot be left stops nothing.
    pub(crate) fn settle(&self, request: &Request, record: &RunRecord) {
        if let Some(note) = self.note(request, record)
            && let Err(e) = write(self.store, request, &note)
        {
            tracing::debug!("no note of this run is left: {}", e.chain());
        }
    }

    /// The note, if nothing was done and all that the run looked at can be told by a note.
    fn note(&self, request: &Request, record: &RunRecord) -> Option<Settled> {
        let plan = self.plan;
        let cached = |t: &TaskOutcome| t.status == Status::Cached && !t.pulled;
        if !record.report.tasks.iter().all(cached) || !plan.warnings.is_empty() {
            return None;
        }
        let mut note = Settled {
            texts: plan.sources.texts().map(|(path, text)| absolute(path, text)).collect(),
            plugins: Vec::new(),
            env: Vec::new(),
            root: plan.root.clone(),
            files: BTreeMap::new(),
            entries: Vec::new(),
            blobs: BTreeMap::new(),
            published: Vec::new(),
            last: Stamp::of(&self.store.last_path(&plan.name)).ok()?,
            record: record.clone(),
        };
        let mut names: Vec<&String> = plan.env.iter().map(|(name, ..)| name).collect();
        for plugin in &plan.plugins {
            note.plugins.push((plugin.dir.clone(), digest_of(plugin).ok()?));
            names.extend(&plugin.env);
        }
        note.env = names.iter().map(|n| ((*n).clone(), request.env(n))).collect();
        for files in plan.tasks.iter().flat_map(|t| &t.files) {
            let stamps = files.paths.iter().map(|p| Some((p.clone(), self.stats.lasting(p)?)));
            note.files.insert(files.pattern.clone(), stamps.collect::<Option<_>>()?);
        }
        for (task, outcome) in plan.tasks.iter().zip(&record.report.tasks) {
            let key = outcome.key?;
            let (entry, size) = self.store.sized_entry(&key)?;
            note.entries.push((key, size));
            let files = entry.outputs.values().flat_map(|a| &a.manifest.files);
            note.blobs.extend(files.map(|f| (f.digest, f.size)));
            for (output, target) in &task.publish {
                note.published.push((target.clone(), entry.outputs.get(output)?.digest));
            }
        }
        Some(note)
    }
}

fn absolute(path: &Path, text: &str) -> (PathBuf, Digest) {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    (path, Digest::of_bytes(text.as_bytes()))
}

fn write(store: &Store, request: &Request, note: &Settled) -> Result<()> {
    let bytes = with_checksum(serde_json::to_vec(note)?);
    store.write_atomic(&request.path(store.dir()), &bytes, Sync::No)
}

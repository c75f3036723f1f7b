//! The engine: a plan meets the store.
//!
//! For each task, as soon as its inputs are known, the key is made and looked up. A hit is the
//! result; a miss runs the task. [`Engine::explain`] walks the plan the same way without running
//! anything.

mod execute;
mod publish;
mod report;
mod reporter;
mod schedule;
mod settled;
mod validate;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lora_flow_core::{CancelToken, DeviceSpec, Digest, Error, Result};

use crate::key::Explained;
use crate::plan::{Plan, PlannedTask};
use crate::reason::{LastKeys, Reason, differences};
use crate::record::{self, RunFolder, RunInfo, RunRecord};
use crate::source::{Diagnostic, Diagnostics};
use crate::stat_cache::StatCache;
use publish::Occupied;

use crate::store::remote::pushing;
use crate::store::{Entry, Freed, Keep, Lookup, Remote, STORE_DIR, Store, StoredArtifact};

pub use report::{
    ErrorRecord, Gpu, Observer, OutputRecord, RunOptions, RunReport, State, Status, TaskOutcome,
    TaskStatus,
};
pub use settled::{Request, store_of};

/// Runs plans against a store.
#[derive(Debug)]
pub struct Engine {
    store: Store,
    remote: Option<Remote>,
    /// Pause before a failed task is tried again; doubled each time.
    retry_delay: Duration,
}

impl Engine {
    /// The engine over the store of a pipeline's root, `.lora-flow` in it unless `cache_dir`
    /// names another folder.
    ///
    /// # Errors
    /// When the store cannot be opened or made.
    pub fn open(root: &Path, cache_dir: Option<&Path>) -> Result<Self> {
        let dir = cache_dir.map_or_else(|| root.join(STORE_DIR), Path::to_owned);
        Ok(Self::over(Store::open(&dir)?))
    }

    /// The engine over a store.
    pub fn over(store: Store) -> Self {
        Self { store, remote: None, retry_delay: Duration::from_secs(1) }
    }

    /// Adds a remote tier: results that the store lacks are taken from there, and those made here
    /// are sent there.
    pub fn with_remote(mut self, remote: Option<Remote>) -> Self {
        self.remote = remote;
        self
    }

    /// Sets the pause before a failed task is tried again (1 s at first, doubled each time).
    pub fn with_retry_delay(mut self, delay: Duration) -> Self {
        self.retry_delay = delay;
        self
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Reports of all runs that ended, newest first.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn runs(&self) -> Result<Vec<RunReport>> {
        record::list_runs(&self.store)
    }

    /// The report of a run by its id, the beginning of its id, or `latest`.
    ///
    /// # Errors
    /// When no run, or more than one, is meant.
    pub fn load_run(&self, id: &str) -> Result<RunReport> {
        Ok(self.load_record(id)?.report)
    }

    /// Everything kept about a run: its report, parameters, command line and environment.
    ///
    /// # Errors
    /// When no run, or more than one, is meant.
    pub fn load_record(&self, id: &str) -> Result<RunRecord> {
        record::load_run(&self.store, id)
    }

    /// Where the log of a task of a run stands. A task that did not execute left none.
    pub fn log_path(&self, run_id: &str, task: &str) -> PathBuf {
        record::log_path(&self.store, run_id, task)
    }

    /// Cleans the store; see [`Store::gc`].
    ///
    /// # Errors
    /// When the store cannot be read or written.
    pub fn gc(&self, keep: &Keep, dry_run: bool) -> Result<Freed> {
        self.store.gc(keep, dry_run)
    }

    /// Sends all results of the store that the remote lacks; gives their number, and the bytes of
    /// the files sent. Unlike in a run, a remote that cannot be used is an error.
    ///
    /// # Errors
    /// When there is no remote, or it cannot be used, or the store cannot be read.
    pub fn push_all(&self, cancel: &CancelToken) -> Result<(usize, u64)> {
        let remote = self.remote.as_ref();
        let remote = remote.ok_or_else(|| Error::new("there is no remote cache to send to"))?;
        let _lock = self.store.lock_shared(cancel)?;
        let _gate = self.store.gate()?;
        let (mut entries, mut bytes) = (0, 0);
        for info in self.store.ls()? {
            let Lookup::Hit(entry) = self.store.inspect(&info.key)? else { continue };
            if let Some(sent) = remote.complete(&self.store, &entry, cancel)? {
                entries += 1;
                bytes += sent;
            }
        }
        Ok((entries, bytes))
    }

    /// What a run would do, and why. Reads outside files that it does not know; runs nothing.
    ///
    /// # Errors
    /// When an outside file or the store cannot be read.
    pub fn explain(
        &self,
        plan: &Plan,
        force: &[String],
        device: DeviceSpec,
    ) -> Result<Vec<TaskStatus>> {
        let _lock = self.store.lock_shared(&CancelToken::default())?;
        let session = self.session(plan, force, device);
        let mut foresight = Foresight::default();
        let mut statuses = Vec::with_capacity(plan.tasks.len());
        for task in &plan.tasks {
            let (outlook, state) = session.foresee(task, &foresight)?;
            foresight.push(outlook);
            statuses.push(TaskStatus { id: task.id.clone(), kind: task.kind.clone(), state });
        }
        session.stats.save(&self.store)?;
        Ok(statuses)
    }

    /// The parts of a task's key, as far as its inputs are in the store. Runs nothing.
    ///
    /// # Errors
    /// When an outside file or the store cannot be read.
    ///
    /// # Panics
    /// When the plan has no task of that index.
    pub fn key_parts(
        &self,
        plan: &Plan,
        index: usize,
        force: &[String],
        device: DeviceSpec,
    ) -> Result<Explained> {
        let _lock = self.store.lock_shared(&CancelToken::default())?;
        let session = self.session(plan, force, device);
        let mut foresight = Foresight::default();
        for task in &plan.tasks[..index] {
            let (outlook, _) = session.foresee(task, &foresight)?;
            foresight.push(outlook);
        }
        session.partly(&plan.tasks[index], &foresight)
    }

    /// Targets of `publish` that are occupied, with their places in the pipeline file: better known
    /// now than when the work is done.
    ///
    /// # Errors
    /// When an outside file or the store cannot be read.
    pub fn check_targets(
        &self,
        plan: &Plan,
        force: &[String],
        device: DeviceSpec,
    ) -> Result<Diagnostics> {
        let mut found = Diagnostics::default();
        let mut foreign = Vec::new();
        let mut report = |task: &PlannedTask, i: usize, message: String, hint: &str| {
            let span = task.publish_spans.get(i).copied().unwrap_or(task.span);
            let mut problem = Diagnostic::new(&plan.source, span, message).with_hint(hint);
            plan.sources.localise(&mut problem);
            found.push(problem);
        };
        for (index, task) in plan.tasks.iter().enumerate() {
            for (i, (_, target)) in task.publish.iter().enumerate() {
                match publish::occupied(&plan.name, target) {
                    Some(Occupied::Foreign) => foreign.push((index, i)),
                    Some(Occupied::Refused(error)) => {
                        let message = format!("cannot publish to `{}`: {error}", target.display());
                        report(task, i, message, error.hint().unwrap_or_default());
                    }
                    None => {}
                }
            }
        }
        if !foreign.is_empty() {
            // A folder that holds exactly the result may stay.
            let _lock = self.store.lock_shared(&CancelToken::default())?;
            let session = self.session(plan, force, device);
            let mut foresight = Foresight::default();
            for task in &plan.tasks {
                let (outlook, _) = session.foresee(task, &foresight)?;
                foresight.push(outlook);
            }
            for (index, i) in foreign {
                let task = &plan.tasks[index];
                let (output, target) = &task.publish[i];
                let artifact =
                    foresight.results[index].as_ref().and_then(|done| done.outputs.get(output));
                if artifact.is_some_and(|artifact| publish::holds(artifact, target)) {
                    continue;
                }
                let error = publish::not_ours();
                let message = format!("cannot publish to `{}`: {error}", target.display());
                report(task, i, message, error.hint().unwrap_or_default());
            }
        }
        found.sort(&plan.source.path);
        Ok(found)
    }

    /// All runs, newest first, also those that go on or were killed.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn all_runs(&self) -> Result<Vec<RunInfo>> {
        record::all_runs(&self.store)
    }

    /// A run by its id, the beginning of its id, or `latest`, which is the last one that ended.
    ///
    /// # Errors
    /// When no run, or more than one, is meant, or its files cannot be read.
    pub fn find_run(&self, id: &str) -> Result<RunInfo> {
        record::find_run(&self.store, id)
    }

    /// Id of the run that started last, whether it ended or not.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn last_run(&self) -> Result<Option<String>> {
        Ok(record::run_ids(&self.store)?.into_iter().next())
    }

    /// Runs a plan. A task's failure is part of the report, not an error.
    ///
    /// # Errors
    /// When the store cannot be read or written.
    pub fn run(
        &self,
        plan: &Plan,
        options: &RunOptions,
        observer: Arc<dyn Observer>,
    ) -> Result<RunReport> {
        let started = Instant::now();
        let timestamp = Timestamp::now();
        let _lock = self.store.lock_for_run(&options.cancel, publish::sweep)?;
        let folder = RunFolder::create(&self.store, timestamp, plan)?;
        let at_work = self.store.lock_run(&folder.id)?;
        let session = self.session(plan, &options.force, options.device);
        let tasks = pushing(self.remote.as_ref(), &self.store, &options.cancel, |pushes| {
            schedule::run(&schedule::Run {
                session: &session,
                options,
                observer,
                folder: &folder,
                retry_delay: self.retry_delay,
                pushes,
            })
        })?;
        session.stats.save(&self.store)?;
        let report = RunReport {
            run_id: folder.id.clone(),
            name: plan.name.clone(),
            started: timestamp.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            wall: started.elapsed(),
            tasks,
        };
        let record = folder.finish(&self.store, plan, options, report)?;
        if let Some(request) = &options.settle {
            session.settle(request, &record);
        }
        at_work.remove();
        Ok(record.report)
    }

    pub(crate) fn session<'a>(
        &'a self,
        plan: &'a Plan,
        force: &'a [String],
        device: DeviceSpec,
    ) -> Session<'a> {
        let last = Mutex::new(LastKeys::load(&self.store, &plan.name));
        let stats = StatCache::load(&self.store);
        let (store, remote) = (&self.store, self.remote.as_ref());
        Session { store, remote, plan, force, device, stats, last }
    }
}

/// The result of a task that others take inputs from.
#[derive(Debug)]
struct Done {
    outputs: BTreeMap<String, Arc<StoredArtifact>>,
    denied: bool,
}

impl Done {
    fn of(entry: &Entry) -> Arc<Self> {
        let outputs = entry.outputs.iter().map(|(k, v)| (k.clone(), Arc::new(v.clone())));
        Arc::new(Self { outputs: outputs.collect(), denied: entry.denied.is_some() })
    }
}

/// An artifact at an input port.
#[derive(Debug, Clone)]
struct Input {
    port: String,
    reference: String,
    artifact: Arc<StoredArtifact>,
}

/// What one walk over a plan knows.
#[derive(Debug)]
pub(crate) struct Session<'a> {
    store: &'a Store,
    remote: Option<&'a Remote>,
    plan: &'a Plan,
    force: &'a [String],
    device: DeviceSpec,
    pub(crate) stats: StatCache,
    last: Mutex<LastKeys>,
}

impl Session<'_> {
    /// For each task the digests of its outputs by name, if its result is there.
    pub(crate) fn results(&self) -> Result<Vec<Option<BTreeMap<String, Digest>>>> {
        let mut foresight = Foresight::default();
        for task in &self.plan.tasks {
            let (outlook, _) = self.foresee(task, &foresight)?;
            foresight.push(outlook);
        }
        let digests = |done: Arc<Done>| {
            done.outputs.iter().map(|(name, a)| (name.clone(), a.digest)).collect()
        };
        Ok(foresight.results.into_iter().map(|done| done.map(digests)).collect())
    }

    fn last(&self) -> MutexGuard<'_, LastKeys> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `*`, the task's id, or the name that a matrix fanned out.
    fn is_forced(&self, task: &PlannedTask) -> bool {
        let base = task.id.split('[').next().unwrap_or(&task.id);
        task.forced || self.force.iter().any(|f| f == "*" || *f == task.id || f == base)
    }

    /// The input artifacts of a task whose producers are done.
    fn inputs(&self, task: &PlannedTask, results: &[Option<Arc<Done>>]) -> Result<Vec<Input>> {
        task.inputs
            .iter()
            .map(|edge| {
                let producer = results.get(edge.task).and_then(Option::as_ref);
                let artifact = producer.and_then(|done| done.outputs.get(&edge.output));
                let artifact = artifact.cloned().ok_or_else(|| {
                    let name = &self.plan.tasks[edge.task].id;
                    let (port, output) = (&edge.port, &edge.output);
                    Error::new(format!(
                        "input `{port}`: `{name}` did not make its output `{output}`"
                    ))
                    .with_hint("that output is optional; the parameters decide whether it is made")
                })?;
                let (port, reference) = (edge.port.clone(), edge.reference.clone());
                Ok(Input { port, reference, artifact })
            })
            .collect()
    }

    /// The explained key of a task; `None` if an outside file must be read for it and `may_read`
    /// is not set.
    fn explained(
        &self,
        task: &PlannedTask,
        inputs: &[Input],
        may_read: bool,
    ) -> Result<Option<Explained>> {
        let mut explained = Explained::begin(task, self.device);
        for input in inputs {
            explained.add_input(&input.port, &input.reference, input.artifact.digest);
        }
        for files in &task.files {
            let digests: Vec<Digest> = if may_read {
                self.stats.digests(&files.paths)?
            } else {
                let known = files.paths.iter().map(|path| self.stats.known(path));
                match known.collect::<Result<Option<_>>>()? {
                    Some(digests) => digests,
                    None => return Ok(None),
                }
            };
            for (path, digest) in files.paths.iter().zip(digests) {
                explained.add_file(&files.pointer, &self.plan.root, path, digest);
            }
        }
        Ok(Some(explained))
    }

    /// Why a task whose key is known, and has no result, runs.
    fn reasons(
        &self,
        task: &PlannedTask,
        explained: &Explained,
        key: &Digest,
        corrupt: bool,
    ) -> Vec<Reason> {
        if self.is_forced(task) {
            return vec![Reason::Forced];
        }
        if corrupt {
            return vec![Reason::Corrupt];
        }
        let last = self.last().get(&task.id);
        match last {
            None => vec![Reason::NeverRun],
            Some(last) if last == *key => vec![Reason::Removed],
            Some(last) => match self.store.peek(&last) {
                Some(entry) => differences(&entry.explained, explained, &Default::default()),
                None => vec![Reason::Removed],
            },
        }
    }

    /// What can be said of a task before anything runs.
    fn foresee(&self, task: &PlannedTask, known: &Foresight) -> Result<(Outlook, State)> {
        if let Some(because) = task.upstream().iter().find_map(|i| self.blocked(*i, known)) {
            return Ok((Outlook::Blocked(because.clone()), State::Blocked(because)));
        }
        let mut pending: Vec<usize> = task.inputs.iter().map(|e| e.task).collect();
        pending.retain(|i| known.results[*i].is_none());
        pending.dedup();
        if pending.is_empty() {
            return self.foresee_known(task, known);
        }
        if self.is_forced(task) {
            return Ok((Outlook::Runs, State::Stale(vec![Reason::Forced])));
        }
        let Some(last) = self.last().get(&task.id) else {
            return Ok((Outlook::Runs, State::Stale(vec![Reason::NeverRun])));
        };
        // What is known already may differ from the last result, whatever the rest turns out to be.
        let mut reasons = match self.store.peek(&last) {
            Some(entry) => {
                let open = task.inputs.iter().filter(|e| known.results[e.task].is_none());
                let open = open.map(|e| e.port.as_str()).collect();
                differences(&entry.explained, &self.partly(task, known)?, &open)
            }
            None => vec![Reason::Removed],
        };
        let changed = !reasons.is_empty();
        reasons.extend(pending.iter().map(|i| Reason::Upstream(self.plan.tasks[*i].id.clone())));
        Ok(match changed {
            true => (Outlook::Runs, State::Stale(reasons)),
            false => (Outlook::Open, State::Open(reasons)),
        })
    }

    /// Why a task cannot run after this one, if it cannot.
    fn blocked(&self, upstream: usize, known: &Foresight) -> Option<String> {
        match &known.outlooks[upstream] {
            Outlook::Blocked(because) => Some(because.clone()),
            Outlook::Stored(done) if done.denied => {
                Some(format!("gate `{}` said no", self.plan.tasks[upstream].id))
            }
            _ => None,
        }
    }

    fn foresee_known(&self, task: &PlannedTask, known: &Foresight) -> Result<(Outlook, State)> {
        let inputs = match self.inputs(task, &known.results) {
            Ok(inputs) => inputs,
            Err(e) => {
                let because = e.to_string();
                return Ok((Outlook::Blocked(because.clone()), State::Blocked(because)));
            }
        };
        let explained = self.explained(task, &inputs, true)?;
        let explained = explained.ok_or_else(|| Error::new("the key is not known"))?;
        let key = explained.key.digest();
        let found = if self.is_forced(task) { Lookup::Miss } else { self.store.inspect(&key)? };
        if let Lookup::Hit(entry) = found {
            return Ok((Outlook::Stored(Done::of(&entry)), State::Cached));
        }
        if let (Some(remote), false) = (self.remote, self.is_forced(task))
            && let Some(entry) = remote.peek(&key, &CancelToken::default())?
        {
            return Ok((Outlook::Stored(Done::of(&entry)), State::CachedRemote));
        }
        let corrupt = matches!(found, Lookup::Corrupt { .. });
        Ok((Outlook::Runs, State::Stale(self.reasons(task, &explained, &key, corrupt))))
    }

    /// The explained key as far as the inputs are known.
    fn partly(&self, task: &PlannedTask, known: &Foresight) -> Result<Explained> {
        let inputs: Vec<Input> = task
            .inputs
            .iter()
            .filter_map(|edge| {
                let artifact =
                    known.results[edge.task].as_ref()?.outputs.get(&edge.output)?.clone();
                Some(Input { port: edge.port.clone(), reference: edge.reference.clone(), artifact })
            })
            .collect();
        let explained = self.explained(task, &inputs, true)?;
        explained.ok_or_else(|| Error::new("the key is not known"))
    }
}

/// What is foreseen of a task.
#[derive(Debug)]
enum Outlook {
    /// Its result is in the store.
    Stored(Arc<Done>),
    /// It will run.
    Runs,
    /// It may run.
    Open,
    /// It cannot run, because of this.
    Blocked(String),
}

/// What is foreseen of the tasks up to some point of the plan.
#[derive(Debug, Default)]
struct Foresight {
    outlooks: Vec<Outlook>,
    results: Vec<Option<Arc<Done>>>,
}

impl Foresight {
    fn push(&mut self, outlook: Outlook) {
        self.results.push(match &outlook {
            Outlook::Stored(done) => Some(done.clone()),
            _ => None,
        });
        self.outlooks.push(outlook);
    }
}

#[cfg(test)]
pub(crate) mod tests;

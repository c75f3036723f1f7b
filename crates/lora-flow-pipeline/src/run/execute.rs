//! One task, from its inputs to its result in the store.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lora_flow_core::{
    CancelToken, DeviceSpec, Digest, Error, ErrorKind, LogLevel, NamedArtifact, OutputDir, Result,
    ResultExt, TaskContext, TaskContextParts,
};

use super::publish::Publication;
use super::reporter::{TaskReporter, printable};
use super::schedule::Run;
use super::validate::validate;
use super::{Done, ErrorRecord, Gpu, Input, Status, TaskOutcome};
use crate::key::Explained;
use crate::pinned::check_outputs;
use crate::plan::PlannedTask;
use crate::store::{Entry, FileLock, Lookup, Staged, remove_all};

/// The longest pause between two tries.
const LONGEST_DELAY: Duration = Duration::from_secs(60);

/// How the scheduler reaches a task that executes.
#[derive(Debug, Default)]
pub(super) struct Control {
    state: Mutex<ControlState>,
    timed_out: AtomicBool,
}

#[derive(Debug, Default)]
struct ControlState {
    /// The token of the present try.
    token: CancelToken,
    deadline: Option<Instant>,
}

impl Control {
    /// A try begins; its token is its own, so that a time limit stops it alone.
    fn begin(&self, timeout: Option<Duration>) -> CancelToken {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.token = CancelToken::default();
        state.deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        self.timed_out.store(false, Ordering::Relaxed);
        state.token.clone()
    }

    /// A try ended; says whether its time was over.
    fn end(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.deadline = None;
        self.timed_out.load(Ordering::Relaxed)
    }

    /// Called often: passes on that the run is to stop, or that time is over.
    pub(super) fn tick(&self, stop: bool) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.deadline.is_some_and(|d| d <= Instant::now()) {
            self.timed_out.store(true, Ordering::Relaxed);
            state.token.cancel();
        }
        if stop {
            state.token.cancel();
        }
    }
}

/// A task that ended.
pub(super) struct Finished {
    pub(super) index: usize,
    pub(super) outcome: TaskOutcome,
    /// Its result, unless it has none.
    pub(super) done: Option<Arc<Done>>,
}

/// What the quick look at a task found.
pub(super) enum Quick {
    /// All is there already.
    Finished(Box<Finished>),
    /// There is work to do.
    Work {
        /// Its entry was damaged.
        corrupt: bool,
    },
}

/// A task and what it needs to execute.
pub(super) struct Job {
    pub(super) index: usize,
    pub(super) inputs: Result<Vec<Input>>,
    pub(super) threads: usize,
    /// GPUs that it has for itself.
    pub(super) gpus: Vec<Gpu>,
    /// Its entry was damaged.
    pub(super) corrupt: bool,
    pub(super) control: Arc<Control>,
}

impl Run<'_> {
    /// Takes a result from the store if that needs a few small reads only: no outside file is
    /// hashed, nothing is published.
    pub(super) fn quick(&self, index: usize, inputs: &Result<Vec<Input>>) -> Quick {
        let session = self.session;
        let task = &session.plan.tasks[index];
        let nothing = Quick::Work { corrupt: false };
        let Ok(inputs) = inputs else { return nothing };
        if session.is_forced(task) {
            return nothing;
        }
        let Ok(Some(explained)) = session.explained(task, inputs, false) else { return nothing };
        let entry = match session.store.find(&explained.key.digest()) {
            Ok(Lookup::Hit(entry)) => entry,
            Ok(Lookup::Corrupt { .. }) => return Quick::Work { corrupt: true },
            _ => return nothing,
        };
        if self.check_pinned(task, &entry).is_err() {
            return nothing;
        }
        let mut outcome = TaskOutcome::new(task, Status::Cached);
        outcome.fill(&entry, true);
        for (output, target) in &task.publish {
            let artifact = entry.outputs.get(output);
            if !artifact.is_some_and(|a| self.publication(task, output, a, target).is_current()) {
                return nothing;
            }
            outcome.published.push(target.clone());
        }
        self.remember(task, entry.key);
        Quick::Finished(Box::new(Finished { index, outcome, done: Some(Done::of(&entry)) }))
    }

    /// Does whatever a task needs. Never panics.
    pub(super) fn work(&self, job: Job) -> Finished {
        let session = self.session;
        let index = job.index;
        let task = &session.plan.tasks[index];
        let reporter = TaskReporter::new(&task.id, self.observer.clone(), self.folder);
        let mut work = Work {
            run: self,
            task,
            threads: job.threads,
            gpus: job.gpus,
            control: job.control,
            reporter: Arc::new(reporter),
            outcome: TaskOutcome::new(task, Status::Failed),
            started: None,
        };
        let steps = AssertUnwindSafe(|| work.steps(job.inputs, job.corrupt));
        let result = catch_unwind(steps).unwrap_or_else(|payload| Err(panic_error(&*payload)));
        let wall = work.started.map_or(Duration::ZERO, |s| s.elapsed());
        let Work { mut outcome, reporter, .. } = work;
        outcome.wall = wall;
        let done = match result {
            Ok(entry) => Some(Done::of(&entry)),
            Err(e) if e.kind() == ErrorKind::Cancelled => {
                outcome.status = Status::Cancelled;
                reporter.note(LogLevel::Warn, "cancelled");
                None
            }
            Err(e) => {
                outcome.status = Status::Failed;
                let log = self.folder.log(&task.id);
                let error = ErrorRecord {
                    message: printable(&e.chain()).into_owned(),
                    hint: e.hint().map(|hint| printable(hint).into_owned()),
                    log,
                };
                reporter.note(LogLevel::Error, &format!("failed: {}", error.message));
                if let Some(hint) = &error.hint {
                    reporter.note(LogLevel::Error, &format!("hint: {hint}"));
                }
                outcome.error = Some(error);
                None
            }
        };
        Finished { index, outcome, done }
    }

    fn publication<'a>(
        &'a self,
        task: &'a PlannedTask,
        output: &'a str,
        artifact: &'a crate::store::StoredArtifact,
        target: &'a Path,
    ) -> Publication<'a> {
        let (store, pipeline) = (self.session.store, self.session.plan.name.as_str());
        Publication { store, pipeline, task, output, artifact, target }
    }

    /// Whether the outputs are those that a lock file insists on.
    fn check_pinned(&self, task: &PlannedTask, entry: &Entry) -> Result<()> {
        let outputs = entry.outputs.iter().map(|(name, a)| (name, a.digest));
        check_outputs(&self.options.pinned, &task.id, outputs)
    }

    /// Remembers the key for later reasons; not being able to stops nothing.
    fn remember(&self, task: &PlannedTask, key: Digest) {
        if let Err(e) = self.session.last().set(&task.id, key) {
            tracing::warn!("cannot remember the key of `{}`: {}", task.id, e.chain());
        }
    }
}

struct Work<'a> {
    run: &'a Run<'a>,
    task: &'a PlannedTask,
    threads: usize,
    gpus: Vec<Gpu>,
    control: Arc<Control>,
    reporter: Arc<TaskReporter>,
    outcome: TaskOutcome,
    /// When it began to execute.
    started: Option<Instant>,
}

impl Work<'_> {
    fn steps(&mut self, inputs: Result<Vec<Input>>, mut corrupt: bool) -> Result<Box<Entry>> {
        let session = self.run.session;
        let cancel = &self.run.options.cancel;
        let inputs = inputs?;
        let explained = session
            .explained(self.task, &inputs, true)?
            .ok_or_else(|| Error::new("the key is not known"))?;
        let key = explained.key.digest();
        self.outcome.key = Some(key);
        let forced = session.is_forced(self.task);
        if !forced {
            match session.store.find(&key)? {
                Lookup::Hit(entry) => return self.settle(entry, true),
                Lookup::Corrupt { .. } => corrupt = true,
                Lookup::Miss => {}
            }
            if let Some(remote) = session.remote
                && let Some(entry) = remote.pull(session.store, &key, cancel, || self.waiting())?
            {
                self.outcome.pulled = true;
                return self.settle(entry, true);
            }
        }
        let reasons = session.reasons(self.task, &explained, &key, corrupt);
        self.outcome.reasons = reasons.iter().map(ToString::to_string).collect();
        self.run.observer.task_started(&self.task.id);
        self.run.folder.note_start(&self.task.id);
        self.started = Some(Instant::now());
        self.reporter.note(LogLevel::Info, &format!("runs: {}", self.outcome.reasons.join("; ")));

        // Two equal keys at once compute once: the second waits, and finds the result.
        let lock = session.store.lock_path(&format!("{key}.lock"));
        let lock = FileLock::exclusive(&lock, cancel, || self.waiting())?;
        let made = match session.store.lookup(&key)? {
            Lookup::Hit(entry) if !forced => Ok((entry, true)),
            _ => self.make(&inputs, explained, key, forced).map(|entry| (entry, false)),
        };
        lock.remove();
        let (entry, cached) = made?;
        if cached {
            self.outcome.reasons.clear();
        }
        self.settle(entry, cached)
    }

    fn waiting(&self) {
        self.reporter.tell(LogLevel::Info, "waiting: the same result is being made elsewhere");
    }

    /// The result stands in the store: note it, and publish what is to be published.
    fn settle(&mut self, entry: Box<Entry>, cached: bool) -> Result<Box<Entry>> {
        self.outcome.fill(&entry, cached);
        self.run.check_pinned(self.task, &entry)?;
        self.run.remember(self.task, entry.key);
        for (output, target) in &self.task.publish {
            let artifact = entry.outputs.get(output).ok_or_else(|| {
                Error::new(format!("output `{output}` was not made, so it cannot be published"))
            })?;
            let publication = self.run.publication(self.task, output, artifact, target);
            publication.publish(&self.run.options.cancel)?;
            self.outcome.published.push(target.clone());
        }
        Ok(entry)
    }

    /// Tries until it succeeds or may not try again.
    fn make(
        &self,
        inputs: &[Input],
        explained: Explained,
        key: Digest,
        forced: bool,
    ) -> Result<Box<Entry>> {
        let state_dir = self.run.session.store.state_dir(&key);
        if forced {
            // From the beginning, not from where an earlier try stopped.
            remove_all(&state_dir)?;
        }
        let mut delay = self.run.retry_delay;
        let mut attempt = 0;
        loop {
            fs_err::create_dir_all(&state_dir)?;
            let error = match self.attempt(inputs, &explained, key, &state_dir) {
                Ok(entry) => {
                    remove_all(&state_dir)?;
                    return Ok(entry);
                }
                Err(Failure { error, final_: true }) => return Err(error),
                Err(Failure { error, .. }) => error,
            };
            attempt += 1;
            if attempt > self.task.retries || error.kind() == ErrorKind::Cancelled {
                // Nothing worth keeping if the task kept nothing.
                let _ = std::fs::remove_dir(&state_dir);
                return Err(error);
            }
            let tries = self.task.retries + 1;
            let message = format!(
                "try {attempt} of {tries} failed: {}; the next one starts in {}",
                error.chain(),
                show(delay)
            );
            self.reporter.tell(LogLevel::Warn, message);
            self.pause(delay)?;
            delay = (delay * 2).min(LONGEST_DELAY);
        }
    }

    fn pause(&self, delay: Duration) -> Result<()> {
        let end = Instant::now() + delay;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            if self.run.options.cancel.is_cancelled() {
                return Err(Error::cancelled());
            }
            std::thread::sleep(left.min(Duration::from_millis(20)));
        }
        Ok(())
    }

    fn attempt(
        &self,
        inputs: &[Input],
        explained: &Explained,
        key: Digest,
        state_dir: &Path,
    ) -> Result<Box<Entry>, Failure> {
        let folder = TmpFolder::new(self.run.session.store.tmp_path()?)?;
        let started = Instant::now();
        let token = self.control.begin(self.task.timeout);
        let mut cx = self.context(inputs, &folder.0, state_dir, token)?;
        let result = catch_unwind(AssertUnwindSafe(|| self.task.task.run(&mut cx)));
        let timed_out = self.control.end();
        match result {
            Err(payload) => return Err(Failure { error: panic_error(&*payload), final_: true }),
            Ok(Err(e)) => return Err(self.explain(e, timed_out).into()),
            Ok(Ok(())) => {}
        }
        self.check_files()?;
        let (outputs, report, summary, denied) = cx.finish();
        let report = printable(&report).into_owned();
        let summary =
            summary.iter().map(|(k, v)| (printable(k).into(), printable(v).into())).collect();
        let denied = denied.map(|text| printable(&text).into_owned());
        let staged = self.stage(outputs)?;
        let entry = Entry {
            key,
            explained: explained.clone(),
            outputs: staged.iter().map(|(port, s)| (port.clone(), s.artifact.clone())).collect(),
            report,
            summary,
            denied,
            created: Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string(),
            wall_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        let staged: Vec<Staged> = staged.into_iter().map(|(_, staged)| staged).collect();
        let committed = self.run.session.store.commit(&entry, &staged);
        committed.context("cannot write the result to the store")?;
        self.reporter.note(LogLevel::Info, &format!("done in {}", show(started.elapsed())));
        let entry = Box::new(entry);
        if let Some(pushes) = self.run.pushes {
            // Whoever sends ends after the tasks.
            let _ = pushes.send(entry.clone());
        }
        Ok(entry)
    }

    fn context(
        &self,
        inputs: &[Input],
        folder: &Path,
        state_dir: &Path,
        cancel: CancelToken,
    ) -> Result<TaskContext> {
        let mut by_port: BTreeMap<String, Vec<NamedArtifact>> = BTreeMap::new();
        for input in inputs {
            let artifact = self.run.session.store.artifact(&input.artifact);
            let reference = input.reference.clone();
            let named = NamedArtifact { reference, artifact };
            by_port.entry(input.port.clone()).or_default().push(named);
        }
        let mut outputs = BTreeMap::new();
        for port in &self.task.outputs.ports {
            let path = folder.join(format!("out.{}", port.name));
            fs_err::create_dir(&path)?;
            let kind = *port
                .kinds
                .first()
                .ok_or_else(|| Error::new(format!("output `{}` has no kind", port.name)))?;
            let (name, adopted) = (port.name.clone(), BTreeMap::new());
            let meta = serde_json::Value::Null;
            let output = OutputDir { port: name.clone(), kind, path, adopted, meta };
            outputs.insert(name, output);
        }
        let scratch = folder.join("scratch");
        fs_err::create_dir(&scratch)?;
        let files = self.task.files.iter().map(|f| (f.pointer.clone(), f.paths.clone()));
        let options = self.run.options;
        let device = match (options.device, self.gpus.first()) {
            (DeviceSpec::Cuda(_), Some(gpu)) => DeviceSpec::Cuda(gpu.ordinal),
            (device, _) => device,
        };
        let cx = TaskContext::new(TaskContextParts {
            inputs: by_port,
            outputs,
            files: files.collect(),
            scratch,
            state_dir: state_dir.to_owned(),
            device,
            threads: self.threads,
            allow_network: options.allow_network,
            cancel,
            reporter: self.reporter.clone(),
        });
        let names = || self.gpus.iter().map(|gpu| gpu.name.clone()).collect();
        Ok(if options.gpus.is_empty() { cx } else { cx.with_gpus(names()) })
    }

    /// What a task's error means: out of time, stopped with the run, or failed.
    fn explain(&self, error: Error, timed_out: bool) -> Error {
        if self.run.options.cancel.is_cancelled() {
            return if error.kind() == ErrorKind::Cancelled { error } else { Error::cancelled() };
        }
        if timed_out {
            let limit = self.task.timeout.unwrap_or_default();
            let outer = Error::new(format!("out of time: its limit is {}", show(limit)))
                .with_hint("raise `timeout`; what it kept of its work is taken up again");
            let by_itself = error.kind() == ErrorKind::Failed;
            return if by_itself { outer.with_source(error) } else { outer };
        }
        if error.kind() == ErrorKind::Cancelled {
            return Error::new("it stopped as if cancelled, but nobody asked it to");
        }
        error
    }

    /// The key speaks of the outside files as they were hashed; the task read them later.
    fn check_files(&self) -> Result<()> {
        let paths = self.task.files.iter().flat_map(|f| &f.paths);
        match self.run.session.stats.first_changed(paths) {
            None => Ok(()),
            Some(path) => {
                let message = format!("`{}` changed while the task ran", path.display());
                Err(Error::new(message).with_hint("its result was discarded; run again"))
            }
        }
    }

    /// Hashes and checks the outputs.
    fn stage(&self, outputs: BTreeMap<String, OutputDir>) -> Result<Vec<(String, Staged)>> {
        let mut all = Vec::new();
        for (name, output) in outputs {
            let staged = self.run.session.store.stage(&output);
            match staged.with_context(|| format!("output `{name}` cannot be kept"))? {
                Some(staged) => {
                    validate(&output, &staged)?;
                    all.push((name, staged));
                }
                None if self.task.outputs.get(&name).is_some_and(|p| p.required) => {
                    return Err(Error::new(format!(
                        "the task ended without making its output `{name}`"
                    ))
                    .with_hint("this is a mistake of the task's kind, not of the pipeline"));
                }
                None => {}
            }
        }
        Ok(all)
    }
}

/// Why a try did not succeed.
struct Failure {
    error: Error,
    /// Another try would not help.
    final_: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, final_: false }
    }
}

/// A folder that is gone when the try is over.
struct TmpFolder(PathBuf);

impl TmpFolder {
    fn new(path: PathBuf) -> Result<Self> {
        fs_err::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for TmpFolder {
    fn drop(&mut self) {
        if let Err(e) = remove_all(&self.0) {
            tracing::debug!("cannot remove `{}`: {}", self.0.display(), e.chain());
        }
    }
}

fn panic_error(payload: &(dyn Any + Send)) -> Error {
    let text = payload
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned());
    let text = text.unwrap_or_else(|| "no message".to_owned());
    Error::new(format!("the task panicked: {text}"))
        .with_hint("this is a bug of the task's implementation; please report it")
}

/// A duration for people: `0.25 s`, `12 s`, `3 m 05 s`, `2 h 10 m`.
fn show(d: Duration) -> String {
    let seconds = d.as_secs();
    match seconds {
        0..10 => format!("{} s", (d.as_secs_f64() * 100.0).round() / 100.0),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} m {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} m", seconds / 3600, seconds / 60 % 60),
    }
}

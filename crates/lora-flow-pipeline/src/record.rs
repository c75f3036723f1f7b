//! What a run leaves behind: `runs/ID/` with `run.json`, the pipeline as given, logs and metrics.
//!
//! `run.json` is written at the end. A run that has none goes on while its `lock` is held, and was
//! killed if nobody holds it; `begun.json` and `tasks.jsonl` then say what it was and how far it
//! came.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use lora_flow_core::{Error, Result, ResultExt};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::plan::Plan;
use crate::run::{RunOptions, RunReport, Status, TaskOutcome};
use crate::store::{FileLock, Store, Sync, file_name_of, write_file};

const RUN_FILE: &str = "run.json";
const PIPELINE_FILE: &str = "pipeline.yaml";
const BEGUN_FILE: &str = "begun.json";
const TASKS_FILE: &str = "tasks.jsonl";
const LOCK_FILE: &str = "lock";

/// Version of `run.json`.
const RECORD_FORMAT: u32 = 1;

/// Everything that is kept about a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunRecord {
    /// Version of this record.
    pub format: u32,
    /// What happened.
    pub report: RunReport,
    /// Parameters of the pipeline, with those of the command line.
    pub params: Value,
    /// The pipeline file.
    pub pipeline: PathBuf,
    /// The command line.
    pub command_line: Vec<String>,
    /// Where it ran.
    pub environment: RunEnvironment,
    /// Its tasks' dependencies. Empty in records of versions that did not keep them.
    #[serde(default)]
    pub edges: Vec<RunEdge>,
}

/// A task waited for another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunEdge {
    /// The task that came first.
    pub from: String,
    /// The task that waited.
    pub to: String,
    /// The input through which the artifact went; none where only the order was asked for.
    pub port: Option<String>,
}

impl RunEdge {
    fn all(plan: &Plan) -> Vec<Self> {
        let id = |index: usize| plan.tasks[index].id.clone();
        let mut edges = Vec::new();
        for task in &plan.tasks {
            let inputs = task.inputs.iter().map(|edge| (edge.task, Some(edge.port.clone())));
            let needs = task.needs.iter().map(|&index| (index, None));
            edges.extend(inputs.chain(needs).map(|(from, port)| Self {
                from: id(from),
                to: task.id.clone(),
                port,
            }));
        }
        edges
    }
}

/// Where a run took place.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunEnvironment {
    /// Version of lora-flow.
    pub version: String,
    /// Operating system.
    pub os: String,
    /// Processor architecture.
    pub arch: String,
    /// Processors that the run could use.
    pub cpus: usize,
    /// Device that was asked for.
    pub device: String,
    /// Environment variables that the pipeline declares, by name; values are not kept.
    pub variables: Vec<String>,
}

impl RunEnvironment {
    /// That of this process.
    fn now(device: String, variables: Vec<String>) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            os: std::env::consts::OS.to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            device,
            variables,
        }
    }
}

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// It ended, however it did.
    Ended,
    /// It goes on.
    Running,
    /// Its process died before it ended.
    Killed,
}

/// A run, whether it ended or not.
#[derive(Debug, Clone, PartialEq)]
pub struct RunInfo {
    /// How far it has come.
    pub state: RunState,
    /// What happened so far. In a run that was killed, the tasks that executed then are cancelled.
    pub report: RunReport,
}

/// What is known of a run when it starts.
#[derive(Debug, Serialize, Deserialize)]
struct Begun {
    format: u32,
    name: String,
    started: String,
    /// Names and kinds.
    tasks: Vec<(String, String)>,
}

/// A line of `tasks.jsonl`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Step {
    Started(String),
    Cached(String),
    Ended(Box<TaskOutcome>),
}

/// The folder of a run that is going on.
#[derive(Debug)]
pub(crate) struct RunFolder {
    pub(crate) id: String,
    pub(crate) dir: PathBuf,
    steps: Mutex<Steps>,
    /// Held as long as the run goes on.
    lock: FileLock,
}

/// What is to be written to `tasks.jsonl`, and where. Tasks from the store wait for one that
/// executes: a run that does nothing writes nothing.
#[derive(Debug, Default)]
struct Steps {
    waiting: Vec<u8>,
    file: Option<File>,
}

impl RunFolder {
    /// Makes the folder of a run that starts now.
    pub(crate) fn create(store: &Store, started: Timestamp, plan: &Plan) -> Result<Self> {
        fs_err::create_dir_all(store.runs_dir())?;
        // Made elsewhere, so that whoever sees the folder sees what is in it.
        let fresh = store.tmp_path()?;
        fs_err::create_dir(&fresh)?;
        let lock = FileLock::try_exclusive(&fresh.join(LOCK_FILE))?
            .ok_or_else(|| Error::new("the lock of a new run is taken"))?;
        write_file(&fresh.join(PIPELINE_FILE), plan.source.text.as_bytes(), Sync::No)?;
        let begun = Begun {
            format: RECORD_FORMAT,
            name: plan.name.clone(),
            started: seconds_of(started),
            tasks: plan.tasks.iter().map(|t| (t.id.clone(), t.kind.clone())).collect(),
        };
        write_file(&fresh.join(BEGUN_FILE), &serde_json::to_vec(&begun)?, Sync::No)?;
        let (id, dir) = name_run(store, started, &fresh, |_| Ok(()))?;
        let lock = lock.moved_to(dir.join(LOCK_FILE));
        Ok(Self { id, dir, steps: Mutex::default(), lock })
    }

    /// A task starts to execute.
    pub(crate) fn note_start(&self, task: &str) {
        self.note(&Step::Started(task.to_owned()), true);
    }

    /// A task ended.
    pub(crate) fn note_end(&self, outcome: &TaskOutcome) {
        match outcome.status {
            Status::Cached => self.note(&Step::Cached(outcome.id.clone()), false),
            Status::Skipped(_) => {}
            _ => self.note(&Step::Ended(Box::new(outcome.clone())), true),
        }
    }

    /// Appends a line. That it cannot be written stops no task.
    fn note(&self, step: &Step, now: bool) {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        if serde_json::to_writer(&mut steps.waiting, step).is_ok() {
            steps.waiting.push(b'\n');
        }
        if !now {
            return;
        }
        let lines = std::mem::take(&mut steps.waiting);
        let written = match &mut steps.file {
            Some(file) => file.write_all(&lines),
            none => File::create(self.dir.join(TASKS_FILE))
                .and_then(|file| none.insert(file).write_all(&lines)),
        };
        if let Err(e) = written {
            tracing::warn!("cannot write `{}`: {e}", self.dir.join(TASKS_FILE).display());
        }
    }

    /// Where the log of a task goes.
    pub(crate) fn log(&self, task: &str) -> PathBuf {
        log_in(&self.dir, task)
    }

    /// Where the metrics of a task go.
    pub(crate) fn metrics(&self, task: &str) -> PathBuf {
        self.dir.join("metrics").join(format!("{}.jsonl", file_name_of(task)))
    }

    /// Writes the record, which says all that the notes on the way did. It is synced if the run did
    /// anything worth it.
    pub(crate) fn finish(
        self,
        store: &Store,
        plan: &Plan,
        options: &RunOptions,
        report: RunReport,
    ) -> Result<RunRecord> {
        let sync = if report.did_work() { Sync::File } else { Sync::No };
        let variables: BTreeMap<&String, ()> =
            plan.tasks.iter().flat_map(|t| t.env.keys()).map(|name| (name, ())).collect();
        let record = RunRecord {
            format: RECORD_FORMAT,
            report,
            params: plan.params.clone(),
            pipeline: plan.source.path.clone(),
            command_line: options.command_line.clone(),
            environment: RunEnvironment::now(
                options.device.to_string(),
                variables.into_keys().cloned().collect(),
            ),
            edges: RunEdge::all(plan),
        };
        store.write_atomic(&self.dir.join(RUN_FILE), &serde_json::to_vec(&record)?, sync)?;
        for name in [BEGUN_FILE, TASKS_FILE] {
            let _ = std::fs::remove_file(self.dir.join(name));
        }
        self.lock.remove();
        Ok(record)
    }

    /// The folder of a run that ended as it began: `record` is that of an earlier one, with what is
    /// this one's own put in.
    pub(crate) fn settled(
        store: &Store,
        started: Timestamp,
        text: &str,
        mut record: RunRecord,
    ) -> Result<RunReport> {
        let RunEnvironment { device, variables, .. } = record.environment;
        record.environment = RunEnvironment::now(device, variables);
        record.report.started = seconds_of(started);
        fs_err::create_dir_all(store.runs_dir())?;
        let fresh = store.tmp_path()?;
        fs_err::create_dir(&fresh)?;
        write_file(&fresh.join(PIPELINE_FILE), text.as_bytes(), Sync::No)?;
        let record_file = fresh.join(RUN_FILE);
        name_run(store, started, &fresh, |id| {
            id.clone_into(&mut record.report.run_id);
            write_file(&record_file, &serde_json::to_vec(&record)?, Sync::No)
        })?;
        Ok(record.report)
    }
}

/// A time to the second, RFC 3339 in UTC.
fn seconds_of(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Gives the folder of a run that starts now its name, after `prepare` was told it. The name is the
/// time in UTC; the last four digits are the fraction of the second, so that names sort by time.
fn name_run(
    store: &Store,
    started: Timestamp,
    fresh: &Path,
    mut prepare: impl FnMut(&str) -> Result<()>,
) -> Result<(String, PathBuf)> {
    let second = started.strftime("%Y%m%d-%H%M%S").to_string();
    let fraction = u64::try_from(started.subsec_nanosecond()).unwrap_or(0);
    for attempt in 0..0x1_0000 {
        let tail = (fraction * 0x1_0000 / 1_000_000_000 + attempt) & 0xffff;
        let id = format!("{second}-{tail:04x}");
        let dir = store.runs_dir().join(&id);
        prepare(&id)?;
        match std::fs::rename(fresh, &dir) {
            // Another run's, which is not empty.
            Err(_) if dir.exists() => continue,
            other => other.with_context(|| format!("cannot make `{}`", dir.display()))?,
        }
        return Ok((id, dir));
    }
    Err(Error::new("no name is left for a run of this second"))
}

fn log_in(run: &Path, task: &str) -> PathBuf {
    run.join("logs").join(format!("{}.log", file_name_of(task)))
}

/// Where the log of a task of a run stands, if the task left one.
pub fn log_path(store: &Store, run_id: &str, task: &str) -> PathBuf {
    log_in(&store.runs_dir().join(run_id), task)
}

/// Ids of all runs, also of those that go on or were killed, newest first.
pub(crate) fn run_ids(store: &Store) -> Result<Vec<String>> {
    let mut ids = Vec::new();
    let entries = match fs_err::read_dir(store.runs_dir()) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(ids),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if let Ok(name) = entry.file_name().into_string() {
            ids.push(name);
        }
    }
    ids.sort_unstable_by(|a, b| b.cmp(a));
    Ok(ids)
}

/// Reports of all runs that ended and can be read, newest first.
///
/// # Errors
/// When the store cannot be read.
pub fn list_runs(store: &Store) -> Result<Vec<RunReport>> {
    Ok(run_ids(store)?.iter().filter_map(|id| load_report(store, id).ok()).collect())
}

pub(crate) fn load_report(store: &Store, id: &str) -> Result<RunReport> {
    Ok(read(store, id)?.report)
}

fn read(store: &Store, id: &str) -> Result<RunRecord> {
    let path = store.runs_dir().join(id).join(RUN_FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            return Err(Error::new(format!("run {id} has not ended, or was killed"))
                .with_hint(format!("its logs are in `{}`", store.runs_dir().join(id).display())));
        }
        Err(e) => return Err(e.into()),
    };
    serde_json::from_slice(&bytes).with_context(|| format!("cannot read `{}`", path.display()))
}

/// All runs, newest first, also those that go on or were killed. One whose files cannot be read is
/// left out.
pub(crate) fn all_runs(store: &Store) -> Result<Vec<RunInfo>> {
    Ok(run_ids(store)?.iter().filter_map(|id| info(store, id).ok()).collect())
}

/// A run by its id, the beginning of its id, or `latest`, the last one that ended.
pub(crate) fn find_run(store: &Store, id: &str) -> Result<RunInfo> {
    match id {
        "latest" => {
            let report = load_run(store, id)?.report;
            Ok(RunInfo { state: RunState::Ended, report })
        }
        _ => info(store, &full_id(store, id)?),
    }
}

fn info(store: &Store, id: &str) -> Result<RunInfo> {
    let dir = store.runs_dir().join(id);
    // In this order: a run writes its record before it lets go of its lock.
    let running = FileLock::is_held(&dir.join(LOCK_FILE));
    let missing = match read(store, id) {
        Ok(record) => return Ok(RunInfo { state: RunState::Ended, report: record.report }),
        Err(e) if dir.join(RUN_FILE).exists() => return Err(e),
        Err(e) => e,
    };
    let Ok(begun) = std::fs::read(dir.join(BEGUN_FILE)) else { return Err(missing) };
    let begun: Begun = serde_json::from_slice(&begun)
        .with_context(|| format!("cannot read `{}`", dir.join(BEGUN_FILE).display()))?;
    let state = if running { RunState::Running } else { RunState::Killed };
    let mut steps = steps(&dir);
    let tasks = begun.tasks.into_iter().map(|(id, kind)| {
        let with = |status| TaskOutcome::with(&id, &kind, status);
        match (steps.remove(&id), state) {
            (Some(Step::Ended(outcome)), _) => *outcome,
            (Some(Step::Cached(_)), _) => with(Status::Cached),
            (Some(Step::Started(_)), RunState::Killed) => with(Status::Cancelled),
            (Some(Step::Started(_)), _) => with(Status::Skipped("it executes now".to_owned())),
            (None, RunState::Killed) => with(Status::Skipped("the run was killed".to_owned())),
            (None, _) => with(Status::Skipped("it has not ended yet".to_owned())),
        }
    });
    let report = RunReport {
        run_id: id.to_owned(),
        name: begun.name,
        tasks: tasks.collect(),
        wall: lasted(&dir, &begun.started, state),
        started: begun.started,
    };
    Ok(RunInfo { state, report })
}

/// The last step of each task.
fn steps(dir: &Path) -> HashMap<String, Step> {
    let bytes = std::fs::read(dir.join(TASKS_FILE)).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    // A line cut short by the end is skipped.
    let steps = text.lines().filter_map(|line| serde_json::from_str::<Step>(line).ok());
    let named = steps.map(|step| match &step {
        Step::Started(id) | Step::Cached(id) => (id.clone(), step),
        Step::Ended(outcome) => (outcome.id.clone(), step),
    });
    named.collect()
}

/// How long a run that has no record has lasted; of one that was killed, as far as it left traces.
fn lasted(dir: &Path, started: &str, state: RunState) -> Duration {
    let end = match state {
        RunState::Killed => {
            let files = [BEGUN_FILE, TASKS_FILE].map(|name| dir.join(name));
            let logs = std::fs::read_dir(dir.join("logs")).into_iter().flatten().flatten();
            let files = files.into_iter().chain(logs.map(|e| e.path()));
            let times = files.filter_map(|f| std::fs::metadata(f).ok()?.modified().ok());
            times.max().and_then(|time| Timestamp::try_from(time).ok())
        }
        _ => Some(Timestamp::now()),
    };
    let started = started.parse::<Timestamp>().ok();
    let both = end.zip(started).map(|(end, started)| end.duration_since(started));
    both.and_then(|d| Duration::try_from(d).ok()).unwrap_or_default()
}

/// The record of a run by its id, the beginning of its id, or `latest`.
///
/// # Errors
/// When no run, or more than one, is meant.
pub fn load_run(store: &Store, id: &str) -> Result<RunRecord> {
    if id == "latest" {
        let latest = run_ids(store)?.iter().find_map(|id| read(store, id).ok());
        return latest.ok_or_else(|| Error::new("no run has ended in this store yet"));
    }
    read(store, &full_id(store, id)?)
}

/// The id that another one, or the beginning of one, means.
pub(crate) fn full_id(store: &Store, id: &str) -> Result<String> {
    let ids = run_ids(store)?;
    if ids.iter().any(|i| i == id) {
        return Ok(id.to_owned());
    }
    let matching: Vec<&String> =
        ids.iter().filter(|i| !id.is_empty() && i.starts_with(id)).collect();
    match matching[..] {
        [one] => Ok(one.clone()),
        [] => Err(Error::new(format!("there is no run `{id}`"))
            .with_hint("`lora-flow runs` lists them; `latest` is the last one")),
        _ => {
            let some: Vec<String> = matching.iter().take(4).map(|i| format!("`{i}`")).collect();
            let count = matching.len();
            Err(Error::new(format!("{count} runs start with `{id}`")).with_hint(format!(
                "give more of the id: {}{}",
                some.join(", "),
                if count > some.len() { ", …" } else { "" }
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_by_id_prefix_and_latest() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let report = |id: &str| RunReport {
            run_id: id.to_owned(),
            name: "p".to_owned(),
            started: "2026-01-01T00:00:00Z".to_owned(),
            wall: std::time::Duration::from_millis(1500),
            tasks: Vec::new(),
        };
        assert!(load_run(&store, "latest").is_err());
        for id in ["20260101-000000-0001", "20260101-000000-0002", "20260102-000000-0001"] {
            let record = RunRecord {
                edges: Vec::new(),
                format: RECORD_FORMAT,
                report: report(id),
                params: Value::Null,
                pipeline: PathBuf::from("p.yaml"),
                command_line: Vec::new(),
                environment: RunEnvironment {
                    version: String::new(),
                    os: String::new(),
                    arch: String::new(),
                    cpus: 1,
                    device: "cpu".to_owned(),
                    variables: Vec::new(),
                },
            };
            let folder = store.runs_dir().join(id);
            fs_err::create_dir_all(&folder).unwrap();
            fs_err::write(folder.join(RUN_FILE), serde_json::to_vec(&record).unwrap()).unwrap();
        }
        // A run that was killed has a folder and no record.
        fs_err::create_dir_all(store.runs_dir().join("20260103-000000-0001")).unwrap();
        let id = |id: &str| load_run(&store, id).map(|r| r.report.run_id);
        assert_eq!(id("latest").unwrap(), "20260102-000000-0001");
        assert_eq!(id("20260102").unwrap(), "20260102-000000-0001");
        assert_eq!(id("20260101-000000-0002").unwrap(), "20260101-000000-0002");
        assert!(id("20260101").unwrap_err().hint().unwrap().contains("`20260101-000000-0001`"));
        assert!(id("").is_err());
        assert!(id("2027").is_err());
        assert!(id("20260103").unwrap_err().to_string().contains("has not ended"));
        let runs = list_runs(&store).unwrap();
        assert_eq!(runs.len(), 3);
        assert_eq!(runs[0].run_id, "20260102-000000-0001");
        assert_eq!(runs[0].wall.as_millis(), 1500);
    }
}

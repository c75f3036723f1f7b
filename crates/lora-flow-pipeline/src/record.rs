//! What a run leaves behind: `runs/ID/` with `run.json`, the pipeline as given, logs and metrics.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use lora_flow_core::{Error, Result, ResultExt};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::plan::Plan;
use crate::run::{RunOptions, RunReport};
use crate::store::{Store, Sync, file_name_of, write_file};

const RUN_FILE: &str = "run.json";

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

/// The folder of a run that is going on.
#[derive(Debug)]
pub(crate) struct RunFolder {
    pub(crate) id: String,
    pub(crate) dir: PathBuf,
}

impl RunFolder {
    /// Makes the folder of a run that starts now. Its name is the time in UTC; the last four
    /// digits are the fraction of the second, so that names sort by time.
    pub(crate) fn create(store: &Store, started: Timestamp, plan: &Plan) -> Result<Self> {
        let fraction = u64::try_from(started.subsec_nanosecond()).unwrap_or(0);
        let second = started.strftime("%Y%m%d-%H%M%S").to_string();
        fs_err::create_dir_all(store.runs_dir())?;
        for attempt in 0..0x1_0000 {
            let tail = (fraction * 0x1_0000 / 1_000_000_000 + attempt) & 0xffff;
            let id = format!("{second}-{tail:04x}");
            let dir = store.runs_dir().join(&id);
            match fs_err::create_dir(&dir) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
                other => other?,
            }
            write_file(&dir.join("pipeline.yaml"), plan.source.text.as_bytes(), Sync::No)?;
            return Ok(Self { id, dir });
        }
        Err(Error::new("no name is left for a run of this second"))
    }

    /// Where the log of a task goes.
    pub(crate) fn log(&self, task: &str) -> PathBuf {
        log_in(&self.dir, task)
    }

    /// Where the metrics of a task go.
    pub(crate) fn metrics(&self, task: &str) -> PathBuf {
        self.dir.join("metrics").join(format!("{}.jsonl", file_name_of(task)))
    }

    /// Writes the record. It is synced if the run did anything worth it.
    pub(crate) fn finish(
        &self,
        store: &Store,
        plan: &Plan,
        options: &RunOptions,
        report: &RunReport,
    ) -> Result<()> {
        let variables: BTreeMap<&String, ()> =
            plan.tasks.iter().flat_map(|t| t.env.keys()).map(|name| (name, ())).collect();
        let record = RunRecord {
            format: RECORD_FORMAT,
            report: report.clone(),
            params: plan.params.clone(),
            pipeline: plan.source.path.clone(),
            command_line: options.command_line.clone(),
            environment: RunEnvironment {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                os: std::env::consts::OS.to_owned(),
                arch: std::env::consts::ARCH.to_owned(),
                cpus: std::thread::available_parallelism().map_or(1, usize::from),
                device: options.device.to_string(),
                variables: variables.into_keys().cloned().collect(),
            },
            edges: RunEdge::all(plan),
        };
        let sync = if report.did_work() { Sync::File } else { Sync::No };
        store.write_atomic(&self.dir.join(RUN_FILE), &serde_json::to_vec(&record)?, sync)
    }
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

/// The record of a run by its id, the beginning of its id, or `latest`.
///
/// # Errors
/// When no run, or more than one, is meant.
pub fn load_run(store: &Store, id: &str) -> Result<RunRecord> {
    let ids = run_ids(store)?;
    if id == "latest" {
        let latest = ids.iter().find_map(|id| read(store, id).ok());
        return latest.ok_or_else(|| Error::new("no run has ended in this store yet"));
    }
    if ids.iter().any(|i| i == id) {
        return read(store, id);
    }
    let matching: Vec<&String> =
        ids.iter().filter(|i| !id.is_empty() && i.starts_with(id)).collect();
    match matching[..] {
        [one] => read(store, one),
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

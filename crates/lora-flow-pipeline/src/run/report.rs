//! What goes into a run and what comes out of it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use lora_flow_core::{ArtifactKind, CancelToken, DeviceSpec, Digest, Event};
use serde::{Deserialize, Serialize};

use super::settled::Request;
use crate::pinned::Pinned;
use crate::plan::PlannedTask;
use crate::reason::Reason;
use crate::store::Entry;

/// How to run a plan.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Tasks that may run at once; 0 counts as 1.
    pub jobs: usize,
    /// Tasks to run whether or not their results are there: ids, names of matrices, or `*`.
    pub force: Vec<String>,
    /// Go on with tasks that do not depend on a failed one.
    pub keep_going: bool,
    /// Device to compute on.
    pub device: DeviceSpec,
    /// GPUs that tasks may be given, each to one task at a time; none where none is known.
    pub gpus: Vec<Gpu>,
    /// Whether plugins may use the network.
    pub allow_network: bool,
    /// Set to stop the run.
    pub cancel: CancelToken,
    /// Digests that the outputs of some tasks must have, from a lock file.
    pub pinned: Pinned,
    /// The command line, for the record.
    pub command_line: Vec<String>,
    /// The command, if it may leave a note when there was nothing to do.
    pub settle: Option<Request>,
}

/// A GPU of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its number in this process, as in `cuda:N`.
    pub ordinal: usize,
    /// Its name for a process that is to see it alone, as in `CUDA_VISIBLE_DEVICES`.
    pub name: String,
}

/// Watches a run. Called from several threads.
pub trait Observer: Send + Sync {
    /// A task starts to execute; one that comes from the store does not.
    fn task_started(&self, id: &str);
    /// An executing task tells something.
    fn task_event(&self, id: &str, event: &Event);
    /// A task ended, however it did; called once for each task of the plan.
    fn task_finished(&self, id: &str, outcome: &TaskOutcome);
}

/// What a run would do with a task.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskStatus {
    /// The task.
    pub id: String,
    /// Its kind.
    pub kind: String,
    /// What would happen.
    pub state: State,
}

/// Whether a task would run.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// Its result is in the store.
    Cached,
    /// Its result is in the remote, as its entry there says.
    CachedRemote,
    /// It will run.
    Stale(Vec<Reason>),
    /// It will run if what it depends on yields something else than before.
    Open(Vec<Reason>),
    /// It cannot run, because of this.
    Blocked(String),
}

impl State {
    /// The state in two words at most.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Cached => "cached",
            Self::CachedRemote => "cached (remote)",
            Self::Stale(_) => "will run",
            Self::Open(_) => "may run",
            Self::Blocked(_) => "blocked",
        }
    }

    /// Why, in lines for people.
    pub fn reasons(&self) -> Vec<String> {
        match self {
            Self::Cached | Self::CachedRemote => Vec::new(),
            Self::Stale(reasons) | Self::Open(reasons) => {
                reasons.iter().map(ToString::to_string).collect()
            }
            Self::Blocked(because) => vec![because.clone()],
        }
    }

    /// Why, for machines; see [`Reason::to_json`].
    pub fn reasons_json(&self) -> Vec<serde_json::Value> {
        match self {
            Self::Cached | Self::CachedRemote => Vec::new(),
            Self::Stale(reasons) | Self::Open(reasons) => {
                reasons.iter().map(Reason::to_json).collect()
            }
            Self::Blocked(because) => {
                vec![serde_json::json!({ "reason": "blocked", "text": because })]
            }
        }
    }
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It ran.
    Ran,
    /// Its result was in the store.
    Cached,
    /// It failed.
    Failed,
    /// It is a gate and said no.
    Denied {
        /// Its verdict was in the store.
        cached: bool,
    },
    /// It did not run, because of this.
    Skipped(String),
    /// The run was stopped before it ended.
    Cancelled,
}

/// An output of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputRecord {
    /// Kind of the artifact.
    pub kind: ArtifactKind,
    /// Its digest.
    pub digest: Digest,
    /// Bytes of its files.
    pub size: u64,
}

/// Why a task failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorRecord {
    /// What happened.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
    /// The task's log.
    pub log: PathBuf,
}

/// What happened to a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskOutcome {
    /// The task.
    pub id: String,
    /// Its kind.
    pub kind: String,
    /// How it ended.
    pub status: Status,
    /// Whether its result came from the remote in this run.
    #[serde(default)]
    pub pulled: bool,
    /// Its key, if its inputs were known.
    pub key: Option<Digest>,
    /// Time it took; zero unless it executed.
    #[serde(with = "seconds")]
    pub wall: Duration,
    /// Why it ran.
    pub reasons: Vec<String>,
    /// Text it made for its reader.
    pub report: String,
    /// Headlines.
    pub summary: Vec<(String, String)>,
    /// Outputs by name.
    pub outputs: BTreeMap<String, OutputRecord>,
    /// Why it failed.
    pub error: Option<ErrorRecord>,
    /// Why it said no, if it is a gate that did.
    pub denied: Option<String>,
    /// Folders outside the store in which its outputs now stand.
    pub published: Vec<PathBuf>,
}

impl TaskOutcome {
    pub(super) fn new(task: &PlannedTask, status: Status) -> Self {
        Self::with(&task.id, &task.kind, status)
    }

    /// A task of which nothing more is known.
    pub(crate) fn with(id: &str, kind: &str, status: Status) -> Self {
        Self {
            id: id.to_owned(),
            kind: kind.to_owned(),
            status,
            pulled: false,
            key: None,
            wall: Duration::ZERO,
            reasons: Vec::new(),
            report: String::new(),
            summary: Vec::new(),
            outputs: BTreeMap::new(),
            error: None,
            denied: None,
            published: Vec::new(),
        }
    }

    /// Takes over what an entry says.
    pub(super) fn fill(&mut self, entry: &Entry, cached: bool) {
        self.status = match (&entry.denied, cached) {
            (Some(_), cached) => Status::Denied { cached },
            (None, true) => Status::Cached,
            (None, false) => Status::Ran,
        };
        self.key = Some(entry.key);
        self.report = entry.report.clone();
        self.summary = entry.summary.clone();
        self.denied = entry.denied.clone();
        if let (Some(reason), true) = (&entry.denied, entry.report.is_empty()) {
            self.report = format!("{reason}\n");
        }
        let record = |artifact: &crate::store::StoredArtifact| OutputRecord {
            kind: artifact.manifest.kind,
            digest: artifact.digest,
            size: artifact.size(),
        };
        self.outputs = entry.outputs.iter().map(|(k, v)| (k.clone(), record(v))).collect();
    }
}

/// What happened in a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// Its id; ids sort by time.
    pub run_id: String,
    /// Name of the pipeline.
    pub name: String,
    /// When it started, RFC 3339 in UTC.
    pub started: String,
    /// Time it took.
    #[serde(with = "seconds")]
    pub wall: Duration,
    /// Its tasks, in the order of the plan.
    pub tasks: Vec<TaskOutcome>,
}

impl RunReport {
    /// Exit code of the program: 0 all done, 1 a task failed, 3 a gate said no, 130 stopped.
    pub fn exit_code(&self) -> i32 {
        let any = |wanted: fn(&Status) -> bool| self.tasks.iter().any(|t| wanted(&t.status));
        if any(|s| matches!(s, Status::Cancelled)) {
            130
        } else if any(|s| matches!(s, Status::Failed)) {
            1
        } else if any(|s| matches!(s, Status::Denied { .. })) {
            3
        } else {
            0
        }
    }

    /// Whether any task executed.
    pub(crate) fn did_work(&self) -> bool {
        self.tasks.iter().any(|t| {
            !matches!(
                t.status,
                Status::Cached | Status::Denied { cached: true } | Status::Skipped(_)
            )
        })
    }
}

/// Durations as seconds.
mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_f64(d.as_secs_f64())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        Duration::try_from_secs_f64(f64::deserialize(d)?).map_err(D::Error::custom)
    }
}

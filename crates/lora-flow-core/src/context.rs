//! What a running task sees of the world.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use crate::{Artifact, Error, Event, LogLevel, OutputDir, Progress, Reporter, Result};

/// Set once when the run is to stop; tasks poll it.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Asks all holders to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether stopping was asked for.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The device a run computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceSpec {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU by its index.
    Cuda(usize),
}

impl DeviceSpec {
    /// What enters a key: results differ between classes, not between cards.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda(_) => "cuda",
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(i) => write!(f, "cuda:{i}"),
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => s.strip_prefix("cuda:").and_then(|i| i.parse().ok()).map(Self::Cuda).ok_or_else(
                || {
                    Error::new(format!("unknown device `{s}`"))
                        .with_hint("use `cpu`, `cuda` or `cuda:N`")
                },
            ),
        }
    }
}

/// An input artifact and the reference that named it (`task` or `task.output`).
#[derive(Debug, Clone)]
pub struct NamedArtifact {
    /// The reference as written in the pipeline.
    pub reference: String,
    /// The artifact.
    pub artifact: Artifact,
}

/// Everything the engine hands over to make a [`TaskContext`].
pub struct TaskContextParts {
    /// Input artifacts by port name.
    pub inputs: BTreeMap<String, Vec<NamedArtifact>>,
    /// Output folders by port name, empty.
    pub outputs: BTreeMap<String, OutputDir>,
    /// Outside files by JSON pointer, absolute, sorted.
    pub files: BTreeMap<String, Vec<PathBuf>>,
    /// Folder for temporary files; gone when the task ends.
    pub scratch: PathBuf,
    /// Folder that outlives a failed or killed try under the same key.
    pub state_dir: PathBuf,
    /// Device to compute on.
    pub device: DeviceSpec,
    /// Threads the task may use.
    pub threads: usize,
    /// Whether the run may use the network (plugins).
    pub allow_network: bool,
    /// Set when the run is to stop.
    pub cancel: CancelToken,
    /// Where events go.
    pub reporter: Arc<dyn Reporter>,
}

/// What a context holds after `run`: outputs by port, report, summary, and why a gate said no.
pub type Finished = (BTreeMap<String, OutputDir>, String, Vec<(String, String)>, Option<String>);

/// The world of one running task: inputs, outputs, progress, cancellation.
pub struct TaskContext {
    parts: TaskContextParts,
    report: String,
    summary: Vec<(String, String)>,
    denied: Option<String>,
    gpus: Option<Vec<String>>,
}

impl TaskContext {
    /// Made by the engine (and by tests).
    pub fn new(parts: TaskContextParts) -> Self {
        Self { parts, report: String::new(), summary: Vec::new(), denied: None, gpus: None }
    }

    /// Names the GPUs that the task was given, as `CUDA_VISIBLE_DEVICES` would. For the engine.
    #[must_use]
    pub fn with_gpus(mut self, gpus: Vec<String>) -> Self {
        self.gpus = Some(gpus);
        self
    }

    /// The GPUs that the task was given and may use; `None` where the run knows of none. A task in
    /// this process finds the first of them at [`TaskContext::device`].
    pub fn gpus(&self) -> Option<&[String]> {
        self.gpus.as_deref()
    }

    /// The artifact at a required input.
    ///
    /// # Errors
    /// When nothing is connected there.
    pub fn input(&self, port: &str) -> Result<&Artifact> {
        self.optional(port).ok_or_else(|| Error::new(format!("input `{port}` is not connected")))
    }

    /// The artifact at an optional input.
    pub fn optional(&self, port: &str) -> Option<&Artifact> {
        self.many(port).first().map(|n| &n.artifact)
    }

    /// All artifacts at an input, in the order written.
    pub fn many(&self, port: &str) -> &[NamedArtifact] {
        self.parts.inputs.get(port).map_or(&[], Vec::as_slice)
    }

    /// Names of the connected inputs.
    pub fn input_names(&self) -> impl Iterator<Item = &str> {
        self.parts.inputs.keys().map(String::as_str)
    }

    /// Outside files of a [`crate::FileRef`], absolute, in sorted order.
    pub fn files(&self, pointer: &str) -> &[PathBuf] {
        self.parts.files.get(pointer).map_or(&[], Vec::as_slice)
    }

    /// The folder of an output.
    ///
    /// # Errors
    /// When the task did not declare it.
    pub fn output(&mut self, port: &str) -> Result<&mut OutputDir> {
        self.parts
            .outputs
            .get_mut(port)
            .ok_or_else(|| Error::new(format!("the task declares no output `{port}`")))
    }

    /// All outputs by port name.
    pub fn outputs(&mut self) -> &mut BTreeMap<String, OutputDir> {
        &mut self.parts.outputs
    }

    /// All inputs by port name.
    pub fn inputs(&self) -> &BTreeMap<String, Vec<NamedArtifact>> {
        &self.parts.inputs
    }

    /// Folder for temporary files; gone when the task ends.
    pub fn scratch(&self) -> &Path {
        &self.parts.scratch
    }

    /// Folder kept across failed or killed tries under the same key; removed once the task is
    /// done. Training keeps its checkpoints here.
    pub fn state_dir(&self) -> &Path {
        &self.parts.state_dir
    }

    /// Device to compute on.
    pub fn device(&self) -> DeviceSpec {
        self.parts.device
    }

    /// Threads the task may use.
    pub fn threads(&self) -> usize {
        self.parts.threads
    }

    /// Whether the user allows plugins the network.
    pub fn allow_network(&self) -> bool {
        self.parts.allow_network
    }

    /// The token to poll.
    pub fn cancel_token(&self) -> &CancelToken {
        &self.parts.cancel
    }

    /// # Errors
    /// [`Error::cancelled`] once the run is to stop. Call it in every long loop.
    pub fn check_cancelled(&self) -> Result<()> {
        if self.parts.cancel.is_cancelled() { Err(Error::cancelled()) } else { Ok(()) }
    }

    /// Sends an event.
    pub fn event(&self, event: Event) {
        self.parts.reporter.event(event);
    }

    /// Where events go, to hand to a library.
    pub fn reporter(&self) -> Arc<dyn Reporter> {
        self.parts.reporter.clone()
    }

    /// Reports progress.
    pub fn progress(&self, done: u64, total: Option<u64>, unit: &str, message: impl Into<String>) {
        self.event(Event::Progress(Progress {
            done,
            total,
            unit: unit.to_owned(),
            message: message.into(),
        }));
    }

    /// Writes a line to the task's log.
    pub fn info(&self, message: impl Into<String>) {
        self.event(Event::Log { level: LogLevel::Info, message: message.into() });
    }

    /// Writes a warning to the task's log and the console.
    pub fn warn(&self, message: impl Into<String>) {
        self.event(Event::Log { level: LogLevel::Warn, message: message.into() });
    }

    /// Reports a number over time.
    pub fn metric(&self, name: &str, step: u64, value: f64) {
        self.event(Event::Metric { name: name.to_owned(), step, value });
    }

    /// Adds text (a table, an example) that is printed when the task ends, kept with the cache
    /// entry, and shown again by `lora-flow show`.
    pub fn report(&mut self, text: impl AsRef<str>) {
        self.report.push_str(text.as_ref());
        if !self.report.ends_with('\n') {
            self.report.push('\n');
        }
    }

    /// Adds a headline to the final table of a run, also when the task comes from the cache:
    /// `("perplexity", "18.24 ± 0.31")`.
    pub fn summary(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.summary.push((name.into(), value.into()));
    }

    /// The gate says no: the task ends well and is cached, what depends on it does not run, and
    /// the run exits with 3.
    pub fn deny(&mut self, reason: impl Into<String>) {
        self.denied = Some(reason.into());
    }

    /// Takes the context apart after `run`. For the engine.
    pub fn finish(self) -> Finished {
        (self.parts.outputs, self.report, self.summary, self.denied)
    }
}

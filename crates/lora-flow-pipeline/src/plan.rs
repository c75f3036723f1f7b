//! The plan: a checked DAG of configured tasks, in topological order.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lora_flow_core::{Digest, Ports, Task, TaskKind};
use serde_json::Value;

use crate::plugin_manifest::PluginManifest;
use crate::source::{Diagnostic, SourceFile, Sources, Span};

/// What [`compile`] needs besides the file.
#[derive(Debug, Clone, Default)]
pub struct CompileOptions {
    /// A YAML or JSON mapping whose values replace parameters, before `set` does.
    pub params_file: Option<PathBuf>,
    /// Parameters given on the command line, `name` or `name.key` → a YAML value.
    pub set: Vec<(String, String)>,
    /// Tasks wanted; with what they need, they are the plan. Empty: all tasks.
    pub targets: Vec<String>,
    /// Tasks up to which the plan goes: wanted like `targets`, beside them.
    pub until: Vec<String>,
    /// Tasks that run whether or not their results are there, and with them all tasks of the plan
    /// that wait for them.
    pub from: Vec<String>,
    /// Environment of the process; a pipeline sees only the names it declares.
    pub env: BTreeMap<String, String>,
    /// The built-in task kinds.
    pub builtin: &'static [&'static [TaskKind]],
}

/// A pipeline, checked and resolved.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Name of the pipeline.
    pub name: String,
    /// What it is for, from the file.
    pub description: String,
    /// The pipeline file, and behind its text that of the files it includes.
    pub source: Arc<SourceFile>,
    /// Folder that relative paths are taken from, absolute.
    pub root: PathBuf,
    /// The parameters, with those of the command line.
    pub params: Value,
    /// Tasks in topological order, otherwise in the order of the file; every index of a task
    /// refers to it.
    pub tasks: Vec<PlannedTask>,
    /// What may be a mistake.
    pub warnings: Vec<Diagnostic>,
    /// The plugins that the file names.
    pub(crate) plugins: Vec<Arc<PluginManifest>>,
    /// The declared environment variables: name, digest of the value if it is set, place.
    pub(crate) env: Vec<(String, Option<Digest>, Span)>,
    /// The files behind [`Plan::source`].
    pub sources: Sources,
}

impl Plan {
    /// File, line and column of a place in [`Plan::source`].
    pub fn place(&self, span: Span) -> (PathBuf, usize, usize) {
        let (source, span) = self.sources.local(span);
        let (line, column) = source.line_column(span.start);
        (source.path.clone(), line, column)
    }
}

/// One task of a plan.
#[derive(Debug, Clone)]
pub struct PlannedTask {
    /// `train`, or `train[r=8]` for a member of a matrix.
    pub id: String,
    /// Name of its kind.
    pub kind: String,
    /// Version of the kind's implementation (0 for plugins, whose digest speaks for them).
    pub kind_version: u32,
    /// The configured task.
    pub task: Arc<dyn Task>,
    /// Its parameters, defaults filled in.
    pub params: Value,
    /// Artifacts it takes from other tasks, in port order, for a `many` port in the order written.
    pub inputs: Vec<InputEdge>,
    /// Tasks that must be done before it, besides those of `inputs`.
    pub needs: Vec<usize>,
    /// Its input ports under these parameters.
    pub input_ports: Ports,
    /// Its outputs under these parameters.
    pub outputs: Ports,
    /// Outside files it reads.
    pub files: Vec<ResolvedFiles>,
    /// Outputs to be placed outside the store: output name → absolute path.
    pub publish: Vec<(String, PathBuf)>,
    /// Places of `publish`, in its order.
    pub publish_spans: Vec<Span>,
    /// Whether it is a task of a plugin that asks for the network.
    pub network: bool,
    /// What its plugin is given of the environment and may depend on: names that are set, with
    /// their values.
    pub env: BTreeMap<String, String>,
    /// What it takes of the machine.
    pub resources: Resources,
    /// Limit of its running time.
    pub timeout: Option<Duration>,
    /// How often to try again after a failure.
    pub retries: u32,
    /// Whether it runs even if its result is there, by [`CompileOptions::from`].
    pub forced: bool,
    /// Place of its name in the text of [`Plan::source`].
    pub span: Span,
    /// Places of its parameters by JSON pointer.
    pub param_spans: BTreeMap<String, Span>,
}

impl PlannedTask {
    /// Place of a parameter, or of the nearest thing around it that is written in the file.
    pub fn param_span(&self, pointer: &str) -> Span {
        nearest_span(&self.param_spans, pointer).unwrap_or(self.span)
    }

    /// Indexes of all tasks that must be done before it, each once.
    pub fn upstream(&self) -> Vec<usize> {
        let mut all: Vec<usize> =
            self.inputs.iter().map(|e| e.task).chain(self.needs.iter().copied()).collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// The span of a JSON pointer, or of its longest prefix that has one.
pub(crate) fn nearest_span(spans: &BTreeMap<String, Span>, pointer: &str) -> Option<Span> {
    let mut pointer = pointer;
    loop {
        if let Some(span) = spans.get(pointer) {
            return Some(*span);
        }
        pointer = &pointer[..pointer.rfind('/')?];
    }
}

/// An edge from an output of a task to an input of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputEdge {
    /// Input port of the consumer.
    pub port: String,
    /// The reference as written (`task` or `task.output`), with the member of a matrix.
    pub reference: String,
    /// Index of the producer.
    pub task: usize,
    /// Output of the producer.
    pub output: String,
}

/// A pattern of outside files and what it stands for now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedFiles {
    /// JSON pointer of the parameter.
    pub pointer: String,
    /// Pattern as written.
    pub pattern: String,
    /// Files, absolute, sorted, at least one.
    pub paths: Vec<PathBuf>,
}

/// What a task takes of the machine while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Resources {
    /// Threads; 0 where the file does not say.
    pub cpu: usize,
    /// GPUs; one where the file does not say and the task computes on a GPU.
    pub gpu: Option<usize>,
    /// Memory in bytes.
    pub memory: Option<u64>,
}

//! The trait where engine and task kinds meet.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;

use schemars::{JsonSchema, Schema};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{ArtifactKind, Error, FileProblem, Problem, Result, TaskContext};

/// A named, typed input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Name as it stands under `inputs` or after the dot of `task.output`.
    pub name: String,
    /// Kinds it accepts; an output has exactly one.
    pub kinds: Vec<ArtifactKind>,
    /// Must be connected.
    pub required: bool,
    /// Takes a list of artifacts.
    pub many: bool,
    /// One line for the reference.
    pub doc: String,
}

/// The inputs or outputs of a task, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ports {
    /// The declared ports.
    pub ports: Vec<Port>,
    /// The task also accepts inputs of any name, each of one of these kinds (a gate does).
    pub any_name: Vec<ArtifactKind>,
}

impl Ports {
    /// No ports.
    pub fn none() -> Self {
        Self::default()
    }

    fn push(
        mut self,
        name: &str,
        kinds: &[ArtifactKind],
        required: bool,
        many: bool,
        doc: &str,
    ) -> Self {
        self.ports.push(Port {
            name: name.to_owned(),
            kinds: kinds.to_vec(),
            required,
            many,
            doc: doc.to_owned(),
        });
        self
    }

    /// Adds a port that must be connected (or, among outputs, that is always made).
    pub fn required(self, name: &str, kind: ArtifactKind, doc: &str) -> Self {
        self.push(name, &[kind], true, false, doc)
    }

    /// Adds a port that may be connected (or, among outputs, that may be made).
    pub fn optional(self, name: &str, kind: ArtifactKind, doc: &str) -> Self {
        self.push(name, &[kind], false, false, doc)
    }

    /// Adds a port that takes one artifact of one of these kinds.
    pub fn one_of(self, name: &str, kinds: &[ArtifactKind], required: bool, doc: &str) -> Self {
        self.push(name, kinds, required, false, doc)
    }

    /// Adds a port that takes any number of artifacts, at least one if `required`.
    pub fn many(self, name: &str, kinds: &[ArtifactKind], required: bool, doc: &str) -> Self {
        self.push(name, kinds, required, true, doc)
    }

    /// Accepts inputs of any further name, each of one of these kinds.
    pub fn any_name(mut self, kinds: &[ArtifactKind]) -> Self {
        self.any_name = kinds.to_vec();
        self
    }

    /// The port of a name.
    pub fn get(&self, name: &str) -> Option<&Port> {
        self.ports.iter().find(|p| p.name == name)
    }
}

/// Outside files that a task reads. The engine resolves the pattern relative to the pipeline's
/// root before anything runs, hashes the files, and lets their content (not their names) enter
/// the key. The task finds the paths with [`TaskContext::files`] under the same pointer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRef {
    /// JSON pointer of the parameter (`/files`, `/files/0`, `/source`), for error places.
    pub pointer: String,
    /// A path, a folder (all files below it, dot files left out), or a glob.
    pub pattern: String,
}

/// A configured task. The parameters struct is the task: what stands under `with`,
/// deserialised, is what runs.
pub trait Task: Debug + Send + Sync {
    /// Inputs it takes, which may depend on its parameters.
    fn inputs(&self) -> Ports;

    /// Outputs it makes, which may depend on its parameters. Every required one must hold at
    /// least one file when `run` returns.
    fn outputs(&self) -> Ports;

    /// Outside files it reads.
    fn files(&self) -> Vec<FileRef> {
        Vec::new()
    }

    /// Problems of the parameters that their types cannot express. Pure: no I/O.
    fn validate(&self) -> Vec<Problem> {
        Vec::new()
    }

    /// Problems inside outside files, which by then are there: what a task can say of a file's
    /// content before anything runs. `files` are those of [`Task::files`] by JSON pointer.
    fn check_files(&self, files: &BTreeMap<String, Vec<PathBuf>>) -> Vec<FileProblem> {
        let _ = files;
        Vec::new()
    }

    /// Whether the result depends on the device class (`cpu`, `cuda`), which then enters the key.
    fn uses_device(&self) -> bool {
        false
    }

    /// Further facts that must enter the key, such as a plugin's digest.
    fn fingerprint_extra(&self) -> Value {
        Value::Null
    }

    /// Does the work. Deterministic in parameters, inputs, files and device class.
    ///
    /// # Errors
    /// When it fails or is cancelled; the engine discards partial outputs and keeps
    /// [`TaskContext::state_dir`] for the next try.
    fn run(&self, cx: &mut TaskContext) -> Result<()>;
}

/// A kind of task: an entry of the one explicit list in the binary.
#[derive(Clone, Copy)]
pub struct TaskKind {
    /// Name after `uses:`.
    pub name: &'static str,
    /// Version of the implementation; raise it whenever the same inputs give other bytes.
    pub version: u32,
    /// One line for `lora-flow tasks`.
    pub summary: &'static str,
    /// Makes the task from its canonical parameters.
    pub parse: fn(Value) -> Result<Box<dyn Task>>,
    /// Parameters with all defaults filled in.
    pub canonical: fn(Value) -> Result<Value>,
    /// JSON Schema of the parameters.
    pub schema: fn() -> Schema,
}

impl Debug for TaskKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TaskKind({} v{})", self.name, self.version)
    }
}

/// Describes a task kind whose parameters are the struct `T`.
pub const fn kind<T>(name: &'static str, version: u32, summary: &'static str) -> TaskKind
where
    T: Task + DeserializeOwned + Serialize + JsonSchema + 'static,
{
    TaskKind {
        name,
        version,
        summary,
        parse: |params| Ok(Box::new(parse::<T>(params)?)),
        canonical: |params| Ok(serde_json::to_value(parse::<T>(params)?)?),
        schema: || {
            schemars::generate::SchemaSettings::draft2020_12()
                .into_generator()
                .into_root_schema_for::<T>()
        },
    }
}

fn parse<T: DeserializeOwned>(params: Value) -> Result<T> {
    serde_json::from_value(params).map_err(|e| Error::new(e.to_string()))
}

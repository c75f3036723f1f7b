//! What the engine asks for: one JSON object on standard input.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Context, PROTOCOL, PluginError};

/// One task to run, with its parameters read into `P`.
///
/// Use `Request<serde_json::Value>` and [`Request::typed`] where one executable serves several
/// kinds of task.
#[derive(Debug, Clone)]
pub struct Request<P> {
    /// The task kind, as named in `plugin.yaml`.
    pub task: String,
    /// The parameters, defaults of the manifest's schema filled in.
    pub params: P,
    /// Input artifacts by port.
    pub inputs: BTreeMap<String, Vec<Input>>,
    /// Output folders by port, empty.
    pub outputs: BTreeMap<String, Output>,
    /// Folder for temporary files; gone when the task ends. The working folder lies in it.
    pub scratch: PathBuf,
    /// Folder that outlives a failed or killed try of the same task, for checkpoints.
    pub state: PathBuf,
    /// Threads the task may use.
    pub threads: usize,
    /// Whether the user allows the network.
    pub network: bool,
}

/// An artifact at an input.
#[derive(Debug, Clone, Deserialize)]
pub struct Input {
    /// The reference as written in the pipeline (`task` or `task.output`).
    pub reference: String,
    /// Its kind: `Dataset`, `Tokens`, `Model`, `Adapter`, `Checkpoint`, `Metrics`, `Verdict`,
    /// `Files`.
    pub kind: String,
    /// Folder with its files, read-only.
    pub path: PathBuf,
    /// Small facts its maker attached.
    #[serde(default)]
    pub meta: Value,
}

impl Input {
    /// Path of a file by its name in the artifact.
    pub fn file(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }
}

/// The folder of an output.
#[derive(Debug, Clone, Deserialize)]
pub struct Output {
    /// Kind of artifact that must stand there at the end.
    pub kind: String,
    /// The folder, empty at start.
    pub path: PathBuf,
}

impl Output {
    /// Path for a file to be written; its parent folders are made.
    ///
    /// # Errors
    /// When a parent folder cannot be made.
    pub fn file(&self, name: impl AsRef<Path>) -> Result<PathBuf, PluginError> {
        let path = self.path.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)
                .context(format!("cannot make the folder `{}`", parent.display()))?;
        }
        Ok(path)
    }
}

/// The request as it stands on the wire. Fields it does not know are ignored: a later engine of
/// the same protocol may add some.
#[derive(Deserialize)]
struct Wire {
    task: String,
    params: Value,
    inputs: BTreeMap<String, Vec<Input>>,
    outputs: BTreeMap<String, Output>,
    scratch: PathBuf,
    state: PathBuf,
    threads: usize,
    network: bool,
}

impl<P: DeserializeOwned> Request<P> {
    /// Reads a request, its protocol version first.
    pub(crate) fn parse(text: &str) -> Result<Self, PluginError> {
        if text.trim().is_empty() {
            return Err(PluginError::new("the request on standard input is empty")
                .with_hint("this program is started by `lora-flow run`; see its `plugin.yaml`"));
        }
        let request: Value =
            serde_json::from_str(text).context("the request on standard input is not JSON")?;
        match request.get("protocol").and_then(Value::as_u64) {
            Some(version) if version == u64::from(PROTOCOL) => {}
            Some(version) => {
                return Err(PluginError::new(format!(
                    "the request is of protocol {version}, this plugin speaks {PROTOCOL}"
                ))
                .with_hint("build the plugin with the SDK of this version of lora-flow"));
            }
            None => return Err(PluginError::new("the request has no `protocol` number")),
        }
        let wire: Wire = serde_json::from_value(request).context("invalid request")?;
        Request {
            task: wire.task,
            params: wire.params,
            inputs: wire.inputs,
            outputs: wire.outputs,
            scratch: wire.scratch,
            state: wire.state,
            threads: wire.threads,
            network: wire.network,
        }
        .typed()
    }
}

impl Request<Value> {
    /// Reads the parameters into a struct.
    ///
    /// # Errors
    /// When they do not fit it.
    pub fn typed<P: DeserializeOwned>(self) -> Result<Request<P>, PluginError> {
        Ok(Request {
            params: serde_json::from_value(self.params)
                .context(format!("invalid parameters of `{}`", self.task))?,
            task: self.task,
            inputs: self.inputs,
            outputs: self.outputs,
            scratch: self.scratch,
            state: self.state,
            threads: self.threads,
            network: self.network,
        })
    }
}

impl<P> Request<P> {
    /// The artifact at a required input.
    ///
    /// # Errors
    /// When nothing is connected there; the message lists what is.
    pub fn input(&self, port: &str) -> Result<&Input, PluginError> {
        self.optional(port).ok_or_else(|| missing("input", port, self.inputs.keys()))
    }

    /// The artifact at an optional input.
    pub fn optional(&self, port: &str) -> Option<&Input> {
        self.many(port).first()
    }

    /// All artifacts at an input, in the order written in the pipeline.
    pub fn many(&self, port: &str) -> &[Input] {
        self.inputs.get(port).map_or(&[], Vec::as_slice)
    }

    /// The folder of an output.
    ///
    /// # Errors
    /// When the manifest declares no such output.
    pub fn output(&self, port: &str) -> Result<&Output, PluginError> {
        self.outputs.get(port).ok_or_else(|| missing("output", port, self.outputs.keys()))
    }
}

fn missing<'a>(what: &str, port: &str, present: impl Iterator<Item = &'a String>) -> PluginError {
    let present: Vec<String> = present.map(|name| format!("`{name}`")).collect();
    let present = if present.is_empty() { "none".to_owned() } else { present.join(", ") };
    PluginError::new(format!("there is no {what} `{port}`; there is {present}"))
}

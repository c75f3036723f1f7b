//! Tasks that are programs: the host side of the plugin protocol.
//!
//! A plugin gets one JSON request on standard input, and tells what it does by one JSON object a
//! line on standard output; its standard error goes to the task's log. Inputs are folders of
//! links into the store, outputs are empty folders to fill. See `process.rs` for how it is
//! started and stopped, `event.rs` for what it may say, `build.rs` for the build step.

mod build;
mod event;
mod process;
mod sandbox;
mod spawn;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use lora_flow_core::{
    Digest, Error, LogLevel, Ports, Reporter, Result, ResultExt, Task, TaskContext,
};
use serde_json::{Map, Value, json};

use crate::plugin_manifest::{PROTOCOL, PluginKind, PluginManifest};
use crate::store::{Store, hash_file};
use event::PluginEvent;
use process::{Heard, Program};
use sandbox::Scope;

/// A configured task of a plugin.
#[derive(Debug)]
pub struct ExternalTask {
    manifest: Arc<PluginManifest>,
    kind: PluginKind,
    params: Value,
    digest: OnceLock<Result<Digest, String>>,
}

impl ExternalTask {
    /// The task of a plugin's kind, by its index in the manifest, with checked parameters.
    ///
    /// # Panics
    /// When the manifest has no kind of that index.
    pub fn new(manifest: Arc<PluginManifest>, kind: usize, params: Value) -> Self {
        let kind = manifest.kinds[kind].clone();
        Self { manifest, kind, params, digest: OnceLock::new() }
    }

    fn digest(&self) -> Result<Digest> {
        let digest = self.digest.get_or_init(|| digest_of(&self.manifest));
        digest.clone().map_err(|e| {
            let dir = self.manifest.dir.display();
            Error::new(format!("the plugin's folder `{dir}` cannot be read: {e}"))
        })
    }

    fn request(&self, cx: &mut TaskContext, inputs: Value, network: bool) -> Value {
        let outputs: Map<String, Value> = cx
            .outputs()
            .iter()
            .map(|(name, o)| (name.clone(), json!({ "kind": o.kind, "path": o.path })))
            .collect();
        json!({
            "protocol": PROTOCOL,
            "task": self.kind.name,
            "params": self.params,
            "inputs": inputs,
            "outputs": outputs,
            "scratch": cx.scratch(),
            "state": cx.state_dir(),
            "threads": cx.threads(),
            "gpus": cx.gpus(),
            "network": network,
        })
    }

    fn converse(&self, cx: &mut TaskContext, products: Option<&Path>) -> Result<()> {
        let network = self.manifest.network && cx.allow_network();
        if self.manifest.network && !network {
            cx.warn(format!(
                "plugin `{}` asks for the network and does not get it",
                self.manifest.name
            ));
        }
        let inputs = link_inputs(cx, &cx.scratch().join("inputs"))?;
        let request = self.request(cx, inputs, network);
        let mut command = process::command(&self.manifest, products, cx.scratch())?;
        if let Some(gpus) = cx.gpus() {
            command.env("CUDA_VISIBLE_DEVICES", gpus.join(","));
        }
        let scope = self.scope(cx, products, network);
        let (confinement, gap) = sandbox::confine(&command, &scope)?;
        if let Some(gap) = gap {
            warn_once(cx, &self.manifest.name, gap);
        }
        let program = Program { plugin: &self.manifest.name };
        let reporter = cx.reporter();
        let cancel = cx.cancel_token().clone();
        let input = format!("{request}\n").into_bytes();
        let mut said = Said::default();
        let end = program.run(&command, &confinement, input, &cancel, |heard| match heard {
            Heard::Error(line) => {
                reporter
                    .event(lora_flow_core::Event::Log { level: LogLevel::Debug, message: line });
                Ok(())
            }
            Heard::Output(line) => self.hear(&line, cx, &*reporter, &mut said),
        })?;
        if let Some((message, hint)) = said.error {
            let error = Error::new(message);
            return Err(match hint {
                Some(hint) => error.with_hint(hint),
                None => explain_refusal(error, network),
            });
        }
        end.judge(&self.manifest.name, said.done).map_err(|e| explain_refusal(e, network))
    }

    /// What a task's process may touch.
    fn scope(&self, cx: &mut TaskContext, products: Option<&Path>, network: bool) -> Scope {
        let mut readable = vec![self.manifest.dir.clone()];
        readable.extend(products.map(Path::to_owned));
        let inputs = cx.inputs().values().flatten();
        readable.extend(inputs.flat_map(|i| i.artifact.files.values().map(|f| f.path.clone())));
        readable.extend(self.manifest.read.iter().filter_map(|r| r.path(&self.params)));
        let mut writable = vec![cx.scratch().to_owned(), cx.state_dir().to_owned()];
        writable.extend(cx.outputs().values().map(|o| o.path.clone()));
        Scope { readable, writable, network, local_sockets: self.manifest.local_sockets }
    }

    /// Takes one line of the plugin's standard output.
    fn hear(
        &self,
        line: &str,
        cx: &mut TaskContext,
        reporter: &dyn Reporter,
        said: &mut Said,
    ) -> Result<()> {
        let event =
            PluginEvent::parse(line).map_err(|why| malformed(&self.manifest.name, line, &why))?;
        if said.done || said.error.is_some() {
            return Err(malformed(
                &self.manifest.name,
                line,
                "it had already said how the task ended",
            ));
        }
        match event {
            PluginEvent::Plain(event) => reporter.event(event),
            PluginEvent::Summary { name, value } => {
                said.keep(name.len() + value.len(), &self.manifest.name)?;
                cx.summary(name, value);
            }
            PluginEvent::Report { text } => {
                said.keep(text.len(), &self.manifest.name)?;
                cx.report(text);
            }
            PluginEvent::Meta { output, value } => match cx.output(&output) {
                Ok(dir) => dir.set_meta(value),
                Err(_) => {
                    let why = format!("it has no output `{output}`");
                    return Err(malformed(&self.manifest.name, line, &why));
                }
            },
            PluginEvent::Done => said.done = true,
            PluginEvent::Error { message, hint } => said.error = Some((message, hint)),
        }
        Ok(())
    }
}

/// Says once for each run of this program that plugins are not confined here.
fn warn_once(cx: &TaskContext, plugin: &str, gap: &str) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::Relaxed) {
        cx.warn(format!(
            "this system cannot confine plugins, Linux with Landlock and seccomp can: `{plugin}` {gap}"
        ));
    }
}

/// Adds what a plugin may do to a failure that looks as if it tried more.
fn explain_refusal(error: Error, network: bool) -> Error {
    let text = error.to_string().to_lowercase();
    let refused = ["permission denied", "permissionerror", "operation not permitted", "eacces"];
    if error.hint().is_some() || !refused.iter().any(|r| text.contains(r)) {
        return error;
    }
    let no_network = match network {
        true => "",
        false => {
            ", and has no network without `network: true`, no local sockets without \
             `local_sockets: true`"
        }
    };
    error.with_hint(format!(
        "a plugin reads its inputs, its own folder, installed programs and what `read` in its \
         `plugin.yaml` names, writes its outputs, `scratch` and `state` alone{no_network}"
    ))
}

/// Bytes of reports and summaries that one task may make.
const LONGEST_REPORT: usize = 1 << 20;

/// What a plugin has said about its end, and how much it has said that is kept.
#[derive(Default)]
struct Said {
    done: bool,
    error: Option<(String, Option<String>)>,
    kept: usize,
}

impl Said {
    fn keep(&mut self, bytes: usize, plugin: &str) -> Result<()> {
        self.kept += bytes;
        if self.kept <= LONGEST_REPORT {
            return Ok(());
        }
        let message = format!("plugin `{plugin}` reports more than {LONGEST_REPORT} bytes of text");
        Err(Error::new(message).with_hint("what is long goes into an output"))
    }
}

/// Reads what a plugin wrote to its standard output as the host does, and gives what it makes of
/// each line to `heard`. For the fuzz target `plugin_events`.
#[doc(hidden)]
pub fn read_plugin_output(output: &[u8], heard: &mut dyn FnMut(Result<()>)) {
    for line in process::output_lines(output) {
        heard(match line {
            None => Err(Error::new("a line is too long")),
            Some(line) => match PluginEvent::parse(&line) {
                Ok(_) => Ok(()),
                Err(why) => Err(malformed("p", &line, &why)),
            },
        });
    }
}

/// The error of a line that is not of the protocol.
fn malformed(plugin: &str, line: &str, why: &str) -> Error {
    const SHOWN: usize = 200;
    let mut shown: String = line.chars().take(SHOWN).collect();
    if shown.len() < line.len() {
        shown.push('…');
    }
    Error::new(format!("plugin `{plugin}` wrote a line that is no event: {why}: `{shown}`"))
        .with_hint(
            "standard output carries one JSON event a line; everything else goes to standard error",
        )
}

impl Task for ExternalTask {
    fn inputs(&self) -> Ports {
        self.kind.inputs.clone()
    }

    fn outputs(&self) -> Ports {
        self.kind.outputs.clone()
    }

    fn fingerprint_extra(&self) -> Value {
        // An unreadable folder gives a key without a digest; `run` then fails, so that nothing is
        // ever stored under it.
        json!({ "plugin": self.manifest.name, "digest": self.digest().ok() })
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        if self.manifest.protocol != PROTOCOL {
            return Err(Error::new(format!(
                "plugin `{}` speaks protocol {}; this version of lora-flow speaks {PROTOCOL}",
                self.manifest.name, self.manifest.protocol
            )));
        }
        let digest = self.digest()?;
        let products = match &self.manifest.build {
            Some(_) => {
                let store = Store::of_state_dir(cx.state_dir()).ok_or_else(|| {
                    Error::new("a plugin with a build step needs a store to keep its products in")
                })?;
                Some(build::products(&self.manifest, digest, &store, cx)?)
            }
            None => None,
        };
        cx.check_cancelled()?;
        self.converse(cx, products.as_deref())
    }
}

/// Folders of links, `SCRATCH/inputs/PORT.N/NAME`, and the part of the request that names them.
fn link_inputs(cx: &TaskContext, dir: &Path) -> Result<Value> {
    let mut ports = Map::new();
    for (port, artifacts) in cx.inputs() {
        let mut list = Vec::new();
        for (i, named) in artifacts.iter().enumerate() {
            let folder = dir.join(format!("{port}.{i}"));
            fs_err::create_dir_all(&folder)?;
            for (name, file) in &named.artifact.files {
                let link = folder.join(name);
                if let Some(parent) = link.parent() {
                    fs_err::create_dir_all(parent)?;
                }
                symlink(&file.path, &link)
                    .with_context(|| format!("cannot make `{}`", link.display()))?;
            }
            list.push(json!({
                "reference": named.reference,
                "kind": named.artifact.kind,
                "path": folder,
                "meta": named.artifact.meta,
            }));
        }
        ports.insert(port.clone(), list.into());
    }
    Ok(ports.into())
}

/// Digest of a plugin's files, made once for each loaded manifest: its tasks share it.
pub(crate) fn digest_of(manifest: &Arc<PluginManifest>) -> Result<Digest, String> {
    type Known = Vec<(Weak<PluginManifest>, Digest)>;
    static KNOWN: Mutex<Known> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.retain(|(m, _)| m.strong_count() > 0);
    if let Some((_, digest)) =
        known.iter().find(|(m, _)| std::ptr::eq(m.as_ptr(), Arc::as_ptr(manifest)))
    {
        return Ok(*digest);
    }
    let digest = folder_digest(&manifest.dir).map_err(|e| e.chain())?;
    known.push((Arc::downgrade(manifest), digest));
    Ok(digest)
}

/// Digest of all files below a folder and their names, without `target`, `__pycache__` and names
/// that start with a dot.
pub(crate) fn folder_digest(dir: &Path) -> Result<Digest> {
    fn walk(dir: &Path, prefix: &str, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
        for entry in fs_err::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') || name == "target" || name == "__pycache__" {
                continue;
            }
            let path = entry.path();
            // A link to a folder is not followed: it could lead anywhere, or round in circles.
            if entry.file_type()?.is_dir() {
                walk(&path, &format!("{prefix}{name}/"), files)?;
            } else {
                files.insert(format!("{prefix}{name}"), path);
            }
        }
        Ok(())
    }
    let mut files = BTreeMap::new();
    walk(dir, "", &mut files)?;
    let mut listing = Map::new();
    for (name, path) in files {
        let digest = match fs::metadata(&path) {
            Ok(meta) if meta.is_file() => hash_file(&path)?.to_string(),
            // A link to a folder or to nothing, a socket.
            _ => format!("link {}", fs::read_link(&path).unwrap_or_default().display()),
        };
        listing.insert(name, digest.into());
    }
    Ok(Digest::of_json(&listing.into()))
}

#[cfg(test)]
mod tests;

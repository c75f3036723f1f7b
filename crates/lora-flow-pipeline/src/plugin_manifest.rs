//! `plugin.yaml`: what a plugin folder offers.

use std::path::{Path, PathBuf};

use lora_flow_core::{ArtifactKind, Port, Ports};
use serde_json::{Value, json};

use crate::reader::{Known, boolean, entries, mapping, one_or_many, string, strings, suggest};
use crate::source::{Diagnostic, Diagnostics, Problems, SourceFile, Span};
use crate::yaml::{self, Key, Node, NodeValue};

/// The version of the plugin protocol that this engine speaks.
pub const PROTOCOL: u32 = 1;

/// Name of the manifest in a plugin's folder.
pub const MANIFEST: &str = "plugin.yaml";

/// A plugin folder's manifest, checked.
#[derive(Debug, Clone)]
pub struct PluginManifest {
    /// The plugin's folder, absolute.
    pub dir: PathBuf,
    /// Name of the plugin.
    pub name: String,
    /// Version of the plugin, as written.
    pub version: String,
    /// What it is for.
    pub description: String,
    /// Version of the protocol it speaks.
    pub protocol: u32,
    /// Command that runs a task.
    pub command: Vec<String>,
    /// Command that builds the plugin once per digest of its folder.
    pub build: Option<Vec<String>>,
    /// Whether it asks for the network.
    pub network: bool,
    /// Further environment variables it is given, by name.
    pub env: Vec<String>,
    /// Task kinds it offers, in the order written.
    pub kinds: Vec<PluginKind>,
}

/// A task kind that a plugin offers.
#[derive(Debug, Clone)]
pub struct PluginKind {
    /// Name after `uses:`.
    pub name: String,
    /// One line for `lora-flow tasks`.
    pub summary: String,
    /// Input ports.
    pub inputs: Ports,
    /// Outputs.
    pub outputs: Ports,
    /// JSON Schema of the parameters.
    pub params: Value,
}

const TOP: Known = Known {
    of: "a plugin",
    keys: &[
        "protocol",
        "name",
        "version",
        "description",
        "command",
        "build",
        "network",
        "env",
        "tasks",
    ],
    aliases: &[
        ("cmd", "command"),
        ("run", "command"),
        ("entrypoint", "command"),
        ("exec", "command"),
        ("kinds", "tasks"),
        ("summary", "description"),
        ("environment", "env"),
    ],
};

const TASK: Known = Known {
    of: "a task of a plugin",
    keys: &["summary", "inputs", "outputs", "params"],
    aliases: &[
        ("description", "summary"),
        ("doc", "summary"),
        ("with", "params"),
        ("schema", "params"),
        ("parameters", "params"),
    ],
};

const PORT: Known = Known {
    of: "a port",
    keys: &["kind", "required", "many", "doc"],
    aliases: &[("type", "kind"), ("kinds", "kind"), ("description", "doc"), ("summary", "doc")],
};

/// All artifact kinds, for messages.
const KINDS: [ArtifactKind; 8] = [
    ArtifactKind::Dataset,
    ArtifactKind::Tokens,
    ArtifactKind::Model,
    ArtifactKind::Adapter,
    ArtifactKind::Checkpoint,
    ArtifactKind::Metrics,
    ArtifactKind::Verdict,
    ArtifactKind::Files,
];

impl PluginManifest {
    /// Reads and checks the manifest of a plugin's folder.
    ///
    /// # Errors
    /// All problems of the manifest, with their places in it.
    pub fn load(dir: &Path) -> Result<Self, Diagnostics> {
        let path = dir.join(MANIFEST);
        let source = SourceFile::read(&path).map_err(|d| Diagnostics::from(*d))?;
        let root = yaml::parse(&source).map_err(Diagnostics)?;
        let mut problems = Problems::new(&source);
        let manifest = read(dir, &root, &mut problems);
        match manifest {
            Some(manifest) if problems.found.is_empty() => Ok(manifest),
            _ => {
                let mut diagnostics = Diagnostics(problems.found);
                diagnostics.sort(&source.path);
                Err(diagnostics)
            }
        }
    }

    /// The kind of a name.
    pub fn kind(&self, name: &str) -> Option<&PluginKind> {
        self.kinds.iter().find(|k| k.name == name)
    }
}

fn read(dir: &Path, root: &Node, problems: &mut Problems) -> Option<PluginManifest> {
    if root.value == NodeValue::Null {
        let hint = "a plugin needs `protocol`, `name`, `version`, `command` and `tasks`";
        problems.report(root.span, "the file is empty", hint.to_owned());
        return None;
    }
    let top = mapping(root, &TOP, problems)?;
    for key in ["protocol", "name", "version", "command", "tasks"] {
        let misspelt = top
            .iter()
            .any(|(k, _)| TOP.aliases.contains(&(k.name.as_str(), key)) || near(&k.name, key));
        if root.get(key).is_none() && !misspelt {
            let span = top.first().map_or(root.span, |(k, _)| k.span);
            problems.report(span, format!("a plugin needs the key `{key}`"), None);
        }
    }
    let mut manifest = PluginManifest {
        dir: dir.to_owned(),
        name: String::new(),
        version: String::new(),
        description: String::new(),
        protocol: PROTOCOL,
        command: Vec::new(),
        build: None,
        network: false,
        env: Vec::new(),
        kinds: Vec::new(),
    };
    for (key, node) in top {
        let what = format!("`{}`", key.name);
        match key.name.as_str() {
            "protocol" => protocol(node, problems),
            "name" => manifest.name = text(node, &what, problems),
            "version" => manifest.version = version(node, problems),
            "description" => manifest.description = text(node, &what, problems),
            "command" => manifest.command = command(node, &what, problems),
            "build" if node.value == NodeValue::Null => {}
            "build" => manifest.build = Some(command(node, &what, problems)),
            "network" => manifest.network = boolean(node, &what, problems).unwrap_or(false),
            "env" => {
                let names = strings(node, &what, problems).unwrap_or_default();
                manifest.env = names.into_iter().map(|n| n.value).collect();
            }
            "tasks" => manifest.kinds = tasks(node, key, problems),
            _ => {}
        }
    }
    Some(manifest)
}

/// Whether a key is so near another that its absence need not be said too.
fn near(name: &str, key: &str) -> bool {
    name != key
        && lora_flow_core::nearest(name, TOP.keys.iter().copied()) == Some(key)
        && !TOP.keys.contains(&name)
}

fn text(node: &Node, what: &str, problems: &mut Problems) -> String {
    string(node, what, problems).map(|s| s.value).unwrap_or_default()
}

fn protocol(node: &Node, problems: &mut Problems) {
    let NodeValue::Number(number) = &node.value else {
        return crate::reader::wrong(
            node,
            "`protocol`",
            &format!("the number {PROTOCOL}"),
            problems,
        );
    };
    if number.as_u64() != Some(PROTOCOL.into()) {
        let message = format!("the plugin speaks protocol {number}; only {PROTOCOL} is known");
        problems.report(node.span, message, None);
    }
}

/// `0.1.0`, also where YAML reads a number (`0.1`).
fn version(node: &Node, problems: &mut Problems) -> String {
    match &node.value {
        NodeValue::Number(_) => problems.source.snippet(node.span).to_owned(),
        _ => text(node, "`version`", problems),
    }
}

fn command(node: &Node, what: &str, problems: &mut Problems) -> Vec<String> {
    if let NodeValue::String(line) = &node.value {
        let words: Vec<&str> = line.split_whitespace().collect();
        problems.report(
            node.span,
            format!("{what} must be a list of words, found {}", node.describe()),
            format!("write `[{}]`", words.join(", ")),
        );
        return Vec::new();
    }
    let words = strings(node, what, problems).unwrap_or_default();
    if words.is_empty() && matches!(node.value, NodeValue::Null | NodeValue::Seq(_)) {
        problems.report(node.span, format!("{what} must not be empty"), None);
    }
    words.into_iter().map(|w| w.value).collect()
}

fn tasks(node: &Node, key: &Key, problems: &mut Problems) -> Vec<PluginKind> {
    let Some(tasks) = entries(node, "`tasks`", problems) else { return Vec::new() };
    if tasks.is_empty() {
        problems.report(key.span, "the plugin offers no tasks", None);
    }
    tasks.iter().filter_map(|(name, node)| task(name, node, problems)).collect()
}

fn task(name: &Key, node: &Node, problems: &mut Problems) -> Option<PluginKind> {
    let mut kind = PluginKind {
        name: name.name.clone(),
        summary: String::new(),
        inputs: Ports::none(),
        outputs: Ports::none(),
        params: json!({ "type": "object", "additionalProperties": false }),
    };
    for (key, node) in mapping(node, &TASK, problems)? {
        match key.name.as_str() {
            "summary" => kind.summary = text(node, "`summary`", problems),
            "inputs" => kind.inputs = ports(node, false, problems),
            "outputs" => kind.outputs = ports(node, true, problems),
            "params" => kind.params = params(node, problems),
            _ => {}
        }
    }
    if node.get("outputs").is_none() {
        let message = format!("the task `{}` has no `outputs`", name.name);
        problems.report(name.span, message, "add `outputs: { files: { kind: Files } }`".to_owned());
    }
    Some(kind)
}

fn ports(node: &Node, outputs: bool, problems: &mut Problems) -> Ports {
    let what = if outputs { "`outputs`" } else { "`inputs`" };
    let Some(entries) = entries(node, what, problems) else { return Ports::none() };
    let ports = entries.iter().filter_map(|(name, node)| port(name, node, outputs, problems));
    Ports { ports: ports.collect(), any_name: Vec::new() }
}

/// `{ kind: Files, required: true, many: false, doc: … }`, or the kind alone.
fn port(name: &Key, node: &Node, output: bool, problems: &mut Problems) -> Option<Port> {
    let mut port = Port {
        name: name.name.clone(),
        kinds: Vec::new(),
        required: true,
        many: false,
        doc: String::new(),
    };
    if node.as_str().is_some() {
        port.kinds = kinds(node, problems);
        return Some(port);
    }
    for (key, node) in mapping(node, &PORT, problems)? {
        let what = format!("`{}`", key.name);
        match key.name.as_str() {
            "kind" => port.kinds = kinds(node, problems),
            "required" => port.required = boolean(node, &what, problems).unwrap_or(true),
            "many" => port.many = boolean(node, &what, problems).unwrap_or(false),
            "doc" => port.doc = text(node, &what, problems),
            _ => {}
        }
        if key.name == "kind" && output && port.kinds.len() > 1 {
            let message = format!("the output `{}` must have one kind", name.name);
            problems.report(node.span, message, None);
        }
        if key.name == "many" && output && port.many {
            problems.report(node.span, "an output is one artifact", None);
        }
    }
    if node.get("kind").is_none() {
        let message = format!("the port `{}` needs the key `kind`", name.name);
        let names = crate::reader::list(KINDS.map(|k| k.to_string()), "or");
        problems.report(name.span, message, format!("one of {names}"));
    }
    Some(port)
}

fn kinds(node: &Node, problems: &mut Problems) -> Vec<ArtifactKind> {
    let names = one_or_many(node, "`kind`", problems).unwrap_or_default();
    let mut kinds = Vec::new();
    for name in names {
        match KINDS.into_iter().find(|k| k.to_string() == name.value) {
            Some(kind) => kinds.push(kind),
            None => {
                let known = KINDS.map(|k| k.to_string());
                let hint = suggest(&name.value, known.iter().map(String::as_str), "the kinds are");
                let message = format!("unknown artifact kind `{}`", name.value);
                problems.report(name.span, message, hint);
            }
        }
    }
    kinds
}

/// The JSON Schema of a task's parameters. Unknown parameters are refused unless it says
/// otherwise.
fn params(node: &Node, problems: &mut Problems) -> Value {
    let mut schema = node.to_json();
    let Value::Object(map) = &mut schema else {
        let message = format!("`params` must be a JSON Schema, found {}", node.describe());
        problems.report(node.span, message, "start with `type: object`".to_owned());
        return Value::Bool(true);
    };
    if map.get("type") != Some(&json!("object")) {
        let hint = "parameters are a mapping: write `type: object`".to_owned();
        let span = node.get("type").map_or(node.span, |n| n.span);
        problems.report(span, "the schema of `params` must have `type: object`", hint);
    }
    let open = ["additionalProperties", "patternProperties", "unevaluatedProperties"];
    if !open.iter().any(|k| map.contains_key(*k)) {
        map.insert("additionalProperties".to_owned(), Value::Bool(false));
    }
    if let Err(e) = jsonschema::validator_for(&schema) {
        let places = node.places().values;
        let span: Span =
            crate::plan::nearest_span(&places, e.instance_path().as_str()).unwrap_or(node.span);
        const TYPES: [&str; 7] =
            ["string", "integer", "number", "boolean", "array", "object", "null"];
        match (e.instance_path().as_str().ends_with("/type"), e.instance().as_str()) {
            (true, Some(name)) => problems.report(
                span,
                format!("JSON Schema knows no type `{name}`"),
                suggest(name, TYPES, "its types are"),
            ),
            _ => problems.report(span, format!("`params` is not a valid JSON Schema: {e}"), None),
        }
    }
    schema
}

/// The problem of a plugin folder that has no manifest, for the place that names the folder.
pub(crate) fn missing_manifest(
    problems: &Problems,
    span: Span,
    shown: &str,
    dir: &Path,
) -> Option<Diagnostic> {
    let (message, hint) = if !dir.exists() {
        (format!("there is no plugin folder `{shown}`"), None)
    } else if !dir.is_dir() {
        (format!("`{shown}` is not a folder"), Some("name the folder that holds `plugin.yaml`"))
    } else if !dir.join(MANIFEST).exists() {
        (format!("the folder `{shown}` has no `{MANIFEST}`"), None)
    } else {
        return None;
    };
    let diagnostic = Diagnostic::new(&problems.source, span, message);
    Some(diagnostic.with_hint_opt(hint.map(str::to_owned)))
}

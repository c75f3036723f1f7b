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
    /// Whether it asks for local (Unix) sockets.
    pub local_sockets: bool,
    /// Environment variables it is given, by name; their values enter the key.
    pub env: Vec<String>,
    /// Those that decide how it works and not what it makes: given, and kept out of the key.
    pub passthrough: Vec<String>,
    /// What it may read besides its inputs and its own folder.
    pub read: Vec<ReadPath>,
    /// Task kinds it offers, in the order written.
    pub kinds: Vec<PluginKind>,
}

impl PluginManifest {
    /// The environment variables that it is given besides those that every program gets.
    pub fn variables(&self) -> impl Iterator<Item = &str> {
        self.env.iter().chain(&self.passthrough).map(String::as_str)
    }

    fn is_given(&self, name: &str) -> bool {
        self.variables().any(|n| n == name)
    }
}

/// A file or folder that a plugin asks to read: `/path`, `~/path`, `$NAME/path` with a variable of
/// its `env` or `passthrough`, or `{params.NAME}/path` with a parameter of the task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadPath {
    base: Base,
    rest: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Base {
    Root,
    Home,
    Variable(String),
    Param(String),
}

impl ReadPath {
    fn parse(text: &str) -> Option<Self> {
        let (base, rest) = if let Some(inner) = text.strip_prefix("{params.") {
            let (name, rest) = inner.split_once('}')?;
            (Base::Param(name.to_owned()), rest)
        } else {
            let (first, rest) = text.split_at(text.find('/').unwrap_or(text.len()));
            match first.strip_prefix('$') {
                Some(name) if !name.is_empty() => (Base::Variable(name.to_owned()), rest),
                None if first == "~" => (Base::Home, rest),
                None if text.starts_with('/') => (Base::Root, rest),
                _ => return None,
            }
        };
        let rest = if base == Base::Root { rest } else { rest.trim_start_matches('/') };
        Some(Self { base, rest: rest.to_owned() })
    }

    /// The absolute path, under these parameters and this process's environment. None if what it
    /// starts with is not set, or is no absolute path.
    pub fn path(&self, params: &Value) -> Option<PathBuf> {
        let base = match &self.base {
            Base::Root => PathBuf::from("/"),
            Base::Home => std::env::home_dir()?,
            Base::Variable(name) => PathBuf::from(std::env::var_os(name)?),
            Base::Param(name) => PathBuf::from(params.get(name)?.as_str()?),
        };
        base.is_absolute().then(|| base.join(&self.rest))
    }
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
        "local_sockets",
        "env",
        "passthrough",
        "read",
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
        local_sockets: false,
        env: Vec::new(),
        passthrough: Vec::new(),
        read: Vec::new(),
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
            "local_sockets" => {
                manifest.local_sockets = boolean(node, &what, problems).unwrap_or(false);
            }
            "env" => {
                let names = strings(node, &what, problems).unwrap_or_default();
                manifest.env = names.into_iter().map(|n| n.value).collect();
            }
            "passthrough" => {
                let names = strings(node, &what, problems).unwrap_or_default();
                manifest.passthrough = names.into_iter().map(|n| n.value).collect();
            }
            "tasks" => manifest.kinds = tasks(node, key, problems),
            _ => {}
        }
    }
    // After `env`, wherever that stands.
    manifest.read =
        root.get("read").map(|n| read_paths(n, &manifest, problems)).unwrap_or_default();
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

fn read_paths(node: &Node, manifest: &PluginManifest, problems: &mut Problems) -> Vec<ReadPath> {
    let mut paths = Vec::new();
    for written in strings(node, "`read`", problems).unwrap_or_default() {
        let Some(path) = ReadPath::parse(&written.value) else {
            problems.report(
                written.span,
                format!("`{}` is not a path that `read` can name", written.value),
                "it starts with `/`, `~`, `$NAME` or `{params.NAME}`; the plugin's own folder can \
                 be read anyway"
                    .to_owned(),
            );
            continue;
        };
        let unknown = match &path.base {
            Base::Variable(name) if name != "HOME" && !manifest.is_given(name) => Some((
                format!("`{name}` is not listed under `env`"),
                format!("add `{name}` to `env` or `passthrough`"),
            )),
            Base::Param(name) if !manifest.kinds.iter().any(|k| has_param(k, name)) => {
                let message = format!("no task of the plugin has a parameter `{name}`");
                Some((message, "`params` of a task lists them under `properties`".to_owned()))
            }
            _ => None,
        };
        match unknown {
            Some((message, hint)) => problems.report(written.span, message, hint),
            None => paths.push(path),
        }
    }
    paths
}

fn has_param(kind: &PluginKind, name: &str) -> bool {
    kind.params.get("properties").is_some_and(|p| p.get(name).is_some())
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

/// The types of JSON Schema.
const TYPES: [&str; 7] = ["string", "integer", "number", "boolean", "array", "object", "null"];

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
    if is_plain(&schema) {
        return schema;
    }
    if let Err(e) = jsonschema::validator_for(&schema) {
        let places = node.places().values;
        let span: Span =
            crate::plan::nearest_span(&places, e.instance_path().as_str()).unwrap_or(node.span);
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

/// Whether a schema is surely valid, because it is made of the commonest keywords alone. Only the
/// others are held against the schema of schemas, whose making takes longer than a no-op run.
fn is_plain(schema: &Value) -> bool {
    let Value::Object(map) = schema else { return schema.is_boolean() };
    map.iter().all(|(keyword, value)| match keyword.as_str() {
        "title" | "description" | "format" => value.is_string(),
        "enum" | "examples" => value.is_array(),
        "required" => value.as_array().is_some_and(|names| {
            names.iter().all(Value::is_string)
                && (1..names.len()).all(|i| !names[..i].contains(&names[i]))
        }),
        "type" => value.as_str().is_some_and(|name| TYPES.contains(&name)),
        "default" | "const" => true,
        "minimum" | "maximum" => value.is_number(),
        "items" | "additionalProperties" => is_plain(value),
        "properties" => value.as_object().is_some_and(|all| all.values().all(is_plain)),
        _ => false,
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_schemas_are_valid_and_invalid_ones_are_never_plain() {
        let plain = json!({
            "type": "object",
            "properties": {
                "a": { "type": "integer", "minimum": 1, "default": 2, "description": "d" },
                "b": { "type": "array", "items": { "enum": ["x", 1] }, "examples": [[]] },
            },
            "required": ["a", "b"],
            "additionalProperties": false,
        });
        assert!(is_plain(&plain));
        assert!(jsonschema::validator_for(&plain).is_ok());
        let invalid = [
            json!(1),
            json!({ "type": "text" }),
            json!({ "type": ["text"] }),
            json!({ "properties": [] }),
            json!({ "properties": { "a": { "type": 1 } } }),
            json!({ "required": ["a", "a"] }),
            json!({ "required": "a" }),
            json!({ "minimum": "1" }),
            json!({ "description": 1 }),
            json!({ "format": 1 }),
            json!({ "enum": 1 }),
            json!({ "examples": 1 }),
            json!({ "items": "a" }),
            json!({ "additionalProperties": 1 }),
            json!({ "pattern": "(" }),
            json!({ "$ref": "#/nowhere" }),
        ];
        for schema in invalid {
            assert!(!is_plain(&schema), "{schema}");
            assert!(jsonschema::validator_for(&schema).is_err(), "{schema}");
        }
    }

    #[test]
    fn paths_to_read_start_somewhere_known() {
        let params = json!({ "docs": "/d", "relative": "d", "number": 1 });
        let path = |text| ReadPath::parse(text).and_then(|p| p.path(&params));
        let home = std::env::home_dir().unwrap();
        assert_eq!(path("/a/b"), Some("/a/b".into()));
        assert_eq!(path("~"), Some(home.join("")));
        assert_eq!(path("~/.rustup"), Some(home.join(".rustup")));
        assert_eq!(path("$HOME/x"), Some(home.join("x")));
        assert_eq!(path("{params.docs}/x"), Some("/d/x".into()));
        for unset in ["$LORA_FLOW_NOT_SET/x", "{params.no}", "{params.relative}", "{params.number}"]
        {
            assert_eq!(path(unset), None, "{unset}");
        }
        for bad in ["a", "./a", "~user/x", "$", "", "{params.x"] {
            assert_eq!(ReadPath::parse(bad), None, "{bad}");
        }
    }
}

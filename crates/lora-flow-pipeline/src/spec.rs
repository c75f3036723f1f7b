//! The pipeline file as written: its keys and their types, before kinds and expressions.

use crate::reader::{At, Known, entries, mapping, one_or_many, string, strings, suggest, wrong};
use crate::source::{Problems, Span};
use crate::yaml::{Key, Node, NodeValue};

/// The version of the file format that this engine reads.
pub(crate) const VERSION: u64 = 1;

pub(crate) const TOP: Known = Known {
    of: "the pipeline",
    keys: &["version", "name", "description", "root", "params", "env", "plugins", "tasks"],
    aliases: &[
        ("steps", "tasks"),
        ("jobs", "tasks"),
        ("stages", "tasks"),
        ("nodes", "tasks"),
        ("pipeline", "tasks"),
        ("vars", "params"),
        ("variables", "params"),
        ("parameters", "params"),
        ("environment", "env"),
        ("plugin", "plugins"),
        ("title", "name"),
        ("workdir", "root"),
    ],
};

pub(crate) const TASK: Known = Known {
    of: "a task",
    keys: &[
        "uses",
        "with",
        "inputs",
        "needs",
        "publish",
        "matrix",
        "resources",
        "timeout",
        "retries",
        "description",
    ],
    aliases: &[
        ("type", "uses"),
        ("kind", "uses"),
        ("task", "uses"),
        ("plugin", "uses"),
        ("op", "uses"),
        ("component", "uses"),
        ("run", "uses"),
        ("params", "with"),
        ("parameters", "with"),
        ("args", "with"),
        ("config", "with"),
        ("options", "with"),
        ("input", "inputs"),
        ("deps", "inputs"),
        ("outs", "publish"),
        ("output", "publish"),
        ("outputs", "publish"),
        ("output_dir", "publish"),
        ("depends_on", "needs"),
        ("depends", "needs"),
        ("dependencies", "needs"),
        ("after", "needs"),
        ("requires", "needs"),
        ("foreach", "matrix"),
        ("strategy", "matrix"),
        ("sweep", "matrix"),
        ("grid", "matrix"),
        ("retry", "retries"),
    ],
};

/// A pipeline file whose shape is right.
#[derive(Debug, Default)]
pub(crate) struct Spec {
    pub name: Option<String>,
    pub description: String,
    pub root: Option<At<String>>,
    pub params: Vec<(Key, Node)>,
    pub env: Vec<At<String>>,
    pub plugins: Vec<At<String>>,
    pub tasks: Vec<TaskSpec>,
}

/// One entry under `tasks`. What may hold expressions stays a tree.
#[derive(Debug)]
pub(crate) struct TaskSpec {
    pub name: Key,
    pub uses: Option<At<String>>,
    pub with: Option<Node>,
    pub inputs: Option<Node>,
    pub needs: Vec<At<String>>,
    pub publish: Option<Node>,
    pub matrix: Vec<(Key, Node)>,
    pub resources: Option<Node>,
    pub timeout: Option<Node>,
    pub retries: Option<Node>,
    /// Whether the entry was a mapping; if not, nothing else about it is worth saying.
    pub usable: bool,
}

/// Reads the tree of a pipeline file, reporting all that does not fit.
pub(crate) fn read(root: &Node, problems: &mut Problems) -> Spec {
    let mut spec = Spec::default();
    match &root.value {
        NodeValue::Map(_) => {}
        NodeValue::Null => {
            let hint = "a pipeline has `tasks:`, each with `uses:`; `pipelines/quickstart.yaml` is a small one";
            problems.report(root.span, "the file is empty", hint.to_owned());
            return spec;
        }
        _ => {
            let message = format!("a pipeline must be a mapping, found {}", root.describe());
            problems.report(root.span, message, "it starts with `tasks:`".to_owned());
            return spec;
        }
    }
    let top = without_extensions(root);
    let Some(entries) = mapping(&top, &TOP, problems) else { return spec };
    for (key, node) in entries {
        match key.name.as_str() {
            "version" => version(node, problems),
            "name" => spec.name = string(node, "`name`", problems).map(|s| s.value),
            "description" => {
                spec.description =
                    string(node, "`description`", problems).map(|s| s.value).unwrap_or_default();
            }
            "root" => spec.root = string(node, "`root`", problems),
            "params" => spec.params = params(node, problems),
            "env" => spec.env = env(node, problems),
            "plugins" => spec.plugins = strings(node, "`plugins`", problems).unwrap_or_default(),
            "tasks" => spec.tasks = tasks(node, key, problems),
            _ => {}
        }
    }
    if top.get("tasks").is_none() {
        problems.report(
            first_key_span(root),
            "the pipeline has no `tasks`",
            "add `tasks:` with one entry per task".to_owned(),
        );
    }
    spec
}

/// The top level without `x-…` keys, which are free for anchors and notes.
fn without_extensions(root: &Node) -> Node {
    let mut root = root.clone();
    if let NodeValue::Map(entries) = &mut root.value {
        entries.retain(|(k, _)| !k.name.starts_with("x-"));
    }
    root
}

fn first_key_span(node: &Node) -> Span {
    match &node.value {
        NodeValue::Map(entries) => entries.first().map_or(node.span, |(k, _)| k.span),
        _ => node.span,
    }
}

fn version(node: &Node, problems: &mut Problems) {
    match &node.value {
        NodeValue::Number(n) if n.as_u64() == Some(VERSION) => {}
        NodeValue::Number(n) => {
            let message = format!("this is version {n} of the format; only {VERSION} is known");
            problems.report(node.span, message, format!("write `version: {VERSION}`"));
        }
        _ => wrong(node, "`version`", &format!("the number {VERSION}"), problems),
    }
}

fn params(node: &Node, problems: &mut Problems) -> Vec<(Key, Node)> {
    let Some(entries) = entries(node, "`params`", problems) else { return Vec::new() };
    for (key, value) in entries {
        name_rule("a parameter", key, false, problems);
        no_expressions(value, problems);
    }
    entries.to_vec()
}

fn no_expressions(node: &Node, problems: &mut Problems) {
    match &node.value {
        NodeValue::String(s) if s.contains("${{") => problems.report(
            node.span,
            "parameters are plain values, not expressions",
            "write the expression where the value is used, under `with`".to_owned(),
        ),
        NodeValue::Seq(items) => items.iter().for_each(|n| no_expressions(n, problems)),
        NodeValue::Map(entries) => entries.iter().for_each(|(_, n)| no_expressions(n, problems)),
        _ => {}
    }
}

fn env(node: &Node, problems: &mut Problems) -> Vec<At<String>> {
    if matches!(node.value, NodeValue::Map(_)) {
        problems.report(
            node.span,
            "`env` must be a list of strings, found a mapping",
            "it lists the names that may be read; constants belong under `params`".to_owned(),
        );
        return Vec::new();
    }
    let names = strings(node, "`env`", problems).unwrap_or_default();
    for name in &names {
        if name.value.contains(['=', '\0']) {
            let message = format!("`{}` is not a name of an environment variable", name.value);
            problems.report(name.span, message, "list names only, without values".to_owned());
        }
    }
    names
}

fn tasks(node: &Node, key: &Key, problems: &mut Problems) -> Vec<TaskSpec> {
    if matches!(node.value, NodeValue::Seq(_)) {
        problems.report(
            node.span,
            "`tasks` must be a mapping, found a list",
            "give every task a name: `tasks: { base: { uses: model } }`".to_owned(),
        );
        return Vec::new();
    }
    let Some(entries) = entries(node, "`tasks`", problems) else { return Vec::new() };
    if entries.is_empty() {
        problems.report(
            key.span,
            "`tasks` is empty",
            "a pipeline needs at least one task".to_owned(),
        );
    }
    entries.iter().map(|(name, node)| task(name, node, problems)).collect()
}

fn task(name: &Key, node: &Node, problems: &mut Problems) -> TaskSpec {
    let mut task = TaskSpec {
        name: name.clone(),
        uses: None,
        with: None,
        inputs: None,
        needs: Vec::new(),
        publish: None,
        matrix: Vec::new(),
        resources: None,
        timeout: None,
        retries: None,
        usable: false,
    };
    name_rule("a task", name, true, problems);
    if !matches!(node.value, NodeValue::Map(_)) {
        let message =
            format!("the task `{}` must be a mapping, found {}", name.name, node.describe());
        let span = if node.span.start == node.span.end { name.span } else { node.span };
        problems.report(span, message, "it needs at least `uses: KIND`".to_owned());
        return task;
    }
    let Some(entries) = mapping(node, &TASK, problems) else { return task };
    task.usable = true;
    let mut stands_in = false;
    for (key, node) in entries {
        match key.name.as_str() {
            "uses" => {
                task.uses = string(node, "`uses`", problems);
                stands_in = true;
            }
            "with" => task.with = Some(node.clone()),
            "inputs" => task.inputs = Some(node.clone()),
            "needs" => task.needs = one_or_many(node, "`needs`", problems).unwrap_or_default(),
            "publish" => task.publish = Some(node.clone()),
            "matrix" => task.matrix = matrix(node, problems),
            "resources" => task.resources = Some(node.clone()),
            "timeout" => task.timeout = Some(node.clone()),
            "retries" => task.retries = Some(node.clone()),
            "description" => {
                string(node, "`description`", problems);
            }
            other => {
                // `type: train` was reported as an unknown key; a missing `uses` would repeat it.
                stands_in |= TASK.aliases.contains(&(other, "uses"))
                    || suggest(other, ["uses"], "").is_some_and(|h| h.starts_with("did"));
            }
        }
    }
    if !stands_in {
        let message = format!("the task `{}` does not say what it `uses`", name.name);
        problems.report(
            name.span,
            message,
            "add `uses: KIND`; `lora-flow tasks` lists the kinds".to_owned(),
        );
    }
    task
}

fn matrix(node: &Node, problems: &mut Problems) -> Vec<(Key, Node)> {
    let Some(entries) = entries(node, "`matrix`", problems) else { return Vec::new() };
    for (key, _) in entries {
        name_rule("an axis of a matrix", key, false, problems);
    }
    entries.to_vec()
}

/// `[A-Za-z_][A-Za-z0-9_-]*`, where dashes are allowed.
fn name_rule(what: &str, key: &Key, dashes: bool, problems: &mut Problems) {
    let mut chars = key.name.chars();
    let first = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
    if first && chars.all(|c| c.is_ascii_alphanumeric() || c == '_' || (dashes && c == '-')) {
        return;
    }
    let with_dashes = if dashes { ", `-`" } else { "" };
    problems.report(
        key.span,
        format!("`{}` cannot be the name of {what}", key.name),
        format!("a name starts with a letter or `_` and holds letters, digits, `_`{with_dashes}"),
    );
}

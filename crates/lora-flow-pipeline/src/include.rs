//! `include`: parts of a pipeline that stand in files of their own.
//!
//! The fragments' text is put behind that of the pipeline file and their places are moved
//! accordingly, so that the steps after this one see one tree over one text. [`Sources`] says
//! which file a place is in; it is asked when a problem is shown.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::reader::{At, Known, entries, mapping, one_or_many, strings};
use crate::source::{Diagnostic, Problems, SourceFile, Sources};
use crate::spec;
use crate::yaml::{self, Key, Node, NodeValue};

const FRAGMENT: Known = Known {
    of: "an included file",
    keys: &["version", "include", "params", "env", "plugins", "tasks"],
    aliases: spec::TOP.aliases,
};

/// Parses a pipeline file and what it includes, and makes one tree of them.
///
/// # Errors
/// All problems of the syntax and of the including; what stands under the keys is not looked at.
pub(crate) fn read(source: &Arc<SourceFile>) -> Result<(Node, Sources), Vec<Diagnostic>> {
    let mut tree = yaml::parse(source)?;
    let mut sources = Sources::new(source);
    if tree.get("include").is_none() {
        return Ok((tree, sources));
    }
    let mut reader = Reader {
        sources: &mut sources,
        parts: Parts::default(),
        seen: BTreeSet::new(),
        open: vec![(identity(&source.path), source.path.clone())],
        found: Vec::new(),
    };
    reader.includes(source, &tree);
    let Reader { parts, mut found, .. } = reader;
    let mut problems = Problems::over(&sources);
    parts.merge_into(&mut tree, &mut problems);
    found.append(&mut problems.found);
    for problem in &mut found {
        sources.localise(problem);
    }
    if found.is_empty() { Ok((tree, sources)) } else { Err(found) }
}

/// What a file is known by: its path without links, or what comes nearest to it.
fn identity(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| {
        crate::files::normalise(&std::path::absolute(path).unwrap_or_else(|_| path.to_owned()))
    })
}

struct Reader<'a> {
    sources: &'a mut Sources,
    parts: Parts,
    /// Fragments that are there already: one that two others include counts once.
    seen: BTreeSet<PathBuf>,
    /// The files that include each other down to the current one, by identity and as written.
    open: Vec<(PathBuf, PathBuf)>,
    found: Vec<Diagnostic>,
}

impl Reader<'_> {
    /// Reads what a file includes.
    fn includes(&mut self, source: &Arc<SourceFile>, tree: &Node) {
        let Some(node) = tree.get("include") else { return };
        let mut problems = Problems::new(source);
        let names = one_or_many(node, "`include`", &mut problems).unwrap_or_default();
        self.found.append(&mut problems.found);
        for name in names {
            self.fragment(source, &name);
        }
    }

    fn fragment(&mut self, source: &Arc<SourceFile>, name: &At<String>) {
        let path = source.path.parent().unwrap_or(Path::new("")).join(&name.value);
        let id = identity(&path);
        if let Some(at) = self.open.iter().position(|(open, _)| *open == id) {
            let circle = self.open[at..].iter().map(|(_, p)| p).chain([&self.open[at].1]);
            let circle: Vec<String> = circle.map(|p| format!("`{}`", p.display())).collect();
            let problem = Diagnostic::new(source, name.span, "these files include each other");
            self.found.push(problem.with_hint(circle.join(" → ")));
            return;
        }
        if !self.seen.insert(id.clone()) {
            return;
        }
        let fragment = match SourceFile::read(&path) {
            Ok(fragment) => fragment,
            Err(problem) if problem.span.is_some() => return self.found.push(*problem),
            Err(problem) => {
                let message = format!("`{}` {}", name.value, problem.message);
                let hint = "the paths of `include` are relative to the file that they stand in";
                self.found.push(Diagnostic::new(source, name.span, message).with_hint(hint));
                return;
            }
        };
        let mut tree = match yaml::parse(&fragment) {
            Ok(tree) => tree,
            Err(mut problems) => return self.found.append(&mut problems),
        };
        self.open.push((id, path));
        self.includes(&fragment, &tree);
        self.open.pop();

        if let NodeValue::Map(entries) = &mut tree.value {
            entries.retain(|(k, _)| !k.name.starts_with("x-"));
        }
        let mut problems = Problems::new(&fragment);
        mapping(&tree, &FRAGMENT, &mut problems);
        for (key, what) in [("params", "`params`"), ("tasks", "`tasks`")] {
            tree.get(key).map(|node| entries(node, what, &mut problems));
        }
        for (key, what) in [("plugins", "`plugins`"), ("env", "`env`")] {
            tree.get(key).map(|node| strings(node, what, &mut problems));
        }
        if let Some(version) = tree.get("version") {
            spec::version(version, &mut problems);
        }
        self.found.append(&mut problems.found);
        tree.shift(self.sources.append(&fragment));
        let problems = &mut Problems::over(self.sources);
        self.parts.add(tree, problems);
        self.found.append(&mut problems.found);
    }
}

/// What fragments hold, in the order they are included.
#[derive(Default)]
struct Parts {
    params: Vec<(Key, Node)>,
    tasks: Vec<(Key, Node)>,
    plugins: Vec<Node>,
    env: Vec<Node>,
}

impl Parts {
    fn add(&mut self, tree: Node, problems: &mut Problems) {
        let NodeValue::Map(top) = tree.value else { return };
        for (key, node) in top {
            match (key.name.as_str(), node.value) {
                ("params", NodeValue::Map(new)) => {
                    add(&mut self.params, new, "parameter", problems);
                }
                ("tasks", NodeValue::Map(new)) => add(&mut self.tasks, new, "task", problems),
                ("plugins", NodeValue::Seq(new)) => add_new(&mut self.plugins, new),
                ("env", NodeValue::Seq(new)) => add_new(&mut self.env, new),
                _ => {}
            }
        }
    }

    /// Puts all of it before what the pipeline file itself has.
    fn merge_into(mut self, tree: &mut Node, problems: &mut Problems) {
        let NodeValue::Map(top) = &mut tree.value else { return };
        top.retain(|(k, _)| k.name != "include");
        for (name, what, parts) in
            [("params", "parameter", &mut self.params), ("tasks", "task", &mut self.tasks)]
        {
            match top.iter_mut().find(|(k, _)| k.name == name) {
                Some((_, Node { value: NodeValue::Map(own), .. })) => {
                    add(parts, std::mem::take(own), what, problems);
                    *own = std::mem::take(parts);
                }
                Some((_, node)) if node.value == NodeValue::Null => {
                    node.value = NodeValue::Map(std::mem::take(parts));
                }
                // The wrong type of value is reported by the next step.
                Some(_) => {}
                None => add_key(top, name, NodeValue::Map(std::mem::take(parts))),
            }
        }
        for (name, parts) in [("plugins", &mut self.plugins), ("env", &mut self.env)] {
            match top.iter_mut().find(|(k, _)| k.name == name) {
                Some((_, Node { value: NodeValue::Seq(own), .. })) => {
                    // What stands twice in the file itself is left for the next step to find.
                    parts.retain(|part| !own.iter().any(|o| o.value == part.value));
                    own.splice(0..0, std::mem::take(parts));
                }
                Some((_, node)) if node.value == NodeValue::Null => {
                    node.value = NodeValue::Seq(std::mem::take(parts));
                }
                Some(_) => {}
                None => add_key(top, name, NodeValue::Seq(std::mem::take(parts))),
            }
        }
    }
}

/// Adds a key with what was found in fragments, if anything was.
fn add_key(top: &mut Vec<(Key, Node)>, name: &str, value: NodeValue) {
    let span = match &value {
        NodeValue::Map(entries) => entries.first().map(|(k, _)| k.span),
        NodeValue::Seq(items) => items.first().map(|n| n.span),
        _ => None,
    };
    if let Some(span) = span {
        top.push((Key { name: name.to_owned(), span }, Node { value, span }));
    }
}

/// Adds entries whose names are not taken.
fn add(known: &mut Vec<(Key, Node)>, new: Vec<(Key, Node)>, what: &str, problems: &mut Problems) {
    for (key, node) in new {
        match known.iter().find(|(k, _)| k.name == key.name) {
            None => known.push((key, node)),
            Some((first, _)) => {
                let place = problems.place(first.span);
                let message = format!("the {what} `{}` is already given at {place}", key.name);
                problems.report(key.span, message, "rename or remove one of them".to_owned());
            }
        }
    }
}

/// Adds items that are not there yet: two fragments may need the same plugin.
fn add_new(known: &mut Vec<Node>, new: Vec<Node>) {
    for node in new {
        if !known.iter().any(|k| k.value == node.value) {
            known.push(node);
        }
    }
}

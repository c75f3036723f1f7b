//! `publish`: outputs that are placed outside the store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_flow_core::Ports;

use crate::files::normalise;
use crate::member::Member;
use crate::reader::{At, suggest};
use crate::source::{Problems, Span};
use crate::yaml::Key;

/// Name of the store's folder under the root.
pub(crate) const STORE: &str = ".lora-flow";

/// Output name, absolute path, and the place it is written at.
pub(crate) type Target = (String, PathBuf, Span);

/// Output names and absolute paths, for each member.
pub(crate) fn resolve(
    members: &[Member],
    root: &Path,
    problems: &mut Problems,
) -> Vec<Vec<Target>> {
    let mut taken: BTreeMap<PathBuf, (Span, String)> = BTreeMap::new();
    let mut all = Vec::new();
    for member in members {
        let outputs = member.configured.as_ref().map(|c| c.task.outputs());
        let mut published = Vec::new();
        for (output, path) in &member.publish {
            let name = match &outputs {
                Some(outputs) => output_name(member, output.as_ref(), outputs, path, problems),
                None => None,
            };
            let Some(absolute) = check_path(path, root, problems) else { continue };
            if !claim(&mut taken, &absolute, path, member, problems) {
                continue;
            }
            if let Some(name) = name {
                published.push((name, absolute, path.span));
            }
        }
        all.push(published);
    }
    all
}

/// The output that is meant; without a name the first.
fn output_name(
    member: &Member,
    output: Option<&Key>,
    outputs: &Ports,
    path: &At<String>,
    problems: &mut Problems,
) -> Option<String> {
    let task = &member.spec.name.name;
    let Some(output) = output else {
        if outputs.ports.is_empty() {
            problems.report(path.span, format!("`{task}` has no output to publish"), None);
        }
        return outputs.ports.first().map(|p| p.name.clone());
    };
    if outputs.get(&output.name).is_none() {
        let known = outputs.ports.iter().map(|p| p.name.as_str());
        let hint = suggest(&output.name, known, "its outputs");
        let message = format!("`{task}` has no output `{}`", output.name);
        problems.report(output.span, message, hint);
        return None;
    }
    Some(output.name.clone())
}

fn check_path(path: &At<String>, root: &Path, problems: &mut Problems) -> Option<PathBuf> {
    let absolute = normalise(&root.join(&path.value));
    let message = if absolute == *root || root.starts_with(&absolute) {
        format!("`{}` would replace the pipeline's own folder", path.value)
    } else if absolute.starts_with(root.join(STORE)) {
        format!("`{}` lies inside the store", path.value)
    } else if path.value.contains('\0') {
        "a path cannot hold a NUL character".to_owned()
    } else {
        return Some(absolute);
    };
    problems.report(
        path.span,
        message,
        "publish to a folder of its own, like `out/NAME`".to_owned(),
    );
    None
}

/// Whether a path is free: neither published to yet, nor inside another, nor around one.
fn claim(
    taken: &mut BTreeMap<PathBuf, (Span, String)>,
    absolute: &Path,
    path: &At<String>,
    member: &Member,
    problems: &mut Problems,
) -> bool {
    let other = taken.iter().find(|(p, _)| absolute.starts_with(p) || p.starts_with(absolute));
    let Some((other_path, (_, owner))) = other else {
        taken.insert(absolute.to_owned(), (path.span, member.id.clone()));
        return true;
    };
    let relation = if other_path == absolute { "to" } else { "inside each other at" };
    let message = format!("`{owner}` and `{}` publish {relation} `{}`", member.id, path.value);
    let hint = match member.assignment.first() {
        Some((axis, _)) if member.spec.publish.is_some() => {
            format!("put the value into the path: `{}-${{{{ matrix.{axis} }}}}`", path.value)
        }
        _ => "give each its own folder".to_owned(),
    };
    problems.report(path.span, message, hint);
    false
}

//! Reads typed values out of a YAML tree and reports everything that does not fit.

use lora_flow_core::nearest;

use crate::source::{Problems, Span};
use crate::yaml::{Key, Node, NodeValue};

/// A value and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct At<T> {
    /// The value.
    pub value: T,
    /// Where it stands.
    pub span: Span,
}

/// The keys that a mapping may have.
pub struct Known {
    /// What the mapping is, for messages: `a task`.
    pub of: &'static str,
    /// Their names.
    pub keys: &'static [&'static str],
    /// What other tools call them: (their name, ours).
    pub aliases: &'static [(&'static str, &'static str)],
}

/// `a`, `b` and `c`, in backticks.
pub fn list<S: AsRef<str>>(names: impl IntoIterator<Item = S>, word: &str) -> String {
    let mut names: Vec<String> = names.into_iter().map(|n| format!("`{}`", n.as_ref())).collect();
    let Some(last) = names.pop() else { return "none".to_owned() };
    if names.is_empty() { last } else { format!("{} {word} {last}", names.join(", ")) }
}

/// `did you mean …?`, or else what there is.
pub fn suggest<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
    what: &str,
) -> Option<String> {
    let candidates: Vec<&str> = candidates.into_iter().collect();
    if let Some(near) = nearest(name, candidates.iter().copied()) {
        return Some(format!("did you mean `{near}`?"));
    }
    match candidates.len() {
        0 => None,
        1 => Some(format!("{what}: `{}`", candidates[0])),
        _ => Some(format!("{what}: {}", list(candidates, "and"))),
    }
}

/// The entries of a mapping whose keys are all known. Keys that are not are reported, and what is
/// not a mapping; nothing is an empty mapping.
pub fn mapping<'a>(
    node: &'a Node,
    known: &Known,
    problems: &mut Problems,
) -> Option<&'a [(Key, Node)]> {
    let entries = entries(node, known.of, problems)?;
    for (key, _) in entries {
        let name = key.name.as_str();
        if known.keys.contains(&name) {
            continue;
        }
        let alias = known.aliases.iter().find(|(theirs, _)| *theirs == name);
        let hint = match alias {
            Some((_, ours)) => Some(format!("here it is called `{ours}`")),
            None => suggest(name, known.keys.iter().copied(), "known keys"),
        };
        problems.report(key.span, format!("unknown key `{name}` in {}", known.of), hint);
    }
    Some(entries)
}

/// The entries of a mapping with any keys; nothing is an empty mapping.
pub fn entries<'a>(
    node: &'a Node,
    what: &str,
    problems: &mut Problems,
) -> Option<&'a [(Key, Node)]> {
    match &node.value {
        NodeValue::Map(entries) => Some(entries),
        NodeValue::Null => Some(&[]),
        _ => {
            wrong(node, what, "a mapping", problems);
            None
        }
    }
}

/// Reports a value of the wrong type.
pub fn wrong(node: &Node, what: &str, expected: &str, problems: &mut Problems) {
    let message = format!("{what} must be {expected}, found {}", node.describe());
    problems.report(node.span, message, None);
}

/// A string that is not empty.
pub fn string(node: &Node, what: &str, problems: &mut Problems) -> Option<At<String>> {
    match &node.value {
        NodeValue::String(s) if !s.trim().is_empty() => {
            Some(At { value: s.clone(), span: node.span })
        }
        NodeValue::Number(_) | NodeValue::Bool(_) => {
            let message = format!("{what} must be a string, found {}", node.describe());
            problems.report(node.span, message, "put quotes around it".to_owned());
            None
        }
        _ => {
            wrong(node, what, "a string", problems);
            None
        }
    }
}

/// A list of strings. The second is whether all its items were fine.
pub fn strings(node: &Node, what: &str, problems: &mut Problems) -> Option<Vec<At<String>>> {
    match &node.value {
        NodeValue::Seq(items) => {
            let item = format!("an item of {what}");
            Some(items.iter().filter_map(|n| string(n, &item, problems)).collect())
        }
        NodeValue::Null => Some(Vec::new()),
        _ => {
            wrong(node, what, "a list of strings", problems);
            None
        }
    }
}

/// A string or a list of strings.
pub fn one_or_many(node: &Node, what: &str, problems: &mut Problems) -> Option<Vec<At<String>>> {
    match &node.value {
        NodeValue::Seq(_) => strings(node, what, problems),
        NodeValue::String(_) => string(node, what, problems).map(|s| vec![s]),
        _ => {
            wrong(node, what, "a string or a list of strings", problems);
            None
        }
    }
}

/// `true` or `false`.
pub fn boolean(node: &Node, what: &str, problems: &mut Problems) -> Option<bool> {
    match &node.value {
        NodeValue::Bool(b) => Some(*b),
        NodeValue::String(s) if matches!(s.as_str(), "yes" | "no" | "on" | "off") => {
            let message = format!("{what} must be `true` or `false`, found {}", node.describe());
            problems.report(node.span, message, "YAML 1.2 knows only these two".to_owned());
            None
        }
        _ => {
            wrong(node, what, "`true` or `false`", problems);
            None
        }
    }
}

/// A whole number from `min` up.
pub fn whole(node: &Node, what: &str, min: u64, problems: &mut Problems) -> Option<u64> {
    let NodeValue::Number(n) = &node.value else {
        wrong(node, what, "a whole number", problems);
        return None;
    };
    match n.as_u64() {
        Some(n) if n >= min => Some(n),
        _ => {
            wrong(node, what, &format!("a whole number from {min} up"), problems);
            None
        }
    }
}

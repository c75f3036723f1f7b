//! The pipeline's parameters with what a file of parameters and `--set` say.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::reader::{entries, suggest};
use crate::source::{Diagnostic, Problems, SourceFile, Span};
use crate::spec::no_expressions;
use crate::yaml::{self, describe_json};

/// Overrides parameters by those of a file, a YAML or JSON mapping. As with `--set`, a parameter
/// that is a mapping is replaced whole.
pub(crate) fn apply_file(
    params: &mut Map<String, Value>,
    path: &Path,
    found: &mut Vec<Diagnostic>,
) {
    let source = match SourceFile::read(path) {
        Ok(source) => source,
        Err(problem) => return found.push(*problem),
    };
    let tree = match yaml::parse(&source) {
        Ok(tree) => tree,
        Err(mut problems) => return found.append(&mut problems),
    };
    let mut problems = Problems::new(&source);
    for (key, node) in entries(&tree, "a file of parameters", &mut problems).unwrap_or_default() {
        let Some(place) = params.get_mut(&key.name) else {
            let hint = suggest(&key.name, params.keys().map(String::as_str), "known parameters");
            let hint = hint.or_else(|| Some("the pipeline has no `params`".to_owned()));
            problems.report(key.span, format!("there is no parameter `{}`", key.name), hint);
            continue;
        };
        no_expressions(node, &mut problems);
        let value = node.to_json();
        if compatible(place, &value) {
            *place = value;
        } else {
            let message = format!(
                "the parameter `{}` is {} in the pipeline, found {}",
                key.name,
                type_name(place),
                describe_json(&value)
            );
            problems.report(node.span, message, None);
        }
    }
    found.append(&mut problems.found);
}

/// Overrides parameters: `r` → `32`, `optimizer.lr` → `1e-4`. The texts on the right are YAML.
pub(crate) fn apply(
    params: &mut Map<String, Value>,
    set: &[(String, String)],
    problems: &mut Vec<Diagnostic>,
) {
    for (name, text) in set {
        let source = SourceFile::new("--set", format!("{name}={text}"));
        if let Err(diagnostics) = apply_one(params, &source, name) {
            problems.extend(diagnostics);
        }
    }
}

fn apply_one(
    params: &mut Map<String, Value>,
    source: &Arc<SourceFile>,
    name: &str,
) -> Result<(), Vec<Diagnostic>> {
    let fail = |message: String, hint: Option<String>| {
        let span = Span::new(0, name.len());
        Err(vec![Diagnostic::new(source, span, message).with_hint_opt(hint)])
    };
    let mut path = name.split('.');
    let first = path.next().unwrap_or("");
    let Some(mut place) = params.get_mut(first) else {
        let known: Vec<String> = params.keys().cloned().collect();
        let hint = suggest(first, known.iter().map(String::as_str), "known parameters");
        let hint = hint.or_else(|| Some("the pipeline has no `params`".to_owned()));
        return fail(format!("there is no parameter `{first}`"), hint);
    };
    let mut walked = first.to_owned();
    for part in path {
        let Value::Object(map) = place else {
            let message = format!("`{walked}` is {}, not a mapping", describe_json(place));
            return fail(message, Some(format!("give a value for all of it: `{walked}=…`")));
        };
        if !map.contains_key(part) {
            let known: Vec<String> = map.keys().cloned().collect();
            let hint = suggest(part, known.iter().map(String::as_str), "it has");
            return fail(format!("the parameter `{walked}` has no `{part}`"), hint);
        }
        let Some(next) = map.get_mut(part) else { return Ok(()) };
        place = next;
        walked = format!("{walked}.{part}");
    }
    let start = (name.len() + 1).min(source.text.len());
    let node = yaml::parse_range(source, start)?;
    let value = node.to_json();
    if text_is_empty(source, start) && !place.is_null() {
        let hint = format!("write `{name}=null` for nothing, `{name}='\"\"'` for an empty string");
        return fail(format!("`--set {name}=` gives no value"), Some(hint));
    }
    if !compatible(place, &value) {
        let message = format!(
            "the parameter `{walked}` is {} in the file, `--set` gives {}",
            type_name(place),
            describe_json(&value)
        );
        let hint = match (&*place, &value) {
            (Value::String(_), Value::Number(_) | Value::Bool(_)) => {
                Some(format!("quote it: `--set '{walked}=\"{}\"'`", source.snippet(node.span)))
            }
            _ => None,
        };
        return Err(vec![Diagnostic::new(source, node.span, message).with_hint_opt(hint)]);
    }
    *place = value;
    Ok(())
}

fn text_is_empty(source: &SourceFile, start: usize) -> bool {
    source.text.get(start..).is_none_or(|t| t.trim().is_empty())
}

/// Whether a value may stand in the place of another: both of one type, any number for a number,
/// anything where nothing was and nothing anywhere.
fn compatible(old: &Value, new: &Value) -> bool {
    matches!((old, new), (Value::Null, _) | (_, Value::Null))
        || std::mem::discriminant(old) == std::mem::discriminant(new)
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "`true` or `false`",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
    }
}

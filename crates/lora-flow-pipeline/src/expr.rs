//! `${{ … }}`: expressions over `params`, `env` and `matrix`.
//!
//! A string that is one expression and nothing else becomes the expression's value with its type;
//! an expression inside a longer string becomes part of the text. `$${{` stands for `${{` itself.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use minijinja::{Environment, UndefinedBehavior};
use serde_json::{Map, Value, json};

use crate::reader::suggest;
use crate::source::{Problems, Span};
use crate::yaml::{Node, NodeValue, escape_pointer, shorten};

/// Steps an expression may take; `range(1_000_000_000)` ends here.
const FUEL: u64 = 100_000;

/// What expressions can see.
pub(crate) struct Scope<'a> {
    pub params: &'a Map<String, Value>,
    /// Names under `env:`.
    pub declared_env: &'a [String],
    /// Those of them that are set.
    pub env: &'a BTreeMap<String, String>,
    /// The values of a matrix task's member.
    pub matrix: Option<&'a [(String, Value)]>,
    /// Parameters that some expression has read.
    pub used_params: &'a RefCell<BTreeSet<String>>,
}

/// A tree without expressions, and the JSON pointers where an expression had a problem (there the
/// tree holds nothing).
pub(crate) struct Expanded {
    pub node: Node,
    pub broken: Vec<String>,
}

/// Replaces all expressions of a tree by their values; problems are reported at their places.
pub(crate) fn expand(node: &Node, scope: &Scope, problems: &mut Problems) -> Expanded {
    let mut broken = Vec::new();
    let node = walk(node, scope, "", &mut broken, problems);
    Expanded { node, broken }
}

fn walk(
    node: &Node,
    scope: &Scope,
    pointer: &str,
    broken: &mut Vec<String>,
    problems: &mut Problems,
) -> Node {
    let span = node.span;
    let value = match &node.value {
        NodeValue::String(text) if text.contains("${{") => {
            return match evaluate(text, span, scope, problems) {
                Some(value) => Node::from_json(&value, span),
                None => {
                    broken.push(pointer.to_owned());
                    Node { value: NodeValue::Null, span }
                }
            };
        }
        NodeValue::Seq(items) => NodeValue::Seq(
            items
                .iter()
                .enumerate()
                .map(|(i, item)| walk(item, scope, &format!("{pointer}/{i}"), broken, problems))
                .collect(),
        ),
        NodeValue::Map(entries) => NodeValue::Map(
            entries
                .iter()
                .map(|(key, item)| {
                    let pointer = format!("{pointer}/{}", escape_pointer(&key.name));
                    (key.clone(), walk(item, scope, &pointer, broken, problems))
                })
                .collect(),
        ),
        scalar => scalar.clone(),
    };
    Node { value, span }
}

enum Segment<'a> {
    Text(&'a str),
    Expression(&'a str),
}

fn evaluate(text: &str, span: Span, scope: &Scope, problems: &mut Problems) -> Option<Value> {
    let Some(segments) = split(text) else {
        let hint = "an expression ends in `}}`".to_owned();
        problems.report(span, "this expression is not closed", hint);
        return None;
    };
    if let [Segment::Expression(expression)] = segments[..] {
        return value_of(expression, span, scope, problems);
    }
    let mut out = String::new();
    let mut good = true;
    for segment in segments {
        match segment {
            Segment::Text(text) => out.push_str(text),
            Segment::Expression(expression) => match value_of(expression, span, scope, problems) {
                Some(Value::String(s)) => out.push_str(&s),
                Some(value @ (Value::Number(_) | Value::Bool(_))) => {
                    out.push_str(&value.to_string());
                }
                Some(other) => {
                    let what = crate::yaml::describe_json(&other);
                    let message = format!("`{}` is {what}, which is not text", expression.trim());
                    let place = locate(expression, span, problems);
                    problems.report(place, message, None);
                    good = false;
                }
                None => good = false,
            },
        }
    }
    good.then_some(Value::String(out))
}

/// Text and expressions of a string, in order; none if an expression has no end.
fn split(text: &str) -> Option<Vec<Segment<'_>>> {
    let mut segments = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find("${{") {
        let before = &rest[..start];
        let after = &rest[start + 3..];
        if let Some(escaped) = before.strip_suffix('$') {
            segments.push(Segment::Text(escaped));
            segments.push(Segment::Text("${{"));
            rest = after;
            continue;
        }
        if !before.is_empty() {
            segments.push(Segment::Text(before));
        }
        let end = end_of_expression(after)?;
        segments.push(Segment::Expression(&after[..end]));
        rest = &after[end + 2..];
    }
    if !rest.is_empty() {
        segments.push(Segment::Text(rest));
    }
    Some(segments)
}

/// Offset of the `}}` that closes an expression, past braces and quotes inside it.
fn end_of_expression(text: &str) -> Option<usize> {
    let (mut depth, mut quote) = (0usize, None);
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        match (quote, bytes[i]) {
            (Some(_), b'\\') => i += 1,
            (Some(q), b) if b == q => quote = None,
            (Some(_), _) => {}
            (None, b @ (b'\'' | b'"')) => quote = Some(b),
            (None, b'{') => depth += 1,
            (None, b'}') if depth > 0 => depth -= 1,
            (None, b'}') if bytes.get(i + 1) == Some(&b'}') => return Some(i),
            _ => {}
        }
        i += 1;
    }
    None
}

fn value_of(expression: &str, span: Span, scope: &Scope, problems: &mut Problems) -> Option<Value> {
    let text = expression.trim();
    let place = locate(text, span, problems);
    if text.is_empty() {
        let hint = "write a name such as `params.r` between the braces".to_owned();
        problems.report(span, "this expression is empty", hint);
        return None;
    }
    let mut jinja = Environment::new();
    jinja.set_undefined_behavior(UndefinedBehavior::Strict);
    jinja.set_fuel(Some(FUEL));
    let compiled = match jinja.compile_expression(text) {
        Ok(compiled) => compiled,
        Err(e) => {
            let detail = e.detail().unwrap_or("syntax error").to_owned();
            let message = format!("the expression `{}` is not valid: {detail}", shorten(text));
            problems.report(place, message, None);
            return None;
        }
    };
    let globals: BTreeSet<String> = jinja.globals().map(|(name, _)| name.to_owned()).collect();
    let mut names: Vec<String> = compiled.undeclared_variables(true).into_iter().collect();
    names.sort();
    let before = problems.len();
    for name in names.iter().filter(|n| !globals.contains(n.as_str())) {
        check_name(name, locate(name, place, problems), scope, problems);
    }
    if problems.len() > before {
        return None;
    }
    let matrix: Map<String, Value> = scope.matrix.unwrap_or(&[]).iter().cloned().collect();
    let context = json!({ "params": scope.params, "env": scope.env, "matrix": matrix });
    let value = match compiled.eval(minijinja::value::Serde(&context)) {
        Ok(value) if !value.is_undefined() => value,
        Ok(_) => {
            report_undefined(text, &names, place, scope, problems);
            return None;
        }
        Err(e) if e.kind() == minijinja::ErrorKind::UndefinedError => {
            report_undefined(text, &names, place, scope, problems);
            return None;
        }
        Err(e) => {
            let reason = match e.kind() {
                minijinja::ErrorKind::OutOfFuel => "it takes too long".to_owned(),
                _ => e.detail().map_or_else(|| e.kind().to_string(), str::to_owned),
            };
            let message = format!("the expression `{}` fails: {reason}", shorten(text));
            problems.report(place, message, None);
            return None;
        }
    };
    if !is_small(&value, &mut { FUEL }) {
        let message = format!("the expression `{}` has too large a value", shorten(text));
        problems.report(place, message, None);
        return None;
    }
    match serde_json::to_value(&value) {
        Ok(Value::Null) if value.is_number() => {
            let message = format!("the expression `{}` is not a finite number", shorten(text));
            problems.report(place, message, None);
            None
        }
        Ok(value) => Some(value),
        Err(_) => {
            let message = format!("the expression `{}` gives no plain value", shorten(text));
            problems.report(place, message, None);
            None
        }
    }
}

/// Whether a value has no more parts than `room`. `[1] * 90_000_000` takes one step and no
/// memory until somebody walks through it.
fn is_small(value: &minijinja::Value, room: &mut u64) -> bool {
    use minijinja::value::ValueKind;
    let Some(left) = room.checked_sub(1) else { return false };
    *room = left;
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => {
            let is_map = value.kind() == ValueKind::Map;
            value.try_iter().is_ok_and(|mut items| {
                items.all(|item| match is_map {
                    true => value.get_item(&item).is_ok_and(|item| is_small(&item, room)),
                    false => is_small(&item, room),
                })
            })
        }
        _ => true,
    }
}

/// Checks one dotted name of an expression (`params.lora.r`).
fn check_name(name: &str, place: Span, scope: &Scope, problems: &mut Problems) {
    let mut parts = name.split('.');
    let root = parts.next().unwrap_or(name);
    let first = parts.next();
    match (root, first) {
        ("params", None) => {
            scope.used_params.borrow_mut().extend(scope.params.keys().cloned());
        }
        ("params", Some(first)) => {
            scope.used_params.borrow_mut().insert(first.to_owned());
            let Some(mut value) = scope.params.get(first) else {
                let known = scope.params.keys().map(String::as_str);
                let hint = suggest(first, known, "known parameters");
                let hint = hint.or_else(|| Some("add it under `params`".to_owned()));
                problems.report(place, format!("there is no parameter `{first}`"), hint);
                return;
            };
            for part in parts {
                let Value::Object(map) = value else { return };
                if matches!(part, "items" | "keys" | "values" | "get") {
                    return;
                }
                let Some(next) = map.get(part) else {
                    let hint = suggest(part, map.keys().map(String::as_str), "it has");
                    let message = format!("the parameter `{first}` has no `{part}`");
                    problems.report(place, message, hint);
                    return;
                };
                value = next;
            }
        }
        ("env", Some(first)) => {
            if !scope.declared_env.iter().any(|n| n == first) {
                let near =
                    lora_flow_core::nearest(first, scope.declared_env.iter().map(String::as_str));
                let hint = near.map_or_else(
                    || format!("add `env: [{first}]` to the pipeline"),
                    |near| format!("did you mean `{near}`?"),
                );
                let message = format!("the environment variable `{first}` is not declared");
                problems.report(place, message, hint);
            }
        }
        ("env", None) => {}
        ("matrix", first) => match (scope.matrix, first) {
            (None, _) => {
                problems.report(place, "`matrix` is only known in a task that has a `matrix`", None)
            }
            (Some(axes), Some(first)) if !axes.iter().any(|(name, _)| name == first) => {
                let known = axes.iter().map(|(name, _)| name.as_str());
                let hint = suggest(first, known, "its axes");
                problems.report(place, format!("the matrix has no axis `{first}`"), hint);
            }
            _ => {}
        },
        _ => {
            let hint = if scope.params.contains_key(root) {
                Some(format!("did you mean `params.{root}`?"))
            } else if scope.declared_env.iter().any(|n| n == root) {
                Some(format!("did you mean `env.{root}`?"))
            } else {
                suggest(root, ["params", "env", "matrix"], "an expression knows")
            };
            problems.report(place, format!("unknown name `{root}`"), hint);
        }
    }
}

/// Says which name of an expression had no value at run time.
fn report_undefined(
    text: &str,
    names: &[String],
    place: Span,
    scope: &Scope,
    problems: &mut Problems,
) {
    let unset = names
        .iter()
        .filter_map(|n| n.strip_prefix("env."))
        .find(|name| !scope.env.contains_key(*name));
    match unset {
        Some(name) => problems.report(
            locate(&format!("env.{name}"), place, problems),
            format!("the environment variable `{name}` is not set"),
            format!("set it, or give a default: `env.{name} | default('…')`"),
        ),
        None => problems.report(place, format!("`{}` has no value", shorten(text)), None),
    }
}

/// The place of a piece of text inside a place, as far as it stands there as it is.
fn locate(needle: &str, span: Span, problems: &Problems) -> Span {
    let needle = needle.trim();
    match problems.source.snippet(span).find(needle) {
        Some(offset) if !needle.is_empty() => {
            Span::new(span.start + offset, span.start + offset + needle.len())
        }
        _ => span,
    }
}

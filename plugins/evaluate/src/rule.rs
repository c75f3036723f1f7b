//! One rule of a gate: an expression over metrics that is true or false.
//!
//! A rule may only read `input.metric`, so that everything it depends on is known before it is
//! evaluated. A metric that is null, missing or counted over no tokens makes it fail whatever the
//! expression says.

use std::collections::BTreeMap;
use std::ops::Range;

use lora_flow_core::{Error, Result, nearest};
use minijinja::value::ValueKind;
use minijinja::{Environment, UndefinedBehavior, Value};
use serde::Serialize;

/// Steps that an expression may take.
const FUEL: u64 = 100_000;

/// The metrics of one input: name → number, `None` where it is null.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    pub(crate) values: BTreeMap<String, Option<f64>>,
    /// Digest of the data they were measured on, if they say.
    pub(crate) data: Option<String>,
}

/// What a rule found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Finding {
    pub(crate) rule: String,
    pub(crate) passed: bool,
    /// The two sides, where the rule is one comparison.
    pub(crate) left: Option<f64>,
    pub(crate) right: Option<f64>,
    /// Every metric that the rule read.
    pub(crate) values: BTreeMap<String, Option<f64>>,
    /// Why it failed, where that is not plain from the values.
    pub(crate) reason: Option<String>,
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_fuel(Some(FUEL));
    env
}

fn message(e: &minijinja::Error) -> String {
    e.detail().map_or_else(|| e.kind().to_string(), str::to_owned)
}

/// What is wrong with a rule as it is written.
pub(crate) fn check(rule: &str) -> Result<(), String> {
    let env = environment();
    let expression = env
        .compile_expression(rule)
        .map_err(|e| format!("`{rule}` is no expression: {}", message(&e)))?;
    if expression.undeclared_variables(false).is_empty() {
        return Err(format!("`{rule}` reads no metric, so it checks nothing"));
    }
    Ok(())
}

/// `input.metric` for everything that a rule reads.
fn references(rule: &str, inputs: &BTreeMap<String, Metrics>) -> Result<Vec<(String, String)>> {
    let env = environment();
    let expression = env
        .compile_expression(rule)
        .map_err(|e| Error::new(format!("`{rule}` is no expression: {}", message(&e))))?;
    let mut names: Vec<_> = expression.undeclared_variables(true).into_iter().collect();
    names.sort();
    let mut found = Vec::new();
    for name in names {
        let (input, metric) = name.split_once('.').unwrap_or((&name, ""));
        let Some(metrics) = inputs.get(input) else {
            let known: Vec<_> = inputs.keys().map(|k| format!("`{k}`")).collect();
            let e = Error::new(format!(
                "`{rule}` reads `{input}`, which is no input of the gate; they are {}",
                known.join(", ")
            ));
            return Err(match nearest(input, inputs.keys().map(String::as_str)) {
                Some(name) => e.with_hint(format!("did you mean `{name}`?")),
                None => e,
            });
        };
        if metric.is_empty() {
            return Err(Error::new(format!("`{rule}` reads `{input}` as a whole"))
                .with_hint(format!("name one of its metrics: `{input}.NAME`")));
        }
        if !metrics.values.contains_key(metric) {
            let known: Vec<_> = metrics.values.keys().map(|k| format!("`{k}`")).collect();
            let e = Error::new(format!(
                "`{rule}` reads `{metric}` of `{input}`, which has {}",
                known.join(", ")
            ));
            return Err(match nearest(metric, metrics.values.keys().map(String::as_str)) {
                Some(name) => e.with_hint(format!("did you mean `{input}.{name}`?")),
                None => e,
            });
        }
        found.push((input.to_owned(), metric.to_owned()));
    }
    Ok(found)
}

/// Evaluates a rule.
///
/// # Errors
/// When it reads an unknown input or metric, compares metrics of different data without leave or
/// values of different kinds, or does not give true or false.
pub(crate) fn evaluate(
    rule: &str,
    inputs: &BTreeMap<String, Metrics>,
    allow_different_data: bool,
) -> Result<Finding> {
    let references = references(rule, inputs)?;
    if references.is_empty() {
        return Err(Error::new(format!("`{rule}` reads no metric, so it checks nothing")));
    }
    if !allow_different_data {
        check_data(rule, &references, inputs)?;
    }
    let value_of = |(input, metric): &(String, String)| {
        inputs.get(input).and_then(|m| m.values.get(metric).copied().flatten())
    };
    let mut finding = Finding {
        rule: rule.to_owned(),
        passed: false,
        left: None,
        right: None,
        values: references.iter().map(|r| (format!("{}.{}", r.0, r.1), value_of(r))).collect(),
        reason: None,
    };
    if let Some((name, _)) = finding.values.iter().find(|(_, value)| value.is_none()) {
        finding.reason = Some(format!("`{name}` is not a finite number"));
        return Ok(finding);
    }
    // `evaluate` counts tokens, `evaluate-tasks` the samples of each task.
    let empty = |(input, metric): &&(String, String)| {
        let task = metric.split('.').next().unwrap_or_default();
        let count =
            |name: &str| inputs.get(input).and_then(|m| m.values.get(name).copied().flatten());
        count("tokens") == Some(0.0) || count(&format!("{task}.samples")) == Some(0.0)
    };
    if let Some((input, _)) = references.iter().find(empty) {
        finding.reason = Some(format!("`{input}` was measured on no tokens"));
        return Ok(finding);
    }

    let mut scope = serde_json::Map::new();
    for reference in &references {
        if let Some(value) = value_of(reference) {
            put(&mut scope, &format!("{}.{}", reference.0, reference.1), value);
        }
    }
    let scope = lora_flow_data::jinja::from_json(&serde_json::Value::Object(scope));
    let env = environment();
    let run = |text: &str| -> Result<Value> {
        env.compile_expression(text)
            .and_then(|e| e.eval(scope.clone()))
            .map_err(|e| Error::new(format!("`{rule}` cannot be evaluated: {}", message(&e))))
    };
    let result = run(rule)?;
    if result.kind() != ValueKind::Bool {
        return Err(Error::new(format!("`{rule}` gives `{result}`, not true or false"))
            .with_hint("a rule compares: `candidate.perplexity < 0.97 * baseline.perplexity`"));
    }
    // Values of two kinds have an order as well, so `x < '5'` would hold for every number x.
    for operands in compared(rule) {
        let found = operands.iter().filter_map(|text| Some((*text, run(text).ok()?.kind())));
        let found: Vec<_> = found.collect();
        if let Some(((first, kind), (other, other_kind))) =
            found.iter().zip(found.iter().skip(1)).find(|((_, a), (_, b))| a != b)
        {
            return Err(Error::new(format!(
                "`{rule}` compares `{first}`, a {kind}, with `{other}`, a {other_kind}"
            ))
            .with_hint("numbers stand in a rule without quotes or brackets"));
        }
    }
    finding.passed = result.is_true();
    if let Some((left, right)) = sides(rule) {
        let side = |text: &str| run(text).ok().and_then(|v| f64::try_from(v).ok());
        (finding.left, finding.right) = (side(left), side(right));
        if [finding.left, finding.right].iter().flatten().any(|x| !x.is_finite()) {
            finding.passed = false;
            finding.reason = Some("a side is not a finite number".to_owned());
        }
    }
    Ok(finding)
}

/// Puts a number under a dotted name.
fn put(scope: &mut serde_json::Map<String, serde_json::Value>, name: &str, value: f64) {
    match name.split_once('.') {
        None => drop(scope.insert(name.to_owned(), value.into())),
        Some((first, rest)) => {
            let inner = scope.entry(first.to_owned()).or_insert_with(|| serde_json::json!({}));
            if let Some(inner) = inner.as_object_mut() {
                put(inner, rest, value);
            }
        }
    }
}

/// Refuses to compare metrics of different data.
fn check_data(
    rule: &str,
    references: &[(String, String)],
    inputs: &BTreeMap<String, Metrics>,
) -> Result<()> {
    let mut seen: Option<(&str, &str)> = None;
    for (input, _) in references {
        let Some(data) = inputs.get(input).and_then(|m| m.data.as_deref()) else { continue };
        match seen {
            Some((first, other)) if other != data => {
                return Err(Error::new(format!(
                    "`{rule}` compares `{first}` and `{input}`, which were measured on different \
                     data"
                ))
                .with_hint(
                    "evaluate both on the same tokens and the same `limit`, or set \
                     `allow_different_data: true`",
                ));
            }
            Some(_) => {}
            None => seen = Some((input, data)),
        }
    }
    Ok(())
}

/// What parts an expression outside of its brackets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// A comparison.
    Operator,
    /// A word that binds looser than a comparison, or makes another one.
    Word,
}

/// Comparisons and looser words of an expression outside of its brackets, with their places.
fn marks(rule: &str) -> Option<Vec<(Mark, Range<usize>)>> {
    let bytes = rule.as_bytes();
    let (mut depth, mut quote, mut found) = (0i32, None, Vec::new());
    let mut i = 0;
    while i < bytes.len() {
        let byte = bytes[i];
        let two = bytes.get(i..i + 2).unwrap_or_default();
        match (quote, byte) {
            (Some(_), b'\\') => i += 1,
            (Some(q), _) if byte == q => quote = None,
            (Some(_), _) => {}
            (None, b'"' | b'\'') => quote = Some(byte),
            (None, b'(' | b'[' | b'{') => depth += 1,
            (None, b')' | b']' | b'}') => depth -= 1,
            (None, b'<' | b'>' | b'=' | b'!') if depth == 0 => {
                let len = if [b"<=", b">=", b"==", b"!="].iter().any(|op| op == &two) {
                    2
                } else if byte == b'<' || byte == b'>' {
                    1
                } else {
                    return None;
                };
                found.push((Mark::Operator, i..i + len));
                i += len - 1;
            }
            (None, b'a'..=b'z' | b'A'..=b'Z' | b'_') => {
                let end = bytes[i..]
                    .iter()
                    .position(|b| !(b.is_ascii_alphanumeric() || *b == b'_'))
                    .map_or(bytes.len(), |n| i + n);
                let word = rule.get(i..end)?;
                if depth == 0 && matches!(word, "and" | "or" | "not" | "if" | "else" | "in" | "is")
                {
                    found.push((Mark::Word, i..end));
                }
                i = end - 1;
            }
            _ => {}
        }
        i += 1;
    }
    Some(found)
}

/// The two sides of a rule that is a single comparison.
fn sides(rule: &str) -> Option<(&str, &str)> {
    match marks(rule)?.as_slice() {
        [(Mark::Operator, at)] => Some((rule.get(..at.start)?.trim(), rule.get(at.end..)?.trim())),
        _ => None,
    }
}

/// What each comparison in an expression compares, also within `and`, `or`, `not` and brackets.
fn compared(expression: &str) -> Vec<Vec<&str>> {
    let expression = expression.trim();
    let Some(marks) = marks(expression) else { return Vec::new() };
    if marks.is_empty() {
        let inner = expression.strip_prefix('(').and_then(|e| e.strip_suffix(')'));
        return inner.map(compared).unwrap_or_default();
    }
    let mut groups = vec![Vec::new()];
    let mut start = 0;
    let end = (Mark::Word, expression.len()..expression.len());
    for (mark, at) in marks.into_iter().chain([end]) {
        let operand = expression.get(start..at.start).unwrap_or_default().trim();
        groups.last_mut().into_iter().for_each(|group| group.push(operand));
        if mark == Mark::Word {
            groups.push(Vec::new());
        }
        start = at.end;
    }
    let inner: Vec<_> = groups.iter().flatten().flat_map(|operand| compared(operand)).collect();
    groups.retain(|group| group.len() > 1);
    groups.extend(inner);
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> BTreeMap<String, Metrics> {
        let metrics = |values: &[(&str, Option<f64>)], data: &str| Metrics {
            values: values.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect(),
            data: Some(data.to_owned()),
        };
        let base = [("perplexity", Some(20.0)), ("loss", None), ("tokens", Some(5.0))];
        BTreeMap::from([
            ("candidate".into(), metrics(&[("perplexity", Some(18.0))], "x")),
            ("baseline".into(), metrics(&base, "x")),
            ("other".into(), metrics(&[("perplexity", Some(1.0))], "y")),
            ("empty".into(), metrics(&[("perplexity", Some(1.0)), ("tokens", Some(0.0))], "x")),
        ])
    }

    fn run(rule: &str) -> Result<Finding> {
        evaluate(rule, &inputs(), false)
    }

    #[test]
    fn rules_pass_and_fail_by_their_numbers_and_show_both_sides() {
        let finding = run("candidate.perplexity < 0.97 * baseline.perplexity").unwrap();
        assert!(finding.passed);
        assert_eq!((finding.left, finding.right), (Some(18.0), Some(19.4)));
        assert_eq!(finding.values["baseline.perplexity"], Some(20.0));
        let finding = run("candidate.perplexity <= 0.5 * (baseline.perplexity)").unwrap();
        assert!(!finding.passed);
        assert_eq!(finding.right, Some(10.0));
        let both = run("candidate.perplexity < 19 and baseline.perplexity > 19").unwrap();
        assert!(both.passed && both.left.is_none());
    }

    #[test]
    fn values_that_are_no_numbers_never_pass() {
        for rule in [
            "baseline.loss < 5",
            "not (baseline.loss > 5)",
            "baseline.loss != 3 or true",
            "empty.perplexity < 5",
            "candidate.perplexity / (baseline.perplexity - 20) > 1",
        ] {
            let finding = run(rule);
            assert!(finding.as_ref().is_ok_and(|f| !f.passed) || finding.is_err(), "{rule}");
        }
        assert!(run("baseline.loss < 5").unwrap().reason.unwrap().contains("`baseline.loss`"));
        assert!(run("empty.perplexity < 5").unwrap().reason.unwrap().contains("no tokens"));
    }

    #[test]
    fn unknown_names_and_other_results_are_errors() {
        let error = |rule: &str| run(rule).unwrap_err();
        let e = error("candidat.perplexity < 1");
        assert!(e.to_string().contains("`baseline`"), "{e}");
        assert_eq!(e.hint(), Some("did you mean `candidate`?"));
        let e = error("candidate.perplexty < 1");
        assert_eq!(e.hint(), Some("did you mean `candidate.perplexity`?"));
        assert!(error("candidate.perplexity").to_string().contains("not true or false"));
        assert!(error("candidate['perplexity'] < 1").to_string().contains("as a whole"));
        assert!(error("candidate < 1").to_string().contains("as a whole"));
    }

    #[test]
    fn different_data_is_compared_only_with_leave() {
        let rule = "candidate.perplexity < other.perplexity";
        assert!(run(rule).unwrap_err().to_string().contains("different data"));
        assert!(!evaluate(rule, &inputs(), true).unwrap().passed);
    }

    #[test]
    fn numbers_are_compared_with_numbers_alone() {
        for rule in [
            "candidate.perplexity < '5'",
            "candidate.perplexity < 1 or candidate.perplexity < \"5\"",
            "not (candidate.perplexity > 20 or 1 < candidate.perplexity < '5')",
            "candidate.perplexity < [1]",
            "(candidate.perplexity < 5) >= 0",
        ] {
            let error = run(rule).unwrap_err().to_string();
            assert!(error.contains("compares"), "{error}");
        }
        for rule in [
            "1 < candidate.perplexity < 19",
            "(candidate.perplexity < 19) == (baseline.perplexity < 21)",
            "not candidate.perplexity | round(1) > 19 and (candidate.perplexity) + (1) < 20",
            "candidate.perplexity in [18] or false",
        ] {
            assert!(run(rule).unwrap().passed, "{rule}");
        }
    }

    #[test]
    fn rules_that_cannot_be_parsed_or_check_nothing_are_found_early() {
        assert!(check("a.b < c.d").is_ok());
        assert!(check("a.b <").unwrap_err().contains("no expression"));
        assert!(check("1 < 2").unwrap_err().contains("checks nothing"));
    }

    #[test]
    fn sides_are_split_at_the_one_comparison_outside_brackets() {
        assert_eq!(sides("a.x<=b.y"), Some(("a.x", "b.y")));
        assert_eq!(sides("(a.x < 1) == b.y"), Some(("(a.x < 1)", "b.y")));
        assert_eq!(sides("a['<'] > 1"), Some(("a['<']", "1")));
        assert_eq!(sides("a.x < 1 and b.y < 2"), None);
        assert_eq!(sides("1 < a.x < 2"), None);
        assert_eq!(sides("not a.x < 1"), None);
        assert_eq!(sides("a.x"), None);
    }
}

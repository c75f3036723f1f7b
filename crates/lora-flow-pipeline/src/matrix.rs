//! `matrix`: one task for every combination of values.

use serde_json::Value;

use crate::expr::{Scope, expand};
use crate::source::Problems;
use crate::spec::TaskSpec;
use crate::yaml::{NodeValue, shorten};

/// Most members one matrix may have.
const MAX_MEMBERS: usize = 1000;

/// The values of one member, in the order of the axes.
pub(crate) type Assignment = Vec<(String, Value)>;

/// All members of a task: a single one without values if it has no matrix. None if the matrix has
/// problems, which are reported.
pub(crate) fn members(
    task: &TaskSpec,
    scope: &Scope,
    problems: &mut Problems,
) -> Option<Vec<Assignment>> {
    let mut members: Vec<Assignment> = vec![Vec::new()];
    let mut good = true;
    for (axis, node) in &task.matrix {
        let expanded = expand(node, scope, problems);
        if !expanded.broken.is_empty() {
            good = false;
            continue;
        }
        let NodeValue::Seq(items) = &expanded.node.value else {
            let message = format!(
                "the axis `{}` of a matrix must be a list of values, found {}",
                axis.name,
                expanded.node.describe()
            );
            problems.report(node.span, message, None);
            good = false;
            continue;
        };
        if items.is_empty() {
            let message = format!("the axis `{}` of the matrix has no values", axis.name);
            problems.report(node.span, message, None);
            good = false;
        }
        let mut values: Vec<Value> = Vec::new();
        for item in items {
            let value = item.to_json();
            if values.iter().any(|v| text(v) == text(&value)) {
                let message = format!("the value `{}` stands twice in the matrix", text(&value));
                problems.report(item.span, message, None);
                good = false;
            }
            values.push(value);
        }
        if members.len().saturating_mul(values.len()) > MAX_MEMBERS {
            let message = format!("the matrix has more than {MAX_MEMBERS} members");
            problems.report(axis.span, message, None);
            return None;
        }
        members = members
            .iter()
            .flat_map(|member| {
                values.iter().map(|value| {
                    let mut member = member.clone();
                    member.push((axis.name.clone(), value.clone()));
                    member
                })
            })
            .collect();
    }
    good.then_some(members)
}

/// `train[r=8,alpha=16]`; the task's name alone if it has no matrix.
pub(crate) fn member_id(task: &str, member: &Assignment) -> String {
    if member.is_empty() {
        return task.to_owned();
    }
    let pairs: Vec<String> = member.iter().map(|(k, v)| format!("{k}={}", text(v))).collect();
    format!("{task}[{}]", pairs.join(","))
}

/// A value as it stands in the name of a member.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::String(s) => shorten(s),
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join("+"),
        other => other.to_string(),
    }
}

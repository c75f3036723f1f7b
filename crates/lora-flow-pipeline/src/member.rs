//! One task for one combination of its matrix: expressions replaced, everything typed.

use std::time::Duration;

use crate::expr::{Scope, expand};
use crate::kinds::Kind;
use crate::matrix::{Assignment, member_id};
use crate::params::{Configured, configure};
use crate::plan::Resources;
use crate::reader::{At, Known, entries, mapping, one_or_many, string, whole, wrong};
use crate::source::{Problems, Span};
use crate::spec::TaskSpec;
use crate::yaml::{Key, Node, NodeValue, Places};

/// Longest time limit: a year.
const MAX_SECONDS: f64 = 366.0 * 86_400.0;

/// A configured task before it is connected.
pub(crate) struct Member<'a> {
    pub spec: &'a TaskSpec,
    pub id: String,
    pub assignment: Assignment,
    pub kind: Option<&'a Kind>,
    /// None if the kind is unknown or the parameters have problems; then nothing is known about
    /// its ports, and nothing is said about them.
    pub configured: Option<Configured>,
    pub places: Places,
    pub inputs: Vec<InputSpec>,
    pub publish: Vec<(Option<Key>, At<String>)>,
    pub resources: Resources,
    pub timeout: Option<Duration>,
    pub retries: u32,
}

/// One entry under `inputs`.
pub(crate) struct InputSpec {
    pub port: Key,
    pub references: Vec<At<String>>,
    /// Written as a list.
    pub list: bool,
    pub span: Span,
}

/// Makes one member of a task.
pub(crate) fn member<'a>(
    spec: &'a TaskSpec,
    kind: Option<&'a Kind>,
    assignment: Assignment,
    scope: &Scope,
    problems: &mut Problems,
) -> Member<'a> {
    let scope = Scope { matrix: (!assignment.is_empty()).then_some(&assignment), ..*scope };
    let nothing = Node { value: NodeValue::Null, span: spec.name.span };
    let with = expand(spec.with.as_ref().unwrap_or(&nothing), &scope, problems);
    let places = with.node.places();
    let configured =
        kind.and_then(|kind| configure(kind, &with, &places, spec.name.span, problems));
    let mut part = |node: &Option<Node>| {
        let expanded = expand(node.as_ref()?, &scope, problems);
        expanded.broken.is_empty().then_some(expanded.node)
    };
    let inputs_node = part(&spec.inputs);
    let publish_node = part(&spec.publish);
    let resources_node = part(&spec.resources);
    let timeout_node = part(&spec.timeout);
    let retries_node = part(&spec.retries);
    Member {
        spec,
        id: member_id(&spec.name.name, &assignment),
        kind,
        configured,
        places,
        inputs: inputs_node.map(|n| inputs(&n, problems)).unwrap_or_default(),
        publish: publish_node.map(|n| publish(&n, problems)).unwrap_or_default(),
        resources: resources_node.map(|n| resources(&n, problems)).unwrap_or_default(),
        timeout: timeout_node.and_then(|n| timeout(&n, problems)),
        retries: retries_node.and_then(|n| retries(&n, problems)).unwrap_or(0),
        assignment,
    }
}

fn inputs(node: &Node, problems: &mut Problems) -> Vec<InputSpec> {
    if matches!(node.value, NodeValue::Seq(_) | NodeValue::String(_)) {
        problems.report(
            node.span,
            format!("`inputs` must be a mapping, found {}", node.describe()),
            "name the port of each input: `inputs: { model: base }`".to_owned(),
        );
        return Vec::new();
    }
    let Some(entries) = entries(node, "`inputs`", problems) else { return Vec::new() };
    let input = |(port, node): &(Key, Node)| {
        let what = format!("the input `{}`", port.name);
        Some(InputSpec {
            port: port.clone(),
            references: one_or_many(node, &what, problems)?,
            list: matches!(node.value, NodeValue::Seq(_)),
            span: node.span,
        })
    };
    entries.iter().filter_map(input).collect()
}

fn publish(node: &Node, problems: &mut Problems) -> Vec<(Option<Key>, At<String>)> {
    match &node.value {
        NodeValue::Map(entries) => entries
            .iter()
            .filter_map(|(output, path)| {
                let what = format!("the path of `{}`", output.name);
                Some((Some(output.clone()), string(path, &what, problems)?))
            })
            .collect(),
        NodeValue::String(_) => {
            string(node, "`publish`", problems).map(|path| (None, path)).into_iter().collect()
        }
        _ => {
            wrong(node, "`publish`", "a path or a mapping of outputs to paths", problems);
            Vec::new()
        }
    }
}

fn resources(node: &Node, problems: &mut Problems) -> Resources {
    const KNOWN: Known = Known {
        of: "`resources`",
        keys: &["cpu", "gpu", "memory"],
        aliases: &[
            ("cpus", "cpu"),
            ("cores", "cpu"),
            ("threads", "cpu"),
            ("gpus", "gpu"),
            ("mem", "memory"),
            ("ram", "memory"),
        ],
    };
    let mut resources = Resources::default();
    for (key, node) in mapping(node, &KNOWN, problems).unwrap_or_default() {
        match key.name.as_str() {
            "cpu" => resources.cpu = whole(node, "`cpu`", 1, problems).unwrap_or(0) as usize,
            "gpu" => {
                resources.gpu = whole(node, "`gpu`", 0, problems).map(|n| n as usize);
            }
            "memory" => resources.memory = memory(node, problems),
            _ => {}
        }
    }
    resources
}

/// Bytes: a whole number, or a number with a unit (`8GiB`, `512 MB`).
fn memory(node: &Node, problems: &mut Problems) -> Option<u64> {
    let bytes = match &node.value {
        NodeValue::Number(n) => n.as_u64(),
        NodeValue::String(text) => parse_memory(text),
        _ => None,
    };
    if bytes.is_none() {
        let message = format!("`memory` must be a size, found {}", node.describe());
        problems.report(node.span, message, "write it like `8GiB` or `512MB`".to_owned());
    }
    bytes
}

fn parse_memory(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(split);
    let unit = unit.trim().to_ascii_lowercase();
    let unit = unit.strip_suffix('b').unwrap_or(&unit);
    let (prefix, base) = match unit.strip_suffix('i') {
        Some(prefix) => (prefix, 1024f64),
        None => (unit, 1000f64),
    };
    let power = ["", "k", "m", "g", "t"].iter().position(|p| *p == prefix)?;
    let bytes = number.parse::<f64>().ok()? * base.powi(power as i32);
    (bytes.is_finite() && bytes < 1e18).then_some(bytes as u64)
}

/// `90s`, `10m`, `1h30m`, `2d`.
fn timeout(node: &Node, problems: &mut Problems) -> Option<Duration> {
    let duration = node.as_str().and_then(parse_duration);
    if duration.is_none() {
        let message = format!("`timeout` must be a duration, found {}", node.describe());
        problems.report(node.span, message, "write it like `90s`, `10m` or `1h30m`".to_owned());
    }
    duration
}

fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = rest[digits..].trim_start();
        let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        seconds += number
            * match &rest[..letters] {
                "ms" => 0.001,
                "s" | "sec" => 1.0,
                "m" | "min" => 60.0,
                "h" => 3600.0,
                "d" => 86_400.0,
                _ => return None,
            };
        rest = rest[letters..].trim_start();
    }
    (seconds > 0.0 && seconds <= MAX_SECONDS).then(|| Duration::from_secs_f64(seconds))
}

fn retries(node: &Node, problems: &mut Problems) -> Option<u32> {
    let retries = whole(node, "`retries`", 0, problems)?;
    if retries > 100 {
        problems.report(node.span, format!("`retries` must be at most 100, found {retries}"), None);
        return None;
    }
    u32::try_from(retries).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_memory("8GiB"), Some(8 << 30));
        assert_eq!(parse_memory("512 MB"), Some(512_000_000));
        assert_eq!(parse_memory("1.5g"), Some(1_500_000_000));
        assert_eq!(parse_memory("12B"), Some(12));
        for bad in ["", "8", "GiB", "8 cats", "1.2.3G", "-1G"] {
            assert_eq!(parse_memory(bad), None, "{bad}");
        }
    }

    #[test]
    fn durations() {
        let seconds = |text| parse_duration(text).map(|d| d.as_secs_f64());
        assert_eq!(seconds("90s"), Some(90.0));
        assert_eq!(seconds("1h30m"), Some(5400.0));
        assert_eq!(seconds("1.5 h"), Some(5400.0));
        for bad in ["", "10", "m", "10 weeks", "0s", "9999999d", "1..2s", "é"] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }
}

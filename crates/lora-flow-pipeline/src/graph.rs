//! A plan as a picture: Mermaid, Graphviz or SVG.

mod svg;

pub use svg::run_svg;

use std::fmt::Write;
use std::str::FromStr;

use lora_flow_core::Error;

use crate::plan::Plan;
use crate::run::TaskStatus;

/// A text format for graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GraphFormat {
    /// Mermaid, which GitHub and many editors render.
    Mermaid,
    /// Graphviz.
    Dot,
    /// A picture that needs no other program.
    Svg,
}

impl FromStr for GraphFormat {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "mermaid" => Ok(Self::Mermaid),
            "dot" => Ok(Self::Dot),
            "svg" => Ok(Self::Svg),
            _ => Err(Error::new(format!("unknown graph format `{s}`"))
                .with_hint("use `mermaid`, `dot` or `svg`")),
        }
    }
}

/// Draws a plan: tasks with their kinds, artifacts along solid arrows, `needs` along dashed ones.
/// An SVG has the colours of what `states` ([`crate::Engine::explain`]) says; it may be empty.
pub fn graph(plan: &Plan, format: GraphFormat, states: &[TaskStatus]) -> String {
    match format {
        GraphFormat::Mermaid => mermaid(plan),
        GraphFormat::Dot => dot(plan),
        GraphFormat::Svg => svg::svg(plan, states),
    }
}

/// `port` of the consumer, with the kind that flows.
fn edge_label(plan: &Plan, task: usize, output: &str, port: &str) -> String {
    let port_of = plan.tasks.get(task).and_then(|t| t.outputs.get(output));
    match port_of.and_then(|p| p.kinds.first()) {
        Some(kind) if output == port => format!("{kind}"),
        Some(kind) => format!("{port}: {kind}"),
        None => port.to_owned(),
    }
}

/// Tasks waited for through `needs` alone.
fn order_only(plan: &Plan, index: usize) -> Vec<usize> {
    let task = &plan.tasks[index];
    let fed = |t: &usize| task.inputs.iter().any(|e| e.task == *t);
    task.needs.iter().copied().filter(|t| !fed(t)).collect()
}

fn mermaid(plan: &Plan) -> String {
    let escape = |s: &str| s.replace('&', "&amp;").replace('"', "#quot;").replace('<', "&lt;");
    let mut out = String::from("flowchart TD\n");
    for (i, task) in plan.tasks.iter().enumerate() {
        let (id, kind) = (escape(&task.id), escape(&task.kind));
        let label = if id == kind { id } else { format!("{id}<br/><i>{kind}</i>") };
        let _ = writeln!(out, "    t{i}[\"{label}\"]");
        for (n, (_, path)) in task.publish.iter().enumerate() {
            let shown = path.strip_prefix(&plan.root).unwrap_or(path).display().to_string();
            let _ = writeln!(out, "    t{i} --> p{i}_{n}[/\"{}\"/]", escape(&shown));
        }
    }
    for (i, task) in plan.tasks.iter().enumerate() {
        for edge in &task.inputs {
            let label = escape(&edge_label(plan, edge.task, &edge.output, &edge.port));
            let _ = writeln!(out, "    t{} -- \"{label}\" --> t{i}", edge.task);
        }
        for before in order_only(plan, i) {
            let _ = writeln!(out, "    t{before} -.-> t{i}");
        }
    }
    out
}

fn dot(plan: &Plan) -> String {
    let quote = |s: &str| format!("\"{}\"", s.replace('\\', "\\\\").replace('"', "\\\""));
    let mut out = format!("digraph {} {{\n", quote(&plan.name));
    out.push_str(
        "    rankdir=TB;\n    node [shape=box, style=rounded, fontname=\"sans-serif\"];\n",
    );
    out.push_str("    edge [fontname=\"sans-serif\", fontsize=10];\n");
    for (i, task) in plan.tasks.iter().enumerate() {
        let label = if task.id == task.kind {
            quote(&task.id)
        } else {
            // `\n` is Graphviz's own line break and must not be escaped.
            let (id, kind) = (quote(&task.id), quote(&task.kind));
            format!("{}\\n({})\"", id.trim_end_matches('"'), kind.trim_matches('"'))
        };
        let _ = writeln!(out, "    t{i} [label={label}];");
        for (n, (_, path)) in task.publish.iter().enumerate() {
            let shown = path.strip_prefix(&plan.root).unwrap_or(path).display().to_string();
            let _ = writeln!(out, "    p{i}_{n} [label={}, shape=folder];", quote(&shown));
            let _ = writeln!(out, "    t{i} -> p{i}_{n};");
        }
    }
    for (i, task) in plan.tasks.iter().enumerate() {
        for edge in &task.inputs {
            let label = quote(&edge_label(plan, edge.task, &edge.output, &edge.port));
            let _ = writeln!(out, "    t{} -> t{i} [label={label}];", edge.task);
        }
        for before in order_only(plan, i) {
            let _ = writeln!(out, "    t{before} -> t{i} [style=dashed];");
        }
    }
    out.push_str("}\n");
    out
}

//! The reference of task kinds in Markdown, from the same schemas and ports that check pipelines.

use std::fmt::Write;

use lora_flow_core::{Port, Ports};
use serde_json::Value;

use crate::explain::accepted;
use crate::kinds::{KindInfo, follow_ref};

/// The whole page: an overview and one section per kind.
pub fn reference_page(kinds: &[KindInfo]) -> String {
    let mut out = String::from("# Task kinds\n\n| kind | what it does | takes | makes |\n");
    out.push_str("|---|---|---|---|\n");
    for kind in kinds {
        let _ = writeln!(
            out,
            "| [`{}`](#{}) | {} | {} | {} |",
            kind.name,
            kind.name,
            cell(&kind.summary),
            short(kind.inputs.as_ref()),
            short(kind.outputs.as_ref()),
        );
    }
    for kind in kinds {
        out.push('\n');
        out.push_str(&kind_reference(kind));
    }
    out
}

/// One kind: summary, ports, parameters.
pub fn kind_reference(kind: &KindInfo) -> String {
    let mut out = format!("## {}\n\n{}", kind.name, sentence(&kind.summary));
    if let Some(plugin) = &kind.plugin {
        let _ = write!(out, " Offered by the plugin `{plugin}`.");
    }
    out.push('\n');
    if let Some(doc) = kind.schema.get("description").and_then(Value::as_str) {
        let bare = |s: &str| s.trim().trim_end_matches('.').to_lowercase();
        if bare(doc) != bare(&kind.summary) {
            let _ = write!(out, "\n{doc}\n");
        }
    }
    ports(&mut out, "Inputs", kind.inputs.as_ref());
    ports(&mut out, "Outputs", kind.outputs.as_ref());
    parameters(&mut out, "### Parameters", &kind.schema, &kind.schema);
    let definitions = kind.schema.get("$defs").and_then(Value::as_object);
    for (name, definition) in definitions.into_iter().flatten() {
        if definition.get("properties").is_some() {
            parameters(&mut out, &format!("### `{name}`"), definition, &kind.schema);
        }
    }
    out
}

fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_uppercase().collect::<String>()).unwrap_or_default();
    format!("{first}{}.", chars.as_str().trim_end_matches('.'))
}

/// Text for one cell of a table.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

fn kind_names(port: &Port) -> String {
    port.kinds.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
}

fn short(ports: Option<&Ports>) -> String {
    let Some(ports) = ports else { return "depends on the parameters".to_owned() };
    let mut names: Vec<String> = ports
        .ports
        .iter()
        .map(|p| format!("`{}`{}", p.name, if p.required { "" } else { "?" }))
        .collect();
    if !ports.any_name.is_empty() {
        names.push("any names".to_owned());
    }
    if names.is_empty() { "–".to_owned() } else { names.join(", ") }
}

fn ports(out: &mut String, title: &str, ports: Option<&Ports>) {
    let Some(ports) = ports else {
        let _ = write!(out, "\n### {title}\n\nThey depend on the parameters.\n");
        return;
    };
    if ports.ports.is_empty() && ports.any_name.is_empty() {
        return;
    }
    let _ = write!(out, "\n### {title}\n\n| name | kind | | |\n|---|---|---|---|\n");
    for port in &ports.ports {
        let need = if port.required { "required" } else { "optional" };
        let many = if port.many { ", one or many" } else { "" };
        let doc = cell(&port.doc);
        let _ = writeln!(out, "| `{}` | {} | {need}{many} | {doc} |", port.name, kind_names(port));
    }
    if !ports.any_name.is_empty() {
        let kinds: Vec<String> = ports.any_name.iter().map(ToString::to_string).collect();
        let _ = writeln!(out, "| any name | {} | optional | |", kinds.join(" or "));
    }
}

fn parameters(out: &mut String, title: &str, schema: &Value, root: &Value) {
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return };
    if properties.is_empty() {
        return;
    }
    let required: Vec<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let _ = write!(out, "\n{title}\n\n| name | type | default | |\n|---|---|---|---|\n");
    for (name, property) in properties {
        let default = match property.get("default") {
            _ if required.contains(&name.as_str()) => "required".to_owned(),
            Some(Value::Null) | None => "–".to_owned(),
            Some(value) => format!("`{}`", cell(&number_or_json(value))),
        };
        let target = follow_ref(property, root);
        let doc = property.get("description").or_else(|| target.get("description"));
        let doc = cell(doc.and_then(Value::as_str).unwrap_or(""));
        let kind = cell(&accepted(property, root));
        let _ = writeln!(out, "| `{name}` | {kind} | {default} | {doc} |");
    }
}

/// `0.0001` reads better than `1e-4` in a table of settings, and both are valid.
fn number_or_json(value: &Value) -> String {
    match value.as_f64() {
        Some(f) if value.is_f64() => f.to_string(),
        _ => value.to_string(),
    }
}

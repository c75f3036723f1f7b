//! JSON Schema of the pipeline file, for editors: keys with their docs, and for every kind the
//! parameters under `with`.

use serde_json::{Map, Value, json};

use crate::kinds::KindInfo;

/// Makes the schema of pipeline files that use these kinds.
///
/// Wherever something other than a string is wanted, an expression (`${{ … }}`) is allowed too.
pub fn pipeline_schema(kinds: &[KindInfo]) -> Value {
    let names: Vec<Value> =
        kinds.iter().map(|k| json!({ "const": k.name, "description": k.summary })).collect();
    let mut defs = Map::new();
    defs.insert("expression".to_owned(), expression());
    defs.insert("task".to_owned(), task(&names, kinds));
    for kind in kinds {
        defs.insert(format!("with-{}", kind.name), parameters(kind));
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lora-flow pipeline",
        "type": "object",
        "anyOf": [{ "required": ["tasks"] }, { "required": ["include"] }],
        "additionalProperties": false,
        "patternProperties": {
            "^x-": { "description": "Free for anchors and notes." }
        },
        "properties": {
            "version": {
                "const": crate::spec::VERSION,
                "description": "Version of the file format."
            },
            "name": {
                "type": "string",
                "description": "Name of the pipeline; by default that of the file."
            },
            "description": { "type": "string", "description": "What the pipeline is for." },
            "root": {
                "type": "string",
                "default": ".",
                "description": "Folder that relative paths are taken from, relative to this file."
            },
            "params": {
                "type": "object",
                "propertyNames": { "pattern": "^[A-Za-z_][A-Za-z0-9_]*$" },
                "description": "Values for `${{ params.NAME }}`; `--set NAME=VALUE` overrides them."
            },
            "env": {
                "type": "array",
                "items": { "type": "string" },
                "description": "Environment variables that `${{ env.NAME }}` may read."
            },
            "include": {
                "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }],
                "description": "Files with further `params`, `env`, `plugins` and `tasks`, relative to this one."
            },
            "plugins": {
                "type": "array",
                "items": { "type": "string" },
                "description": "Folders with a `plugin.yaml`, whose task kinds can be used."
            },
            "tasks": {
                "type": "object",
                "minProperties": 1,
                "propertyNames": { "pattern": "^[A-Za-z_][A-Za-z0-9_-]*$" },
                "additionalProperties": { "$ref": "#/$defs/task" },
                "description": "The tasks by name. Their order is given by `inputs` and `needs`."
            }
        },
        "$defs": defs
    })
}

fn expression() -> Value {
    json!({
        "type": "string",
        "pattern": "\\$\\{\\{.*\\}\\}",
        "description": "An expression over `params`, `env` and `matrix`."
    })
}

/// A schema, or an expression that gives a value for it.
fn or_expression(schema: Value) -> Value {
    let string = schema.get("type") == Some(&json!("string"))
        && schema.get("enum").is_none()
        && schema.get("pattern").is_none();
    let open = schema == json!({}) || schema == json!(true);
    if string || open {
        return schema;
    }
    let mut outer = Map::new();
    let mut schema = schema;
    // Editors show the text of the outermost schema.
    for key in ["description", "default", "title", "deprecated"] {
        if let Some(value) = schema.as_object_mut().and_then(|s| s.remove(key)) {
            outer.insert(key.to_owned(), value);
        }
    }
    outer.insert("anyOf".to_owned(), json!([schema, { "$ref": "#/$defs/expression" }]));
    Value::Object(outer)
}

fn task(names: &[Value], kinds: &[KindInfo]) -> Value {
    let strings = json!({
        "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }]
    });
    let described = |mut schema: Value, text: &str| {
        schema["description"] = json!(text);
        schema
    };
    let branches: Vec<Value> = kinds.iter().map(|kind| branch(kind, &strings)).collect();
    json!({
        "type": "object",
        "required": ["uses"],
        "additionalProperties": false,
        "properties": {
            "uses": { "oneOf": names, "description": "The task's kind." },
            "with": { "description": "Parameters of the task." },
            "inputs": {
                "type": "object",
                "additionalProperties": strings,
                "description": "Artifacts by input port: `task`, `task.output` or `task[axis=value]`."
            },
            "needs": described(strings.clone(), "Tasks that must be done before, for order only."),
            "publish": {
                "anyOf": [
                    { "type": "string" },
                    { "type": "object", "additionalProperties": { "type": "string" } }
                ],
                "description": "Path for the first output, or output → path, relative to `root`."
            },
            "matrix": {
                "type": "object",
                "additionalProperties": or_expression(json!({ "type": "array", "minItems": 1 })),
                "description": "Fans the task out over all combinations of values; `${{ matrix.NAME }}` reads them."
            },
            "resources": or_expression(json!({
                "type": "object",
                "additionalProperties": false,
                "description": "What the task takes of the machine.",
                "properties": {
                    "cpu": or_expression(json!({
                        "type": "integer", "minimum": 1, "description": "Threads."
                    })),
                    "gpu": or_expression(json!({
                        "type": "integer", "minimum": 0, "description": "GPUs that it has for itself. A task that computes on one takes one unless told otherwise."
                    })),
                    "memory": {
                        "type": ["string", "integer"],
                        "description": "Bytes, or a size such as `8GiB`."
                    }
                }
            })),
            "timeout": {
                "type": "string",
                "description": "Limit of the running time: `90s`, `10m`, `1h30m`."
            },
            "retries": or_expression(json!({
                "type": "integer",
                "minimum": 0,
                "maximum": 100,
                "default": 0,
                "description": "How often to try again after a failure."
            })),
            "description": { "type": "string", "description": "What the task is for." }
        },
        "allOf": branches
    })
}

/// What holds where `uses` names a kind.
fn branch(kind: &KindInfo, strings: &Value) -> Value {
    let mut properties = Map::new();
    properties.insert("with".to_owned(), json!({ "$ref": format!("#/$defs/with-{}", kind.name) }));
    if let Some(ports) = kind.inputs.as_ref().filter(|p| p.any_name.is_empty()) {
        let inputs: Map<String, Value> = ports
            .ports
            .iter()
            .map(|port| {
                let mut schema =
                    if port.many { strings.clone() } else { json!({ "type": "string" }) };
                schema["description"] = json!(port.doc);
                (port.name.clone(), schema)
            })
            .collect();
        properties.insert("inputs".to_owned(), json!({ "properties": inputs }));
    }
    let required = kind.schema.get("required").and_then(Value::as_array);
    let mut then = json!({ "properties": properties });
    if required.is_some_and(|r| !r.is_empty()) {
        then["required"] = json!(["with"]);
    }
    json!({
        "if": { "properties": { "uses": { "const": kind.name } }, "required": ["uses"] },
        "then": then
    })
}

/// A kind's parameters as a definition of the whole schema.
fn parameters(kind: &KindInfo) -> Value {
    let mut schema = kind.schema.clone();
    let prefix = format!("#/$defs/with-{}", kind.name);
    if let Some(map) = schema.as_object_mut() {
        map.remove("$schema");
        map.remove("title");
    }
    relocate(&mut schema, &prefix);
    admit_expressions(&mut schema);
    schema
}

/// Makes references within a document hold inside a larger one.
fn relocate(schema: &mut Value, prefix: &str) {
    match schema {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(target) if key == "$ref" => {
                        if let Some(rest) = target.strip_prefix('#') {
                            *target = format!("{prefix}{rest}");
                        }
                    }
                    value => relocate(value, prefix),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| relocate(item, prefix)),
        _ => {}
    }
}

/// Allows an expression for every property and item that is not a string anyway.
fn admit_expressions(schema: &mut Value) {
    let Value::Object(map) = schema else { return };
    for key in ["properties", "$defs"] {
        let Some(Value::Object(parts)) = map.get_mut(key) else { continue };
        for part in parts.values_mut() {
            admit_expressions(part);
            if key == "properties" {
                *part = or_expression(std::mem::take(part));
            }
        }
    }
    for key in ["items", "additionalProperties"] {
        if let Some(part @ Value::Object(_)) = map.get_mut(key) {
            admit_expressions(part);
            *part = or_expression(std::mem::take(part));
        }
    }
    for key in ["anyOf", "oneOf", "allOf"] {
        if let Some(Value::Array(parts)) = map.get_mut(key) {
            parts.iter_mut().for_each(admit_expressions);
        }
    }
}

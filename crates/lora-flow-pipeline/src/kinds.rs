//! The task kinds a pipeline can use: the built-in ones and those of its plugins.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use jsonschema::Validator;
use lora_flow_core::{Ports, Result, Task, TaskKind};
use serde_json::{Map, Value, json};

use crate::external::ExternalTask;
use crate::plugin_manifest::PluginManifest;

/// What the reference says about a task kind.
#[derive(Debug, Clone)]
pub struct KindInfo {
    /// Name after `uses:`.
    pub name: String,
    /// Version of the implementation; none for plugins.
    pub version: Option<u32>,
    /// One line.
    pub summary: String,
    /// JSON Schema of the parameters.
    pub schema: Value,
    /// Input ports. Where they depend on the parameters: those under example parameters; none
    /// where no example can be made.
    pub inputs: Option<Ports>,
    /// Outputs, likewise.
    pub outputs: Option<Ports>,
    /// The plugin that offers it; none for a built-in kind.
    pub plugin: Option<String>,
}

/// Describes the built-in kinds, in the order of the list.
pub fn builtin_kinds(builtin: &[&[TaskKind]]) -> Vec<KindInfo> {
    let describe = |kind: &TaskKind| {
        let schema = (kind.schema)().to_value();
        let task = (kind.parse)(example(&schema, &schema, 0)).ok();
        KindInfo {
            name: kind.name.to_owned(),
            version: Some(kind.version),
            summary: kind.summary.to_owned(),
            inputs: task.as_ref().map(|t| t.inputs()),
            outputs: task.as_ref().map(|t| t.outputs()),
            schema,
            plugin: None,
        }
    };
    builtin.iter().copied().flatten().map(describe).collect()
}

/// Describes the kinds that a plugin offers, in the order of its manifest.
pub fn plugin_kinds(manifest: &PluginManifest) -> Vec<KindInfo> {
    let describe = |kind: &crate::PluginKind| KindInfo {
        name: kind.name.clone(),
        version: None,
        summary: kind.summary.clone(),
        schema: kind.params.clone(),
        inputs: Some(kind.inputs.clone()),
        outputs: Some(kind.outputs.clone()),
        plugin: Some(manifest.name.clone()),
    };
    manifest.kinds.iter().map(describe).collect()
}

/// The smallest value that fits a schema, more or less: only what is required is filled in.
fn example(schema: &Value, root: &Value, depth: usize) -> Value {
    let schema = follow_ref(schema, root);
    if depth > 8 {
        return Value::Null;
    }
    for key in ["default", "const"] {
        if let Some(value) = schema.get(key) {
            return value.clone();
        }
    }
    for key in ["examples", "enum"] {
        if let Some(value) = schema.get(key).and_then(|v| v.get(0)) {
            return value.clone();
        }
    }
    for key in ["anyOf", "oneOf", "allOf"] {
        if let Some(first) = schema.get(key).and_then(|v| v.get(0)) {
            return example(first, root, depth + 1);
        }
    }
    let kind = schema.get("type");
    let kind = kind.and_then(|t| t.as_str().or_else(|| t.get(0)?.as_str())).unwrap_or("object");
    match kind {
        "string" => json!("example"),
        "boolean" => json!(false),
        "integer" | "number" => schema.get("minimum").cloned().unwrap_or(json!(1)),
        "array" => {
            let items = schema.get("items").unwrap_or(&Value::Null);
            json!([example(items, root, depth + 1)])
        }
        "null" => Value::Null,
        _ => {
            let required = schema.get("required").and_then(Value::as_array);
            let names = required.into_iter().flatten().filter_map(Value::as_str);
            let property = |name: &str| schema.get("properties").and_then(|p| p.get(name));
            let value = |name: &str| Some(example(property(name)?, root, depth + 1));
            names.filter_map(|n| value(n).map(|v| (n.to_owned(), v))).collect::<Map<_, _>>().into()
        }
    }
}

/// The schema that `$ref` names, if it names one of this document.
pub(crate) fn follow_ref<'a>(schema: &'a Value, root: &'a Value) -> &'a Value {
    let mut schema = schema;
    for _ in 0..16 {
        let Some(name) = schema.get("$ref").and_then(Value::as_str) else { break };
        let Some(target) = name.strip_prefix('#').and_then(|p| root.pointer(p)) else { break };
        schema = target;
    }
    schema
}

/// Where the tasks of a kind come from.
#[derive(Debug, Clone)]
pub(crate) enum Maker {
    Builtin(&'static TaskKind),
    Plugin(Arc<PluginManifest>, usize),
}

/// A kind that the pipeline can use.
pub(crate) struct Kind {
    pub name: String,
    pub maker: Maker,
    schema: OnceLock<Value>,
    validator: OnceLock<Option<Validator>>,
}

impl Kind {
    /// JSON Schema of the parameters.
    pub fn schema(&self) -> &Value {
        self.schema.get_or_init(|| match &self.maker {
            Maker::Builtin(kind) => (kind.schema)().to_value(),
            Maker::Plugin(manifest, i) => {
                manifest.kinds.get(*i).map_or(Value::Bool(true), |k| k.params.clone())
            }
        })
    }

    /// The schema, ready to check values.
    pub fn validator(&self) -> Option<&Validator> {
        // A built-in schema is always valid, and that of a plugin was tried when its manifest was
        // read.
        self.validator.get_or_init(|| jsonschema::validator_for(self.schema()).ok()).as_ref()
    }

    /// Version for [`crate::PlannedTask::kind_version`].
    pub fn version(&self) -> u32 {
        match &self.maker {
            Maker::Builtin(kind) => kind.version,
            Maker::Plugin(..) => 0,
        }
    }

    /// The parameters with all defaults, and the task they make.
    ///
    /// # Errors
    /// When the parameters do not fit the kind in a way its schema does not express.
    pub fn make(&self, params: Value) -> Result<(Value, Arc<dyn Task>)> {
        match &self.maker {
            Maker::Builtin(kind) => {
                let params = (kind.canonical)(params)?;
                let task = (kind.parse)(params.clone())?;
                Ok((params, Arc::from(task)))
            }
            Maker::Plugin(manifest, index) => {
                let mut params = params;
                fill_defaults(&mut params, self.schema(), self.schema());
                let task = ExternalTask::new(manifest.clone(), *index, params.clone());
                Ok((params, Arc::new(task)))
            }
        }
    }
}

/// Puts the defaults of a schema where a value has nothing.
fn fill_defaults(value: &mut Value, schema: &Value, root: &Value) {
    let schema = follow_ref(schema, root);
    match value {
        Value::Object(map) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            for (name, property) in properties.into_iter().flatten() {
                let default = property.get("default").or(follow_ref(property, root).get("default"));
                match map.get_mut(name) {
                    Some(value) => fill_defaults(value, property, root),
                    None => {
                        if let Some(default) = default {
                            let mut default = default.clone();
                            fill_defaults(&mut default, property, root);
                            map.insert(name.clone(), default);
                        }
                    }
                }
            }
        }
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                items.iter_mut().for_each(|item| fill_defaults(item, schema, root));
            }
        }
        _ => {}
    }
}

/// All kinds by name.
#[derive(Default)]
pub(crate) struct Kinds {
    by_name: BTreeMap<String, Kind>,
    /// A plugin's manifest has problems: an unknown kind may be one of its own.
    pub incomplete: bool,
}

impl Kinds {
    pub fn builtin(lists: &'static [&'static [TaskKind]]) -> Self {
        let mut kinds = Self::default();
        for kind in lists.iter().copied().flatten() {
            kinds.insert(kind.name, Maker::Builtin(kind));
        }
        kinds
    }

    /// Adds a kind; if the name is taken, what it already stands for.
    pub fn insert(&mut self, name: &str, maker: Maker) -> Option<&Kind> {
        if self.by_name.contains_key(name) {
            return self.by_name.get(name);
        }
        let kind = Kind {
            name: name.to_owned(),
            maker,
            schema: OnceLock::new(),
            validator: OnceLock::new(),
        };
        self.by_name.insert(name.to_owned(), kind);
        None
    }

    pub fn get(&self, name: &str) -> Option<&Kind> {
        self.by_name.get(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }
}

//! The key of a task: what its result depends on, and nothing else.
//!
//! | enters | how |
//! |---|---|
//! | the kind and its implementation's version | by name and number |
//! | parameters | canonical JSON, defaults filled in, order-free |
//! | input artifacts | by digest, for each port in order: a producer that runs again and yields the same bytes changes nothing downstream |
//! | outside files | by content, for each parameter in the sorted order of their paths |
//! | environment variables that a plugin's `env` names | by the digest of each value, so that no secret stands in the store; not those of its `passthrough` |
//! | a plugin | by the digest of its files |
//! | the device | by class, for tasks whose result depends on it |
//!
//! Never: paths, times, names of tasks and pipelines, threads, log levels. A task renamed or a
//! folder moved costs nothing.
//!
//! Every entry keeps the key's parts beside its digest, so that `plan` can say what changed.

use std::collections::BTreeMap;
use std::path::Path;

use lora_flow_core::{DeviceSpec, Digest};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::plan::PlannedTask;

/// Version of the key's make-up. Raising it makes every result a new one.
pub const KEY_FORMAT: u32 = 1;

/// The parts of a key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskKey {
    /// [`KEY_FORMAT`].
    pub format: u32,
    /// Kind of the task.
    pub kind: String,
    /// Version of the kind's implementation.
    pub version: u32,
    /// Parameters, defaults filled in.
    pub params: Value,
    /// Digests of input artifacts by port.
    pub inputs: BTreeMap<String, Vec<Digest>>,
    /// Digests of outside files by JSON pointer.
    pub files: BTreeMap<String, Vec<Digest>>,
    /// Digests of the values of environment variables by name.
    pub env: BTreeMap<String, Digest>,
    /// What the task itself adds ([`lora_flow_core::Task::fingerprint_extra`]).
    pub extra: Value,
    /// Class of the device, if the result depends on it.
    pub device: Option<String>,
}

impl TaskKey {
    /// The key.
    pub fn digest(&self) -> Digest {
        // Serialising plain data to a `Value` cannot fail.
        Digest::of_json(&serde_json::to_value(self).unwrap_or_default())
    }
}

/// The parts of a key and the names that people know them by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explained {
    /// The parts of the key.
    pub key: TaskKey,
    /// Names of the outside files by JSON pointer, in the order of their digests.
    pub files: BTreeMap<String, Vec<String>>,
    /// References of the inputs by port, in the order of their digests.
    pub references: BTreeMap<String, Vec<String>>,
}

impl Explained {
    /// Everything of a task's key but its inputs and outside files.
    pub(crate) fn begin(task: &PlannedTask, device: DeviceSpec) -> Self {
        let env = task.env.iter();
        let key = TaskKey {
            format: KEY_FORMAT,
            kind: task.kind.clone(),
            version: task.kind_version,
            params: task.params.clone(),
            inputs: BTreeMap::new(),
            files: BTreeMap::new(),
            env: env.map(|(k, v)| (k.clone(), Digest::of_bytes(v.as_bytes()))).collect(),
            extra: task.task.fingerprint_extra(),
            device: task.task.uses_device().then(|| device.class().to_owned()),
        };
        Self { key, files: BTreeMap::new(), references: BTreeMap::new() }
    }

    /// Adds an input artifact.
    pub(crate) fn add_input(&mut self, port: &str, reference: &str, digest: Digest) {
        self.key.inputs.entry(port.to_owned()).or_default().push(digest);
        self.references.entry(port.to_owned()).or_default().push(reference.to_owned());
    }

    /// Adds an outside file.
    pub(crate) fn add_file(&mut self, pointer: &str, root: &Path, path: &Path, digest: Digest) {
        let name = path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned();
        self.key.files.entry(pointer.to_owned()).or_default().push(digest);
        self.files.entry(pointer.to_owned()).or_default().push(name);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Map, json};

    fn key(params: Value) -> TaskKey {
        TaskKey {
            format: KEY_FORMAT,
            kind: "train".to_owned(),
            version: 1,
            params,
            inputs: BTreeMap::from([(
                "data".to_owned(),
                vec![Digest::of_bytes(b"a"), Digest::of_bytes(b"b")],
            )]),
            files: BTreeMap::from([("/files".to_owned(), vec![Digest::of_bytes(b"f")])]),
            env: BTreeMap::from([("X".to_owned(), Digest::of_bytes(b"1"))]),
            extra: json!({ "plugin": "p" }),
            device: Some("cpu".to_owned()),
        }
    }

    /// JSON of any shape, with keys in any order.
    pub(crate) fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e9..1e9f64).prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec(("[a-z/.~é\"]{0,6}", inner), 0..4)
                    .prop_map(|entries| Value::from(entries.into_iter().collect::<Map<_, _>>())),
            ]
        })
    }

    /// The same value with the keys of all objects put in the other order.
    pub(crate) fn reversed(value: &Value) -> Value {
        match value {
            Value::Object(map) => map
                .iter()
                .rev()
                .map(|(k, v)| (k.clone(), reversed(v)))
                .collect::<Map<_, _>>()
                .into(),
            Value::Array(items) => items.iter().map(reversed).collect::<Vec<_>>().into(),
            scalar => scalar.clone(),
        }
    }

    proptest! {
        #[test]
        fn the_order_of_parameters_does_not_matter(params in any_json()) {
            prop_assert_eq!(key(params.clone()).digest(), key(reversed(&params)).digest());
        }

        #[test]
        fn different_parameters_give_different_keys(a in any_json(), b in any_json()) {
            prop_assert_eq!(a == b, key(a).digest() == key(b).digest());
        }

        #[test]
        fn a_key_survives_being_stored(params in any_json()) {
            let key = key(params);
            let text = serde_json::to_string(&key).unwrap();
            let back: TaskKey = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(back.digest(), key.digest());
        }
    }

    #[test]
    fn every_part_changes_the_key() {
        let base = key(json!({ "a": 1 }));
        type Change = (&'static str, fn(&mut TaskKey));
        let changes: [Change; 13] = [
            ("format", |k| k.format += 1),
            ("kind", |k| k.kind.push('x')),
            ("version", |k| k.version += 1),
            ("params", |k| k.params = json!({ "a": 2 })),
            ("order of inputs", |k| k.inputs.values_mut().for_each(|v| v.reverse())),
            ("port of inputs", |k| {
                let inputs = k.inputs.remove("data").unwrap();
                k.inputs.insert("other".to_owned(), inputs);
            }),
            ("number of inputs", |k| {
                k.inputs.values_mut().for_each(|v| v.truncate(1));
            }),
            ("content of files", |k| {
                k.files.insert("/files".to_owned(), vec![Digest::of_bytes(b"g")]);
            }),
            ("pointer of files", |k| {
                let files = k.files.remove("/files").unwrap();
                k.files.insert("/other".to_owned(), files);
            }),
            ("value of env", |k| {
                k.env.insert("X".to_owned(), Digest::of_bytes(b"2"));
            }),
            ("env", |k| k.env.clear()),
            ("extra", |k| k.extra = Value::Null),
            ("device", |k| k.device = None),
        ];
        let mut seen = vec![base.digest()];
        for (what, change) in changes {
            let mut key = base.clone();
            change(&mut key);
            assert!(!seen.contains(&key.digest()), "{what} must change the key");
            seen.push(key.digest());
        }
    }
}

//! Parameters that may be written in more than one way.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{MapAccess, SeqAccess, Visitor, value};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A string or a list of strings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Names {
    /// Written as one string.
    One(String),
    /// Written as a list.
    Many(Vec<String>),
}

impl Names {
    /// Each with the JSON pointer to it, `pointer` being that of the parameter.
    pub fn with_pointers<'a>(&'a self, pointer: &'a str) -> Vec<(String, &'a str)> {
        match self {
            Self::One(name) => vec![(pointer.to_owned(), name)],
            Self::Many(names) => names
                .iter()
                .enumerate()
                .map(|(i, name)| (format!("{pointer}/{i}"), name.as_str()))
                .collect(),
        }
    }
}

impl Serialize for Names {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::One(name) => name.serialize(s),
            Self::Many(names) => names.serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct NamesVisitor;
        impl<'de> Visitor<'de> for NamesVisitor {
            type Value = Names;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E>(self, name: &str) -> Result<Names, E> {
                Ok(Names::One(name.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Names, A::Error> {
                Vec::deserialize(value::SeqAccessDeserializer::new(seq)).map(Names::Many)
            }
        }
        d.deserialize_any(NamesVisitor)
    }
}

impl JsonSchema for Names {
    fn schema_name() -> Cow<'static, str> {
        "Names".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [
            { "type": "string" },
            { "type": "array", "items": { "type": "string" } },
        ] })
    }
}

/// Columns to keep: a list of names, or new name → old name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Columns {
    /// Kept under their own names, in this order.
    Keep(Vec<String>),
    /// Kept under new names.
    Rename(BTreeMap<String, String>),
}

impl Columns {
    /// New name and old name of each.
    pub fn pairs(&self) -> Vec<(String, String)> {
        match self {
            Self::Keep(names) => names.iter().map(|n| (n.clone(), n.clone())).collect(),
            Self::Rename(names) => names.iter().map(|(n, o)| (n.clone(), o.clone())).collect(),
        }
    }
}

impl Serialize for Columns {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Keep(names) => names.serialize(s),
            Self::Rename(names) => names.serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for Columns {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct ColumnsVisitor;
        impl<'de> Visitor<'de> for ColumnsVisitor {
            type Value = Columns;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of column names, or a map of new name to old name")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Columns, A::Error> {
                Vec::deserialize(value::SeqAccessDeserializer::new(seq)).map(Columns::Keep)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Columns, A::Error> {
                BTreeMap::deserialize(value::MapAccessDeserializer::new(map)).map(Columns::Rename)
            }
        }
        d.deserialize_any(ColumnsVisitor)
    }
}

impl JsonSchema for Columns {
    fn schema_name() -> Cow<'static, str> {
        "Columns".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [
            { "type": "array", "items": { "type": "string" } },
            { "type": "object", "additionalProperties": { "type": "string" } },
        ] })
    }
}

/// Whether to remove duplicates, or the columns that make rows equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dedup {
    /// Yes, by the text; or no.
    Flag(bool),
    /// By these columns.
    By(Vec<String>),
}

impl Default for Dedup {
    fn default() -> Self {
        Self::Flag(false)
    }
}

impl Serialize for Dedup {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Flag(flag) => flag.serialize(s),
            Self::By(columns) => columns.serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for Dedup {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct DedupVisitor;
        impl<'de> Visitor<'de> for DedupVisitor {
            type Value = Dedup;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("true, false or a list of column names")
            }

            fn visit_bool<E>(self, flag: bool) -> Result<Dedup, E> {
                Ok(Dedup::Flag(flag))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Dedup, A::Error> {
                Vec::deserialize(value::SeqAccessDeserializer::new(seq)).map(Dedup::By)
            }
        }
        d.deserialize_any(DedupVisitor)
    }
}

impl JsonSchema for Dedup {
    fn schema_name() -> Cow<'static, str> {
        "Dedup".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [
            { "type": "boolean" },
            { "type": "array", "items": { "type": "string" } },
        ] })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn each_way_of_writing_round_trips_and_others_are_refused() {
        fn round<T: for<'a> Deserialize<'a> + Serialize>(value: Value) {
            let back = serde_json::to_value(T::deserialize(&value).unwrap()).unwrap();
            assert_eq!(back, value);
        }
        round::<Names>(json!("a"));
        round::<Names>(json!(["a", "b"]));
        round::<Columns>(json!(["a"]));
        round::<Columns>(json!({ "new": "old" }));
        round::<Dedup>(json!(true));
        round::<Dedup>(json!(["a"]));
        let error = Names::deserialize(json!(3)).unwrap_err().to_string();
        assert!(error.contains("a string or a list of strings"), "{error}");
        assert!(Dedup::deserialize(json!("text")).is_err());
        assert!(Columns::deserialize(json!("text")).is_err());
    }
}

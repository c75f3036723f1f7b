//! The shape of JSON rows: which keys, and what each holds, gathered over all rows so that a
//! column has one type or the conflict is named with both places.

use std::fmt;
use std::sync::Arc;

use arrow_schema::{DataType, Field};
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

/// Where something was first seen: index of the file, line in it.
pub(crate) type Place = (usize, u64);

/// What the values at one place of the rows have in common.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Shape {
    kind: Kind,
    first: Place,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Null,
    Bool,
    Int,
    Float,
    Text,
    List(Box<Shape>),
    Object(Fields),
}

/// The keys of an object, in order of first appearance.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Fields(Vec<(String, Shape)>);

/// Two values at the same place that no column can hold.
#[derive(Debug)]
pub(crate) struct Conflict {
    /// Keys from the row down.
    pub(crate) path: Vec<String>,
    /// What was there first, and where.
    pub(crate) first: (&'static str, Place),
    /// What came later, and where.
    pub(crate) later: (&'static str, Place),
}

impl Kind {
    fn name(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool => "a boolean",
            Self::Int | Self::Float => "a number",
            Self::Text => "text",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }
}

impl Shape {
    fn null(first: Place) -> Self {
        Self { kind: Kind::Null, first }
    }

    /// The Arrow type, or none when only empty objects were seen (no file can hold those).
    pub(crate) fn data_type(&self) -> Option<DataType> {
        Some(match &self.kind {
            Kind::Null => DataType::Null,
            Kind::Bool => DataType::Boolean,
            Kind::Int => DataType::Int64,
            Kind::Float => DataType::Float64,
            Kind::Text => DataType::Utf8,
            Kind::List(item) => {
                DataType::List(Arc::new(Field::new("item", item.data_type()?, true)))
            }
            Kind::Object(fields) => {
                let fields: Vec<Field> = fields
                    .0
                    .iter()
                    .filter_map(|(name, shape)| Some(Field::new(name, shape.data_type()?, true)))
                    .collect();
                if fields.is_empty() {
                    return None;
                }
                DataType::Struct(fields.into())
            }
        })
    }

    /// Takes in a scalar or an empty container of another value.
    fn admit(&mut self, kind: Kind, at: Place) -> Result<(), Conflict> {
        let merged = match (&self.kind, &kind) {
            (_, Kind::Null) => return Ok(()),
            (Kind::Null, _) => {
                self.first = at;
                kind
            }
            (Kind::Int, Kind::Float) => kind,
            (Kind::Float, Kind::Int)
            | (Kind::List(_), Kind::List(_))
            | (Kind::Object(_), Kind::Object(_)) => return Ok(()),
            (a, b) if a == b => return Ok(()),
            (a, b) => {
                return Err(Conflict {
                    path: Vec::new(),
                    first: (a.name(), self.first),
                    later: (b.name(), at),
                });
            }
        };
        self.kind = merged;
        Ok(())
    }

    /// Takes in everything that another shape has seen.
    fn merge(&mut self, other: &Self) -> Result<(), Conflict> {
        let empty = match &other.kind {
            Kind::List(_) => Kind::List(Box::new(Self::null(other.first))),
            Kind::Object(_) => Kind::Object(Fields::default()),
            scalar => scalar.clone(),
        };
        self.admit(empty, other.first)?;
        match (&mut self.kind, &other.kind) {
            (Kind::List(mine), Kind::List(theirs)) => mine.merge(theirs),
            (Kind::Object(mine), Kind::Object(theirs)) => mine.merge(theirs),
            _ => Ok(()),
        }
    }
}

impl Fields {
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Shape)> {
        self.0.iter().map(|(name, shape)| (name.as_str(), shape))
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Shape> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, shape)| shape)
    }

    /// Takes in the keys of another set of rows.
    pub(crate) fn merge(&mut self, other: &Self) -> Result<(), Conflict> {
        for (name, shape) in &other.0 {
            let index = self.index(name, 0, shape.first);
            self.0[index].1.merge(shape).map_err(|mut conflict| {
                conflict.path.insert(0, name.clone());
                conflict
            })?;
        }
        Ok(())
    }

    /// Index of a key, added if new. Rows tend to name their keys in the same order, so the
    /// search starts at `from`.
    fn index(&mut self, name: &str, from: usize, at: Place) -> usize {
        if self.0.get(from).is_some_and(|(n, _)| n == name) {
            return from;
        }
        self.0.iter().position(|(n, _)| n == name).unwrap_or_else(|| {
            self.0.push((name.to_owned(), Shape::null(at)));
            self.0.len() - 1
        })
    }

    /// Parses one row and takes in its keys and values.
    ///
    /// # Errors
    /// Of the JSON text; a conflict is left in `conflict`, and the error then only says where.
    pub(crate) fn read_row(
        &mut self,
        text: &[u8],
        at: Place,
        conflict: &mut Option<Conflict>,
    ) -> serde_json::Result<()> {
        let mut deserializer = serde_json::Deserializer::from_slice(text);
        deserializer.deserialize_map(RowVisitor { fields: self, at, conflict })?;
        deserializer.end()
    }
}

struct RowVisitor<'a> {
    fields: &'a mut Fields,
    at: Place,
    conflict: &'a mut Option<Conflict>,
}

impl<'de> Visitor<'de> for RowVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object with one key a column")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        read_fields(self.fields, self.at, self.conflict, map)
    }
}

fn read_fields<'de, A: MapAccess<'de>>(
    fields: &mut Fields,
    at: Place,
    conflict: &mut Option<Conflict>,
    mut map: A,
) -> Result<(), A::Error> {
    let mut expected = 0;
    while let Some(key) = map.next_key::<std::borrow::Cow<'_, str>>()? {
        let index = fields.index(&key, expected, at);
        expected = index + 1;
        let shape = &mut fields.0[index].1;
        if let Err(e) = map.next_value_seed(ShapeSeed { shape, at, conflict: &mut *conflict }) {
            if let Some(conflict) = conflict {
                conflict.path.insert(0, key.into_owned());
            }
            return Err(e);
        }
    }
    Ok(())
}

struct ShapeSeed<'a> {
    shape: &'a mut Shape,
    at: Place,
    conflict: &'a mut Option<Conflict>,
}

impl ShapeSeed<'_> {
    fn admit<E: serde::de::Error>(&mut self, kind: Kind) -> Result<(), E> {
        self.shape.admit(kind, self.at).map_err(|conflict| {
            *self.conflict = Some(conflict);
            E::custom("values of two types in one column")
        })
    }
}

impl<'de> DeserializeSeed<'de> for ShapeSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ShapeSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E: serde::de::Error>(mut self, _: bool) -> Result<(), E> {
        self.admit(Kind::Bool)
    }

    fn visit_i64<E: serde::de::Error>(mut self, _: i64) -> Result<(), E> {
        self.admit(Kind::Int)
    }

    fn visit_u64<E: serde::de::Error>(mut self, value: u64) -> Result<(), E> {
        // Integers beyond i64 go where JSON's own readers put them.
        self.admit(if i64::try_from(value).is_ok() { Kind::Int } else { Kind::Float })
    }

    fn visit_f64<E: serde::de::Error>(mut self, _: f64) -> Result<(), E> {
        self.admit(Kind::Float)
    }

    fn visit_str<E: serde::de::Error>(mut self, _: &str) -> Result<(), E> {
        self.admit(Kind::Text)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<(), A::Error> {
        let at = self.at;
        self.admit(Kind::List(Box::new(Shape::null(at))))?;
        let Kind::List(item) = &mut self.shape.kind else { return Ok(()) };
        while let Some(()) = seq.next_element_seed(ShapeSeed {
            shape: &mut *item,
            at,
            conflict: &mut *self.conflict,
        })? {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, map: A) -> Result<(), A::Error> {
        self.admit(Kind::Object(Fields::default()))?;
        let Kind::Object(fields) = &mut self.shape.kind else { return Ok(()) };
        read_fields(fields, self.at, self.conflict, map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rows: &[&str]) -> Result<Fields, Conflict> {
        let mut fields = Fields::default();
        for (i, row) in rows.iter().enumerate() {
            let mut conflict = None;
            let result = fields.read_row(row.as_bytes(), (0, i as u64 + 1), &mut conflict);
            if let Some(conflict) = conflict {
                return Err(conflict);
            }
            result.unwrap();
        }
        Ok(fields)
    }

    #[test]
    fn nulls_and_integers_widen_and_keys_keep_their_order() {
        let fields = read(&[
            r#"{"z": null, "a": 1, "m": []}"#,
            r#"{"a": 1.5, "z": "x", "new": true, "m": [{"role": "user"}]}"#,
            r#"{"m": [{"role": "user", "extra": {}}]}"#,
        ])
        .unwrap();
        let types: Vec<String> =
            fields.iter().map(|(n, s)| format!("{n} {}", s.data_type().unwrap())).collect();
        assert_eq!(types[0], "z Utf8");
        assert_eq!(types[1], "a Float64");
        assert!(types[2].starts_with("m List(") && types[2].contains("\"role\": Utf8"));
        assert!(!types[2].contains("extra"), "{}", types[2]);
        assert_eq!(types[3], "new Boolean");
    }

    #[test]
    fn a_conflict_names_the_path_and_both_places() {
        let conflict = read(&[r#"{"a": {"b": [1]}}"#, r#"{"a": {"b": [null, "x"]}}"#]).unwrap_err();
        assert_eq!(conflict.path, ["a", "b"]);
        assert_eq!(conflict.first, ("a number", (0, 1)));
        assert_eq!(conflict.later, ("text", (0, 2)));
    }

    #[test]
    fn merging_two_files_finds_the_same_conflict() {
        let mut a = read(&[r#"{"x": {"y": 1}}"#]).unwrap();
        let b = read(&[r#"{"x": {"z": null, "y": "1"}}"#]).unwrap();
        assert_eq!(a.merge(&b).unwrap_err().path, ["x", "y"]);
        let c = read(&[r#"{"x": {"z": true}, "w": 2}"#]).unwrap();
        let mut d = read(&[r#"{"x": {"y": 1}}"#]).unwrap();
        d.merge(&c).unwrap();
        assert_eq!(d.get("w").unwrap().data_type(), Some(DataType::Int64));
        assert_eq!(d.iter().count(), 2);
    }
}

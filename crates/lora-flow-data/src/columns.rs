//! Columns: plain types, agreement between files, and the errors about them.

use std::sync::Arc;

use arrow_array::ArrayRef;
use arrow_array::cast::AsArray;
use arrow_array::{Array, StringArray};
use arrow_cast::{CastOptions, cast_with_options};
use arrow_schema::{ArrowError, DataType, Field};
use lora_flow_core::{Error, Result, nearest};

/// The same type without the choices that only say how values are stored: every string is
/// `Utf8`, every list `List` with an inner field `item`, dictionaries are spelled out, and every
/// field is nullable and without metadata.
pub(crate) fn plain_type(data_type: &DataType) -> DataType {
    let item = |field: &Field| Arc::new(Field::new("item", plain_type(field.data_type()), true));
    match data_type {
        DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
        DataType::LargeBinary | DataType::BinaryView => DataType::Binary,
        DataType::Dictionary(_, value) => plain_type(value),
        DataType::List(field)
        | DataType::LargeList(field)
        | DataType::ListView(field)
        | DataType::LargeListView(field)
        | DataType::FixedSizeList(field, _) => DataType::List(item(field)),
        DataType::Struct(fields) => {
            DataType::Struct(fields.iter().map(|f| plain_field(f)).collect())
        }
        other => other.clone(),
    }
}

fn plain_field(field: &Field) -> Field {
    Field::new(field.name(), plain_type(field.data_type()), true)
}

/// The type that holds the values of both, if one does without changing any.
pub(crate) fn common_type(a: &DataType, b: &DataType) -> Option<DataType> {
    use DataType::{Float16, Float32, Float64, Int8, Int16, Int32, Int64, List, Null, Struct};
    use DataType::{UInt8, UInt16, UInt32};
    let is_int = |t: &DataType| matches!(t, Int8 | Int16 | Int32 | Int64 | UInt8 | UInt16 | UInt32);
    let is_float = |t: &DataType| matches!(t, Float16 | Float32 | Float64);
    match (a, b) {
        _ if a == b => Some(a.clone()),
        (Null, other) | (other, Null) => Some(other.clone()),
        _ if is_int(a) && is_int(b) => Some(Int64),
        _ if is_float(a) && is_float(b) => Some(Float64),
        (List(x), List(y)) => {
            let item = common_type(x.data_type(), y.data_type())?;
            Some(List(Arc::new(Field::new("item", item, true))))
        }
        (Struct(x), Struct(y)) if x.len() == y.len() => x
            .iter()
            .zip(y)
            .map(|(f, g)| {
                let inner = common_type(f.data_type(), g.data_type())?;
                (f.name() == g.name()).then(|| Field::new(f.name(), inner, true))
            })
            .collect::<Option<Vec<_>>>()
            .map(|fields| Struct(fields.into())),
        _ => None,
    }
}

/// The array in another type; a value that does not fit is an error, never a null.
pub(crate) fn convert(
    array: &ArrayRef,
    to: &DataType,
) -> std::result::Result<ArrayRef, ArrowError> {
    if array.data_type() == to {
        return Ok(array.clone());
    }
    cast_with_options(array, to, &CastOptions { safe: false, ..CastOptions::default() })
}

/// The error of a column that is not there, with the nearest name and the list of those that are.
pub fn no_such_column<'a>(
    name: &str,
    place: &str,
    columns: impl IntoIterator<Item = &'a str>,
) -> Error {
    let columns: Vec<&str> = columns.into_iter().collect();
    let listed: Vec<String> = columns.iter().map(|c| format!("`{c}`")).collect();
    let listed = match listed.len() {
        0 => "it has no columns".to_owned(),
        1 => format!("its only column is {}", listed[0]),
        _ => format!("its columns are {}", listed.join(", ")),
    };
    let hint = match nearest(name, columns) {
        Some(near) => format!("did you mean `{near}`? {listed}"),
        None => listed,
    };
    Error::new(format!("{place} has no column `{name}`")).with_hint(hint)
}

/// The column as text.
///
/// # Errors
/// When it holds something else; the message names the column, the place and the type.
pub fn require_text<'a>(array: &'a dyn Array, name: &str, place: &str) -> Result<&'a StringArray> {
    array.as_string_opt::<i32>().ok_or_else(|| {
        Error::new(format!(
            "column `{name}` of {place} holds {}, not text",
            type_name(array.data_type())
        ))
        .with_hint("name a column of text, or turn the values into strings where they are made")
    })
}

/// A type in words, for messages.
pub(crate) fn type_name(data_type: &DataType) -> String {
    match data_type {
        DataType::Null => "nothing but nulls".into(),
        DataType::Boolean => "booleans".into(),
        DataType::Utf8 => "text".into(),
        DataType::Binary => "bytes".into(),
        DataType::List(field) => format!("lists of {}", type_name(field.data_type())),
        DataType::Struct(fields) => {
            let names: Vec<_> = fields.iter().map(|f| f.name().as_str()).collect();
            format!("objects {{{}}}", names.join(", "))
        }
        t if t.is_numeric() => format!("numbers ({t})"),
        t => t.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_choices_do_not_make_types_differ() {
        let list = |inner: &str, t| DataType::List(Arc::new(Field::new(inner, t, false)));
        let large = DataType::LargeList(Arc::new(Field::new("element", DataType::LargeUtf8, true)));
        let dictionary = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
        assert_eq!(plain_type(&large), plain_type(&list("item", dictionary)));
        assert_ne!(plain_type(&large), plain_type(&list("item", DataType::Int64)));
    }

    #[test]
    fn common_type_widens_and_refuses() {
        use DataType::{Float32, Float64, Int16, Int64, Null, UInt32, Utf8};
        assert_eq!(common_type(&Int16, &UInt32), Some(Int64));
        assert_eq!(common_type(&Float32, &Float64), Some(Float64));
        assert_eq!(common_type(&Null, &Utf8), Some(Utf8));
        assert_eq!(common_type(&Int64, &Utf8), None);
        assert_eq!(common_type(&Int64, &Float64), None);
    }

    #[test]
    fn missing_column_names_the_nearest_and_all() {
        let error = no_such_column("txt", "`a.csv`", ["id", "text"]);
        assert_eq!(error.to_string(), "`a.csv` has no column `txt`");
        assert_eq!(error.hint(), Some("did you mean `text`? its columns are `id`, `text`"));
    }
}

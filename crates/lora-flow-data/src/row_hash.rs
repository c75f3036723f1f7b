//! A 128-bit hash of a row's content, the same whatever file format the row came from.

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Float64Type, Int64Type};
use arrow_array::{Array, ArrayRef};
use arrow_cast::cast;
use arrow_cast::display::{ArrayFormatter, FormatOptions};
use arrow_schema::DataType;

/// Hash of a row's content: the first half of a BLAKE3 digest.
pub type RowHash = [u8; 16];

/// Hash of the cells of one row, in the order of `columns`. Integers of all widths hash alike,
/// and so do a null and a missing key of an object.
pub fn hash_row(columns: &[ArrayRef], row: usize) -> RowHash {
    let mut hasher = blake3::Hasher::new();
    for column in columns {
        hash_cell(&mut hasher, column.as_ref(), row);
    }
    let mut out = [0; 16];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    out
}

/// Feeds a tag and the value, with its length where that is not fixed, so that no two different
/// rows feed the same bytes.
fn hash_cell(hasher: &mut blake3::Hasher, array: &dyn Array, row: usize) {
    if array.is_null(row) || array.data_type() == &DataType::Null {
        hasher.update(b"0");
        return;
    }
    match array.data_type() {
        DataType::Boolean => {
            hasher.update(if array.as_boolean().value(row) { b"t" } else { b"f" });
        }
        DataType::Int64 => {
            hasher.update(b"i").update(&array.as_primitive::<Int64Type>().value(row).to_le_bytes());
        }
        DataType::Int8
        | DataType::Int16
        | DataType::Int32
        | DataType::UInt8
        | DataType::UInt16
        | DataType::UInt32 => {
            if let Ok(wide) = cast(&array.slice(row, 1), &DataType::Int64) {
                hash_cell(hasher, wide.as_ref(), 0);
            }
        }
        DataType::Float32 => {
            let value = f64::from(array.as_primitive::<Float32Type>().value(row));
            hasher.update(b"d").update(&value.to_le_bytes());
        }
        DataType::Float64 => {
            let value = array.as_primitive::<Float64Type>().value(row);
            hasher.update(b"d").update(&value.to_le_bytes());
        }
        DataType::Utf8 => {
            let text = array.as_string::<i32>().value(row).as_bytes();
            hasher.update(b"s").update(&(text.len() as u64).to_le_bytes()).update(text);
        }
        DataType::List(_) => {
            let items = array.as_list::<i32>().value(row);
            hasher.update(b"[").update(&(items.len() as u64).to_le_bytes());
            for i in 0..items.len() {
                hash_cell(hasher, items.as_ref(), i);
            }
        }
        DataType::Struct(fields) => {
            hasher.update(b"{");
            for (field, column) in fields.iter().zip(array.as_struct().columns()) {
                if !column.is_null(row) {
                    let name = field.name().as_bytes();
                    hasher.update(b"k").update(&(name.len() as u64).to_le_bytes()).update(name);
                    hash_cell(hasher, column.as_ref(), row);
                }
            }
            hasher.update(b"}");
        }
        _ => {
            let text = ArrayFormatter::try_new(array, &FormatOptions::default())
                .ok()
                .and_then(|f| f.value(row).try_to_string().ok())
                .unwrap_or_default();
            hasher.update(b"x").update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{Int32Array, Int64Array, StringArray};

    use super::*;

    fn text(values: &[Option<&str>]) -> ArrayRef {
        Arc::new(StringArray::from(values.to_vec()))
    }

    #[test]
    fn cells_do_not_run_into_each_other() {
        let a = [text(&[Some("ab")]), text(&[Some("c")])];
        let b = [text(&[Some("a")]), text(&[Some("bc")])];
        assert_ne!(hash_row(&a, 0), hash_row(&b, 0));
        assert_ne!(hash_row(&[text(&[Some("")])], 0), hash_row(&[text(&[None])], 0));
    }

    #[test]
    fn width_of_integers_does_not_matter() {
        let narrow: ArrayRef = Arc::new(Int32Array::from(vec![1, -7]));
        let wide: ArrayRef = Arc::new(Int64Array::from(vec![1, -7]));
        let (narrow, wide) = ([narrow], [wide]);
        assert_eq!(hash_row(&narrow, 1), hash_row(&wide, 1));
        assert_ne!(hash_row(&narrow, 0), hash_row(&wide, 1));
    }
}

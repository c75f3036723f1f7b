//! Which rows to keep: an expression over the row's columns, in Jinja's syntax.

use std::collections::BTreeSet;

use arrow_array::{Array, ArrayRef, BooleanArray};
use lora_flow_core::{Error, Result};
use minijinja::{Environment, UndefinedBehavior, Value};
use rayon::prelude::*;

use crate::cell::cell;

/// Steps one evaluation may take; far above what an honest expression over one row needs.
const FUEL: u64 = 50_000_000;

/// A condition such as `text | length > 100 and book == 'nomicon'`. Python's string methods
/// work (`text.startswith('#')`), and so does `text is matching('^# ')` with a regular
/// expression. A row is kept where the value is true in Jinja's sense: not `false`, `none`, `0`
/// or empty.
pub struct RowFilter {
    source: String,
    environment: Environment<'static>,
    columns: Vec<String>,
}

impl RowFilter {
    /// Parses the expression.
    ///
    /// # Errors
    /// When it is not one.
    pub fn parse(source: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.add_test("matching", matching);
        let globals: BTreeSet<String> =
            environment.globals().map(|(name, _)| name.to_owned()).collect();
        let columns: BTreeSet<String> = environment
            .compile_expression(source)
            .map_err(|e| {
                Error::new(format!("`{source}` is not an expression: {}", what(&e)))
                    .with_hint("for example `text | length > 100 and book == 'nomicon'`")
            })?
            .undeclared_variables(false)
            .into_iter()
            .filter(|name| !globals.contains(name))
            .collect();
        Ok(Self { source: source.to_owned(), environment, columns: columns.into_iter().collect() })
    }

    /// Names of the columns it looks at, sorted.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// Which of the rows to keep; `columns` are those of [`RowFilter::columns`], in that order.
    ///
    /// # Errors
    /// For the first row where the expression cannot be computed; `place` names a row.
    pub fn keep(
        &self,
        columns: &[ArrayRef],
        rows: usize,
        place: impl Fn(usize) -> String,
    ) -> Result<BooleanArray> {
        let expression = self.environment.compile_expression(&self.source).map_err(|e| {
            Error::new(format!("`{}` is not an expression", self.source)).with_source(e)
        })?;
        let verdicts: Vec<std::result::Result<bool, minijinja::Error>> = (0..rows)
            .into_par_iter()
            .with_min_len(64)
            .map(|row| {
                let values = self
                    .columns
                    .iter()
                    .zip(columns)
                    .map(|(name, column)| (name.as_str(), cell(column.as_ref(), row)));
                expression.eval(Value::from_pairs(values)).map(|value| value.is_true())
            })
            .collect();
        let mut keep = Vec::with_capacity(rows);
        for (row, verdict) in verdicts.into_iter().enumerate() {
            keep.push(verdict.map_err(|e| {
                let nulls: Vec<String> = self
                    .columns
                    .iter()
                    .zip(columns)
                    .filter(|(_, column)| column.is_null(row))
                    .map(|(name, _)| format!("`{name}`"))
                    .collect();
                let error =
                    Error::new(format!("`{}` fails on {}: {}", self.source, place(row), what(&e)));
                if nulls.is_empty() {
                    error
                } else {
                    error.with_hint(format!(
                        "{} is null there; test it first: `{} is not none and …`",
                        nulls.join(" and "),
                        nulls[0].trim_matches('`'),
                    ))
                }
            })?);
        }
        Ok(BooleanArray::from(keep))
    }
}

/// The test `is matching('…')`.
fn matching(text: &str, pattern: &str) -> std::result::Result<bool, minijinja::Error> {
    use std::cell::RefCell;
    use std::collections::HashMap;
    thread_local! {
        static COMPILED: RefCell<HashMap<String, regex::Regex>> = RefCell::new(HashMap::new());
    }
    COMPILED.with_borrow_mut(|compiled| {
        if !compiled.contains_key(pattern) {
            let regex = regex::Regex::new(pattern).map_err(|e| {
                minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, e.to_string())
            })?;
            compiled.insert(pattern.to_owned(), regex);
        }
        Ok(compiled[pattern].is_match(text))
    })
}

/// An expression's error without the name of the made-up template it stands in.
fn what(e: &minijinja::Error) -> String {
    e.detail().map_or_else(|| e.kind().to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{Int64Array, StringArray};

    use super::*;

    fn keep(expression: &str) -> Result<Vec<bool>> {
        let filter = RowFilter::parse(expression)?;
        let columns: Vec<ArrayRef> = filter
            .columns()
            .iter()
            .map(|name| -> ArrayRef {
                match name.as_str() {
                    "id" => Arc::new(Int64Array::from(vec![1, 2, 3])),
                    _ => Arc::new(StringArray::from(vec![Some("# one"), Some("two"), None])),
                }
            })
            .collect();
        let kept = filter.keep(&columns, 3, |row| format!("row {}", row + 1))?;
        Ok(kept.iter().map(Option::unwrap_or_default).collect())
    }

    #[test]
    fn expressions_see_columns_methods_and_patterns() {
        assert_eq!(keep("id > 1").unwrap(), [false, true, true]);
        assert_eq!(keep("text is not none and text | length > 3").unwrap(), [true, false, false]);
        assert_eq!(keep("text and text.startswith('#')").unwrap(), [true, false, false]);
        assert_eq!(keep("text and text is matching('^t.o$')").unwrap(), [false, true, false]);
        assert_eq!(keep("id in range(2, 9)").unwrap(), [false, true, true]);
    }

    #[test]
    fn errors_name_the_row_and_say_what_is_null() {
        assert!(keep("id >").unwrap_err().to_string().contains("`id >` is not an expression"));
        let error = keep("text | length > 3").unwrap_err();
        assert!(error.to_string().contains("row 3"), "{error}");
        assert!(error.hint().unwrap().contains("`text` is null"), "{:?}", error.hint());
    }
}

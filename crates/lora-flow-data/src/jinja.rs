//! Jinja as Jinja2 runs it in Python: printing, methods, tests and filters.
//!
//! Chat templates and the templates of evaluation tasks were written against Jinja2; this is the
//! environment that both share.

use minijinja::value::ValueKind;
use minijinja::{Environment, ErrorKind, Value};

use crate::python_text::{python_str, tojson};

/// Steps one rendering may take, so that a template cannot run for ever.
const FUEL: u64 = 200_000_000;

/// Python's string and dict methods, values printed as Python prints them, `tojson` without HTML
/// escapes, `raise_exception`.
pub fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    environment.set_debug(false);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, _, value| {
        match value.as_str() {
            Some(text) => out.write_str(text)?,
            None => out.write_str(&python_str(value)?)?,
        }
        Ok(())
    });
    // Jinja2 can iterate over strings and undefined values but not over `none`, and calls
    // everything with a length and items a sequence.
    environment.add_test("iterable", |value: &Value| {
        !matches!(value.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number)
    });
    environment.add_test("sequence", |value: &Value| {
        use ValueKind::{Map, Seq, String, Undefined};
        matches!(value.kind(), Seq | String | Map | Undefined)
    });
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |value: Value| python_str(&value));
    environment.add_function(
        "raise_exception",
        |message: String| -> std::result::Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    environment
}

/// What went wrong in a template, by the innermost error: the one that its author needs.
pub fn what(e: &minijinja::Error) -> String {
    let mut inner = e;
    while let Some(cause) =
        std::error::Error::source(inner).and_then(|s| s.downcast_ref::<minijinja::Error>())
    {
        inner = cause;
    }
    inner.detail().map_or_else(|| inner.kind().to_string(), str::to_owned)
}

/// A JSON value as templates see it.
pub fn from_json(value: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match value {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(n) => n
            .as_i64()
            .map(Value::from)
            .or_else(|| n.as_u64().map(Value::from))
            .unwrap_or_else(|| Value::from(n.as_f64().unwrap_or(f64::NAN))),
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(from_json).collect(),
        Json::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), from_json(value))))
        }
    }
}

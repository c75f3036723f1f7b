//! The quick look at parameters: sure that they fit, or not sure.
//!
//! A JSON Schema validator is compiled, and held against the schema of schemas, in more time than
//! a whole run with nothing to do takes. So values are looked at first by the commonest keywords;
//! only what is not surely right meets the validator, which also knows how to explain.

use serde_json::Value;

use crate::kinds::follow_ref;

/// Deeper schemas are left to the validator.
const DEPTH: usize = 32;

/// Integers up to here have a float of their own.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// Whether a value surely fits a schema; `root` is the document that `$ref` points into.
pub(crate) fn surely_fits(value: &Value, schema: &Value, root: &Value) -> bool {
    fits(value, schema, root, DEPTH)
}

fn fits(value: &Value, schema: &Value, root: &Value, depth: usize) -> bool {
    let map = match schema {
        Value::Bool(all) => return *all,
        Value::Object(map) if depth > 0 => map,
        _ => return false,
    };
    let fits = |value, schema| fits(value, schema, root, depth - 1);
    map.iter().all(|(keyword, wanted)| match keyword.as_str() {
        // They say nothing about the value. Formats are notes in today's draft.
        "title" | "description" | "default" | "examples" | "format" | "$schema" | "$defs" => true,
        "$ref" => {
            let target = follow_ref(schema, root);
            !std::ptr::eq(target, schema) && fits(value, target)
        }
        "type" => match wanted {
            Value::String(name) => is(value, name),
            Value::Array(names) => names.iter().filter_map(Value::as_str).any(|n| is(value, n)),
            _ => false,
        },
        "const" => same(value, wanted),
        "enum" => wanted.as_array().is_some_and(|all| all.iter().any(|w| same(value, w))),
        "minimum" => compare(value, wanted, |value, limit| value >= limit),
        "maximum" => compare(value, wanted, |value, limit| value <= limit),
        "exclusiveMinimum" => compare(value, wanted, |value, limit| value > limit),
        "exclusiveMaximum" => compare(value, wanted, |value, limit| value < limit),
        "required" => match (value, wanted) {
            (Value::Object(have), Value::Array(names)) => {
                names.iter().all(|name| name.as_str().is_some_and(|n| have.contains_key(n)))
            }
            _ => false,
        },
        "properties" => match (value, wanted) {
            (Value::Object(have), Value::Object(all)) => have
                .iter()
                .all(|(name, value)| all.get(name).is_none_or(|schema| fits(value, schema))),
            _ => false,
        },
        "additionalProperties" => {
            let listed = map.get("properties").and_then(Value::as_object);
            let listed = |name: &String| listed.is_some_and(|all| all.contains_key(name));
            // `patternProperties` is not known here, so that it makes all unsure.
            value.as_object().is_some_and(|have| {
                have.iter().all(|(name, value)| listed(name) || fits(value, wanted))
            })
        }
        "items" => value.as_array().is_some_and(|items| items.iter().all(|i| fits(i, wanted))),
        "anyOf" => wanted.as_array().is_some_and(|any| any.iter().any(|s| fits(value, s))),
        "allOf" => wanted.as_array().is_some_and(|all| all.iter().all(|s| fits(value, s))),
        _ => false,
    })
}

fn is(value: &Value, name: &str) -> bool {
    match name {
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        "null" => value.is_null(),
        _ => false,
    }
}

/// Equal without asking whether 1 and 1.0 are.
fn same(value: &Value, wanted: &Value) -> bool {
    value == wanted && !(value.is_array() || value.is_object())
}

fn compare(value: &Value, limit: &Value, holds: fn(f64, f64) -> bool) -> bool {
    match (value.as_f64(), limit.as_f64()) {
        (Some(value), Some(limit)) => {
            value.abs() < EXACT && limit.abs() < EXACT && holds(value, limit)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (-3i64..4).prop_map(Value::from),
            Just(json!(i64::MAX)),
            Just(json!(u64::MAX)),
            (-3.0..3.0f64).prop_map(Value::from),
            Just(json!(1.0)),
            "[ab]{0,1}".prop_map(Value::from),
        ];
        leaf.prop_recursive(2, 12, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                prop::collection::btree_map("[ab]", inner, 0..3)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    fn any_schema() -> impl Strategy<Value = Value> {
        let kind = || {
            prop::sample::select(vec![
                "string", "integer", "number", "boolean", "array", "object", "null",
            ])
        };
        let number = || prop_oneof![(-3i64..4).prop_map(Value::from), Just(json!(1.5))];
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            kind().prop_map(|k| json!({ "type": k })),
            (kind(), kind())
                .prop_filter("twice", |(a, b)| a != b)
                .prop_map(|(a, b)| json!({ "type": [a, b] })),
            any_value().prop_map(|v| json!({ "const": v })),
            prop::collection::vec(any_value(), 1..3).prop_map(|v| json!({ "enum": v })),
            (number(), number()).prop_map(|(a, b)| json!({ "minimum": a, "exclusiveMaximum": b })),
            (number(), number()).prop_map(|(a, b)| json!({ "exclusiveMinimum": a, "maximum": b })),
            Just(json!({ "pattern": "^a", "required": ["a"] })),
            Just(json!({ "$ref": "#/$defs/x" })),
            Just(json!({ "format": "uint32" })),
        ];
        leaf.prop_recursive(3, 16, 3, |inner| {
            let some = || prop::collection::vec(inner.clone(), 1..3);
            prop_oneof![
                (inner.clone(), inner.clone()).prop_map(|(a, more)| json!({
                    "type": "object", "properties": { "a": a }, "additionalProperties": more,
                })),
                inner.clone().prop_map(|a| json!({ "properties": { "a": a }, "required": ["a"] })),
                inner.clone().prop_map(|items| json!({ "items": items })),
                some().prop_map(|any| json!({ "anyOf": any })),
                some().prop_map(|all| json!({ "allOf": all })),
                some().prop_map(|one| json!({ "oneOf": one })),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn what_surely_fits_does_fit(
            value in any_value(), schema in any_schema(), target in any_schema(),
        ) {
            let mut root = json!({ "allOf": [schema] });
            // No circles: a target that points at itself is nobody's schema.
            if !target.to_string().contains("$ref") {
                root["$defs"] = json!({ "x": target });
            } else {
                root["$defs"] = json!({ "x": { "type": "integer" } });
            }
            let validator = jsonschema::validator_for(&root).unwrap();
            if surely_fits(&value, &root, &root) {
                prop_assert!(validator.is_valid(&value), "{} under {}", value, root);
            }
        }
    }

    #[test]
    fn common_parameters_are_sure_and_wrong_ones_are_not() {
        let schema = json!({
            "type": "object",
            "properties": {
                "r": { "type": "integer", "format": "uint32", "minimum": 1 },
                "mode": { "anyOf": [{ "const": "a" }, { "$ref": "#/$defs/mode" }] },
            },
            "additionalProperties": false,
            "required": ["r"],
            "$defs": { "mode": { "enum": ["b", "c"] } },
        });
        for good in [json!({ "r": 8 }), json!({ "r": 1, "mode": "c" })] {
            assert!(surely_fits(&good, &schema, &schema), "{good}");
        }
        let wrong = [
            json!({}),
            json!({ "r": 0 }),
            json!({ "r": "8" }),
            json!({ "r": 8, "mode": "d" }),
            json!({ "r": 8, "x": 1 }),
            json!(8),
        ];
        for wrong in wrong {
            assert!(!surely_fits(&wrong, &schema, &schema), "{wrong}");
        }
        let circle = json!({ "$defs": { "x": { "$ref": "#/$defs/x" } }, "$ref": "#/$defs/x" });
        assert!(!surely_fits(&json!(1), &circle, &circle));
    }
}

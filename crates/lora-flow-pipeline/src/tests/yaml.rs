//! The tree: types, places, anchors.

use serde_json::{Value, json};

use super::SourceFile;
use crate::yaml::{Node, parse};

fn tree(text: &str) -> Node {
    parse(&SourceFile::new("p.yaml", text)).unwrap_or_else(|e| panic!("{text}: {e:?}"))
}

fn value(text: &str) -> Value {
    tree(text).to_json()
}

#[test]
fn scalars_follow_the_core_schema() {
    for (text, expected) in [
        ("", Value::Null),
        ("~", Value::Null),
        ("null", Value::Null),
        ("true", json!(true)),
        ("False", json!(false)),
        ("yes", json!("yes")),
        ("on", json!("on")),
        ("12", json!(12)),
        ("+12", json!(12)),
        ("-3", json!(-3)),
        ("0", json!(0)),
        ("007", json!("007")),
        ("-01", json!("-01")),
        ("00.5", json!("00.5")),
        ("0.5", json!(0.5)),
        (".5", json!(0.5)),
        ("1.", json!(1.0)),
        ("2.0e-4", json!(2.0e-4)),
        ("2e-4", json!(2.0e-4)),
        ("1E3", json!(1000.0)),
        ("1_000", json!("1_000")),
        ("0x1F", json!(31)),
        ("0o17", json!(15)),
        ("0b1", json!("0b1")),
        ("1.2.3", json!("1.2.3")),
        ("1e", json!("1e")),
        ("-", json!([null])),
        ("2026-11-24", json!("2026-11-24")),
        ("12:30", json!("12:30")),
        ("18446744073709551615", json!(18446744073709551615u64)),
        ("\"12\"", json!("12")),
        ("'true'", json!("true")),
        ("!!str 12", json!("12")),
        ("!!float 1", json!(1)),
        ("|\n  a\n  b\n", json!("a\nb\n")),
        ("${{ params.r }}", json!("${{ params.r }}")),
    ] {
        assert_eq!(value(text), expected, "{text}");
    }
}

#[test]
fn keys_are_text_as_written() {
    assert_eq!(
        value("1: a\ntrue: b\non: c\n\"x y\": d\n"),
        json!({"1":"a","true":"b","on":"c","x y":"d"})
    );
}

#[test]
fn merge_keys_give_way_to_own_keys() {
    let text =
        "a: &a { x: 1, y: 1 }\nb: &b { y: 2, z: 2 }\nc: { y: 0, <<: [*a, *b] }\nd: { \"<<\": 1 }\n";
    let value = value(text);
    assert_eq!(value["c"], json!({ "y": 0, "x": 1, "z": 2 }));
    assert_eq!(value["d"], json!({ "<<": 1 }));
}

#[test]
fn every_key_and_value_has_its_place() {
    let text = "é: &x\n  - a\n  - \"b c\"\nm: { k: 1.5, l: *x }\nlast:\n  deep: yes\n# end\n";
    let places = tree(text).places();
    let of = |pointer: &str| {
        let span = places.values[pointer];
        &text[span.start..span.end]
    };
    let key = |pointer: &str| {
        let span = places.keys[pointer];
        &text[span.start..span.end]
    };
    assert_eq!(of("/é/0"), "a");
    assert_eq!(of("/é/1"), "\"b c\"");
    assert_eq!(of("/m"), "{ k: 1.5, l: *x }");
    assert_eq!(of("/m/k"), "1.5");
    // What an alias stands for is where it is written.
    assert_eq!(of("/m/l/0"), "a");
    assert_eq!(of("/last"), "deep: yes");
    assert_eq!(key("/é"), "é");
    assert_eq!(key("/m/k"), "k");
    assert_eq!(key("/last/deep"), "deep");
}

#[test]
fn byte_order_mark_and_windows_lines_are_fine() {
    assert_eq!(value("\u{feff}a: 1\r\nb:\r\n  - x\r\n"), json!({ "a": 1, "b": ["x"] }));
}

#[test]
fn all_repeated_keys_are_named() {
    let source = SourceFile::new("p.yaml", "a: 1\nb: 2\na: 3\nc: { d: 1, d: 2 }\n");
    let found: Vec<String> = parse(&source).unwrap_err().iter().map(|d| d.to_string()).collect();
    assert_eq!(
        found,
        ["p.yaml:3:1: `a` is already given at 1:1", "p.yaml:4:12: `d` is already given at 4:6"]
    );
}

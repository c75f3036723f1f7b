use std::path::Path;

use lora_flow_core::Artifact;
use serde_json::{Value, json};

use super::*;
use crate::testing::{Ran, run, texts};

fn ingest(dir: &Path, with: Value) -> Result<Ran> {
    run("ingest", with, dir, vec![])
}

fn write(dir: &Path, name: &str, content: &str) -> String {
    std::fs::write(dir.join(name), content).unwrap();
    name.to_owned()
}

const ROWS: &str = "book,body,n\na,one,1\na,two,2\nb,one,3\nb,four,4\nc,five,5\nc,six,6\n";

#[test]
fn columns_are_chosen_renamed_and_filtered() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "a.csv", ROWS);
    let with = json!({ "files": file, "text": "body", "columns": { "source": "book" },
                       "where": "n > 1 and source != 'c' and text | length < 5" });
    let ran = ingest(dir.path(), with).unwrap();
    let (columns, rows) = texts(&ran.outputs["dataset"]);
    assert_eq!(columns, ["text", "source"]);
    assert_eq!(rows, [["two", "a"], ["one", "b"], ["four", "b"]]);
    assert!(ran.report.contains("  dropped    3 by `where"), "{}", ran.report);
    assert_eq!(ran.summary, [("rows".to_owned(), "3".to_owned())]);
}

#[test]
fn duplicates_go_by_text_or_by_columns() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "a.csv", ROWS);
    let count = |with: Value| {
        let mut all = json!({ "files": file, "text": "body" });
        all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        texts(&ingest(dir.path(), all).unwrap().outputs["dataset"]).1.len()
    };
    assert_eq!(count(json!({})), 6);
    assert_eq!(count(json!({ "dedup": true })), 5);
    assert_eq!(count(json!({ "dedup": ["book"] })), 3);
    assert_eq!(count(json!({ "dedup": ["book", "text"] })), 6);
    assert_eq!(count(json!({ "dedup": ["book"], "limit": 2 })), 2);
}

#[test]
fn groups_stay_together_and_every_row_has_one_place() {
    let dir = tempfile::tempdir().unwrap();
    let rows: String =
        (0..400).map(|i| format!("{{\"text\": \"t{i}\", \"book\": \"b{}\"}}\n", i % 40)).collect();
    let file = write(dir.path(), "a.jsonl", &rows);
    let with = json!({ "files": [file], "split": { "train": 0.7, "eval": 0.3 },
                       "split_by": "book", "columns": ["text", "book"], "seed": 3 });
    let ran = ingest(dir.path(), with).unwrap();
    let (train, eval) = (texts(&ran.outputs["train"]).1, texts(&ran.outputs["eval"]).1);
    assert_eq!(train.len() + eval.len(), 400);
    let books =
        |rows: &[Vec<String>]| -> BTreeSet<String> { rows.iter().map(|r| r[1].clone()).collect() };
    assert!(books(&train).is_disjoint(&books(&eval)));
    assert!(ran.report.contains("40 of `book`"), "{}", ran.report);
}

#[test]
fn rows_come_from_artifacts_too() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "a.jsonl", "{\"text\": \"x\"}\n");
    write(dir.path(), "about.json", "{}");
    let artifact = Artifact::from_dir(ArtifactKind::Files, dir.path()).unwrap();
    let inputs = vec![("files", "fetch", artifact)];
    let ran = run("ingest", json!({}), dir.path(), inputs).unwrap();
    assert_eq!(texts(&ran.outputs["dataset"]).1, [["x"]]);
    let again = Artifact::from_dir(ArtifactKind::Dataset, &ran.outputs["dataset"]).unwrap();
    let inputs = vec![("files", "docs", again)];
    let ran = run("ingest", json!({ "columns": ["txt"] }), dir.path(), inputs);
    let error = ran.unwrap_err();
    assert_eq!(error.to_string(), "`docs/part-00000.parquet` has no column `txt`");
}

#[test]
fn what_is_said_about_bad_rows() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "a.csv", ROWS);
    let fail = |with: Value| {
        let mut all = json!({ "files": file });
        all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        ingest(dir.path(), all).unwrap_err()
    };
    assert!(fail(json!({ "text": "txt" })).to_string().contains("has no column `txt`"));
    let error = fail(json!({ "where": "boook == 'a'" }));
    assert!(error.chain().contains("has no column `boook`"), "{}", error.chain());
    assert!(error.hint().unwrap().contains("did you mean `book`?"));
    assert!(fail(json!({ "where": "n > 10" })).to_string().contains("none of the 6 rows is kept"));
    let error = fail(json!({ "where": "n + 1" , "split": { "a": 0.999_999, "b": 0.000_001 } }));
    assert!(error.to_string().contains("split `b` got no rows"), "{error}");
    let error = fail(json!({ "where": "n | upper + 1" }));
    assert!(error.to_string().contains("a.csv` row 1"), "{error}");
    let file = write(dir.path(), "n.jsonl", "{\"text\": 1}\n");
    let error = ingest(dir.path(), json!({ "files": file, "text": "text" })).unwrap_err();
    assert!(error.to_string().contains("holds numbers (Int64), not text"), "{error}");
}

#[test]
fn problems_are_found_before_anything_runs() {
    let problems = |with: Value| -> Vec<String> {
        let task = Ingest::deserialize(with).unwrap();
        task.validate().into_iter().map(|p| format!("{} {}", p.pointer, p.message)).collect()
    };
    assert!(problems(json!({ "files": "a.csv", "split": { "a": 0.5, "b": 0.5 } })).is_empty());
    for (with, pointer) in [
        (json!({ "files": [] }), "/files "),
        (json!({ "where": "id >" }), "/where "),
        (json!({ "split": { "a": 0.5, "b": 0.6 } }), "/split the fractions add up to 1.1"),
        (json!({ "split": { "a/b": 1.0 } }), "/split `a/b` cannot name"),
        (json!({ "split_by": "x" }), "/split_by "),
        (json!({ "limit": 0 }), "/limit "),
        (json!({ "dedup": [] }), "/dedup "),
        (json!({ "columns": [] }), "/columns "),
        (json!({ "columns": ["a", "a"] }), "/columns "),
        (json!({ "text": "a", "columns": { "text": "b" } }), "/columns both"),
    ] {
        let found = problems(with.clone());
        assert!(found.len() == 1 && found[0].starts_with(pointer), "{with}: {found:?}");
    }
}

#[test]
fn a_file_that_is_damaged_in_the_middle_is_an_error_that_says_where() {
    let dir = tempfile::tempdir().unwrap();
    let rows: String = (0..9000).map(|i| format!("{{\"text\": \"{i} {}\"}}\n", i * i)).collect();
    let file = write(dir.path(), "a.jsonl", &rows);
    let whole = ingest(dir.path(), json!({ "files": file })).unwrap();
    let mut bytes = std::fs::read(whole.outputs["dataset"].join("part-00000.parquet")).unwrap();
    // The last of the pages, each of which is a zstd frame.
    let frame = bytes.windows(4).rposition(|w| w == [0x28, 0xb5, 0x2f, 0xfd]).unwrap();
    bytes[frame..frame + 4].fill(0);
    std::fs::write(dir.path().join("b.parquet"), bytes).unwrap();
    let error = ingest(dir.path(), json!({ "files": "b.parquet" })).unwrap_err();
    assert!(error.chain().contains("b.parquet` is damaged after row 8192"), "{}", error.chain());
}

#[test]
fn rows_are_the_same_whether_row_groups_are_copied_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let rows: String = (0..5000)
        .map(|i| format!("{{\"n\": {i}, \"name\": \"name {i}\", \"text\": \"text {i}\"}}\n"))
        .collect();
    let file = write(dir.path(), "a.jsonl", &rows);
    let first = ingest(dir.path(), json!({ "files": file })).unwrap();
    let part =
        |ran: &Ran| std::fs::read(ran.outputs["dataset"].join("part-00000.parquet")).unwrap();
    std::fs::write(dir.path().join("b.parquet"), part(&first)).unwrap();
    let all = texts(&first.outputs["dataset"]);
    let again = |more: Value| {
        let mut with = json!({ "files": "b.parquet" });
        with.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ingest(dir.path(), with).unwrap()
    };
    for same in [
        json!({}),
        json!({ "text": "text" }),
        json!({ "where": "n >= 0" }),
        json!({ "dedup": true }),
        json!({ "limit": 9000 }),
        json!({ "columns": ["n", "name", "text"] }),
    ] {
        let ran = again(same.clone());
        assert_eq!(texts(&ran.outputs["dataset"]), all, "{same}");
        assert_eq!(ran.report.lines().last(), first.report.lines().last());
        assert_eq!(ran.summary, first.summary);
        let info = |ran: &Ran| std::fs::read(ran.outputs["dataset"].join("dataset.json")).unwrap();
        assert_eq!(info(&ran), info(&first), "{same}");
    }
    // Names that change places are no reason to copy what stands under them.
    let swapped = again(json!({ "columns": { "text": "name", "name": "text", "n": "n" } }));
    let (columns, rows) = texts(&swapped.outputs["dataset"]);
    assert_eq!((columns, &rows[7]), (all.0, &vec!["7".into(), "text 7".into(), "name 7".into()]));
    let chosen = again(json!({ "columns": ["text", "n"] }));
    assert_eq!(texts(&chosen.outputs["dataset"]).1[7], ["text 7", "7"]);
    let split = again(json!({ "split": { "train": 0.5, "eval": 0.5 } }));
    let count = |name: &str| texts(&split.outputs[name]).1.len();
    assert_eq!(count("train") + count("eval"), 5000);
}

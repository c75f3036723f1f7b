//! The lock file: what it pins, and what is said when something differs.

use std::fs;
use std::sync::Arc;

use lora_flow_core::{DeviceSpec, Digest};
use serde_json::json;

use super::bench::{Bench, out};
use crate::pinned::LockFile;
use crate::run::Status;
use crate::source::Span;

fn bench() -> Bench {
    let mut bench = Bench::new();
    for name in ["one", "two"] {
        fs::write(bench.path(name), name).unwrap();
    }
    bench.add("a", json!({}), &[]).param_spans.insert("/files".to_owned(), Span::new(6, 11));
    bench.reads(&["one", "two"]);
    bench
}

fn lock(bench: &Bench) -> (LockFile, Vec<String>) {
    bench.engine().lock(&bench.plan(), DeviceSpec::Cpu).unwrap()
}

/// What differs from a lock, as `line:column: message`.
fn differs(bench: &Bench, lock: &LockFile) -> Vec<String> {
    let found = bench.engine().check_lock(&bench.plan(), lock, DeviceSpec::Cpu).unwrap();
    let line = |d: &crate::Diagnostic| {
        let (line, column) = d.line_column().unwrap();
        assert!(d.hint.as_ref().unwrap().contains("lora-flow lock "));
        format!("{line}:{column}: {}", d.message)
    };
    found.iter().map(line).collect()
}

#[test]
fn a_lock_survives_its_file_and_nothing_differs_from_it() {
    let bench = bench();
    let (lock, open) = lock(&bench);
    assert!(open.is_empty());
    assert_eq!(lock.files["*"]["one"], Digest::of_bytes(b"one"));
    let path = LockFile::path_of(&bench.path("p.yaml"));
    assert_eq!(path, bench.path("p.lock"));
    assert_eq!(LockFile::read(&path).unwrap(), None);
    lock.write(&path).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    assert!(!text.contains(bench.path("").to_str().unwrap()), "no path of this machine: {text}");
    assert_eq!(LockFile::read(&path).unwrap(), Some(lock.clone()));
    assert!(differs(&bench, &lock).is_empty());
    fs::write(&path, text.replace("\"version\": 1", "\"version\": 2")).unwrap();
    assert!(LockFile::read(&path).unwrap_err().to_string().ends_with("has version 2"));
    fs::write(&path, "{}").unwrap();
    assert!(LockFile::read(&path).unwrap_err().to_string().ends_with("is not a lock file"));
}

#[test]
fn every_difference_is_named_with_both_digests_and_its_place() {
    let mut bench = bench();
    let (lock, _) = lock(&bench);
    let short = |text: &str| Digest::of_bytes(text.as_bytes()).short();
    fs::write(bench.path("one"), "changed").unwrap();
    fs::write(bench.path("three"), "three").unwrap();
    bench.task("a").files.clear();
    bench.reads(&["one", "three"]);
    assert_eq!(
        differs(&bench, &lock),
        [
            format!("1:7: file `one` differs: pinned {}, found {}", short("one"), short("changed")),
            format!("1:7: file `three` is not in the lock: found {}", short("three")),
            format!("1:7: file `two` is missing: pinned {}", short("two")),
        ]
    );
    assert_eq!(differs(&bench, &LockFile::default()), ["1:7: `*` is not in the lock"]);
    assert_eq!(bench.taken(), [""; 0], "nothing ran");
}

#[test]
fn variables_are_pinned_by_the_digest_of_their_value() {
    let bench = bench();
    let mut plan = bench.plan();
    let digest = |text: &str| Some(Digest::of_bytes(text.as_bytes()));
    plan.env = vec![
        ("A".to_owned(), digest("1"), Span::new(0, 4)),
        ("B".to_owned(), None, Span::new(6, 8)),
    ];
    let engine = bench.engine();
    let (lock, _) = engine.lock(&plan, DeviceSpec::Cpu).unwrap();
    assert!(engine.check_lock(&plan, &lock, DeviceSpec::Cpu).unwrap().is_empty());
    plan.env[0].1 = digest("2");
    plan.env[1].1 = digest("3");
    let found = engine.check_lock(&plan, &lock, DeviceSpec::Cpu).unwrap();
    let messages: Vec<_> = found.iter().map(|d| d.message.as_str()).collect();
    assert!(messages[0].starts_with("environment variable `A` differs: pinned "), "{messages:?}");
    assert!(messages[1].starts_with("environment variable `B` differs: pinned not set, found "));
}

#[test]
fn downloads_are_pinned_when_they_are_known_and_checked_when_they_are_made() {
    let mut bench = Bench::new();
    let served = bench.path("served");
    fs::write(&served, "first").unwrap();
    let body = move |cx: &mut lora_flow_core::TaskContext| {
        cx.output("out")?.write("text", fs::read(&served)?)
    };
    bench.add_with("fetch", json!({}), &[], body).network = true;
    bench.add("b", json!({}), &["fetch"]);
    let (empty, open) = lock(&bench);
    assert_eq!((empty.downloads.len(), open), (0, vec!["fetch".to_owned()]));
    assert_eq!(differs(&bench, &empty), ["1:1: what `fetch` downloads is not in the lock"]);
    bench.run();
    let (lock, open) = lock(&bench);
    assert!(open.is_empty() && differs(&bench, &lock).is_empty());
    bench.options.pinned = lock.downloads.clone();
    assert_eq!(bench.run().exit_code(), 0);
    assert_eq!(bench.taken(), ["fetch", "b"]);
    // On another machine the network says something else.
    fs::remove_dir_all(bench.store_dir()).unwrap();
    fs::write(bench.path("served"), "second").unwrap();
    let report = bench.engine().run(&bench.plan(), &bench.options, Arc::new(super::bench::Quiet));
    let report = report.unwrap();
    let error = out(&report, "fetch").error.as_ref().unwrap();
    let start = "this is not what the lock says: output `out` differs: pinned ";
    assert!(error.message.starts_with(start), "{}", error.message);
    assert!(matches!(out(&report, "b").status, Status::Skipped(_)));
    assert_eq!((report.exit_code(), bench.taken()), (1, vec!["fetch".to_owned()]));
    // The wrong result is in the store by now, and still not accepted.
    assert_eq!(bench.run().exit_code(), 1);
    bench.options.pinned.clear();
    assert_eq!(bench.run().exit_code(), 0);
}

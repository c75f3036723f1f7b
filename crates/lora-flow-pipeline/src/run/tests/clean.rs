//! Cleaning: what goes, what stays, and what a run beside it notices.

use std::fs;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, SystemTime};

use serde_json::json;

use super::bench::{Bench, files_below, out, text};
use crate::run::{RunReport, Status};
use crate::store::Keep;

fn keep(runs: usize, age: Duration) -> Keep {
    Keep { runs, age, max_bytes: None }
}

const NOTHING: Keep = Keep { runs: 0, age: Duration::ZERO, max_bytes: None };

fn chain() -> Bench {
    let mut bench = Bench::new();
    bench.add("a", json!({ "n": "some text" }), &[]);
    bench.add("b", json!({ "n": 2 }), &["a"]);
    bench
}

/// As if nothing below a folder had been used for some hours.
fn age(dir: &Path, hours: u64) {
    let then = SystemTime::now() - Duration::from_secs(hours * 3600);
    for path in files_below(dir) {
        fs::File::open(path).unwrap().set_modified(then).unwrap();
    }
}

fn age_results(bench: &Bench, hours: u64) {
    age(&bench.store_dir().join("entries"), hours);
    age(&bench.store_dir().join("objects"), hours);
}

#[test]
fn cleaning_keeps_what_recent_runs_and_young_entries_need() {
    let mut bench = chain();
    bench.run();
    bench.set_params("b", json!({ "n": 3 }));
    bench.run();
    let engine = bench.engine();
    assert_eq!(engine.store().ls().unwrap().len(), 3);
    let day = Duration::from_secs(24 * 3600);
    let kept = engine.gc(&keep(1, day), false).unwrap();
    assert_eq!((kept.entries, kept.blobs), (0, 0), "all are young");
    let would = engine.gc(&keep(1, Duration::ZERO), true).unwrap();
    assert_eq!((would.entries, would.runs), (1, 1));
    assert_eq!(engine.store().ls().unwrap().len(), 3, "a dry run removes nothing");
    let freed = engine.gc(&keep(1, Duration::ZERO), false).unwrap();
    assert_eq!((freed.entries, freed.blobs, freed.runs), (would.entries, would.blobs, 1));
    assert!(freed.bytes > 0);
    bench.taken();
    assert_eq!(bench.executes(), [""; 0], "the last run's results are kept");
    let freed = engine.gc(&keep(0, Duration::ZERO), false).unwrap();
    assert_eq!(freed.entries, 2);
    assert!(files_below(&bench.store_dir().join("objects")).is_empty());
    assert_eq!(bench.explained()[0], "a: runs: its last result is no longer in the store");
    assert_eq!(bench.executes(), ["a", "b"]);
}

#[test]
fn killed_runs_do_not_take_the_place_of_those_that_ended() {
    let bench = chain();
    bench.run();
    for killed in ["29990101-000000-0001", "29990101-000000-0002"] {
        fs::create_dir_all(bench.store_dir().join("runs").join(killed)).unwrap();
    }
    let freed = bench.engine().gc(&keep(1, Duration::ZERO), false).unwrap();
    assert_eq!((freed.entries, freed.blobs, freed.runs), (0, 0, 0));
}

#[test]
fn cleaning_beside_a_running_pipeline_leaves_what_it_uses() {
    let mut bench = Bench::new();
    bench.add("a", json!({ "n": 1 }), &[]);
    assert_eq!(bench.executes(), ["a"]);
    let wanted = bench.run();
    bench.set_params("a", json!({ "n": 2 }));
    bench.run();
    bench.set_params("a", json!({ "n": 1 }));
    let (started, is_started) = mpsc::channel::<()>();
    let (go_on, may_end) = mpsc::channel::<()>();
    let may_end = std::sync::Mutex::new(may_end);
    bench.add_with("b", json!({}), &["a"], move |cx| {
        started.send(()).unwrap();
        may_end.lock().unwrap().recv().unwrap();
        let text = fs::read(cx.inputs()["a"][0].artifact.file("text")?)?;
        cx.output("out")?.write("text", text)
    });
    age_results(&bench, 10);
    let bench = Arc::new(bench);
    let running = bench.clone();
    let run = std::thread::spawn(move || running.run());
    is_started.recv().unwrap();
    let engine = bench.engine();
    assert_eq!(engine.store().ls().unwrap().len(), 2);
    let would = engine.gc(&NOTHING, true).unwrap();
    assert_eq!((would.entries, would.blobs, would.beside_runs), (1, 1, true));
    let freed = engine.gc(&Keep { max_bytes: Some(0), ..NOTHING }, false).unwrap();
    assert_eq!((freed.entries, freed.blobs, freed.beside_runs), (1, 1, true));
    assert!(freed.left > 0, "what the run uses is more than was allowed");
    assert!(engine.store().verify().unwrap().problems.is_empty());
    go_on.send(()).unwrap();
    let report: RunReport = run.join().unwrap();
    assert_eq!(report.exit_code(), 0);
    assert_eq!(out(&report, "a").status, Status::Cached);
    assert_eq!(text(&bench, &report, "b"), text(&bench, &wanted, "a"));
    assert!(engine.store().verify().unwrap().problems.is_empty());
    let freed = engine.gc(&NOTHING, false).unwrap();
    assert_eq!((freed.entries, freed.left, freed.beside_runs), (2, 0, false));
}

#[test]
fn runs_and_cleanings_at_once_do_no_harm() {
    let root = tempfile::tempdir().unwrap();
    let bench = || {
        let mut bench = chain();
        bench.add("c", json!({ "n": 3 }), &["b"]);
        bench.root = Some(root.path().to_owned());
        bench
    };
    let store = bench().engine().store().clone();
    std::thread::scope(|scope| {
        let runners: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..12 {
                        let bench = bench();
                        let report = bench.run();
                        assert_eq!(report.exit_code(), 0, "{report:?}");
                    }
                })
            })
            .collect();
        while runners.iter().any(|r| !r.is_finished()) {
            store.gc(&NOTHING, false).unwrap();
            let report = store.verify().unwrap();
            assert!(report.problems.is_empty(), "{report:?}");
        }
    });
    let report = bench().run();
    assert_eq!(text(&bench(), &report, "c"), r#"{"n":3}{"n":2}{"n":"some text"}"#);
}

#[test]
fn beyond_a_size_the_least_recently_used_goes_and_pins_stay() {
    let mut bench = Bench::new();
    bench.add_with("a", json!({ "n": 0 }), &[], |_| Ok(()));
    let mut ids = Vec::new();
    for n in 0..4 {
        let body =
            move |cx: &mut lora_flow_core::TaskContext| cx.output("out")?.write("text", [n; 1000]);
        bench.tasks.clear();
        bench.add_with("a", json!({ "n": n }), &[], body);
        let report = bench.run();
        let key = out(&report, "a").key.unwrap().to_string();
        let entry = bench.store_dir().join("entries").join(&key[..2]);
        age(&entry, 10 - u64::from(n));
        ids.push(report.run_id);
    }
    let engine = bench.engine();
    let left = || -> Vec<String> {
        let mut params: Vec<String> = (engine.store().ls().unwrap().iter())
            .map(|e| engine.store().peek(&e.key).unwrap().explained.key.params.to_string())
            .collect();
        params.sort();
        params
    };
    let week = Duration::from_secs(7 * 24 * 3600);
    let fits = |max| Keep { runs: 10, age: week, max_bytes: Some(max) };
    assert_eq!(engine.gc(&fits(4000), false).unwrap().entries, 0);
    engine.store().pin(&ids[0]).unwrap();
    // The oldest is pinned; the next one was used just now.
    bench.tasks.clear();
    bench.add_with("a", json!({ "n": 1 }), &[], |_| panic!("it is cached"));
    assert_eq!(bench.executes(), [""; 0]);
    let would = engine.gc(&fits(3999), true).unwrap();
    assert_eq!((would.entries, would.blobs, would.left), (1, 1, 3000));
    let freed = engine.gc(&fits(3999), false).unwrap();
    assert_eq!((freed.entries, freed.blobs, freed.left), (1, 1, 3000));
    assert_eq!(freed.removed[0].size, 1000);
    assert!(freed.bytes > 1000, "the entry's own file counts");
    assert_eq!(left(), [r#"{"n":0}"#, r#"{"n":1}"#, r#"{"n":3}"#]);
    engine.gc(&fits(1), false).unwrap();
    assert_eq!(left(), [r#"{"n":0}"#]);
    engine.gc(&NOTHING, false).unwrap();
    assert_eq!(left(), [r#"{"n":0}"#]);
    assert!(engine.load_run(&ids[0]).is_ok() && engine.load_run(&ids[1]).is_err());
    assert!(engine.store().unpin(&ids[0]).unwrap());
    engine.gc(&NOTHING, false).unwrap();
    assert_eq!(left(), [""; 0]);
}

//! What is computed again, what is not, and what is said about it.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use lora_flow_core::{ArtifactKind, Ports};
use serde_json::json;

use super::bench::{Bench, Quiet, out, text};
use crate::run::Status;

/// a → b → d, a → c → d.
fn diamond() -> Bench {
    let mut bench = Bench::new();
    bench.add("a", json!({ "n": 1 }), &[]);
    bench.add("b", json!({ "x": "b" }), &["a"]);
    bench.add("c", json!({ "x": "c", "deep": { "rate": 0.1 } }), &["a"]);
    bench.add("d", json!({}), &["left=b", "right=c"]);
    bench
}

#[test]
fn a_rerun_executes_nothing_and_gives_the_same() {
    let bench = diamond();
    let first = bench.run();
    assert_eq!(bench.taken(), ["a", "b", "c", "d"]);
    assert_eq!(
        text(&bench, &first, "d"),
        r#"{}{"x":"b"}{"n":1}{"deep":{"rate":0.1},"x":"c"}{"n":1}"#
    );
    let second = bench.run();
    assert_eq!(bench.taken(), [""; 0]);
    assert!(second.tasks.iter().all(|t| t.status == Status::Cached && t.wall.is_zero()));
    assert_eq!(second.exit_code(), 0);
    for (a, b) in first.tasks.iter().zip(&second.tasks) {
        assert_eq!((&a.id, &a.key, &a.outputs), (&b.id, &b.key, &b.outputs));
    }
    assert_ne!(first.run_id, second.run_id);
    assert!(first.run_id < second.run_id, "ids sort by time");
    let engine = bench.engine();
    assert_eq!(engine.load_run("latest").unwrap(), second);
    assert_eq!(engine.runs().unwrap(), [second.clone(), first]);
    assert!(!engine.log_path(&second.run_id, "a").exists(), "nothing to log");
}

#[test]
fn a_changed_parameter_runs_its_task_and_what_depends_on_it() {
    let mut bench = diamond();
    assert_eq!(bench.executes(), ["a", "b", "c", "d"]);
    bench.set_params("c", json!({ "x": "c", "deep": { "rate": 0.2 } }));
    assert_eq!(
        bench.explained(),
        [
            "a: cached",
            "b: cached",
            "c: runs: `with.deep.rate` changed: 0.1 → 0.2",
            "d: may run: depends on `c`",
        ]
    );
    let report = bench.run();
    assert_eq!(bench.taken(), ["c", "d"]);
    assert_eq!(out(&report, "b").status, Status::Cached);
    assert_eq!(out(&report, "c").reasons, ["`with.deep.rate` changed: 0.1 → 0.2"]);
    assert_eq!(out(&report, "d").reasons, ["input `right` changed: `c` has new content"]);
}

#[test]
fn what_is_known_of_a_task_is_said_before_its_inputs_are() {
    let mut bench = diamond();
    let never =
        ["a: runs: never run", "b: runs: never run", "c: runs: never run", "d: runs: never run"];
    assert_eq!(bench.explained(), never);
    bench.run();
    bench.set_params("a", json!({ "n": 2 }));
    bench.set_params("b", json!({ "x": "other" }));
    assert_eq!(
        bench.explained(),
        [
            "a: runs: `with.n` changed: 1 → 2",
            "b: runs: `with.x` changed: \"b\" → \"other\"; depends on `a`",
            "c: may run: depends on `a`",
            "d: may run: depends on `b`; depends on `c`",
        ]
    );
    bench.run();
    bench.set_params("a", json!({ "n": 1 }));
    assert_eq!(bench.explained()[0], "a: cached", "the result of the first run");
    assert_eq!(bench.taken(), ["a", "b", "c", "d", "a", "b", "c", "d"]);
}

#[test]
fn an_upstream_rerun_with_equal_bytes_stops_there() {
    let mut bench = Bench::new();
    bench.add_with("a", json!({ "seed": 1 }), &[], |cx| cx.output("out")?.write("text", "same"));
    bench.add("b", json!({}), &["a"]);
    assert_eq!(bench.executes(), ["a", "b"]);
    bench.task("a").params = json!({ "seed": 2 });
    assert_eq!(
        bench.explained(),
        ["a: runs: `with.seed` changed: 1 → 2", "b: may run: depends on `a`"]
    );
    assert_eq!(bench.executes(), ["a"]);
    bench.task("a").kind_version = 2;
    assert_eq!(bench.explained()[0], "a: runs: implementation version 1 → 2");
    assert_eq!(bench.executes(), ["a"]);
}

#[test]
fn names_of_tasks_and_pipelines_are_not_in_the_key() {
    let mut bench = diamond();
    bench.run();
    bench.name = "other".to_owned();
    bench.task("b").id = "renamed".to_owned();
    bench.task("d").inputs[0].reference = "renamed".to_owned();
    assert_eq!(bench.executes(), [""; 0]);
}

#[test]
fn outside_files_enter_by_content_alone() {
    let mut bench = Bench::new();
    let read = |cx: &mut lora_flow_core::TaskContext| {
        let texts: Vec<String> =
            cx.files("/files").iter().map(|p| fs::read_to_string(p).unwrap()).collect();
        cx.output("out")?.write("text", texts.concat())
    };
    bench.add_with("a", json!({}), &[], read);
    fs::write(bench.path("one.txt"), "1").unwrap();
    fs::write(bench.path("two.txt"), "2").unwrap();
    bench.reads(&["one.txt", "two.txt"]);
    let report = bench.run();
    assert_eq!(text(&bench, &report, "a"), "12");
    bench.taken();
    // Another time, another inode, the same bytes.
    fs::remove_file(bench.path("one.txt")).unwrap();
    fs::write(bench.path("one.txt"), "1").unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(1000);
    fs::File::options()
        .write(true)
        .open(bench.path("two.txt"))
        .unwrap()
        .set_modified(long_ago)
        .unwrap();
    assert_eq!(bench.explained(), ["a: cached"]);
    assert_eq!(bench.executes(), [""; 0]);
    // A renamed file is the same content in the same order.
    fs::rename(bench.path("one.txt"), bench.path("again.txt")).unwrap();
    bench.tasks[0].files.clear();
    bench.reads(&["again.txt", "two.txt"]);
    assert_eq!(bench.executes(), [""; 0]);
    fs::write(bench.path("two.txt"), "3").unwrap();
    // The entry was made when the first file had its old name.
    assert_eq!(
        bench.explained(),
        ["a: runs: file `again.txt` added; file `one.txt` removed; file `two.txt` changed"]
    );
    assert_eq!(bench.executes(), ["a"]);
}

#[test]
fn a_file_that_changes_while_its_task_runs_spoils_the_result() {
    let mut bench = Bench::new();
    let path = bench.path("data");
    fs::write(&path, "before").unwrap();
    let victim = path.clone();
    bench.add_with("a", json!({}), &[], move |cx| {
        fs::write(&victim, "after, and longer").unwrap();
        cx.output("out")?.write("text", "mixed")
    });
    bench.reads(&["data"]);
    let report = bench.run();
    let error = out(&report, "a").error.clone().unwrap();
    assert!(error.message.contains("changed while the task ran"), "{}", error.message);
    assert!(bench.engine().store().ls().unwrap().is_empty());
}

#[test]
fn forced_tasks_run_and_their_equal_results_stop_there() {
    let mut bench = diamond();
    bench.run();
    bench.taken();
    bench.options.force = vec!["b".to_owned()];
    assert_eq!(bench.explained()[1], "b: runs: forced");
    assert_eq!(bench.executes(), ["b"]);
    bench.options.force = vec!["*".to_owned()];
    assert_eq!(bench.executes(), ["a", "b", "c", "d"]);
}

#[test]
fn a_forced_matrix_is_all_of_its_members() {
    let mut bench = Bench::new();
    bench.add("m[r=1]", json!({ "r": 1 }), &[]);
    bench.add("m[r=2]", json!({ "r": 2 }), &[]);
    bench.run();
    bench.options.force = vec!["m".to_owned()];
    bench.taken();
    assert_eq!(bench.executes(), ["m[r=1]", "m[r=2]"]);
    bench.options.force = vec!["m[r=2]".to_owned()];
    assert_eq!(bench.executes(), ["m[r=2]"]);
}

#[test]
fn two_engines_on_one_store_compute_once() {
    let mut bench = Bench::new();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    bench.add_with("slow", json!({}), &[], move |cx| {
        counter.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(150));
        cx.output("out")?.write("text", "x")
    });
    let statuses: Vec<Status> = std::thread::scope(|scope| {
        let runs: Vec<_> =
            (0..4).map(|_| scope.spawn(|| bench.run().tasks[0].status.clone())).collect();
        runs.into_iter().map(|r| r.join().unwrap()).collect()
    });
    assert_eq!(count.load(Ordering::SeqCst), 1);
    assert_eq!(statuses.iter().filter(|s| **s == Status::Ran).count(), 1);
    assert_eq!(statuses.iter().filter(|s| **s == Status::Cached).count(), 3);
}

#[test]
fn equal_tasks_of_one_plan_compute_once_at_the_same_time() {
    let mut bench = Bench::new();
    bench.options.jobs = 4;
    let count = Arc::new(AtomicUsize::new(0));
    for id in ["a", "b", "c"] {
        let counter = count.clone();
        bench.add_with(id, json!({}), &[], move |cx| {
            counter.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(60));
            cx.output("out")?.write("text", "x")
        });
    }
    let report = bench.run();
    assert_eq!(count.load(Ordering::SeqCst), 1);
    assert_eq!(report.exit_code(), 0);
}

#[test]
fn reports_headlines_and_metadata_come_back_from_the_store() {
    let mut bench = Bench::new();
    bench.add_with("a", json!({}), &[], |cx| {
        cx.report("a table");
        cx.summary("loss", "1.5");
        let out = cx.output("out")?;
        out.set_meta(json!({ "rows": 3 }));
        out.write("text", "x")
    });
    bench.add_with("b", json!({}), &["a"], |cx| {
        let rows = cx.input("a")?.meta["rows"].to_string();
        cx.output("out")?.write("text", rows)
    });
    let first = bench.run();
    let second = bench.run();
    assert_eq!(out(&second, "a").report, "a table\n");
    assert_eq!(out(&second, "a").summary, [("loss".to_owned(), "1.5".to_owned())]);
    assert_eq!(out(&first, "a").outputs, out(&second, "a").outputs);
    assert_eq!(text(&bench, &second, "b"), "3");
}

#[test]
fn adopted_files_are_shared_and_not_copied() {
    let mut bench = Bench::new();
    bench.add("a", json!({ "big": "file" }), &[]);
    bench.add_with("b", json!({}), &["a"], |cx| {
        let file = cx.input("a")?.files["text"].clone();
        let out = cx.output("out")?;
        out.adopt("sub/text", &file);
        out.write("more", "m")
    });
    let report = bench.run();
    let engine = bench.engine();
    let entry = engine.store().peek(&out(&report, "b").key.unwrap()).unwrap();
    let files = &entry.outputs["out"].manifest.files;
    let names: Vec<&str> = files.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, ["more", "sub/text"]);
    assert_eq!(super::bench::files_below(&bench.store_dir().join("objects")).len(), 2);
    assert!(engine.store().verify().unwrap().problems.is_empty());
}

#[test]
fn an_optional_output_may_be_missing() {
    let mut bench = Bench::new();
    let ports = Ports::none().required("out", ArtifactKind::Files, "").optional(
        "extra",
        ArtifactKind::Files,
        "",
    );
    bench.add_task("a", json!({}), &[], ports, Arc::new(|cx| cx.output("out")?.write("text", "x")));
    bench.add("b", json!({}), &["a"]);
    bench.add("c", json!({}), &["a=a.extra"]);
    bench.options.keep_going = true;
    let report = bench.run();
    assert_eq!(out(&report, "b").status, Status::Ran);
    let error = out(&report, "c").error.as_ref().unwrap();
    assert_eq!(error.message, "input `a`: `a` did not make its output `extra`");
    assert_eq!(
        bench.explained(),
        ["a: cached", "b: cached", "c: blocked: input `a`: `a` did not make its output `extra`"]
    );
}

#[test]
fn environment_device_and_implementation_are_explained() {
    let mut bench = Bench::new();
    bench.add("a", json!({}), &[]).env.insert("TOKEN".into(), "secret-value".into());
    bench.run();
    bench.task("a").env.insert("TOKEN".into(), "other".into());
    assert_eq!(bench.explained(), ["a: runs: environment variable `TOKEN` changed"]);
    for path in super::bench::files_below(&bench.store_dir()) {
        let bytes = fs::read(&path).unwrap();
        assert!(!String::from_utf8_lossy(&bytes).contains("secret-value"), "{}", path.display());
    }
}

#[test]
fn a_dozen_stored_tasks_cost_next_to_nothing() {
    let mut bench = Bench::new();
    for i in 0..12 {
        let before = format!("in=t{}", usize::saturating_sub(i, 1));
        let inputs: Vec<&str> = if i == 0 { vec![] } else { vec![before.as_str()] };
        bench.add(&format!("t{i}"), json!({ "i": i }), &inputs);
    }
    bench.run();
    let plan = bench.plan();
    let best = (0..10)
        .map(|_| {
            let start = Instant::now();
            bench.engine().run(&plan, &bench.options, Arc::new(Quiet)).unwrap();
            start.elapsed()
        })
        .min()
        .unwrap();
    println!("12 tasks, nothing to do: {best:?}");
    assert!(best < Duration::from_millis(50), "{best:?}");
}

#[test]
fn a_thousand_stored_tasks_are_settled_quickly() {
    let mut bench = Bench::new();
    for i in 0..1000 {
        let id = format!("t{i}");
        let before = format!("in=t{}", i - i % 10);
        let inputs: Vec<&str> = if i % 10 == 0 { vec![] } else { vec![before.as_str()] };
        bench.add(&id, json!({ "i": i }), &inputs);
    }
    bench.options.jobs = 8;
    let cold = Instant::now();
    bench.run();
    let cold = cold.elapsed();
    assert_eq!(bench.taken().len(), 1000);
    let (engine, plan) = (bench.engine(), bench.plan());
    let best = (0..5)
        .map(|_| {
            let start = Instant::now();
            let report = engine.run(&plan, &bench.options, Arc::new(Quiet)).unwrap();
            assert_eq!(report.exit_code(), 0);
            start.elapsed()
        })
        .min()
        .unwrap();
    assert_eq!(bench.taken(), [""; 0]);
    println!("cold {cold:?}, nothing to do {best:?}");
    // Generous: the machine of the tests may be busy.
    assert!(best < Duration::from_millis(500), "{best:?}");
}

#[test]
fn a_task_that_the_plan_forces_runs_and_says_so() {
    let mut bench = diamond();
    bench.run();
    bench.task("a").forced = true;
    assert_eq!(bench.explained()[0], "a: runs: forced");
    let report = bench.run();
    assert_eq!(out(&report, "a").status, Status::Ran);
    assert_eq!(out(&report, "b").status, Status::Cached, "the same bytes came out");
}

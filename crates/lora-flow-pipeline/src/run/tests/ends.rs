//! How tasks and runs end.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lora_flow_core::{ArtifactKind, Error, Event, LogLevel, Ports};
use serde_json::json;

use super::bench::{Bench, out};
use crate::run::{Observer, Status, TaskOutcome};

fn skipped(because: &str) -> Status {
    Status::Skipped(because.to_owned())
}

#[test]
fn a_gate_that_says_no_stops_what_depends_on_it() {
    let mut bench = Bench::new();
    bench.add_with("gate", json!({}), &[], |cx| {
        cx.deny("loss 2 is not below 1");
        cx.output("out")?.write("text", "no")
    });
    bench.add("after", json!({ "n": 1 }), &[]);
    bench.needs("after", "gate");
    bench.add("later", json!({ "n": 2 }), &["after"]);
    bench.add("free", json!({ "n": 3 }), &[]);
    for cached in [false, true] {
        let report = bench.run();
        assert_eq!(out(&report, "gate").status, Status::Denied { cached });
        assert_eq!(out(&report, "gate").denied.as_deref(), Some("loss 2 is not below 1"));
        assert_eq!(out(&report, "gate").report, "loss 2 is not below 1\n");
        assert_eq!(out(&report, "after").status, skipped("gate `gate` said no"));
        assert_eq!(out(&report, "later").status, skipped("gate `gate` said no"));
        assert_eq!(report.exit_code(), 3);
    }
    assert_eq!(bench.taken(), ["gate", "free"]);
    assert_eq!(
        bench.explained(),
        [
            "gate: cached",
            "after: blocked: gate `gate` said no",
            "later: blocked: gate `gate` said no",
            "free: cached",
        ]
    );
}

fn failing() -> Bench {
    let mut bench = Bench::new();
    bench.add_with("bad", json!({}), &[], |cx| {
        cx.info("about to fail");
        Err(Error::new("it broke").with_hint("mend it"))
    });
    bench.add("child", json!({ "n": 1 }), &["bad"]);
    bench.add("grandchild", json!({ "n": 2 }), &["child"]);
    bench.add("free", json!({ "n": 3 }), &[]);
    bench
}

#[test]
fn a_failure_stops_the_run() {
    let bench = failing();
    let report = bench.run();
    let bad = out(&report, "bad");
    assert_eq!(bad.status, Status::Failed);
    let error = bad.error.as_ref().unwrap();
    assert_eq!((error.message.as_str(), error.hint.as_deref()), ("it broke", Some("mend it")));
    let log = fs::read_to_string(&error.log).unwrap();
    for part in
        ["runs: never run", "INFO  about to fail", "ERROR failed: it broke", "ERROR hint: mend it"]
    {
        assert!(log.contains(part), "{log}");
    }
    assert_eq!(error.log, bench.engine().log_path(&report.run_id, "bad"));
    assert_eq!(out(&report, "child").status, skipped("upstream `bad` failed"));
    assert_eq!(out(&report, "grandchild").status, skipped("upstream `bad` failed"));
    assert_eq!(out(&report, "free").status, skipped("the run stopped: `bad` failed"));
    assert_eq!(report.exit_code(), 1);
    assert!(super::bench::files_below(&bench.store_dir().join("entries")).is_empty());
    assert!(super::bench::files_below(&bench.store_dir().join("tmp")).is_empty());
}

#[test]
fn with_keep_going_the_rest_runs() {
    let mut bench = failing();
    bench.options.keep_going = true;
    let report = bench.run();
    assert_eq!(out(&report, "free").status, Status::Ran);
    assert_eq!(out(&report, "child").status, skipped("upstream `bad` failed"));
    assert_eq!(report.exit_code(), 1);
}

#[test]
fn a_panic_is_an_error_and_is_not_tried_again() {
    let mut bench = Bench::new();
    bench.add_with("bad", json!({}), &[], |_| panic!("index {} out of range", 7)).retries = 3;
    let report = bench.run();
    let error = out(&report, "bad").error.as_ref().unwrap();
    assert_eq!(error.message, "the task panicked: index 7 out of range");
    assert_eq!(bench.taken(), ["bad"]);
}

#[test]
fn a_failed_task_is_tried_again_and_keeps_its_state() {
    let mut bench = Bench::new();
    let tries = Arc::new(AtomicUsize::new(0));
    let counter = tries.clone();
    let task = bench.add_with("flaky", json!({}), &[], move |cx| {
        let state = cx.state_dir().join("tries");
        let before = fs::read_to_string(&state).unwrap_or_default();
        fs::write(&state, format!("{before}x"))?;
        cx.output("out")?.write("partial", "p")?;
        if counter.fetch_add(1, Ordering::SeqCst) < 2 {
            return Err(Error::new("not yet"));
        }
        cx.output("out")?.write("text", format!("{before}x"))
    });
    task.retries = 1;
    let report = bench.run();
    assert_eq!(out(&report, "flaky").error.as_ref().unwrap().message, "not yet");
    assert_eq!(tries.load(Ordering::SeqCst), 2);
    assert!(!super::bench::files_below(&bench.store_dir().join("state")).is_empty());
    let report = bench.run();
    assert_eq!(out(&report, "flaky").status, Status::Ran);
    assert_eq!(super::text(&bench, &report, "flaky"), "xxx", "state of all three tries");
    assert!(super::bench::files_below(&bench.store_dir().join("state")).is_empty());
}

#[test]
fn a_time_limit_stops_its_task_alone() {
    let mut bench = Bench::new();
    bench.options.keep_going = true;
    let task = bench.add_with("slow", json!({}), &[], |cx| {
        loop {
            cx.check_cancelled()?;
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    task.timeout = Some(Duration::from_millis(60));
    task.retries = 1;
    bench.add("other", json!({}), &[]);
    let report = bench.run();
    let error = out(&report, "slow").error.as_ref().unwrap();
    assert_eq!(error.message, "out of time: its limit is 0.06 s");
    assert_eq!(bench.taken(), ["slow", "slow", "other"], "each try has its own limit");
    assert_eq!(out(&report, "other").status, Status::Ran);
    assert_eq!(report.exit_code(), 1);
}

#[test]
fn a_cancelled_run_keeps_state_and_goes_on_later() {
    let mut bench = Bench::new();
    let cancel = bench.options.cancel.clone();
    bench.add_with("train", json!({}), &[], move |cx| {
        let checkpoint = cx.state_dir().join("step");
        if checkpoint.exists() {
            return cx.output("out")?.write("text", "resumed");
        }
        fs::write(&checkpoint, "5")?;
        cx.output("out")?.write("half", "h")?;
        cancel.cancel();
        loop {
            cx.check_cancelled()?;
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    bench.add("after", json!({ "n": 1 }), &["train"]);
    bench.add("free", json!({ "n": 2 }), &[]);
    let start = Instant::now();
    let report = bench.run();
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(report.exit_code(), 130);
    assert!(report.tasks.iter().all(|t| t.status == Status::Cancelled), "{:?}", report.tasks);
    assert!(bench.engine().store().ls().unwrap().is_empty());
    assert!(super::bench::files_below(&bench.store_dir().join("tmp")).is_empty());
    // The closure holds the old token; the new run has its own.
    bench.options.cancel = lora_flow_core::CancelToken::default();
    let report = bench.run();
    assert_eq!(super::text(&bench, &report, "train"), "resumed");
    assert_eq!(report.exit_code(), 0);
}

#[test]
fn a_task_that_does_not_make_its_output_fails() {
    let mut bench = Bench::new();
    bench.options.keep_going = true;
    bench.add_with("lazy", json!({}), &[], |_| Ok(()));
    bench.add_with("link", json!({ "l": 1 }), &[], |cx| {
        let out = cx.output("out")?;
        std::os::unix::fs::symlink("/etc/passwd", out.path.join("text"))?;
        Ok(())
    });
    let report = bench.run();
    let message = |id: &str| out(&report, id).error.as_ref().unwrap().message.clone();
    assert_eq!(message("lazy"), "the task ended without making its output `out`");
    assert_eq!(
        message("link"),
        "output `out` cannot be kept: the output file `text` is a symbolic link"
    );
}

#[test]
fn outputs_must_be_what_their_kind_says() {
    /// Kind, files and their texts, what is wrong with them.
    type Case = (ArtifactKind, &'static [(&'static str, &'static str)], Option<&'static str>);
    let cases: [Case; 12] = [
        (ArtifactKind::Files, &[("a", "")], None),
        (ArtifactKind::Dataset, &[("dataset.json", "{}")], Some("it has no `.parquet` file")),
        (ArtifactKind::Dataset, &[("part-0.parquet", "")], Some("it has no file `dataset.json`")),
        (ArtifactKind::Dataset, &[("p.parquet", ""), ("dataset.json", "{}")], None),
        (ArtifactKind::Tokens, &[("tokens.json", "{}")], Some("it has no file `tokens.parquet`")),
        (ArtifactKind::Model, &[("config.json", "{")], Some("`config.json` is not a JSON object")),
        (
            ArtifactKind::Adapter,
            &[("adapter_config.json", "{}")],
            Some("it has no file `adapter_model.safetensors`"),
        ),
        (ArtifactKind::Metrics, &[("metrics.json", r#"{"a":1,"b":null,"meta":{"c":"d"}}"#)], None),
        (
            ArtifactKind::Metrics,
            &[("metrics.json", r#"{"a":"1"}"#)],
            Some("`a` in `metrics.json` is not a number"),
        ),
        (
            ArtifactKind::Metrics,
            &[("metrics.json", r#"{"a":NaN}"#)],
            Some("`metrics.json` is not a JSON object"),
        ),
        (ArtifactKind::Verdict, &[("verdict.txt", "")], Some("it has no file `verdict.json`")),
        (ArtifactKind::Verdict, &[("verdict.json", "{}")], None),
    ];
    let mut bench = Bench::new();
    bench.options.keep_going = true;
    for (i, (kind, files, _)) in cases.iter().enumerate() {
        let ports = Ports::none().required("out", *kind, "");
        let files: Vec<(String, String)> =
            files.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let body = move |cx: &mut lora_flow_core::TaskContext| {
            let out = cx.output("out")?;
            files.iter().try_for_each(|(name, text)| out.write(name, text))
        };
        bench.add_task(&i.to_string(), json!({ "i": i }), &[], ports, Arc::new(body));
    }
    let report = bench.run();
    for (task, (kind, _, wanted)) in report.tasks.iter().zip(cases) {
        let message = task.error.as_ref().map(|e| e.message.as_str());
        match wanted {
            None => assert_eq!(message, None),
            Some(wanted) => {
                let message = message.unwrap();
                assert!(message.contains(wanted), "{kind}: {message}");
                assert!(
                    message.starts_with(&format!("output `out` is not a valid {kind}: ")),
                    "{message}"
                );
            }
        }
    }
}

#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

impl Observer for Recorder {
    fn task_started(&self, id: &str) {
        self.0.lock().unwrap().push(format!("{id} started"));
    }
    fn task_event(&self, id: &str, event: &Event) {
        let event = serde_json::to_string(event).unwrap();
        self.0.lock().unwrap().push(format!("{id} {event}"));
    }
    fn task_finished(&self, id: &str, outcome: &TaskOutcome) {
        self.0.lock().unwrap().push(format!("{id} {:?}", outcome.status));
    }
}

#[test]
fn events_reach_the_observer_the_log_and_the_metrics_file() {
    let mut bench = Bench::new();
    bench.add_with("m[r=8]", json!({}), &[], |cx| {
        cx.progress(1, Some(2), "step", "half");
        cx.event(Event::Log { level: LogLevel::Debug, message: "two\nlines".to_owned() });
        cx.metric("loss", 1, 0.5);
        cx.metric("loss", 2, f64::NAN);
        cx.output("out")?.write("text", "x")
    });
    let recorder = Arc::new(Recorder::default());
    let report = bench.run_watched(recorder.clone());
    let seen = std::mem::take(&mut *recorder.0.lock().unwrap());
    assert_eq!(seen.len(), 6, "{seen:?}");
    assert_eq!((seen[0].as_str(), seen[5].as_str()), ("m[r=8] started", "m[r=8] Ran"));
    let log = fs::read_to_string(bench.engine().log_path(&report.run_id, "m[r=8]")).unwrap();
    assert!(log.contains("DEBUG two\n") && log.contains("DEBUG lines\n"), "{log}");
    let metrics = bench.store_dir().join("runs").join(&report.run_id).join("metrics/m[r=8].jsonl");
    assert_eq!(
        fs::read_to_string(metrics).unwrap(),
        "{\"name\":\"loss\",\"step\":1,\"value\":0.5}\n{\"name\":\"loss\",\"step\":2,\"value\":null}\n"
    );
    bench.run_watched(recorder.clone());
    assert_eq!(*recorder.0.lock().unwrap(), ["m[r=8] Cached"]);
}

//! Commands around a run: what CI reads of it, and how two runs compare.

#[path = "support/mod.rs"]
mod support;

use serde_json::Value;
use support::{Project, documents};

#[test]
fn diff_shows_what_changed_and_by_how_much() {
    let project = Project::new();
    let until = ["--target", "after"];
    let run = |set: &str| {
        let args: Vec<&str> =
            ["run", "pipeline.yaml", "--set", set].iter().chain(&until).copied().collect();
        project.expect(0, &args);
        project.latest()["run_id"].as_str().unwrap().to_owned()
    };
    let (a, b) = (run("learning_rate=0.004"), run("learning_rate=0.002"));
    let shown = project.expect(0, &["diff", &a, &b]).stdout;
    assert!(shown.contains("train.with.learning_rate") && shown.contains("-50.00 %"), "{shown}");
    assert!(!shown.contains("max_steps"), "{shown}");
    let json =
        |args: &[&str]| -> Value { serde_json::from_str(&project.expect(0, args).stdout).unwrap() };
    let diff = json(&["diff", &a, &b, "--json"]);
    let names = |section: &str| -> Vec<String> {
        let rows = diff[section].as_array().unwrap();
        rows.iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names("parameters"), ["params.learning_rate", "train.with.learning_rate"]);
    assert!(names("metrics").contains(&"after.perplexity".to_owned()), "{diff}");
    let all = json(&["diff", &a, &b, "--json", "--all"]);
    assert!(all["parameters"].as_array().unwrap().len() > 10);
    assert!(project.expect(0, &["diff", &a, &a]).stdout.contains("no differences"));
}

#[test]
fn ci_leaves_a_junit_report_and_a_summary() {
    let project = Project::new();
    project.edit("pipeline.yaml", "candidate.perplexity < ", "candidate.perplexity < 0.01 * ");
    project.write("summary.md", "before\n");
    let mut command = project.command(&["run", "pipeline.yaml", "--ci"]);
    command.env("GITHUB_STEP_SUMMARY", project.path("summary.md"));
    assert_eq!(command.output().unwrap().status.code(), Some(3));
    let xml = std::fs::read_to_string(project.path("lora-flow-junit.xml")).unwrap();
    // Ten tasks and the rule of the gate.
    assert_eq!(xml.matches("<testcase ").count(), 11, "{xml}");
    assert!(
        xml.contains("<testsuite name=\"tiny.gate\"") && xml.contains("type=\"fail\""),
        "{xml}"
    );
    assert!(xml.contains("type=\"denied\"") && xml.contains("0.01 * baseline.perplexity"), "{xml}");
    assert!(xml.contains("<skipped message="), "{xml}");
    let summary = std::fs::read_to_string(project.path("summary.md")).unwrap();
    assert!(summary.starts_with("before\n## tiny: ⛔ a gate said no"), "{summary}");
    assert!(summary.contains("| merged | merge | skipped |"), "{summary}");
    assert!(summary.contains("### gate: ⛔ says no\n\n| | rule | found |\n"), "{summary}");
    assert!(summary.contains("| ❌ | candidate.perplexity &lt; 0.01"), "{summary}");
    project.expect(3, &["run", "pipeline.yaml", "--ci", "--junit", "reports/run.xml"]);
    assert!(project.path("reports/run.xml").is_file());
    project.expect(2, &["run", "pipeline.yaml", "--junit", "run.xml"]);
}

#[test]
fn why_and_status_say_what_a_run_would_do() {
    let project = Project::new();
    let fresh = project.expect(0, &["why", "pipeline.yaml", "train"]).stdout;
    assert!(fresh.starts_with("train: will run\n  never run\n"), "{fresh}");
    assert!(fresh.contains("key not known before its inputs are made"), "{fresh}");
    project.expect(0, &["run", "pipeline.yaml", "--target", "train"]);
    let set = ["--set", "learning_rate=0.004"];
    let args = |more: &[&'static str]| [more, &set].concat();
    let why = project.expect(0, &args(&["why", "pipeline.yaml", "train"])).stdout;
    assert!(why.contains("  `with.learning_rate` changed: 0.005 → 0.004\n\nkey "), "{why}");
    assert!(why.contains("  with.learning_rate: 0.004\n"), "{why}");
    assert!(why.contains("  input   train: train_tokens"), "{why}");
    let json = project.expect(0, &args(&["why", "pipeline.yaml", "train", "--json"])).stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["pending_inputs"], 0);
    assert_eq!(json["parts"]["key"]["params"]["learning_rate"], 0.004);
    let changed = serde_json::json!({
        "reason": "parameter", "parameter": "learning_rate", "old": 0.005, "new": 0.004,
        "text": "`with.learning_rate` changed: 0.005 → 0.004",
    });
    assert_eq!(json["reasons"], serde_json::json!([changed]));
    for command in ["plan", "status"] {
        let all = project.expect(0, &args(&[command, "pipeline.yaml", "--json"])).stdout;
        let all: Value = serde_json::from_str(&all).unwrap();
        let of = |id: &str| all.as_array().unwrap().iter().find(|t| t["task"] == id).unwrap();
        assert_eq!(of("docs")["state"], "cached");
        assert_eq!(
            (&of("train")["state"], &of("train")["reasons"][0]),
            (&"will run".into(), &changed)
        );
    }
    // What waits for it may turn out to be done already, once it has a result.
    project.expect(0, &["run", "pipeline.yaml"]);
    let after = project.expect(0, &args(&["why", "pipeline.yaml", "after", "--json"])).stdout;
    let after: Value = serde_json::from_str(&after).unwrap();
    assert_eq!(after["state"], "may run");
    let upstream =
        serde_json::json!({ "reason": "upstream", "task": "train", "text": "depends on `train`" });
    assert_eq!(after["reasons"], serde_json::json!([upstream]));
    let rows = documents(48).replace("the scheduler", "a scheduler");
    project.write("data/docs.jsonl", rows);
    let docs = project.expect(0, &["why", "pipeline.yaml", "docs", "--json"]).stdout;
    let docs: Value = serde_json::from_str(&docs).unwrap();
    let reason = &docs["reasons"][0];
    assert_eq!((&reason["reason"], &reason["file"]), (&"file".into(), &"data/docs.jsonl".into()));
    let digest = |name: &str| reason[name].as_str().unwrap().to_owned();
    assert_eq!((digest("old").len(), digest("new").len()), (64, 64));
    assert_ne!(digest("old"), digest("new"));
    project.write("data/docs.jsonl", documents(48));
    let status = project.expect(0, &args(&["status", "pipeline.yaml"])).stdout;
    assert!(status.contains("cached    docs\n"), "{status}");
    assert!(status.contains("will run  train  (`with.learning_rate` changed"), "{status}");
    let unknown = project.expect(2, &["why", "pipeline.yaml", "trian"]).stderr;
    assert!(unknown.contains("did you mean `train`?"), "{unknown}");
}

#[test]
fn export_traces_every_artifact_to_files_from_outside() {
    let project = Project::new();
    project.expect(0, &["run", "pipeline.yaml"]);
    let out = project.expect(0, &["export"]).stdout;
    let out: Value = serde_json::from_str(&out).unwrap();
    let tasks = out["tasks"].as_array().unwrap();
    let of = |id: &str| tasks.iter().find(|t| t["task"] == id).unwrap();
    let mut open = vec![of("merged")["made"]["model"].as_str().unwrap().to_owned()];
    let (mut seen, mut files) = (Vec::new(), Vec::new());
    while let Some(digest) = open.pop() {
        let maker = out["artifacts"][&digest]["made_by"][0]["task"].as_str().unwrap();
        if seen.iter().any(|s| s == maker) {
            continue;
        }
        seen.push(maker.to_owned());
        let used = &of(maker)["used"];
        for input in
            used["inputs"].as_object().unwrap().values().flat_map(|v| v.as_array().unwrap())
        {
            open.push(input["digest"].as_str().unwrap().to_owned());
        }
        for file in used["files"].as_object().unwrap().values().flat_map(|v| v.as_array().unwrap())
        {
            files.push(file["path"].as_str().unwrap().to_owned());
        }
    }
    assert!(files.contains(&"data/docs.jsonl".to_owned()), "{files:?}");
    assert!(files.iter().any(|f| f.starts_with("models/tiny")), "{files:?}");
    assert!(of("merged")["published"][0].as_str().unwrap().ends_with("out/merged"));
}

#[test]
fn a_log_is_followed_until_the_run_ends() {
    let project = Project::new();
    let args = ["run", "pipeline.yaml", "--target", "train", "--set", "steps=200"];
    let mut run = project.command(&args).stderr(std::process::Stdio::null()).spawn().unwrap();
    let runs = project.path(".lora-flow/runs");
    while !std::fs::read_dir(&runs).is_ok_and(|mut dir| dir.next().is_some()) {
        assert!(run.try_wait().unwrap().is_none(), "the run ended too soon");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let followed = project.expect(0, &["logs", "-f", "latest", "train"]).stdout;
    assert!(
        project
            .path(".lora-flow/runs")
            .join(project.latest()["run_id"].as_str().unwrap())
            .join("run.json")
            .is_file()
    );
    run.wait().unwrap();
    let whole = project.expect(0, &["logs", "latest", "train"]).stdout;
    assert!(!whole.is_empty());
    assert_eq!(followed, whole);
    project.expect(2, &["logs", "-f", "latest", "trian"]);
}

#[test]
fn instruction_sets_are_limited_by_a_known_name() {
    let project = Project::new();
    let doctor = |set: &str| {
        let mut command = project.command(&["doctor"]);
        command.env("LORA_FLOW_MAX_ISA", set).output().unwrap()
    };
    let limited = doctor("baseline");
    let text = String::from_utf8(limited.stdout).unwrap();
    assert!(text.contains("kernels for baseline (limited by LORA_FLOW_MAX_ISA)"), "{text}");
    let unknown = doctor("avx3");
    let text = String::from_utf8(unknown.stderr).unwrap();
    assert_eq!(unknown.status.code(), Some(2), "{text}");
    assert!(
        text.contains("`LORA_FLOW_MAX_ISA` is \"avx3\"") && text.contains("avx512_bf16"),
        "{text}"
    );
}

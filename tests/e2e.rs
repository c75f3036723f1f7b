//! The binary from end to end on a tiny model: run, rerun, change, deny, kill, resume, generate.

#[path = "support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use serde_json::Value;
use support::Project;

const RUN: &[&str] = &["run", "pipeline.yaml"];

fn statuses(record: &Value) -> Vec<(String, String)> {
    record["tasks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|task| {
            let status = match &task["status"] {
                Value::String(s) => s.clone(),
                Value::Object(o) => o.keys().next().unwrap().clone(),
                other => panic!("status {other}"),
            };
            (task["id"].as_str().unwrap().to_owned(), status)
        })
        .collect()
}

fn ran(record: &Value) -> Vec<String> {
    let ran = statuses(record).into_iter().filter(|(_, s)| s == "Ran" || s == "ran");
    let mut names: Vec<String> = ran.map(|(id, _)| id).collect();
    names.sort();
    names
}

fn digest(record: &Value, task: &str, output: &str) -> String {
    let tasks = record["tasks"].as_array().unwrap();
    let task = tasks.iter().find(|t| t["id"] == task).unwrap();
    task["outputs"][output]["digest"].as_str().unwrap().to_owned()
}

#[test]
fn a_rerun_executes_nothing_and_a_change_reruns_exactly_what_depends_on_it() {
    let project = Project::new();
    let first = project.expect(0, RUN);
    assert!(project.path("out/merged/model.safetensors").is_file(), "{}", first.stdout);
    assert_eq!(ran(&project.latest()).len(), 10);

    let again = project.expect(0, RUN);
    assert_eq!(ran(&project.latest()), Vec::<String>::new(), "{}", again.stdout);
    assert!(project.plan(&[]).values().all(|(state, _)| state == "cached"));

    let plan = project.plan(&["--set", "learning_rate=0.004"]);
    let mut stale: Vec<&str> =
        plan.iter().filter(|(_, (s, _))| s != "cached").map(|(id, _)| id.as_str()).collect();
    stale.sort_unstable();
    assert_eq!(stale, ["after", "gate", "merged", "train"]);
    assert_eq!(plan["train"].1, ["`with.learning_rate` changed: 0.005 → 0.004"]);

    project.expect(0, &["run", "pipeline.yaml", "--set", "learning_rate=0.004"]);
    assert_eq!(ran(&project.latest()), ["after", "gate", "merged", "train"]);
}

#[test]
fn a_published_model_that_was_deleted_or_edited_is_put_back() {
    let project = Project::new();
    project.expect(0, RUN);
    let path = project.path("out/merged/config.json");
    let good = std::fs::read(&path).unwrap();
    std::fs::write(&path, "spoilt").unwrap();
    project.expect(0, RUN);
    assert_eq!(std::fs::read(&path).unwrap(), good);
    std::fs::remove_dir_all(project.path("out")).unwrap();
    project.expect(0, RUN);
    assert_eq!(std::fs::read(&path).unwrap(), good);
    project.expect(0, &["cache", "verify"]);
}

#[test]
fn a_gate_that_says_no_stops_what_depends_on_it_and_exits_with_3() {
    let project = Project::new();
    project.edit("pipeline.yaml", "candidate.perplexity < ", "candidate.perplexity < 0.01 * ");
    let denied = project.expect(3, RUN);
    assert!(denied.stdout.contains("the gate says no"), "{}", denied.stdout);
    assert!(!project.path("out").exists());
    let statuses = statuses(&project.latest());
    let of = |id: &str| statuses.iter().find(|(t, _)| t == id).unwrap().1.to_lowercase();
    assert_eq!((of("gate").as_str(), of("merged").as_str()), ("denied", "skipped"));
    // The verdict is cached, and a cached no is still no.
    project.expect(3, RUN);
}

#[test]
fn killed_training_resumes_to_the_bytes_of_an_undisturbed_run() {
    let steps = ["--set", "steps=400"];
    let args: Vec<&str> = RUN.iter().copied().chain(["--target", "train"]).chain(steps).collect();
    let undisturbed = Project::new();
    undisturbed.expect(0, &args);

    let killed = Project::new();
    let mut child = killed.command(&args).stderr(std::process::Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while !has_checkpoint(&killed) {
        assert!(Instant::now() < deadline, "no checkpoint in two minutes");
        assert!(child.try_wait().unwrap().is_none(), "training ended before it could be killed");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let resumed = killed.expect(0, &args);
    assert!(resumed.stderr.contains("resum"), "{}", resumed.stderr);
    let digest = |p: &Project| digest(&p.latest(), "train", "adapter");
    assert_eq!(digest(&killed), digest(&undisturbed));
    killed.expect(0, &["cache", "verify"]);
}

/// Whether the training under way has saved anything.
fn has_checkpoint(project: &Project) -> bool {
    let Ok(keys) = std::fs::read_dir(project.path(".lora-flow/state")) else { return false };
    keys.flatten().any(|key| {
        std::fs::read_dir(key.path()).is_ok_and(|entries| {
            entries.flatten().any(|e| e.file_name().to_string_lossy().starts_with("step-"))
        })
    })
}

#[test]
fn the_number_of_threads_does_not_change_a_byte() {
    let digests: Vec<String> = ["1", "2"]
        .into_iter()
        .map(|cpu| {
            let project = Project::new();
            let line = format!("    uses: train\n    resources: {{ cpu: {cpu} }}\n");
            project.edit("pipeline.yaml", "    uses: train\n", &line);
            let ran = project.expect(0, &["run", "pipeline.yaml", "--target", "train"]);
            let threads = format!("with {cpu} threads on");
            assert!(ran.stderr.contains(&threads), "{}", ran.stderr);
            digest(&project.latest(), "train", "adapter")
        })
        .collect();
    assert_eq!(digests[0], digests[1]);
}

#[test]
fn generate_answers_with_the_base_and_with_each_adapter() {
    let project = Project::new();
    project.edit(
        "pipeline.yaml",
        "      save_steps: 2\n",
        "      save_steps: 2\n    publish: { adapter: out/adapter }\n",
    );
    project.expect(0, RUN);
    let ran = project.expect(
        0,
        &[
            "generate",
            "--model",
            "models/tiny",
            "--adapter",
            "a=out/adapter",
            "--adapter",
            "b=out/adapter",
            "--prompt",
            "the cache",
            "--max-new-tokens",
            "8",
            "--json",
        ],
    );
    let answers: Vec<Value> = serde_json::from_str(&ran.stdout).unwrap();
    let of = |name: &str| answers.iter().find(|a| a["adapter"] == name).unwrap()["text"].clone();
    assert_eq!(of("a"), of("b"));
    assert_ne!(of("a"), of("base"), "{}", ran.stdout);
}

#[test]
fn runs_show_and_logs_tell_what_happened() {
    let project = Project::new();
    project.expect(0, RUN);
    let runs = project.expect(0, &["runs"]).stdout;
    assert!(runs.contains("tiny") && runs.contains("done"), "{runs}");
    let show = project.expect(0, &["show"]).stdout;
    assert!(show.contains("train.adapter") && show.contains("perplexity"), "{show}");
    project.expect(0, &["logs", "latest", "train"]);
    let unknown = project.expect(2, &["logs", "latest", "trian"]);
    assert!(unknown.stderr.contains("did you mean `train`?"), "{}", unknown.stderr);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let project = Project::new();
    let binary = env!("CARGO_BIN_EXE_lora-flow");
    let through = |command: &str| {
        // The writer may outlive the reader: the code is waited for.
        let script = format!(
            "rm -f code; ({binary} {command}; echo $? >tmp; mv tmp code) | true; \
             until [ -f code ]; do sleep 0.05; done; cat code"
        );
        let output = project.shell(&script);
        assert!(!output.stderr.contains("panicked"), "{}", output.stderr);
        output.stdout.trim().to_owned()
    };
    assert_eq!(through("schema"), "0");
    assert_eq!(through("run pipeline.yaml --target base 2>&1"), "0");
}

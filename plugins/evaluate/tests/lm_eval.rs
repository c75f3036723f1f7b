//! `evaluate-tasks` against lm-evaluation-harness 0.4.13 on the same models, rows and task files
//! (`tests/reference/make_lm_eval.py`): results, prompts, per-sample log-likelihoods, and that
//! neither the size nor the order of batches matters.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, UInt32Type};
use arrow_array::{Array, RecordBatch};
use lora_flow_core::{
    Artifact, ArtifactKind, CancelToken, DeviceSpec, Event, NamedArtifact, OutputDir, Reporter,
    Task, TaskContext, TaskContextParts,
};
use lora_flow_evaluate::EvaluateTasks;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};

struct Quiet;

impl Reporter for Quiet {
    fn event(&self, _: Event) {}
}

fn reference() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference/lm_eval")
}

/// What an evaluation left in one output.
struct Output {
    metrics: Value,
    results: Value,
    samples: Vec<RecordBatch>,
}

/// Files below a folder that end in a suffix, in order.
fn files(folder: &Path, suffix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.to_str().unwrap().ends_with(suffix));
    paths.sort();
    paths
}

/// Runs the kind over task files; inputs by name, `model` among them.
fn run(
    with: Value,
    tasks: &[PathBuf],
    data: &Path,
    inputs: &[(&str, Artifact)],
) -> lora_flow_core::Result<BTreeMap<String, Output>> {
    let mut with = with;
    with["tasks"] = json!(["tasks"]);
    with["data_files"] = json!(["data"]);
    let task: EvaluateTasks = serde_json::from_value(with).unwrap();
    assert_eq!(task.validate(), []);
    let dir = tempfile::tempdir().unwrap();
    let inputs = inputs.iter().map(|(name, artifact)| {
        let named = NamedArtifact { reference: (*name).to_owned(), artifact: artifact.clone() };
        ((*name).to_owned(), vec![named])
    });
    let outputs: BTreeMap<String, OutputDir> = task
        .outputs()
        .ports
        .iter()
        .map(|port| {
            let path = dir.path().join(&port.name);
            std::fs::create_dir_all(&path).unwrap();
            let out = OutputDir {
                port: port.name.clone(),
                kind: ArtifactKind::Metrics,
                path,
                adopted: BTreeMap::new(),
                meta: Value::Null,
            };
            (port.name.clone(), out)
        })
        .collect();
    let names: Vec<String> = outputs.keys().cloned().collect();
    let data: Vec<PathBuf> = std::fs::read_dir(data)
        .map(|entries| entries.map(|e| e.unwrap().path()).collect())
        .unwrap_or_default();
    let mut cx = TaskContext::new(TaskContextParts {
        inputs: inputs.collect(),
        outputs,
        files: BTreeMap::from([
            ("/tasks/0".to_owned(), tasks.to_vec()),
            ("/data_files/0".to_owned(), data),
        ]),
        scratch: dir.path().to_owned(),
        state_dir: dir.path().to_owned(),
        device: DeviceSpec::Cpu,
        threads: 2,
        allow_network: false,
        cancel: CancelToken::default(),
        reporter: Arc::new(Quiet),
    });
    task.run(&mut cx)?;
    let read = |name: &String| {
        let folder = dir.path().join(name);
        let json = |file: &str| {
            serde_json::from_slice(&std::fs::read(folder.join(file)).unwrap()).unwrap()
        };
        let file = std::fs::File::open(folder.join("samples.parquet")).unwrap();
        let reader = ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap();
        let output = Output {
            metrics: json("metrics.json"),
            results: json("results.json"),
            samples: reader.map(Result::unwrap).collect(),
        };
        (name.clone(), output)
    };
    Ok(names.iter().map(read).collect())
}

fn model(folder: &Path) -> Artifact {
    Artifact::from_dir(ArtifactKind::Model, folder).unwrap()
}

fn tiny_run(with: Value, names: &[&str]) -> Output {
    let folder = reference().join("tiny");
    let tasks: Vec<PathBuf> =
        names.iter().map(|n| folder.join(format!("tasks/{n}.yaml"))).collect();
    let inputs = [("model", model(&folder.join("model")))];
    let mut out = run(with, &tasks, &folder.join("data"), &inputs)
        .unwrap_or_else(|e| panic!("{}", e.chain()));
    out.remove("metrics").unwrap()
}

fn values(path: &str) -> Value {
    let path = reference().join(path);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// One sample of `samples.parquet`.
struct Sample<'a> {
    batch: &'a RecordBatch,
    row: usize,
}

impl Sample<'_> {
    fn text(&self, column: &str) -> Option<&str> {
        let column = self.batch.column_by_name(column).unwrap().as_string::<i32>();
        (!column.is_null(self.row)).then(|| column.value(self.row))
    }

    fn number(&self, column: &str) -> f64 {
        let column = self.batch.column_by_name(column).unwrap();
        match column.as_primitive_opt::<Float64Type>() {
            Some(numbers) => numbers.value(self.row),
            None => column.as_list::<i32>().value(self.row).as_primitive::<Float64Type>().value(0),
        }
    }

    fn list(&self, column: &str) -> Vec<f64> {
        let column = self.batch.column_by_name(column).unwrap().as_list::<i32>();
        column.value(self.row).as_primitive::<Float64Type>().values().to_vec()
    }
}

/// The samples of a task, by their place in the data.
fn samples<'a>(output: &'a Output, task: &str) -> Vec<Sample<'a>> {
    let mut out = Vec::new();
    for batch in &output.samples {
        for row in 0..batch.num_rows() {
            let sample = Sample { batch, row };
            if sample.text("task") == Some(task) {
                let id = batch.column_by_name("doc_id").unwrap().as_primitive::<UInt32Type>();
                assert_eq!(id.value(row) as usize, out.len());
                out.push(sample);
            }
        }
    }
    out
}

/// Differences to the harness: of log-likelihoods, and of results relative to their size.
#[derive(Default)]
struct Worst {
    loglikelihood: f64,
    result: f64,
    compared: usize,
}

/// Compares a task's results and samples with the harness's, the latter `expected` rows.
fn compare(output: &Output, task: &str, results: &Value, expected: &Value, worst: &mut Worst) {
    let ours = &output.results["results"][task];
    for (key, value) in results.as_object().into_iter().flatten() {
        let Some(theirs) = value.as_f64() else { continue };
        let ours = ours[key].as_f64().unwrap_or_else(|| panic!("{task}: no `{key}` in {ours}"));
        let difference = (ours - theirs).abs() / theirs.abs().max(1.0);
        assert!(difference < 1e-3, "{task} {key}: {ours} against {theirs}");
        worst.result = worst.result.max(difference);
    }
    let found = samples(output, task);
    for row in expected.as_array().unwrap() {
        let sample = &found[row["doc_id"].as_u64().unwrap() as usize];
        for hash in ["doc_hash", "prompt_hash", "target_hash"] {
            let prompt = sample.text("prompt");
            assert_eq!(sample.text(hash), row[hash].as_str(), "{task} {hash} of {prompt:?}");
        }
        if let Some(theirs) = row["ll"].as_array() {
            let ours = sample.list("loglikelihoods");
            assert_eq!(ours.len(), theirs.len());
            for (ours, theirs) in ours.iter().zip(theirs) {
                let difference = (ours - theirs.as_f64().unwrap()).abs();
                worst.loglikelihood = worst.loglikelihood.max(difference);
                worst.compared += 1;
                assert!(difference < 1e-3, "{task}: {ours} against {theirs}");
            }
        }
        if let Some(hash) = row["response_hash"].as_str() {
            let response = sample.text("response").unwrap();
            assert_eq!(sha256(response), hash, "{task}: {response:?} against {}", row["response"]);
        }
        for (metric, value) in row["metrics"].as_object().unwrap() {
            let column = match row["filter"].as_str().unwrap() {
                "none" => metric.clone(),
                filter => format!("{metric}_{}", filter.replace('-', "_")),
            };
            assert_eq!(Some(sample.number(&column)), value.as_f64(), "{task} {column}");
        }
    }
}

fn sha256(text: &str) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(text.as_bytes()).iter().map(|b| format!("{b:02x}")).collect()
}

const TINY: [&str; 7] =
    ["binary", "choice", "choice_same", "choice_shots", "extract", "generate", "target"];

#[test]
fn tiny_tasks_give_the_harness_numbers() {
    let expected = values("tiny/values.json");
    let mut worst = Worst::default();
    let mut check = |output: &Output, names: &[&str]| {
        for name in names {
            let (results, rows) = (&expected["results"][*name], &expected["samples"][*name]);
            compare(output, name, results, rows, &mut worst);
            assert_eq!(output.results["n-shot"][*name], expected["n-shot"][*name], "{name}");
        }
    };
    check(&tiny_run(json!({ "bootstrap_iters": 2000 }), &TINY), &TINY);
    let rolling = json!({ "bootstrap_iters": 2000, "max_length": 64 });
    check(&tiny_run(rolling, &["rolling"]), &["rolling"]);
    let chat = json!({ "apply_chat_template": true, "system_instruction": "Be brief." });
    check(&tiny_run(chat, &["chat"]), &["chat"]);
    let single = json!({ "apply_chat_template": true, "fewshot_as_multiturn": false });
    let output = tiny_run(single, &["chat"]);
    compare(&output, "chat", &Value::Null, &expected["chat_single_turn"], &mut worst);
    println!(
        "tiny: {} log-likelihoods, max |Δ| {:.1e}; results, max relative Δ {:.1e}",
        worst.compared, worst.loglikelihood, worst.result
    );
    assert!(worst.compared > 400);
}

#[test]
fn scores_do_not_depend_on_the_batches() {
    let names = ["binary", "choice", "choice_shots", "target", "generate"];
    let base = tiny_run(json!({}), &names);
    for with in [
        json!({ "batch_size": 1 }),
        json!({ "max_tokens_per_batch": 100 }),
        json!({ "batch_size": 7, "max_tokens_per_batch": 100_000 }),
    ] {
        let other = tiny_run(with, &names);
        for name in names {
            for (a, b) in samples(&base, name).iter().zip(samples(&other, name)) {
                assert_eq!(a.text("response"), b.text("response"), "{name}");
                for (a, b) in a.list("loglikelihoods").iter().zip(b.list("loglikelihoods")) {
                    assert!((a - b).abs() < 1e-4, "{name}: {a} and {b}");
                }
            }
        }
        for (task, values) in base.results["results"].as_object().unwrap() {
            for (key, value) in values.as_object().unwrap() {
                let (a, b) = (value.as_f64(), other.results["results"][task][key].as_f64());
                let near = |a: f64, b: f64| (a - b).abs() <= 1e-5 * a.abs();
                assert!(a.zip(b).is_none_or(|(a, b)| near(a, b)), "{task} {key}: {a:?} {b:?}");
            }
        }
    }
    let rolling = |with: Value| tiny_run(with, &["rolling"]);
    let (a, b) = (
        rolling(json!({ "max_length": 64 })),
        rolling(json!({ "max_length": 64, "batch_size": 1 })),
    );
    let of = |o: &Output| o.metrics["rolling.bits_per_byte"].as_f64().unwrap();
    assert!((of(&a) - of(&b)).abs() < 1e-5);
    // A smaller stride gives each token more context, and so another number.
    let strided = rolling(json!({ "max_length": 64, "stride": 16 }));
    assert!((of(&a) - of(&strided)).abs() > 1e-3);
}

/// Against the real model: `make_lm_eval.py real DIR`, with DIR in `LORA_FLOW_LM_EVAL_DIR`.
#[test]
#[ignore = "reads the folder that LORA_FLOW_LM_EVAL_DIR names"]
fn smollm2_gives_the_harness_numbers() {
    let Some(folder) = std::env::var_os("LORA_FLOW_LM_EVAL_DIR").map(PathBuf::from) else {
        eprintln!("skipped: LORA_FLOW_LM_EVAL_DIR names no folder of make_lm_eval.py");
        return;
    };
    let expected = values("real.json");
    let tasks = files(&reference().join("real"), ".yaml");
    let inputs = [("model", model(&folder.join("model")))];
    let with = json!({ "bootstrap_iters": 2000, "max_length": 512, "max_tokens_per_batch": 1024 });
    let mut out = run(with, &tasks, &folder.join("data"), &inputs)
        .unwrap_or_else(|e| panic!("{}", e.chain()));
    let output = out.remove("metrics").unwrap();
    let mut worst = Worst::default();
    for (name, results) in expected["results"].as_object().unwrap() {
        compare(&output, name, results, &expected["samples"][name], &mut worst);
        println!("{name}: {}", output.results["results"][name]);
    }
    println!(
        "SmolLM2: {} log-likelihoods, max |Δ| {:.1e}; results, max relative Δ {:.1e}",
        worst.compared, worst.loglikelihood, worst.result
    );
    assert!(expected["results"].as_object().unwrap().len() >= 5);
}

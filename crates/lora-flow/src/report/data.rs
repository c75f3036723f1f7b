//! What the report shows of a run, read from its record and the store.

use std::collections::BTreeMap;

use lora_flow_core::{Artifact, ArtifactKind};
use lora_flow_data::{STATISTICS_FILE, TokenStatistics};
use lora_flow_evaluate::{AnsweredSample, CONTAMINATION_FILE, answered_samples};
use lora_flow_pipeline::{Engine, Entry, RunEdge, RunRecord, Status, TaskOutcome};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::commands::{artifact_json, artifact_text, flatten, metrics_name};
use crate::report::samples::{SamplesView, side_by_side};

/// A run. Serialised, it is both what the page is filled with and the JSON inside the page.
#[derive(Debug, Serialize)]
pub struct RunView {
    pub id: String,
    pub pipeline: String,
    pub file: String,
    pub started: String,
    pub seconds: f64,
    pub exit_code: i32,
    /// `done`, `failed`, `denied` or `cancelled`.
    pub outcome: &'static str,
    pub command_line: Vec<String>,
    pub environment: Value,
    /// Parameters of the pipeline by dotted name.
    pub params: BTreeMap<String, Value>,
    pub tasks: Vec<TaskView>,
    pub edges: Vec<RunEdge>,
    /// The DAG, coloured by outcome.
    #[serde(skip)]
    pub graph: String,
    pub verdicts: Vec<VerdictView>,
    pub evaluations: Vec<EvaluationView>,
    pub samples: Vec<SamplesView>,
    pub training: Vec<TrainingView>,
    pub data: Vec<DataView>,
    pub contamination: Vec<ContaminationView>,
    pub artifacts: Vec<ArtifactView>,
    /// Tasks whose results the store no longer has: nothing but their outcome can be shown.
    pub gone: Vec<String>,
}

/// A task and how it ended.
#[derive(Debug, Serialize)]
pub struct TaskView {
    pub id: String,
    pub kind: String,
    /// `ran`, `cached`, `failed`, `denied`, `skipped` or `cancelled`.
    pub status: &'static str,
    pub seconds: f64,
    pub summary: Vec<(String, String)>,
    pub reasons: Vec<String>,
    /// What it told its reader.
    pub report: String,
    pub error: Option<String>,
    pub published: Vec<String>,
}

/// What a gate said.
#[derive(Debug, Serialize)]
pub struct VerdictView {
    pub task: String,
    /// The whole of `verdict.json`.
    pub verdict: Value,
}

/// Metrics of one evaluation.
#[derive(Debug, Serialize)]
pub struct EvaluationView {
    /// The task; with the output behind it where it has one for each model.
    pub task: String,
    /// Digest of the data it was measured on, where the evaluation says so.
    pub data: Option<String>,
    /// Value by name, without standard errors.
    pub metrics: BTreeMap<String, MetricView>,
}

/// A number with its standard error.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MetricView {
    pub value: f64,
    pub stderr: Option<f64>,
}

/// A training run: its numbers, and its log step by step.
#[derive(Debug, Serialize)]
pub struct TrainingView {
    pub task: String,
    pub metrics: Map<String, Value>,
    pub log: Vec<Map<String, Value>>,
}

/// Evaluation rows held against training rows.
#[derive(Debug, Serialize)]
pub struct ContaminationView {
    pub task: String,
    pub metrics: Map<String, Value>,
    /// The whole of `contamination.json`.
    pub found: Value,
}

/// Statistics of a data set or of its tokens.
#[derive(Debug, Serialize)]
pub struct DataView {
    /// `task.output`.
    pub name: String,
    pub kind: ArtifactKind,
    pub facts: BTreeMap<String, Value>,
    /// Lengths and an example, of tokens.
    pub statistics: Option<TokenStatistics>,
}

/// An artifact and where it comes from.
#[derive(Debug, Serialize)]
pub struct ArtifactView {
    /// `task.output`.
    pub name: String,
    pub kind: ArtifactKind,
    pub size: u64,
    pub digest: String,
    /// References of the artifacts and names of the files that it was made from.
    pub from: Vec<String>,
}

impl RunView {
    /// Reads a run. What the store no longer has is left out and named in `gone`.
    pub fn read(engine: &Engine, record: &RunRecord) -> Self {
        let report = &record.report;
        let mut params = BTreeMap::new();
        flatten("params", &record.params, &mut params);
        let mut view = Self {
            id: report.run_id.clone(),
            pipeline: report.name.clone(),
            file: record.pipeline.display().to_string(),
            started: report.started.clone(),
            seconds: report.wall.as_secs_f64(),
            exit_code: report.exit_code(),
            outcome: crate::commands::outcome_word(report.exit_code()),
            command_line: record.command_line.clone(),
            environment: serde_json::to_value(&record.environment).unwrap_or_default(),
            params,
            tasks: Vec::new(),
            edges: record.edges.clone(),
            graph: lora_flow_pipeline::run_svg(record),
            verdicts: Vec::new(),
            evaluations: Vec::new(),
            samples: Vec::new(),
            training: Vec::new(),
            data: Vec::new(),
            contamination: Vec::new(),
            artifacts: Vec::new(),
            gone: Vec::new(),
        };
        let mut answers = Vec::new();
        for task in &report.tasks {
            let entry = task.key.and_then(|key| engine.store().entry(&key));
            view.tasks.push(TaskView::of(task));
            match &entry {
                Some(entry) => view.read_outputs(engine, task, entry, &mut answers),
                None if task.key.is_some() && !task.outputs.is_empty() => {
                    view.gone.push(task.id.clone());
                }
                None => {}
            }
        }
        view.samples = side_by_side(answers);
        view
    }

    fn read_outputs(
        &mut self,
        engine: &Engine,
        task: &TaskOutcome,
        entry: &Entry,
        answers: &mut Vec<(String, Vec<AnsweredSample>)>,
    ) {
        let inputs = self.edges.iter().filter(|e| e.to == task.id && e.port.is_some());
        let files = entry.explained.files.values().flatten();
        let from: Vec<String> = inputs.map(|e| e.from.clone()).chain(files.cloned()).collect();
        for (output, stored) in &entry.outputs {
            let artifact = engine.store().artifact(stored);
            let name = format!("{}.{output}", task.id);
            self.artifacts.push(ArtifactView {
                name: name.clone(),
                kind: artifact.kind,
                size: stored.size(),
                digest: artifact.digest.to_string(),
                from: from.clone(),
            });
            match artifact.kind {
                ArtifactKind::Metrics => {
                    let name = metrics_name(&task.id, output);
                    self.read_metrics(&name, &artifact);
                    let samples = artifact.get("samples.parquet").map(answered_samples);
                    answers.extend(samples.and_then(Result::ok).map(|samples| (name, samples)));
                }
                ArtifactKind::Verdict => {
                    if let Some(verdict) = artifact_json(&artifact, "verdict.json") {
                        self.verdicts.push(VerdictView { task: task.id.clone(), verdict });
                    }
                }
                ArtifactKind::Dataset | ArtifactKind::Tokens => {
                    let file = match artifact.kind {
                        ArtifactKind::Tokens => "tokens.json",
                        _ => "dataset.json",
                    };
                    if let Some(Value::Object(facts)) = artifact_json(&artifact, file) {
                        let facts = facts.into_iter().collect();
                        let statistics = artifact_json(&artifact, STATISTICS_FILE)
                            .and_then(|json| serde_json::from_value(json).ok());
                        self.data.push(DataView { name, kind: artifact.kind, facts, statistics });
                    }
                }
                _ => {}
            }
        }
    }

    fn read_metrics(&mut self, task: &str, artifact: &Artifact) {
        let Some(Value::Object(metrics)) = artifact_json(artifact, "metrics.json") else { return };
        if let Some(log) = artifact_text(artifact, "log.jsonl") {
            let log = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
            self.training.push(TrainingView { task: task.to_owned(), metrics, log });
            return;
        }
        if let Some(found) = artifact_json(artifact, CONTAMINATION_FILE) {
            self.contamination.push(ContaminationView { task: task.to_owned(), metrics, found });
            return;
        }
        let data = metrics.get("meta").and_then(|m| m.get("data")).and_then(Value::as_str);
        let stderr = |name: &str| metrics.get(&format!("{name}_stderr")).and_then(Value::as_f64);
        let values = metrics
            .iter()
            .filter(|(name, _)| !name.ends_with("_stderr"))
            .filter_map(|(name, value)| {
                let metric = MetricView { value: value.as_f64()?, stderr: stderr(name) };
                Some((name.clone(), metric))
            })
            .collect();
        self.evaluations.push(EvaluationView {
            task: task.to_owned(),
            data: data.map(str::to_owned),
            metrics: values,
        });
    }
}

impl TaskView {
    fn of(task: &TaskOutcome) -> Self {
        let status = match &task.status {
            Status::Ran => "ran",
            Status::Cached => "cached",
            Status::Failed => "failed",
            Status::Denied { .. } => "denied",
            Status::Skipped(_) => "skipped",
            Status::Cancelled => "cancelled",
        };
        let error = match &task.status {
            Status::Skipped(why) => Some(why.clone()),
            _ => task.error.as_ref().map(|e| e.message.clone()).or_else(|| task.denied.clone()),
        };
        Self {
            id: task.id.clone(),
            kind: task.kind.clone(),
            status,
            seconds: task.wall.as_secs_f64(),
            summary: task.summary.clone(),
            reasons: task.reasons.clone(),
            report: task.report.clone(),
            error,
            published: task.published.iter().map(|p| p.display().to_string()).collect(),
        }
    }
}

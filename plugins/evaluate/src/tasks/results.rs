//! What an evaluation leaves: `metrics.json` for gates, `results.json` in lm-evaluation-harness's
//! shape, `samples.parquet` with every question and answer.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{Float64Builder, ListBuilder, StringBuilder};
use arrow_array::{ArrayRef, BooleanArray, Float64Array, RecordBatch, StringArray, UInt32Array};
use lora_flow_core::{Digest, OutputDir, Result, ResultExt};
use parquet::arrow::ArrowWriter;
use serde_json::{Map, Value, json};

use crate::tasks::Asked;
use crate::tasks::judged::{Judged, Measured};
use crate::tasks::prompt::{Question, dumped, shown};
use crate::tasks::rows::sha256;
use crate::tasks::task_file::{OutputType, TaskFile, comparable};

/// One model's results on all tasks.
pub(crate) struct Results<'a> {
    pub(crate) tasks: &'a [TaskFile],
    pub(crate) asked: &'a [Asked],
    pub(crate) judged: &'a [Judged],
    pub(crate) tokenizer: Digest,
    pub(crate) prompts: Value,
    pub(crate) options: &'a Value,
    pub(crate) model: Digest,
    pub(crate) adapter: Option<Digest>,
}

/// Digests by which samples of two runs are paired, as lm-evaluation-harness computes them.
struct Hashes {
    doc: Vec<String>,
    prompt: Vec<String>,
    target: Vec<String>,
}

impl Results<'_> {
    /// Writes the three files.
    pub(crate) fn write(&self, out: &mut OutputDir) -> Result<()> {
        let hashes = self
            .all()
            .map(|(task, asked, _)| Hashes::new(task, asked))
            .collect::<Result<Vec<_>>>()?;
        out.write_json("metrics.json", &self.metrics(&hashes))?;
        out.write_json("results.json", &self.results())?;
        self.samples(&out.file("samples.parquet")?, &hashes)
    }

    fn all(&self) -> impl Iterator<Item = (&TaskFile, &Asked, &Judged)> {
        let pairs = self.tasks.iter().zip(self.asked).zip(self.judged);
        pairs.map(|((task, asked), judged)| (task, asked, judged))
    }

    fn metrics(&self, hashes: &[Hashes]) -> Value {
        let (mut out, mut metrics, mut tasks) = (Map::new(), Map::new(), Map::new());
        for ((task, asked, judged), hashes) in self.all().zip(hashes) {
            let id = task.identifier();
            for m in &judged.measured {
                let name = format!("{id}.{}", m.flat());
                out.insert(format!("{name}_stderr"), json!(m.stderr));
                metrics.insert(name.clone(), m.meta(&id));
                out.insert(name, json!(m.value));
            }
            out.insert(format!("{id}.samples"), json!(asked.questions.len()));
            let mut config = comparable(task);
            config.insert("num_fewshot".into(), json!(asked.num_fewshot));
            tasks.insert(
                id,
                json!({
                    "rows": Digest::of_json(&json!(hashes.doc)),
                    "prompts": Digest::of_json(&json!(hashes.prompt)),
                    "config": config,
                }),
            );
        }
        let data = json!({
            "rows": hashes.iter().map(|h| &h.doc).collect::<Vec<_>>(),
            "prompts": hashes.iter().map(|h| (&h.prompt, &h.target)).collect::<Vec<_>>(),
        });
        out.insert(
            "meta".into(),
            json!({
                "data": Digest::of_json(&data),
                "tokenizer": self.tokenizer,
                "model": self.model,
                "adapter": self.adapter,
                "prompts": self.prompts,
                "tasks": tasks,
                "metrics": metrics,
            }),
        );
        Value::Object(out)
    }

    fn results(&self) -> Value {
        let mut parts: [Map<String, Value>; 7] = Default::default();
        let [results, subtasks, configs, versions, shots, directions, counts] = &mut parts;
        for (task, asked, judged) in self.all() {
            let name = &task.name;
            let n = asked.questions.len();
            let mut values = Map::from_iter([
                ("alias".to_owned(), json!(task.alias)),
                ("sample_len".to_owned(), json!(n)),
            ]);
            let mut higher = Map::new();
            for m in &judged.measured {
                values.insert(m.key(), json!(m.value));
                values.insert(m.stderr_key(), m.stderr.map_or(json!("N/A"), |e| json!(e)));
                higher.insert(m.spec.metric.name().to_owned(), json!(m.spec.higher_is_better));
            }
            results.insert(name.clone(), Value::Object(values));
            subtasks.insert(name.clone(), json!([]));
            configs.insert(name.clone(), task.json.clone());
            versions.insert(name.clone(), task.version.clone());
            shots.insert(name.clone(), json!(asked.num_fewshot));
            directions.insert(name.clone(), Value::Object(higher));
            counts.insert(name.clone(), json!({ "original": n, "effective": n }));
        }
        let [results, subtasks, configs, versions, shots, directions, counts] = parts;
        json!({
            "results": results,
            "group_subtasks": subtasks,
            "configs": configs,
            "versions": versions,
            "n-shot": shots,
            "higher_is_better": directions,
            "n-samples": counts,
            "config": { "model": "lora-flow", "model_args": self.options },
        })
    }

    fn samples(&self, path: &Path, hashes: &[Hashes]) -> Result<()> {
        // Name → whether its samples are lists: `f1` is for one output type and not for another.
        let mut names: BTreeMap<String, bool> = BTreeMap::new();
        for m in self.judged.iter().flat_map(|j| &j.measured) {
            *names.entry(m.flat()).or_default() |= m.spec.metric.statistic().width() > 1;
        }
        let parts: Vec<RecordBatch> = self
            .all()
            .zip(hashes)
            .map(|((task, asked, judged), hashes)| {
                task_samples(task, asked, judged, hashes, &names)
            })
            .collect::<Result<_>>()?;
        let Some(first) = parts.first() else { return Ok(()) };
        let file = fs_err::File::create(path)?;
        let mut writer =
            ArrowWriter::try_new(file, first.schema(), None).context("cannot write samples")?;
        for part in &parts {
            writer.write(part).context("cannot write samples")?;
        }
        writer.close().context("cannot write samples")?;
        Ok(())
    }
}

impl Hashes {
    fn new(task: &TaskFile, asked: &Asked) -> Result<Self> {
        let doc = asked.rows.rows.iter().map(|r| dumped(r).map(|t| sha256(&t)));
        let target = asked.questions.iter().map(|q| shown(&q.target).map(|t| sha256(&t)));
        // A rolling log-likelihood has its text as the only argument.
        let prompt = |q: &Question| match (&q.target, task.output_type) {
            (Value::String(text), OutputType::Rolling) => sha256(text),
            _ => sha256(&q.prompt),
        };
        Ok(Self {
            doc: doc.collect::<Result<_>>()?,
            prompt: asked.questions.iter().map(prompt).collect(),
            target: target.collect::<Result<_>>()?,
        })
    }
}

/// The samples of one task. Every metric has a column: a number, or the list of those that add up.
fn task_samples(
    task: &TaskFile,
    asked: &Asked,
    judged: &Judged,
    hashes: &Hashes,
    names: &BTreeMap<String, bool>,
) -> Result<RecordBatch> {
    let n = asked.questions.len();
    let text = |values: Vec<Option<String>>| -> ArrayRef { Arc::new(StringArray::from(values)) };
    let known = |values: &[String]| text(values.iter().cloned().map(Some).collect());
    let docs = asked.rows.rows.iter().map(|row| Ok(Some(serde_json::to_string(row)?)));
    let docs: Vec<Option<String>> = docs.collect::<Result<_>>()?;
    let mut choices = ListBuilder::new(StringBuilder::new());
    let mut lls = ListBuilder::new(Float64Builder::new());
    for (question, answer) in asked.questions.iter().zip(&judged.answers) {
        question.choices.iter().for_each(|c| choices.values().append_value(c));
        choices.append(true);
        answer.loglikelihoods.iter().for_each(|l| lls.values().append_value(l.sum));
        lls.append(true);
    }
    let questions = &asked.questions;
    let targets: Vec<Option<String>> = questions
        .iter()
        .map(|q| {
            let choice = q.target.as_u64().and_then(|i| q.choices.get(i as usize).cloned());
            Some(choice.unwrap_or_else(|| super::judged::as_text(&q.target)))
        })
        .collect();
    let mut columns: Vec<(String, ArrayRef)> = vec![
        ("task".into(), text(vec![Some(task.identifier()); n])),
        ("doc_id".into(), Arc::new(UInt32Array::from_iter_values(0..n as u32))),
        ("doc".into(), text(docs)),
        ("prompt".into(), text(questions.iter().map(|q| Some(q.prompt.clone())).collect())),
        ("target".into(), text(targets)),
        ("choices".into(), Arc::new(choices.finish())),
        ("loglikelihoods".into(), Arc::new(lls.finish())),
        ("response".into(), text(judged.answers.iter().map(|a| a.text.clone()).collect())),
        ("prediction".into(), text(judged.predictions.clone())),
        ("correct".into(), Arc::new(BooleanArray::from(judged.correct.clone()))),
        ("doc_hash".into(), known(&hashes.doc)),
        ("prompt_hash".into(), known(&hashes.prompt)),
        ("target_hash".into(), known(&hashes.target)),
    ];
    for (name, wide) in names {
        let measured = judged.measured.iter().find(|m| m.flat() == *name);
        columns.push((name.clone(), metric_column(measured, *wide, n)));
    }
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true)))
        .context("cannot make `samples.parquet`")
}

fn metric_column(measured: Option<&Measured>, wide: bool, n: usize) -> ArrayRef {
    if wide {
        let mut list = ListBuilder::new(Float64Builder::new());
        for i in 0..n {
            let sample = measured.map(|m| &m.samples[i]);
            sample.into_iter().flatten().for_each(|x| list.values().append_value(*x));
            list.append(sample.is_some());
        }
        return Arc::new(list.finish());
    }
    let values = (0..n).map(|i| measured.map(|m| m.samples[i][0]));
    Arc::new(values.collect::<Float64Array>())
}

/// The table of all models and metrics.
pub(crate) fn table(tasks: &[TaskFile], models: &[&str], judged: &[Vec<Judged>]) -> String {
    let mut rows = vec![["task", "metric", "model", "value", "± stderr", "n"].map(str::to_owned)];
    for (t, task) in tasks.iter().enumerate() {
        let count = judged.first().map_or(0, |all| all[t].measured.len());
        for m in 0..count {
            for (name, all) in models.iter().zip(judged) {
                let measured = &all[t].measured[m];
                let arrow = if measured.spec.higher_is_better { "↑" } else { "↓" };
                rows.push([
                    task.identifier(),
                    format!("{} {arrow}", measured.flat()),
                    (*name).to_owned(),
                    crate::short(measured.value),
                    measured.stderr.map_or("–".to_owned(), crate::short),
                    measured.samples.len().to_string(),
                ]);
            }
        }
    }
    crate::text_table(&rows)
}

/// The first metric of each task, for each model.
pub(crate) fn headlines(
    tasks: &[TaskFile],
    models: &[&str],
    judged: &[Vec<Judged>],
) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for (t, task) in tasks.iter().enumerate() {
        for (model, all) in models.iter().zip(judged) {
            let Some(m) = all[t].measured.first() else { continue };
            let name = match *model {
                "metrics" => format!("{}.{}", task.identifier(), m.flat()),
                model => format!("{model} {}.{}", task.identifier(), m.flat()),
            };
            let error = m.stderr.map_or(String::new(), |e| format!(" ± {}", crate::short(e)));
            out.push((name, format!("{}{error}", crate::short(m.value))));
        }
    }
    out
}

//! `evaluate-tasks`: task files in the YAML of lm-evaluation-harness, on one or more models.
//!
//! Numbers agree with lm-evaluation-harness 0.4.13 on the same model and rows
//! (`tests/reference/make_lm_eval.py` holds them against each other), and every sample is kept, so
//! that a gate can compare two models row by row.

mod filter;
mod judged;
mod literal;
mod model;
mod prompt;
mod results;
mod rows;
mod samples;
mod task_file;
mod task_reader;

use std::collections::BTreeMap;
use std::path::PathBuf;

use lora_flow_core::{
    Artifact, ArtifactKind, Error, FileProblem, FileRef, Ports, Problem, Result, ResultExt, Task,
    TaskContext,
};
use lora_flow_data::{ChatTemplate, TextTokenizer};
use lora_flow_model::config::ModelConfig;
use lora_flow_model::decoder::Decoder;
use lora_flow_model::lora::Lora;
use lora_flow_model::place::Place;
use lora_flow_train::{open_device, with_threads};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::tasks::judged::Judged;
use crate::tasks::model::Judge;
use crate::tasks::prompt::{PromptOptions, Prompter, Question};
use crate::tasks::rows::{Rows, Source};
use crate::tasks::task_file::TaskFile;

pub use samples::{AnsweredSample, answered_samples};
pub(crate) use task_file::OutputType;

/// Name of the base among `models`.
const BASE: &str = "base";

/// Parameters of `evaluate-tasks`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvaluateTasks {
    /// Task files (paths or patterns) in the YAML of lm-evaluation-harness.
    pub tasks: Vec<String>,
    /// Files (paths or patterns) that the task files name under `data_files`.
    #[serde(default)]
    pub data_files: Vec<String>,
    /// Models to evaluate side by side, the base being loaded once: `base`, and names of inputs
    /// that are adapters on it or models of their own. Each gives an output of its name. Left out:
    /// the model, with the adapter if there is one, as output `metrics`.
    #[serde(default)]
    pub models: Vec<String>,
    /// Use only this many rows of each task, the first ones.
    #[serde(default)]
    pub limit: Option<usize>,
    /// Worked examples in each prompt, instead of what the task files say.
    #[serde(default)]
    pub num_fewshot: Option<usize>,
    /// Seed of the choice of examples.
    #[serde(default = "default_seed")]
    pub fewshot_seed: u32,
    /// Wrap the prompts in the model's chat template.
    #[serde(default)]
    pub apply_chat_template: bool,
    /// With the chat template, make each example a turn of its own; otherwise examples and question
    /// are one message.
    #[serde(default = "yes")]
    pub fewshot_as_multiturn: bool,
    /// Text before every prompt; with the chat template, the system's message.
    #[serde(default)]
    pub system_instruction: Option<String>,
    /// Most tokens that the model sees at once; what its config says if left out.
    #[serde(default)]
    pub max_length: Option<usize>,
    /// New tokens in each window of `loglikelihood_rolling`; `max_length` if left out, so that a
    /// window keeps one token of context, as in lm-evaluation-harness.
    #[serde(default)]
    pub stride: Option<usize>,
    /// Most tokens in one pass through the model; a longer document goes alone.
    #[serde(default = "default_tokens")]
    pub max_tokens_per_batch: usize,
    /// Most documents in one pass; as many as fit if left out.
    #[serde(default)]
    pub batch_size: Option<usize>,
    /// Replicates of bootstrapped standard errors; 0 leaves them out.
    #[serde(default = "default_iters")]
    pub bootstrap_iters: usize,
}

fn yes() -> bool {
    true
}

fn default_seed() -> u32 {
    1234
}

fn default_tokens() -> usize {
    2048
}

fn default_iters() -> usize {
    100_000
}

impl Task for EvaluateTasks {
    fn inputs(&self) -> Ports {
        let kinds = [ArtifactKind::Dataset, ArtifactKind::Files];
        let ports = Ports::none()
            .required("model", ArtifactKind::Model, "the base model")
            .optional("adapter", ArtifactKind::Adapter, "an adapter on top of it")
            .one_of("data", &kinds, false, "rows to evaluate, instead of the files a task names")
            .one_of("fewshot", &kinds, false, "rows to take worked examples from");
        let named = self.models.iter().filter(|name| *name != BASE);
        named.fold(ports, |ports, name| {
            let kinds = [ArtifactKind::Adapter, ArtifactKind::Model];
            ports.one_of(name, &kinds, true, "an adapter on the base, or a model of its own")
        })
    }

    fn outputs(&self) -> Ports {
        let doc = "metrics with their errors; `results.json` in lm-evaluation-harness's shape; \
                   `samples.parquet` has every prompt and answer";
        if self.models.is_empty() {
            return Ports::none().required("metrics", ArtifactKind::Metrics, doc);
        }
        let outputs = self.models.iter();
        outputs.fold(Ports::none(), |p, name| p.required(name, ArtifactKind::Metrics, doc))
    }

    fn files(&self) -> Vec<FileRef> {
        let of = |field: &str, patterns: &[String]| -> Vec<FileRef> {
            let patterns = patterns.iter().enumerate();
            let files = patterns.map(|(i, pattern)| FileRef {
                pointer: format!("/{field}/{i}"),
                pattern: pattern.clone(),
            });
            files.collect()
        };
        [of("tasks", &self.tasks), of("data_files", &self.data_files)].concat()
    }

    fn validate(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.tasks.is_empty() {
            problems
                .push(Problem::at("/tasks", "`tasks` is empty, so there is nothing to evaluate"));
        }
        for (field, value) in [
            ("limit", self.limit),
            ("max_length", self.max_length),
            ("stride", self.stride),
            ("batch_size", self.batch_size),
            ("max_tokens_per_batch", Some(self.max_tokens_per_batch)),
        ] {
            if value == Some(0) {
                let message = format!("`{field}` is 0, it must be at least 1");
                problems.push(Problem::at(format!("/{field}"), message));
            }
        }
        if let (Some(stride), Some(length)) = (self.stride, self.max_length)
            && stride > length
        {
            let message = format!("`stride` is {stride}, above `max_length`, {length}");
            problems.push(Problem::at("/stride", message));
        }
        for (i, name) in self.models.iter().enumerate() {
            if self.models[..i].contains(name) {
                let message = format!("`{name}` is listed twice");
                problems.push(Problem::at(format!("/models/{i}"), message));
            }
            if ["model", "adapter", "data", "fewshot"].contains(&name.as_str()) {
                let message = format!("`{name}` is the name of another input");
                let problem = Problem::at(format!("/models/{i}"), message);
                problems.push(problem.with_hint("the base model's own name here is `base`"));
            }
        }
        problems
    }

    fn check_files(&self, files: &BTreeMap<String, Vec<PathBuf>>) -> Vec<FileProblem> {
        let task_files = files.iter().filter(|(pointer, _)| pointer.starts_with("/tasks/"));
        let mut problems = Vec::new();
        for path in task_files.flat_map(|(_, paths)| paths) {
            for d in TaskFile::read(path).err().unwrap_or_default() {
                problems.push(FileProblem {
                    path: path.clone(),
                    bytes: d.span.map(|s| s.start..s.end),
                    message: d.message,
                    hint: d.hint,
                });
            }
        }
        problems
    }

    fn uses_device(&self) -> bool {
        true
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let tasks = self.task_files(cx)?;
        let base = cx.input("model")?.clone();
        let tokenizer = TextTokenizer::open(&base).context("input `model`")?;
        let chat = self.chat_template(&tokenizer)?;
        let mut asked = Vec::new();
        for task in &tasks {
            asked.push(self.asked(task, cx, chat.as_ref())?);
        }
        let subjects = self.subjects(cx)?;
        let device = open_device(cx.device())?;
        let context = &*cx;
        let judged = with_threads(cx.threads(), || {
            let decoder = load(&base, &device).context("input `model`")?;
            let mut all = Vec::new();
            for (i, subject) in subjects.iter().enumerate() {
                let place = || format!("input `{}`", subject.input);
                let mut report = |task: &TaskFile, done: usize, of: usize| {
                    let message = format!("{} {}", subject.output, task.name);
                    let total = (subjects.len() * of) as u64;
                    context.progress((i * of + done) as u64, Some(total), "row", message);
                    context.check_cancelled()
                };
                let own = match &subject.model {
                    Some(model) => {
                        let other = TextTokenizer::open(model).with_context(place)?;
                        check_same_tokenizer(&tokenizer, &other).with_context(place)?;
                        Some(load(model, &device).with_context(place)?)
                    }
                    None => None,
                };
                let decoder = own.as_ref().unwrap_or(&decoder);
                let lora = match &subject.adapter {
                    Some(adapter) => {
                        let lora = Lora::load_peft(adapter, &decoder.linear_modules());
                        Some(lora.with_context(place)?)
                    }
                    None => None,
                };
                let judge = self.judge(decoder, lora.as_ref(), &tokenizer);
                all.push(self.judge_all(&tasks, &asked, &judge, &mut report)?);
            }
            Ok(all)
        })?;
        let options = serde_json::to_value(self)?;
        for (subject, judged) in subjects.iter().zip(&judged) {
            let out = results::Results {
                tasks: &tasks,
                asked: &asked,
                judged,
                tokenizer: tokenizer.digest(),
                prompts: self.prompt_facts(),
                options: &options,
                model: subject.model.as_ref().unwrap_or(&base).digest,
                adapter: subject.adapter.as_ref().map(|a| a.digest),
            };
            out.write(cx.output(&subject.output)?)?;
        }
        let names: Vec<&str> = subjects.iter().map(|s| s.output.as_str()).collect();
        cx.report(results::table(&tasks, &names, &judged));
        for (name, value) in results::headlines(&tasks, &names, &judged) {
            cx.summary(name, value);
        }
        Ok(())
    }
}

/// A model to be evaluated.
struct Subject {
    output: String,
    input: String,
    /// A model of its own; none for the base.
    model: Option<Artifact>,
    adapter: Option<Artifact>,
}

/// The questions of a task.
pub(crate) struct Asked {
    pub(crate) rows: Rows,
    pub(crate) questions: Vec<Question>,
    pub(crate) num_fewshot: usize,
}

fn load(model: &Artifact, place: &Place) -> Result<Decoder> {
    let dtype = ModelConfig::open(model)?.dtype;
    Decoder::open(model, place, dtype)
}

/// Prompts are made once; a model that reads them with other ids would be asked other questions.
fn check_same_tokenizer(base: &TextTokenizer, other: &TextTokenizer) -> Result<()> {
    let sample = "The 3 quick-brown foxes (12.5 %) don't\n\tjump; naïve «日本» 🦊!";
    if base.vocab_size() == other.vocab_size() && base.encode(sample)? == other.encode(sample)? {
        return Ok(());
    }
    Err(Error::new("this model has another tokenizer than the base")
        .with_hint("evaluate it in a task of its own"))
}

impl EvaluateTasks {
    fn task_files(&self, cx: &TaskContext) -> Result<Vec<TaskFile>> {
        let mut tasks: Vec<TaskFile> = Vec::new();
        for i in 0..self.tasks.len() {
            for path in cx.files(&format!("/tasks/{i}")) {
                let mut task = TaskFile::read(path).map_err(|problems| {
                    let all: Vec<String> = problems.iter().map(ToString::to_string).collect();
                    Error::new(all.join("\n"))
                })?;
                task.num_fewshot = self.num_fewshot.unwrap_or(task.num_fewshot);
                if let Some(twin) = tasks.iter().find(|t| t.identifier() == task.identifier()) {
                    return Err(Error::new(format!(
                        "`{}` and `{}` are both called `{}`",
                        twin.source.path.display(),
                        path.display(),
                        task.identifier()
                    )));
                }
                tasks.push(task);
            }
        }
        Ok(tasks)
    }

    fn chat_template(&self, tokenizer: &TextTokenizer) -> Result<Option<ChatTemplate>> {
        if !self.apply_chat_template {
            return Ok(None);
        }
        let source = tokenizer.chat_template().ok_or_else(|| {
            Error::new("`apply_chat_template` is set, but the model has no chat template")
        })?;
        ChatTemplate::new(source, tokenizer.named_tokens(), &BTreeMap::new(), None).map(Some)
    }

    fn asked(
        &self,
        task: &TaskFile,
        cx: &TaskContext,
        chat: Option<&ChatTemplate>,
    ) -> Result<Asked> {
        let mut files: Vec<PathBuf> = Vec::new();
        for i in 0..self.data_files.len() {
            files.extend_from_slice(cx.files(&format!("/data_files/{i}")));
        }
        let source = Source::new(task, cx, files);
        let rows = source.eval(self.limit)?;
        let prompter = Prompter::new(task, &rows.columns);
        let rolling = task.output_type == OutputType::Rolling;
        let num_fewshot = if rolling { 0 } else { task.num_fewshot };
        let examples = if num_fewshot > 0 { Some(source.examples()?) } else { None };
        let options = PromptOptions {
            chat,
            system: self.system_instruction.as_deref(),
            multiturn: self.fewshot_as_multiturn,
            seed: self.fewshot_seed,
        };
        let questions = if rolling {
            prompter.texts(&rows)?
        } else {
            prompter.questions(&rows, examples.as_ref(), options)?
        };
        Ok(Asked { rows, questions, num_fewshot })
    }

    /// The models, by the outputs that they get.
    fn subjects(&self, cx: &TaskContext) -> Result<Vec<Subject>> {
        let subject = |output: &str, input: &str, model, adapter| Subject {
            output: output.to_owned(),
            input: input.to_owned(),
            model,
            adapter,
        };
        let adapter = cx.optional("adapter").cloned();
        if self.models.is_empty() {
            let input = if adapter.is_some() { "adapter" } else { "model" };
            return Ok(vec![subject("metrics", input, None, adapter)]);
        }
        if adapter.is_some() {
            return Err(Error::new(
                "the input `adapter` is not used where `models` names the models",
            )
            .with_hint("give it a name of its own, and list that under `models`"));
        }
        let of = |name: &String| {
            if name == BASE {
                return Ok(subject(name, "model", None, None));
            }
            let artifact = cx.input(name)?.clone();
            Ok(match artifact.kind {
                ArtifactKind::Adapter => subject(name, name, None, Some(artifact)),
                _ => subject(name, name, Some(artifact), None),
            })
        };
        self.models.iter().map(of).collect()
    }

    fn judge<'a>(
        &self,
        decoder: &'a Decoder,
        lora: Option<&'a Lora>,
        tokenizer: &'a TextTokenizer,
    ) -> Judge<'a> {
        let max_length = self.max_length.unwrap_or(decoder.config().max_position_embeddings);
        Judge {
            decoder,
            lora,
            tokenizer,
            max_length,
            stride: self.stride.unwrap_or(max_length).min(max_length),
            max_tokens_per_batch: self.max_tokens_per_batch,
            batch_size: self.batch_size.unwrap_or(usize::MAX),
        }
    }

    fn judge_all(
        &self,
        tasks: &[TaskFile],
        asked: &[Asked],
        judge: &Judge<'_>,
        report: &mut dyn FnMut(&TaskFile, usize, usize) -> Result<()>,
    ) -> Result<Vec<Judged>> {
        let total: usize = asked.iter().map(|a| a.questions.len()).sum();
        let mut before = 0;
        let mut all = Vec::new();
        for (task, asked) in tasks.iter().zip(asked) {
            let mut progress = |done: usize| report(task, before + done, total);
            progress(0)?;
            let answers = judged::ask(task, &asked.questions, judge, &mut progress)
                .with_context(|| format!("task `{}`", task.name))?;
            let places = &asked.rows.places;
            let judged =
                judged::measure(task, &asked.questions, places, answers, self.bootstrap_iters)?;
            all.push(judged);
            before += asked.questions.len();
        }
        Ok(all)
    }

    /// What changes the prompts of all tasks: a part of what makes results comparable.
    fn prompt_facts(&self) -> Value {
        json!({
            "apply_chat_template": self.apply_chat_template,
            "fewshot_as_multiturn": self.fewshot_as_multiturn,
            "system_instruction": self.system_instruction,
            "fewshot_seed": self.fewshot_seed,
            "max_length": self.max_length,
            "stride": self.stride,
        })
    }
}

//! A task file: one evaluation in the YAML of lm-evaluation-harness's local tasks.
//!
//! Every key that the harness knows is either understood or refused with its place; none is
//! ignored silently but those that change no number (`tag`, `metadata`, `task_alias`, …). Python
//! functions (`!function`) are refused: the file must say everything itself.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use lora_flow_data::FileFormat;
use lora_flow_yaml::source::{Diagnostic, Problems, SourceFile, Span};
use lora_flow_yaml::yaml::{self, Places};
use serde_json::{Map, Value};

use crate::metric::{Metric, MetricOptions};
use crate::tasks::filter::Filter;
use crate::tasks::task_reader::Reader;

/// How the model is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutputType {
    /// Log-likelihood of the target after the prompt.
    LogLikelihood,
    /// Log-likelihood of a whole text, window by window.
    Rolling,
    /// Log-likelihood of each choice after the prompt.
    MultipleChoice,
    /// Text that the model writes after the prompt.
    Generate,
}

impl OutputType {
    pub(crate) const ALL: [(&'static str, Self); 4] = [
        ("loglikelihood", Self::LogLikelihood),
        ("loglikelihood_rolling", Self::Rolling),
        ("multiple_choice", Self::MultipleChoice),
        ("generate_until", Self::Generate),
    ];

    /// The harness's name.
    pub(crate) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, t)| *t == self).map_or("", |(n, _)| n)
    }
}

/// The choices of a multiple choice.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Choices {
    /// A column, or a template that renders a Python list.
    Template(String),
    /// The same for every row.
    Fixed(Vec<String>),
}

/// What stands for the answer: a column or a template, or the same for every row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Target {
    Template(String),
    Fixed(Value),
}

/// How to continue a prompt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Generation {
    pub(crate) until: Vec<String>,
    pub(crate) max_gen_toks: usize,
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
}

/// How rows become worked examples before the question.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct FewShot {
    pub(crate) split: Option<String>,
    pub(crate) first_n: bool,
    pub(crate) samples: Option<Vec<Value>>,
    pub(crate) doc_to_text: Option<String>,
    pub(crate) doc_to_target: Option<Target>,
    pub(crate) doc_to_choice: Option<Choices>,
    pub(crate) delimiter: String,
    pub(crate) target_delimiter: String,
}

/// A filter of generated text, by the name that its metrics carry.
#[derive(Debug, Clone)]
pub(crate) struct FilterChain {
    pub(crate) name: String,
    pub(crate) filters: Vec<Filter>,
}

/// A metric with its options and direction.
#[derive(Debug, Clone)]
pub(crate) struct MetricSpec {
    pub(crate) metric: Metric,
    pub(crate) options: MetricOptions,
    pub(crate) higher_is_better: bool,
}

/// A task file, checked.
#[derive(Debug, Clone)]
pub(crate) struct TaskFile {
    pub(crate) source: Arc<SourceFile>,
    pub(crate) places: Places,
    /// The file as JSON, for the results.
    pub(crate) json: Value,
    pub(crate) name: String,
    pub(crate) alias: String,
    pub(crate) version: Value,
    pub(crate) format: Option<FileFormat>,
    /// Split → names of files.
    pub(crate) data_files: BTreeMap<String, Vec<String>>,
    pub(crate) training_split: Option<String>,
    pub(crate) validation_split: Option<String>,
    pub(crate) test_split: Option<String>,
    pub(crate) output_type: OutputType,
    pub(crate) doc_to_text: String,
    pub(crate) doc_to_target: Target,
    pub(crate) doc_to_choice: Option<Choices>,
    pub(crate) description: String,
    pub(crate) target_delimiter: String,
    pub(crate) gen_prefix: Option<String>,
    pub(crate) num_fewshot: usize,
    pub(crate) fewshot: FewShot,
    pub(crate) generation: Generation,
    pub(crate) filters: Vec<FilterChain>,
    pub(crate) metrics: Vec<MetricSpec>,
}

impl TaskFile {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// All its problems, each with its place.
    pub(crate) fn read(path: &Path) -> Result<Self, Vec<Diagnostic>> {
        let source = SourceFile::read(path).map_err(|d| vec![*d])?;
        Self::parse(source)
    }

    pub(crate) fn parse(source: Arc<SourceFile>) -> Result<Self, Vec<Diagnostic>> {
        let tree = yaml::parse(&source)?;
        let mut problems = Problems::new(&source);
        let task = Reader { tree: &tree, problems: &mut problems }.task(&source);
        match task {
            Some(task) if problems.is_empty() => Ok(task),
            _ => Err(problems.found),
        }
    }

    /// Where something stands, for messages: `faq.yaml:12:15`.
    pub(crate) fn place(&self, pointer: &str) -> String {
        let mut at = pointer;
        let span = loop {
            if let Some(span) = self.places.values.get(at) {
                break *span;
            }
            match at.rfind('/') {
                Some(i) => at = &at[..i],
                None => break Span::default(),
            }
        };
        let (line, column) = self.source.line_column(span.start);
        format!("{}:{line}:{column}", self.source.path.display())
    }

    /// The split that is evaluated.
    pub(crate) fn eval_split(&self) -> &str {
        self.test_split.as_deref().or(self.validation_split.as_deref()).unwrap_or("test")
    }

    /// The task's name as an expression can read it: letters, digits and `_`.
    pub(crate) fn identifier(&self) -> String {
        let name: String =
            self.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        if name.starts_with(|c: char| c.is_ascii_digit()) { format!("_{name}") } else { name }
    }
}

/// The parts of a task file that decide what a number means: two results are comparable when these
/// are equal.
pub(crate) fn comparable(task: &TaskFile) -> Map<String, Value> {
    let mut config = task.json.as_object().cloned().unwrap_or_default();
    for key in ["task_alias", "tag", "group", "metadata", "dataset_kwargs", "dataset_path"] {
        config.remove(key);
    }
    config
}

#[cfg(test)]
#[path = "task_file_tests.rs"]
mod tests;

//! Small task kinds with the shapes of the real ones.

use std::collections::BTreeMap;

use lora_flow_core::{
    ArtifactKind, FileRef, Ports, Problem, Result, Task, TaskContext, TaskKind, kind,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

macro_rules! no_run {
    () => {
        fn run(&self, _cx: &mut TaskContext) -> Result<()> {
            Ok(())
        }
    };
}

/// A path or a list of paths.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Paths {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// Reads files.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ingest {
    /// Paths, folders or globs of the files to read.
    files: Paths,
    /// Column with the text.
    #[serde(default)]
    text: Option<String>,
    /// Fractions by split name.
    #[serde(default)]
    split: BTreeMap<String, f64>,
}

impl Task for Ingest {
    fn inputs(&self) -> Ports {
        Ports::none()
    }
    fn outputs(&self) -> Ports {
        if self.split.is_empty() {
            return Ports::none().required("dataset", ArtifactKind::Dataset, "the rows");
        }
        self.split.keys().fold(Ports::none(), |p, name| p.required(name, ArtifactKind::Dataset, ""))
    }
    fn files(&self) -> Vec<FileRef> {
        match &self.files {
            Paths::One(p) => vec![FileRef { pointer: "/files".into(), pattern: p.clone() }],
            Paths::Many(all) => all
                .iter()
                .enumerate()
                .map(|(i, p)| FileRef { pointer: format!("/files/{i}"), pattern: p.clone() })
                .collect(),
        }
    }
    fn validate(&self) -> Vec<Problem> {
        let bad = self.split.iter().find(|(_, f)| **f <= 0.0);
        bad.map(|(n, f)| {
            Problem::at(format!("/split/{n}"), format!("the fraction {f} is not positive"))
        })
        .into_iter()
        .collect()
    }
    no_run!();
}

/// Opens a model.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Folder, GGUF file or `hf://org/name`.
    source: String,
}

impl Task for Model {
    fn inputs(&self) -> Ports {
        Ports::none().optional("files", ArtifactKind::Files, "files of a plugin")
    }
    fn outputs(&self) -> Ports {
        Ports::none().required("model", ArtifactKind::Model, "the model")
    }
    no_run!();
}

/// How rows become text.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Plain text.
    #[default]
    Text,
    /// A prompt and its completion.
    PromptCompletion,
    /// Chat messages.
    Messages,
}

/// Text to tokens.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tokenize {
    /// How rows become text.
    #[serde(default)]
    format: Format,
    /// Longest sequence.
    #[serde(default = "max_length")]
    #[schemars(range(min = 1))]
    max_length: usize,
    /// Join short documents.
    #[serde(default)]
    packing: bool,
}

fn max_length() -> usize {
    1024
}

impl Task for Tokenize {
    fn inputs(&self) -> Ports {
        Ports::none().required("dataset", ArtifactKind::Dataset, "rows").required(
            "model",
            ArtifactKind::Model,
            "its tokenizer",
        )
    }
    fn outputs(&self) -> Ports {
        Ports::none().required("tokens", ArtifactKind::Tokens, "sequences")
    }
    no_run!();
}

/// Which modules.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// Rank.
    #[serde(default = "rank")]
    #[schemars(range(min = 1))]
    r: u32,
    /// Scale of the update.
    #[serde(default)]
    lora_alpha: Option<f64>,
    /// `all-linear` or module names.
    target_modules: Paths,
}

fn rank() -> u32 {
    8
}

impl Task for Lora {
    fn inputs(&self) -> Ports {
        Ports::none().required("model", ArtifactKind::Model, "the base")
    }
    fn outputs(&self) -> Ports {
        Ports::none().required("adapter", ArtifactKind::Adapter, "the adapter")
    }
    no_run!();
}

/// When to stop.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "by", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Stop {
    /// After some steps.
    Steps {
        /// How many.
        count: u64,
    },
    /// When the loss is low.
    Loss {
        /// How low.
        below: f64,
    },
}

/// Trains.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Peak learning rate.
    #[serde(default = "lr")]
    learning_rate: f64,
    /// Steps at most.
    #[serde(default)]
    max_steps: Option<u64>,
    /// Sequences a step.
    #[serde(default = "batch")]
    per_device_train_batch_size: usize,
    /// When to stop early.
    #[serde(default)]
    stop: Option<Stop>,
}

fn lr() -> f64 {
    2e-4
}

fn batch() -> usize {
    8
}

impl Task for Train {
    fn inputs(&self) -> Ports {
        Ports::none()
            .required("model", ArtifactKind::Model, "the base")
            .required("adapter", ArtifactKind::Adapter, "where to start")
            .required("train", ArtifactKind::Tokens, "what to learn")
            .optional("eval", ArtifactKind::Tokens, "what to watch")
    }
    fn outputs(&self) -> Ports {
        Ports::none().required("adapter", ArtifactKind::Adapter, "the result").required(
            "metrics",
            ArtifactKind::Metrics,
            "losses",
        )
    }
    no_run!();
}

/// Measures.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Evaluate {}

impl Task for Evaluate {
    fn inputs(&self) -> Ports {
        Ports::none()
            .required("model", ArtifactKind::Model, "")
            .optional("adapter", ArtifactKind::Adapter, "")
            .required("eval", ArtifactKind::Tokens, "")
    }
    fn outputs(&self) -> Ports {
        Ports::none().required("metrics", ArtifactKind::Metrics, "")
    }
    no_run!();
}

/// Decides.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// Conditions that must hold.
    #[schemars(length(min = 1))]
    require: Vec<String>,
}

impl Task for Gate {
    fn inputs(&self) -> Ports {
        Ports::none().any_name(&[ArtifactKind::Metrics])
    }
    fn outputs(&self) -> Ports {
        Ports::none().required("verdict", ArtifactKind::Verdict, "yes or no")
    }
    no_run!();
}

/// Puts many metrics into one table.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Table {}

impl Task for Table {
    fn inputs(&self) -> Ports {
        Ports::none().many("runs", &[ArtifactKind::Metrics], true, "the runs")
    }
    fn outputs(&self) -> Ports {
        Ports::none().required("files", ArtifactKind::Files, "the table")
    }
    no_run!();
}

/// The list, as the binary has it.
pub const KINDS: &[&[TaskKind]] = &[
    &[
        kind::<Ingest>("ingest", 1, "read files into a data set"),
        kind::<Tokenize>("tokenize", 1, "text to tokens"),
        kind::<Model>("model", 1, "open a model"),
        kind::<Lora>("lora-inject", 1, "put adapters into a model"),
    ],
    &[
        kind::<Train>("train", 3, "train an adapter"),
        kind::<Evaluate>("evaluate", 1, "measure a model"),
        kind::<Gate>("gate", 1, "decide by metrics"),
        kind::<Table>("table", 1, "compare runs"),
    ],
];

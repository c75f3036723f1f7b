//! The command line. Help texts live here and nowhere else.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use lora_flow_core::DeviceSpec;

/// LoRA fine-tuning as a declarative pipeline: a YAML file becomes a checked DAG of tasks, every
/// artifact is cached by content, and a gate stands between training and release.
#[derive(Debug, Parser)]
#[command(name = "lora-flow", version, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 done · 1 a task failed · 2 bad usage or bad pipeline · \
                        3 a gate said no · 130 interrupted")]
pub struct Args {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, ClapArgs)]
pub struct Global {
    /// Only errors and results
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Debug lines of the tasks as well
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// How progress and logs are written to stderr
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Folder of the artifact store [default: `.lora-flow` in the pipeline's root]
    #[arg(long, global = true, value_name = "DIR", env = "LORA_FLOW_CACHE_DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Remote cache to take results from and send them to: `s3://BUCKET/PREFIX` (settings in
    /// `AWS_*`) or `file:///FOLDER`
    #[arg(long, global = true, value_name = "URL", env = "LORA_FLOW_REMOTE")]
    pub remote: Option<String>,
    /// Send nothing to the remote cache
    #[arg(long, visible_alias = "no-push", global = true, env = "LORA_FLOW_REMOTE_READ_ONLY")]
    pub remote_read_only: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Bars on a terminal, plain lines elsewhere
    Text,
    /// One JSON object per event
    Json,
}

/// What every command that reads a pipeline takes.
#[derive(Debug, Clone, ClapArgs)]
pub struct PipelineArgs {
    /// The pipeline file
    #[arg(value_name = "PIPELINE")]
    pub pipeline: PathBuf,
    /// Override a parameter of the pipeline (`--set r=32`)
    #[arg(long = "set", value_name = "PARAM=VALUE", value_parser = key_value)]
    pub set: Vec<(String, String)>,
    /// Override parameters from a YAML or JSON file, before `--set` does
    #[arg(long, value_name = "FILE")]
    pub params_file: Option<PathBuf>,
    /// Only this task and what it needs (may be repeated)
    #[arg(long = "target", value_name = "TASK")]
    pub targets: Vec<String>,
    /// The plan ends at this task: wanted like a target (may be repeated)
    #[arg(long = "until", value_name = "TASK")]
    pub until: Vec<String>,
    /// Run this task and all that wait for it, cached or not (may be repeated)
    #[arg(long = "from", value_name = "TASK")]
    pub from: Vec<String>,
}

/// Options that decide what would run.
#[derive(Debug, Clone, ClapArgs)]
pub struct ChoiceArgs {
    /// Run this task even if it is cached; without a name, every task
    #[arg(long, value_name = "TASK", num_args = 0..=1, default_missing_value = "*", require_equals = true)]
    pub force: Vec<String>,
    /// Where tensors live: `cpu`, `cuda`, `cuda:N`
    #[arg(long, default_value = "cpu", env = "LORA_FLOW_DEVICE")]
    pub device: DeviceSpec,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a pipeline
    Run(RunArgs),
    /// Show what would run, what is cached, and why
    Plan(PlanArgs),
    /// Say in one line for each task whether it would run
    Status(PlanArgs),
    /// Say why one task would run, and what its key is made of
    Why(WhyArgs),
    /// Report every problem of a pipeline file without doing any work
    Check(PipelineArgs),
    /// Pin the digests of everything from outside in `PIPELINE.lock`, for `run --locked`
    Lock(LockArgs),
    /// Draw the DAG
    Graph(GraphArgs),
    /// List past runs
    Runs {
        /// At most this many, newest first
        #[arg(long, default_value_t = 20)]
        limit: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one run: tasks, reports, metrics, artifacts
    Show {
        /// Run id, a unique beginning of one, or `latest`
        #[arg(default_value = "latest")]
        run: String,
        /// Print the run's record as JSON
        #[arg(long)]
        json: bool,
    },
    /// Compare parameters and metrics of two runs
    Diff {
        /// Run id, a unique beginning of one, or `latest`
        a: String,
        /// Run to compare it with
        b: String,
        /// Also what is equal
        #[arg(long)]
        all: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the log of a task of a run
    Logs {
        /// Run id, a unique beginning of one, or `latest`
        run: String,
        /// Task
        task: String,
        /// Go on printing while the run goes on (`latest` is then the run that started last)
        #[arg(short, long)]
        follow: bool,
    },
    /// Write a run, or several side by side, as one HTML page that needs no network
    Report {
        /// Run ids, unique beginnings of them, or `latest`
        #[arg(default_value = "latest")]
        runs: Vec<String>,
        /// File to write; `-` is standard output
        #[arg(long, short, default_value = "lora-flow-report.html")]
        output: PathBuf,
    },
    /// Say why a gate said what it said
    Gate {
        #[command(subcommand)]
        command: GateCommand,
    },
    /// Record a run's results in a small file for git, to hold later runs against
    Accept {
        /// Run id, a unique beginning of one, or `latest`
        #[arg(default_value = "latest")]
        run: String,
        /// The file [default: `baselines/PIPELINE.json`]
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
        /// Accept a run whose gate said no
        #[arg(long)]
        denied: bool,
    },
    /// Print the lineage of a run as JSON: who made what, from which inputs
    Export {
        /// Run id, a unique beginning of one, or `latest`
        #[arg(default_value = "latest")]
        run: String,
    },
    /// Inspect and clean the artifact store
    Cache {
        #[command(subcommand)]
        command: CacheCommand,
    },
    /// List the task kinds, or describe one
    Tasks {
        /// Kind to describe
        kind: Option<String>,
        /// Print the reference of all kinds as Markdown
        #[arg(long, conflicts_with = "kind")]
        markdown: bool,
    },
    /// Print the JSON Schema of the pipeline file, for editors
    Schema,
    /// Make a pipeline to start from, with rows to run it on
    Init(InitArgs),
    /// Make and check plugins
    Plugin {
        #[command(subcommand)]
        command: PluginCommand,
    },
    /// Try a model with and without adapters
    Generate(GenerateArgs),
    /// Measure the speed and the memory of training or evaluation on synthetic tokens
    Bench {
        #[command(subcommand)]
        command: BenchCommand,
    },
    /// Say what this program finds on this machine
    Doctor,
}

#[derive(Debug, ClapArgs)]
pub struct RunArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    /// Tasks at once
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub jobs: usize,
    /// GPUs to spread the tasks over, each given to one task at a time [default: the one of
    /// `--device cuda:N`; without it, those that are found, for plugins]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub gpus: Option<usize>,
    /// Go on with tasks that do not depend on a failed one
    #[arg(short, long)]
    pub keep_going: bool,
    /// Show the plan and stop
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Insist on exactly the inputs that `PIPELINE.lock` pins
    #[arg(long, conflicts_with = "update_lock")]
    pub locked: bool,
    /// Write `PIPELINE.lock` when the run has succeeded
    #[arg(long)]
    pub update_lock: bool,
    /// Refuse the network to plugins that ask for it
    #[arg(long)]
    pub offline: bool,
    /// Print the run's record as JSON instead of the table
    #[arg(long)]
    pub json: bool,
    /// For CI: no bars, a JUnit report, and a summary where `GITHUB_STEP_SUMMARY` is set
    #[arg(long)]
    pub ci: bool,
    /// Where the JUnit report goes [default: `lora-flow-junit.xml` in the working folder]
    #[arg(long, value_name = "FILE", requires = "ci")]
    pub junit: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub struct PlanArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, ClapArgs)]
pub struct LockArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// Where tensors live: `cpu`, `cuda`, `cuda:N`
    #[arg(long, default_value = "cpu", env = "LORA_FLOW_DEVICE")]
    pub device: DeviceSpec,
}

#[derive(Debug, ClapArgs)]
pub struct WhyArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// The task
    #[arg(value_name = "TASK")]
    pub task: String,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, ClapArgs)]
pub struct GraphArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    /// Language of the drawing
    #[arg(long, default_value = "mermaid")]
    pub format: GraphFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GraphFormat {
    /// For Markdown
    Mermaid,
    /// For Graphviz
    Dot,
    /// A picture, coloured by what a run would do
    Svg,
}

#[derive(Debug, Subcommand)]
pub enum GateCommand {
    /// Every rule with the numbers, intervals, tests and rows that decided
    Explain {
        /// Run id, a unique beginning of one, or `latest`
        #[arg(default_value = "latest")]
        run: String,
        /// Only this gate
        #[arg(long, value_name = "TASK")]
        gate: Option<String>,
        /// Print the verdicts as JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// List the entries
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Delete what is neither pinned, nor reached by recent runs, nor used lately; safe beside runs
    Gc {
        /// Keep what the last N runs reach
        #[arg(long, value_name = "N", default_value_t = 10)]
        keep_runs: usize,
        /// Keep entries used within this many days
        #[arg(long, value_name = "DAYS", default_value_t = 7)]
        keep_days: u64,
        /// Beyond this size delete the least recently used results, recent or not (`20G`, `500M`)
        #[arg(long, value_name = "SIZE", value_parser = size)]
        max_size: Option<u64>,
        /// Say what would go and stop
        #[arg(short = 'n', long)]
        dry_run: bool,
    },
    /// Rehash everything; corrupt entries are set aside and recomputed by the next run
    Verify,
    /// Send all results that the remote cache lacks
    Push,
    /// Keep what a run used, whatever is cleaned; without a run, list what is pinned
    Pin {
        /// Run id, a unique beginning of one, or `latest`
        run: Option<String>,
    },
    /// End the protection of a run
    Unpin {
        /// Run id or a unique beginning of one
        run: String,
    },
}

#[derive(Debug, ClapArgs)]
pub struct InitArgs {
    /// Folder to make it in
    #[arg(value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// A Hugging Face folder or a GGUF file: the pipeline then trains, measures and merges too
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum PluginCommand {
    /// Make a plugin that works, to be changed into the wanted one
    New(PluginNewArgs),
    /// Report every problem of a plugin's manifest, and build it if it has a build step
    Check {
        /// The plugin's folder
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
}

#[derive(Debug, ClapArgs)]
pub struct PluginNewArgs {
    /// Name of the plugin, and of its first task kind
    pub name: String,
    /// Language of its program
    #[arg(long)]
    pub lang: Language,
    /// Folder to make the plugin's folder in
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// For Rust: the folder of `lora-flow-plugin-sdk` [default: lora-flow's repository]
    #[arg(long, value_name = "DIR")]
    pub sdk: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Language {
    /// With the helper module in one file; needs `python3` alone
    Python,
    /// On the SDK crate
    Rust,
}

#[derive(Debug, ClapArgs)]
pub struct GenerateArgs {
    /// A published model folder (config.json, tokenizer.json, weights)
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// A PEFT adapter folder, with a name for the output (`--adapter docs=out/adapter`)
    #[arg(long = "adapter", value_name = "NAME=DIR", value_parser = key_value)]
    pub adapters: Vec<(String, String)>,
    /// What the model continues; `-` reads stdin
    #[arg(long)]
    pub prompt: String,
    /// Wrap the prompt as a user message in the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// Tokens to generate at most
    #[arg(long, default_value_t = 64)]
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Sample from the smallest set of tokens with this probability
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f64,
    /// Seed of the sampling
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where tensors live: `cpu`, `cuda`, `cuda:N`
    #[arg(long, default_value = "cpu", env = "LORA_FLOW_DEVICE")]
    pub device: DeviceSpec,
    /// Leave out the answer of the model without an adapter
    #[arg(long)]
    pub no_base: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Whole training steps: forward, backward, clipping, AdamW
    Train {
        #[command(flatten)]
        bench: BenchArgs,
        /// Rank of the adapter, on all linear layers
        #[arg(long, default_value_t = 16, value_parser = at_least_one)]
        r: usize,
        /// Keep only the residual stream between forward and backward
        #[arg(long)]
        checkpointing: bool,
    },
    /// Forward and loss alone, without an adapter
    Eval(BenchArgs),
    /// Text generation with cached keys and values, without an adapter
    Generate(BenchGenerateArgs),
}

#[derive(Debug, ClapArgs)]
pub struct BenchGenerateArgs {
    /// A published model folder (config.json, weights) or a GGUF file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 128, value_parser = at_least_one)]
    pub prompt: usize,
    /// New tokens, of which the first counts to the prompt
    #[arg(long, default_value_t = 65, value_parser = at_least_one)]
    pub tokens: usize,
    /// Weights and the operands of products in bf16, sums in f32
    #[arg(long)]
    pub bf16: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, ClapArgs)]
pub struct BenchArgs {
    /// A published model folder (config.json, weights) or a GGUF file
    #[arg(long, value_name = "PATH", required_unless_present = "shape")]
    pub model: Option<PathBuf>,
    /// On a GPU: random weights of a known model's shape instead of `--model`
    #[arg(long, value_name = "NAME", conflicts_with = "model", value_parser = SHAPES)]
    pub shape: Option<String>,
    /// Dtype of the weights and of the operands of products, sums are f32 [default: float32 on the
    /// CPU, the model's own on a GPU]
    #[arg(long, value_parser = ["float32", "bfloat16"])]
    pub dtype: Option<String>,
    /// On a GPU: keep less between forward and backward to stay within this memory
    #[arg(long, value_name = "GIB")]
    pub memory: Option<f64>,
    /// Documents of a step and tokens of each
    #[arg(long, value_name = "DOCSxTOKENS", default_value = "4x256", value_parser = batch_shape)]
    pub batch: (usize, usize),
    /// Steps that are timed; one more runs before them
    #[arg(long, default_value_t = 3, value_parser = at_least_one)]
    pub steps: usize,
    /// Where tensors live: `cpu`, `cuda`, `cuda:N`
    #[arg(long, default_value = "cpu", env = "LORA_FLOW_DEVICE")]
    pub device: DeviceSpec,
    /// Short for `--dtype bfloat16`
    #[arg(long, conflicts_with = "dtype")]
    pub bf16: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Shapes that `bench --shape` knows.
const SHAPES: [&str; 3] = ["smollm2-135m", "llama3.2-1b", "llama3.1-8b"];

/// `4x256`: documents of at least two tokens, as the first token of one is no target.
fn batch_shape(text: &str) -> Result<(usize, usize), String> {
    let shape = text.split_once('x').and_then(|(docs, tokens)| {
        Some((docs.parse::<usize>().ok()?, tokens.parse::<usize>().ok()?))
    });
    match shape {
        Some((docs, tokens)) if docs > 0 && tokens > 1 => Ok((docs, tokens)),
        _ => Err("expected `DOCSxTOKENS` with at least one document of two tokens".to_owned()),
    }
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected `NAME=VALUE`".to_owned()),
    }
}

/// `20G`, `20GB`: powers of 1,000, as sizes are shown; `20Gi`, `20GiB`: powers of 1,024.
fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let start = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = (text[..start].trim_end(), text[start..].to_ascii_lowercase());
    let prefix = unit.trim_end_matches('b');
    let (prefix, base) = match prefix.strip_suffix('i') {
        Some(prefix) => (prefix, 1024f64),
        None => (prefix, 1000f64),
    };
    let power = ["", "k", "m", "g", "t"].iter().position(|p| *p == prefix);
    match (number.parse::<f64>(), power) {
        (Ok(number), Some(power)) if (0.0..1e9).contains(&number) => {
            Ok((number * base.powi(power as i32)) as u64)
        }
        _ => Err("expected a size like `20G` or `512MiB`".to_owned()),
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(n) => Ok(n),
        Err(_) => Err("expected a whole number".to_owned()),
    }
}

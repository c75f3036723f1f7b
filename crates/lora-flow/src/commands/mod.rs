//! The commands; one file each, but for the smallest.

mod accept;
mod annotations;
mod bench;
#[cfg(feature = "cuda")]
mod bench_cuda;
mod cache;
mod ci;
mod diff;
mod doctor;
mod export;
mod generate;
mod lock;
mod plan;
mod plugin;
mod report;
mod run;
mod runs;
mod scaffold;
mod tasks;
mod verdict;
mod why;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use lora_flow_core::{Artifact, Error};
use lora_flow_kernels::isa;
use lora_flow_pipeline::{CompileOptions, Engine, Plan, Remote, compile};
use lora_flow_remote::{Bucket, Patience};
use serde_json::Value;

use crate::args::{
    Args, Command, GateCommand, GraphArgs, GraphFormat, PipelineArgs, PluginCommand,
};
pub use diff::flatten;
pub use runs::outcome_word;

use crate::ui::{self, Failure};

/// Runs the command and gives the exit code.
pub fn dispatch(args: Args) -> Result<i32, Failure> {
    isa::limit().map_err(|e| {
        let hint = "unset it to use all that the processor has (`lora-flow doctor` says what)";
        Failure::Usage(Error::new(e).with_hint(hint))
    })?;
    match args.command {
        Command::Run(args) => run::run(&args),
        Command::Plan(args) => plan::plan(&args),
        Command::Status(args) => why::status(&args),
        Command::Why(args) => why::why(&args),
        Command::Check(args) => check(&args),
        Command::Lock(args) => lock::lock(&args),
        Command::Graph(args) => draw(&args),
        Command::Runs { limit, json } => runs::list(limit, json),
        Command::Show { run, json } => runs::show(&run, json),
        Command::Diff { a, b, all, json } => diff::diff(&a, &b, all, json),
        Command::Logs { run, task, follow } => runs::logs(&run, &task, follow),
        Command::Report { runs, output } => report::report(&runs, &output),
        Command::Gate { command: GateCommand::Explain { run, gate, json } } => {
            verdict::explain(&run, gate.as_deref(), json)
        }
        Command::Accept { run, file, denied } => accept::accept(&run, file.as_deref(), denied),
        Command::Export { run } => export::export(&run),
        Command::Cache { command } => cache::cache(&command),
        Command::Tasks { kind, markdown } => tasks::tasks(kind.as_deref(), markdown),
        Command::Schema => tasks::schema(),
        Command::Init(args) => scaffold::init(&args),
        Command::Plugin { command: PluginCommand::New(args) } => scaffold::plugin_new(&args),
        Command::Plugin { command: PluginCommand::Check { dir } } => plugin::check(&dir),
        Command::Generate(args) => generate::generate(&args),
        Command::Bench { command } => bench::bench(&command),
        Command::Doctor => doctor::doctor(),
    }
}

/// Compiles the pipeline; warnings go to stderr. The plan is never taken apart: a command needs it
/// until the process ends, and with thousands of tasks that would be felt in a run with nothing to do.
fn load(args: &PipelineArgs) -> Result<&'static Plan, Failure> {
    let options = CompileOptions {
        params_file: args.params_file.clone(),
        set: args.set.clone(),
        targets: args.targets.clone(),
        until: args.until.clone(),
        from: args.from.clone(),
        env: environment(),
        builtin: crate::BUILTIN,
    };
    let plan = compile(&args.pipeline, &options)?;
    if !ui::global().quiet {
        ui::render_diagnostics("warning", &plan.warnings);
    }
    Ok(Box::leak(Box::new(plan)))
}

/// The variables of this process that are text.
fn environment() -> BTreeMap<String, String> {
    let text = |(k, v): (OsString, OsString)| Some((k.into_string().ok()?, v.into_string().ok()?));
    std::env::vars_os().filter_map(text).collect()
}

/// The engine over the store of a pipeline.
fn engine(plan: &Plan) -> Result<Engine, Failure> {
    // A bad URL is to be known before anything is done.
    let remote = remote()?;
    Ok(Engine::open(&plan.root, ui::global().cache_dir.as_deref())?.with_remote(remote))
}

/// The remote cache that the options name.
fn remote() -> Result<Option<Remote>, Failure> {
    let global = ui::global();
    let Some(url) = global.remote.as_deref().filter(|url| !url.is_empty()) else {
        return Ok(None);
    };
    let bucket = Bucket::open(url, environment(), Patience::default()).map_err(Failure::Usage)?;
    Ok(Some(Remote::new(Box::new(bucket), global.remote_read_only)))
}

/// The engine over the store that this folder, or the nearest one above it, has.
fn engine_here() -> Result<Engine, Failure> {
    let cache_dir = ui::global().cache_dir.as_deref();
    let here = std::env::current_dir()?;
    let root = here.ancestors().find(|dir| dir.join(".lora-flow").is_dir()).map(Path::to_owned);
    let exists = cache_dir.is_some_and(|dir| dir.join("format").is_file())
        || (cache_dir.is_none() && root.is_some());
    if !exists {
        return Err(Failure::Usage(
            Error::new("there is no artifact store here")
                .with_hint("run a pipeline first, or name the store with `--cache-dir`"),
        ));
    }
    Ok(Engine::open(&root.unwrap_or(here), cache_dir)?.with_remote(remote()?))
}

/// What metrics are called: the usual name of the one output would only be noise.
pub fn metrics_name(task: &str, output: &str) -> String {
    match output {
        "metrics" => task.to_owned(),
        other => format!("{task}.{other}"),
    }
}

/// A file of an artifact as text; nothing if it is not there or cannot be read.
pub fn artifact_text(artifact: &Artifact, name: &str) -> Option<String> {
    std::fs::read_to_string(&artifact.files.get(name)?.path).ok()
}

/// The same as JSON.
pub fn artifact_json(artifact: &Artifact, name: &str) -> Option<Value> {
    serde_json::from_str(&artifact_text(artifact, name)?).ok()
}

/// A path as the user would write it from here.
fn display_path(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(here).map_or_else(|_| path.to_owned(), PathBuf::from).display().to_string()
}

fn check(args: &PipelineArgs) -> Result<i32, Failure> {
    let plan = load(args)?;
    println!("{} is valid: {}", args.pipeline.display(), ui::count(plan.tasks.len(), "task"));
    Ok(0)
}

fn draw(args: &GraphArgs) -> Result<i32, Failure> {
    let plan = load(&args.pipeline)?;
    let format = match args.format {
        GraphFormat::Mermaid => lora_flow_pipeline::GraphFormat::Mermaid,
        GraphFormat::Dot => lora_flow_pipeline::GraphFormat::Dot,
        GraphFormat::Svg => lora_flow_pipeline::GraphFormat::Svg,
    };
    // Colours tell what a run would do, where there is a store to ask; drawing makes none.
    let root = plan.root.join(".lora-flow");
    let store = ui::global().cache_dir.as_deref().unwrap_or(&root);
    let states = if args.format == GraphFormat::Svg && store.join("format").is_file() {
        engine(plan)?.explain(plan, &args.choice.force, args.choice.device)?
    } else {
        Vec::new()
    };
    print!("{}", lora_flow_pipeline::graph(plan, format, &states));
    Ok(0)
}

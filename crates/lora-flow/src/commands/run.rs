//! `lora-flow run`: everything up to the final table.

use std::path::Path;

use lora_flow_core::{CancelToken, DeviceSpec};
use lora_flow_pipeline::{
    Engine, Gpu, Pinned, Request, RunOptions, RunReport, Status, TaskOutcome, store_of,
};

use crate::args::{ChoiceArgs, PipelineArgs, RunArgs};
use crate::commands::{annotations, ci, verdict};
use crate::table::{duration, table};
use crate::ui::{self, Failure};
use crate::{commands, progress};

pub fn run(args: &RunArgs) -> Result<i32, Failure> {
    let request = request(args);
    if let Some(report) = settled(args, request.as_ref())? {
        print_report(&report);
        return Ok(report.exit_code());
    }
    let plan = commands::load(&args.pipeline)?;
    commands::plan::check_forced(plan, &args.choice.force)?;
    // A device that cannot be had is better known now than after the tasks before training.
    let gpus = gpus(args.gpus, args.choice.device);
    if args.choice.device != DeviceSpec::Cpu {
        for gpu in &gpus {
            let device = DeviceSpec::Cuda(gpu.ordinal);
            lora_flow_train::open_device(device).map_err(Failure::Usage)?;
        }
    }
    let engine = commands::engine(plan)?;
    let device = args.choice.device;
    let pinned = match args.locked {
        true => commands::lock::check(&engine, plan, &args.pipeline, device)?,
        false => Pinned::new(),
    };
    let occupied = engine.check_targets(plan, &args.choice.force, device)?;
    if !occupied.is_empty() {
        return Err(occupied.into());
    }
    if args.dry_run {
        return commands::plan::print(&engine, plan, &args.choice, args.json);
    }

    let cancel = CancelToken::default();
    let on_signal = cancel.clone();
    let handler = ctrlc::set_handler(move || {
        if on_signal.is_cancelled() {
            // A second signal: the user does not want to wait for a clean end.
            std::process::exit(130);
        }
        eprintln!("stopping: running tasks save their state (again to stop at once)");
        on_signal.cancel();
    });
    if let Err(e) = handler {
        tracing::warn!("signals are not handled: {e}");
    }

    let options = RunOptions {
        jobs: args.jobs,
        force: args.choice.force.clone(),
        keep_going: args.keep_going,
        device: args.choice.device,
        gpus,
        allow_network: !args.offline,
        cancel,
        pinned,
        command_line: std::env::args().collect(),
        settle: request,
    };
    let report = engine.run(plan, &options, progress::observer(args.ci))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print_report(&report);
    }
    if args.ci {
        let junit = args.junit.as_deref().unwrap_or(Path::new(ci::JUNIT));
        let verdicts = verdict::read(&engine, &report);
        ci::write(&report, &verdicts, junit)?;
        annotations::write(plan, &report, &verdicts)?;
    }
    if args.update_lock && report.exit_code() == 0 {
        commands::lock::write(&engine, plan, &args.pipeline, device)?;
    }
    Ok(report.exit_code())
}

/// The command, if a note of an earlier run may answer it: one that only prints what it did, on the
/// processor, and asks for nothing out of the ordinary.
fn request(args: &RunArgs) -> Option<Request> {
    let PipelineArgs { pipeline, set, params_file, targets, until, from } = &args.pipeline;
    let ChoiceArgs { force, device } = &args.choice;
    let plain = params_file.is_none()
        && from.is_empty()
        && force.is_empty()
        && *device == DeviceSpec::Cpu
        && !(args.dry_run || args.locked || args.update_lock || args.json || args.ci)
        && ui::global().remote.is_none();
    let cache_dir = &ui::global().cache_dir;
    let options = serde_json::json!([set, targets, until, cache_dir]).to_string();
    plain.then(|| Request::new(pipeline, &options, commands::environment()))?
}

/// The report of a run that had nothing to do, by the note of an earlier one.
fn settled(args: &RunArgs, request: Option<&Request>) -> Result<Option<RunReport>, Failure> {
    let cache_dir = ui::global().cache_dir.as_deref();
    let pipeline = &args.pipeline.pipeline;
    let store = request.and_then(|request| store_of(request, pipeline, cache_dir));
    let (Some(request), Some(store)) = (request, store) else { return Ok(None) };
    let command_line = std::env::args().collect();
    let observer = progress::observer(args.ci);
    Ok(Engine::over(store).run_settled(request, command_line, &*observer)?)
}

/// The GPUs of a run: as many as were asked for, or the one that the device names, or, for
/// plugins, those that the system shows.
fn gpus(asked: Option<usize>, device: DeviceSpec) -> Vec<Gpu> {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let name = |ordinal: usize| {
        let names = visible.as_deref().map(|v| v.split(',').map(str::trim));
        let named = names.and_then(|mut names| names.nth(ordinal)).filter(|n| !n.is_empty());
        named.map_or_else(|| ordinal.to_string(), str::to_owned)
    };
    let ordinals = match (asked, device, &visible) {
        (Some(n), ..) => 0..n,
        (None, DeviceSpec::Cuda(i), _) => i..i + 1,
        (None, DeviceSpec::Cpu, Some(v)) => {
            0..v.split(',').filter(|n| !n.trim().is_empty()).count()
        }
        (None, DeviceSpec::Cpu, None) => 0..devices(),
    };
    ordinals.map(|ordinal| Gpu { ordinal, name: name(ordinal) }).collect()
}

/// NVIDIA's devices as Linux shows them.
fn devices() -> usize {
    let number = |e: &std::fs::DirEntry| {
        let name = e.file_name();
        let digits = name.to_str().and_then(|n| n.strip_prefix("nvidia"));
        digits.is_some_and(|d| !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()))
    };
    std::fs::read_dir("/dev").into_iter().flatten().flatten().filter(number).count()
}

/// The end of a run: what the gates said, what failed and why, and the table of tasks.
pub fn print_report(report: &RunReport) {
    for task in &report.tasks {
        if matches!(task.status, Status::Denied { .. }) {
            print!("{}: the gate says no\n{}", task.id, indent(&task.report));
        }
    }
    print_tasks(report);
    for task in &report.tasks {
        let Some(error) = &task.error else { continue };
        eprintln!();
        let message = format!("task `{}` failed: {}", task.id, error.message);
        eprint!("{}", ui::error_text(&message, error.hint.as_deref()));
        eprintln!("log: {}", commands::display_path(&error.log));
    }
}

/// The table of tasks with their headlines, and one line for the whole.
pub fn print_tasks(report: &RunReport) {
    let mut rows = table(&["task", "kind", "state", "time", "result"]);
    for task in &report.tasks {
        rows.add_row([
            task.id.clone(),
            task.kind.clone(),
            state(task),
            if task.wall.is_zero() { String::new() } else { duration(task.wall) },
            result(task),
        ]);
    }
    println!("{}", rows.trim_fmt());
    let of =
        |wanted: fn(&Status) -> bool| report.tasks.iter().filter(|t| wanted(&t.status)).count();
    let mut parts = Vec::new();
    for (n, word) in [
        (of(|s| matches!(s, Status::Ran | Status::Denied { cached: false })), "ran"),
        (of(|s| matches!(s, Status::Cached | Status::Denied { cached: true })), "cached"),
        (of(|s| matches!(s, Status::Failed)), "failed"),
        (of(|s| matches!(s, Status::Denied { .. })), "denied"),
        (of(|s| matches!(s, Status::Skipped(_))), "skipped"),
        (of(|s| matches!(s, Status::Cancelled)), "cancelled"),
    ] {
        if n > 0 {
            parts.push(format!("{n} {word}"));
        }
    }
    println!("\nrun {} · {} · {}", report.run_id, parts.join(", "), duration(report.wall));
}

/// How a task ended, in a word.
pub fn state(task: &TaskOutcome) -> String {
    match &task.status {
        Status::Ran => "ran".to_owned(),
        Status::Cached if task.pulled => "cached (remote)".to_owned(),
        Status::Cached => "cached".to_owned(),
        Status::Failed => "FAILED".to_owned(),
        Status::Denied { cached: false } => "DENIED".to_owned(),
        Status::Denied { cached: true } => "DENIED (cached)".to_owned(),
        Status::Skipped(_) => "skipped".to_owned(),
        Status::Cancelled => "cancelled".to_owned(),
    }
}

/// A task's headlines; for a skipped one, why.
pub fn result(task: &TaskOutcome) -> String {
    if let Status::Skipped(why) = &task.status {
        return why.clone();
    }
    let mut parts: Vec<String> =
        task.summary.iter().map(|(name, value)| format!("{name} {value}")).collect();
    parts.extend(task.published.iter().map(|path| format!("→ {}", commands::display_path(path))));
    parts.join(" · ")
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

//! `lora-flow runs`, `show` and `logs`: what past runs left.

use lora_flow_core::{Error, nearest};
use lora_flow_pipeline::RunReport;

use crate::commands::{self, run};
use crate::table::{bytes, duration, table};
use crate::ui::Failure;

pub fn list(limit: usize, json: bool) -> Result<i32, Failure> {
    let engine = commands::engine_here()?;
    let mut runs = engine.runs()?;
    runs.truncate(limit);
    if json {
        outln!("{}", serde_json::to_string_pretty(&runs)?);
        return Ok(0);
    }
    let mut rows = table(&["run", "pipeline", "started", "time", "outcome"]);
    for run in &runs {
        let outcome = match run.exit_code() {
            0 => "done",
            3 => "denied",
            130 => "cancelled",
            _ => "failed",
        };
        rows.add_row([&run.run_id, &run.name, &run.started, &duration(run.wall), outcome]);
    }
    outln!("{}", rows.trim_fmt());
    Ok(0)
}

pub fn show(id: &str, json: bool) -> Result<i32, Failure> {
    let report = commands::engine_here()?.load_run(id)?;
    if json {
        outln!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(0);
    }
    outln!("pipeline {} · started {}\n", report.name, report.started);
    run::print_tasks(&report);
    let mut outputs = table(&["artifact", "kind", "size", "digest"]);
    for task in &report.tasks {
        for (port, output) in &task.outputs {
            outputs.add_row([
                format!("{}.{port}", task.id),
                output.kind.to_string(),
                bytes(output.size),
                output.digest.short(),
            ]);
        }
    }
    outln!("\n{}", outputs.trim_fmt());
    for task in report.tasks.iter().filter(|t| !t.report.is_empty()) {
        outln!("\n── {} ──\n{}", task.id, task.report.trim_end());
    }
    for task in &report.tasks {
        if let Some(error) = &task.error {
            outln!("\n── {} failed ──\n{}", task.id, error.message);
            if let Some(hint) = &error.hint {
                outln!("hint: {hint}");
            }
            outln!("log: {}", commands::display_path(&error.log));
        }
    }
    Ok(0)
}

pub fn logs(id: &str, task: &str) -> Result<i32, Failure> {
    let engine = commands::engine_here()?;
    let report = engine.load_run(id)?;
    known_task(&report, task)?;
    let path = engine.log_path(&report.run_id, task);
    match fs_err::read_to_string(&path) {
        Ok(text) => out!("{text}"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("task `{task}` did not execute in run {} and left no log", report.run_id);
        }
        Err(e) => return Err(e.into()),
    }
    Ok(0)
}

fn known_task(report: &RunReport, task: &str) -> Result<(), Failure> {
    let ids = || report.tasks.iter().map(|t| t.id.as_str());
    if ids().any(|id| id == task) {
        return Ok(());
    }
    let error = Error::new(format!("run {} has no task `{task}`", report.run_id));
    Err(Failure::Usage(match nearest(task, ids()) {
        Some(name) => error.with_hint(format!("did you mean `{name}`?")),
        None => error.with_hint(format!("tasks: {}", ids().collect::<Vec<_>>().join(", "))),
    }))
}

//! `lora-flow runs`, `show` and `logs`: what past runs left.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::time::Duration;

use lora_flow_core::Error;
use lora_flow_pipeline::{Engine, RunInfo, RunReport, RunState, Status};
use serde_json::Value;

use crate::commands::{self, run};
use crate::table::{bytes, duration, table};
use crate::ui::{self, Failure};

/// How often `logs --follow` looks.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

pub fn list(limit: usize, json: bool) -> Result<i32, Failure> {
    let engine = commands::engine_here()?;
    let mut runs = engine.all_runs()?;
    runs.truncate(limit);
    if json {
        let runs: Vec<Value> = runs.iter().map(to_json).collect::<Result<_, _>>()?;
        println!("{}", serde_json::to_string_pretty(&runs)?);
        return Ok(0);
    }
    let mut rows = table(&["run", "pipeline", "started", "time", "outcome"]);
    for RunInfo { state, report } in &runs {
        let outcome = match state {
            RunState::Running => format!("running, {}", so_far(report)),
            RunState::Killed => format!("killed, {}", so_far(report)),
            RunState::Ended => outcome_word(report.exit_code()).to_owned(),
        };
        let time = duration(report.wall);
        rows.add_row([&report.run_id, &report.name, &report.started, &time, &outcome]);
    }
    println!("{}", rows.trim_fmt());
    Ok(0)
}

/// The report with the run's state in it.
fn to_json(run: &RunInfo) -> Result<Value, Failure> {
    let mut report = serde_json::to_value(&run.report)?;
    report["state"] = serde_json::to_value(run.state)?;
    Ok(report)
}

/// `3 of 9 tasks done`.
fn so_far(report: &RunReport) -> String {
    let done =
        |status: &Status| matches!(status, Status::Ran | Status::Cached | Status::Denied { .. });
    let count = report.tasks.iter().filter(|t| done(&t.status)).count();
    format!("{count} of {} done", ui::count(report.tasks.len(), "task"))
}

/// How a run ended, by its exit code.
pub fn outcome_word(exit_code: i32) -> &'static str {
    match exit_code {
        0 => "done",
        3 => "denied",
        130 => "cancelled",
        _ => "failed",
    }
}

pub fn show(id: &str, json: bool) -> Result<i32, Failure> {
    let run = commands::engine_here()?.find_run(id).map_err(Failure::Usage)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&to_json(&run)?)?);
        return Ok(0);
    }
    let RunInfo { state, report } = run;
    let state = match state {
        RunState::Ended => String::new(),
        RunState::Running => format!(" · running, {}", so_far(&report)),
        RunState::Killed => format!(" · killed, {}", so_far(&report)),
    };
    println!("pipeline {} · started {}{state}\n", report.name, report.started);
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
    println!("\n{}", outputs.trim_fmt());
    for task in report.tasks.iter().filter(|t| !t.report.is_empty()) {
        println!("\n── {} ──\n{}", task.id, task.report.trim_end());
    }
    for task in &report.tasks {
        if let Some(error) = &task.error {
            println!("\n── {} failed ──\n{}", task.id, error.message);
            if let Some(hint) = &error.hint {
                println!("hint: {hint}");
            }
            println!("log: {}", commands::display_path(&error.log));
        }
    }
    Ok(0)
}

pub fn logs(id: &str, task: &str, follow: bool) -> Result<i32, Failure> {
    let engine = commands::engine_here()?;
    if follow {
        return follow_log(&engine, id, task);
    }
    let report = engine.find_run(id).map_err(Failure::Usage)?.report;
    known_task(&report, task)?;
    let path = engine.log_path(&report.run_id, task);
    match fs_err::read_to_string(&path) {
        Ok(text) => print!("{text}"),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            eprintln!("task `{task}` did not execute in run {} and left no log", report.run_id);
        }
        Err(e) => return Err(e.into()),
    }
    Ok(0)
}

/// Prints what a log has and gets, until the run is over.
fn follow_log(engine: &Engine, id: &str, task: &str) -> Result<i32, Failure> {
    let latest = if id == "latest" { engine.last_run()? } else { None };
    let id = latest.as_deref().unwrap_or(id);
    let run = engine.find_run(id).map_err(Failure::Usage)?.report.run_id;
    let path = engine.log_path(&run, task);
    let mut printed = 0;
    loop {
        // The state is looked at first: what the log gets before its end is then printed below.
        let RunInfo { state, report } = engine.find_run(&run).map_err(Failure::Usage)?;
        known_task(&report, task)?;
        let over = state != RunState::Running;
        match File::open(&path) {
            Ok(mut file) => {
                let mut new = Vec::new();
                file.seek(SeekFrom::Start(printed))?;
                file.read_to_end(&mut new)?;
                // Whole lines only, so that no character is cut; the last one when all is over.
                let whole = match over {
                    true => new.len(),
                    false => new.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1),
                };
                print!("{}", String::from_utf8_lossy(&new[..whole]));
                printed += whole as u64;
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
        if state == RunState::Killed {
            let error = Error::new(format!("run {run} was killed"));
            return Err(error.with_hint("a new run goes on from what it saved").into());
        }
        if over || crate::out::stdout_closed() {
            return Ok(0);
        }
        std::thread::sleep(FOLLOW_INTERVAL);
    }
}

fn known_task(report: &RunReport, task: &str) -> Result<(), Failure> {
    let ids = || report.tasks.iter().map(|t| t.id.as_str());
    if ids().any(|id| id == task) {
        return Ok(());
    }
    let message = format!("run {} has no task `{task}`", report.run_id);
    Err(Failure::unknown_task(message, task, ids()))
}

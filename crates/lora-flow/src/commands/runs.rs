//! `lora-flow runs`, `show` and `logs`: what past runs left.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::time::Duration;

use lora_flow_core::Error;
use lora_flow_pipeline::{Engine, RunReport};

use crate::commands::{self, run};
use crate::table::{bytes, duration, table};
use crate::ui::Failure;

/// How often `logs --follow` looks.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

pub fn list(limit: usize, json: bool) -> Result<i32, Failure> {
    let engine = commands::engine_here()?;
    let mut runs = engine.runs()?;
    runs.truncate(limit);
    if json {
        println!("{}", serde_json::to_string_pretty(&runs)?);
        return Ok(0);
    }
    let mut rows = table(&["run", "pipeline", "started", "time", "outcome"]);
    for run in &runs {
        let outcome = outcome_word(run.exit_code());
        rows.add_row([&run.run_id, &run.name, &run.started, &duration(run.wall), outcome]);
    }
    println!("{}", rows.trim_fmt());
    Ok(0)
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
    let report = commands::engine_here()?.load_run(id).map_err(Failure::Usage)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(0);
    }
    println!("pipeline {} · started {}\n", report.name, report.started);
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
    let report = engine.load_run(id).map_err(Failure::Usage)?;
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

/// Prints what a log has and gets, until the run has a record.
fn follow_log(engine: &Engine, id: &str, task: &str) -> Result<i32, Failure> {
    let ids = engine.run_ids()?;
    let of = |i: &&String| id == "latest" || i.starts_with(id);
    let run = match ids.iter().filter(of).collect::<Vec<_>>()[..] {
        [one] => one.clone(),
        [newest, ..] if id == "latest" => newest.clone(),
        // The one place that says what is wrong with an id.
        _ => engine.load_run(id).map_err(Failure::Usage)?.run_id,
    };
    let path = engine.log_path(&run, task);
    let mut printed = 0;
    loop {
        // The record is looked for first: what the log gets before it is then printed below.
        let in_use = engine.store().in_use()?;
        let ended = engine.load_run(&run).ok();
        if let Some(report) = &ended {
            known_task(report, task)?;
        }
        match File::open(&path) {
            Ok(mut file) => {
                let mut new = Vec::new();
                file.seek(SeekFrom::Start(printed))?;
                file.read_to_end(&mut new)?;
                // Whole lines only, so that no character is cut; the last one when all is over.
                let whole = match ended {
                    Some(_) => new.len(),
                    None => new.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1),
                };
                print!("{}", String::from_utf8_lossy(&new[..whole]));
                printed += whole as u64;
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
        if ended.is_some() || crate::out::stdout_closed() {
            return Ok(0);
        }
        // A run holds the store until its record is written.
        if !in_use {
            let error = Error::new(format!("run {run} was killed: it has no record"));
            return Err(error.with_hint("a new run goes on from what it saved").into());
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

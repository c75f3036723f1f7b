//! `lora-flow plan`: what would run, what is cached, and why.

use lora_flow_pipeline::{Engine, Plan, State};
use serde_json::json;

use crate::args::{ChoiceArgs, PlanArgs};
use crate::commands;
use crate::table::table;
use crate::ui::Failure;

pub fn plan(args: &PlanArgs) -> Result<i32, Failure> {
    let plan = commands::load(&args.pipeline)?;
    check_forced(plan, &args.choice.force)?;
    let engine = commands::engine(plan)?;
    print(&engine, plan, &args.choice, args.json)
}

/// `--force` must name tasks of the pipeline.
pub fn check_forced(plan: &Plan, force: &[String]) -> Result<(), Failure> {
    let ids = || plan.tasks.iter().map(|t| t.id.as_str());
    // The name of a matrix task stands for all its members.
    let named = |name: &str| ids().any(|id| id == name || id.split('[').next() == Some(name));
    let Some(unknown) = force.iter().find(|f| *f != "*" && !named(f)) else {
        return Ok(());
    };
    let message = format!("`--force` names the unknown task `{unknown}`");
    Err(Failure::unknown_task(message, unknown, ids()))
}

pub fn print(
    engine: &Engine,
    plan: &Plan,
    choice: &ChoiceArgs,
    as_json: bool,
) -> Result<i32, Failure> {
    let tasks = engine.explain(plan, &choice.force, choice.device)?;
    if as_json {
        let tasks: Vec<_> = tasks
            .iter()
            .map(|task| {
                let (state, reasons) = (task.state.word(), task.state.reasons_json());
                json!({ "task": task.id, "kind": task.kind, "state": state, "reasons": reasons })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&tasks)?);
        return Ok(0);
    }
    let mut rows = table(&["task", "kind", "state", "why"]);
    for task in &tasks {
        let why = task.state.reasons().join("; ");
        rows.add_row([&task.id, &task.kind, task.state.word(), &why]);
    }
    let cached =
        tasks.iter().filter(|t| matches!(t.state, State::Cached | State::CachedRemote)).count();
    println!("{}\n\n{cached} of {} cached", rows.trim_fmt(), tasks.len());
    Ok(0)
}

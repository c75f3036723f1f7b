//! `lora-flow why` and `status`: the plan for one task in full, and for all in one line each.

use std::collections::BTreeMap;

use lora_flow_core::Digest;
use lora_flow_pipeline::TaskKey;
use serde_json::{Value, json};

use crate::args::{PlanArgs, WhyArgs};
use crate::commands::{self, diff::flatten};
use crate::ui::Failure;

/// All reasons of one task, and what its key is made of.
pub fn why(args: &WhyArgs) -> Result<i32, Failure> {
    let plan = commands::load(&args.pipeline)?;
    commands::plan::check_forced(plan, &args.choice.force)?;
    let ids = || plan.tasks.iter().map(|t| t.id.as_str());
    let Some(index) = ids().position(|id| id == args.task) else {
        let message = format!("the pipeline has no task `{}`", args.task);
        return Err(Failure::unknown_task(message, &args.task, ids()));
    };
    let engine = commands::engine(plan)?;
    let (force, device) = (&args.choice.force, args.choice.device);
    let statuses = engine.explain(plan, force, device)?;
    let status = &statuses[index];
    let explained = engine.key_parts(plan, index, force, device)?;
    let key = &explained.key;
    // Inputs that upstream tasks have still to make.
    let given: usize = key.inputs.values().map(Vec::len).sum();
    let pending = plan.tasks[index].inputs.len() - given;
    let digest = (pending == 0).then(|| key.digest());
    let state = status.state.word();
    if args.json {
        let out = json!({
            "task": status.id, "kind": status.kind, "state": state,
            "reasons": status.state.reasons_json(),
            "key": digest, "pending_inputs": pending, "parts": explained,
        });
        println!("{}", serde_json::to_string_pretty(&out)?);
        return Ok(0);
    }
    println!("{}: {state}", status.id);
    for reason in status.state.reasons() {
        println!("  {reason}");
    }
    match digest {
        Some(digest) => println!("\nkey {}", digest.short()),
        None => println!("\nkey not known before its inputs are made; so far"),
    }
    print_parts(key, &explained.references, &explained.files);
    Ok(0)
}

fn print_parts(
    key: &TaskKey,
    references: &BTreeMap<String, Vec<String>>,
    files: &BTreeMap<String, Vec<String>>,
) {
    println!("  kind    {}, version {}", key.kind, key.version);
    let mut params = BTreeMap::new();
    flatten("with", &key.params, &mut params);
    for (name, value) in &params {
        println!("  {name}: {value}");
    }
    print_digests("input", &key.inputs, references);
    print_digests("file ", &key.files, files);
    for (name, digest) in &key.env {
        println!("  env     {name} {}", digest.short());
    }
    if key.extra != Value::Null {
        println!("  extra   {}", key.extra);
    }
    if let Some(device) = &key.device {
        println!("  device  {device}");
    }
}

fn print_digests(
    what: &str,
    digests: &BTreeMap<String, Vec<Digest>>,
    names: &BTreeMap<String, Vec<String>>,
) {
    for (place, digests) in digests {
        let names = names.get(place).into_iter().flatten();
        for (digest, name) in digests.iter().zip(names) {
            println!("  {what}   {place}: {name} {}", digest.short());
        }
    }
}

/// One line for each task.
pub fn status(args: &PlanArgs) -> Result<i32, Failure> {
    if args.json {
        return commands::plan::plan(args);
    }
    let plan = commands::load(&args.pipeline)?;
    commands::plan::check_forced(plan, &args.choice.force)?;
    let engine = commands::engine(plan)?;
    for task in engine.explain(plan, &args.choice.force, args.choice.device)? {
        let (state, reasons) = (task.state.word(), task.state.reasons());
        let more = match reasons.len() {
            0 => String::new(),
            1 => format!("  ({})", reasons[0]),
            n => format!("  ({}; {} more)", reasons[0], n - 1),
        };
        println!("{state:<8}  {}{more}", task.id);
    }
    Ok(0)
}

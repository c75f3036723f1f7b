//! `lora-flow export`: the lineage of a run as JSON. docs/lineage.md describes the format.

use std::collections::BTreeMap;

use lora_flow_core::Digest;
use lora_flow_pipeline::{Engine, TaskOutcome};
use serde_json::{Value, json};

use crate::commands;
use crate::ui::Failure;

/// Version of the format.
const FORMAT: u32 = 1;

pub fn export(run: &str) -> Result<i32, Failure> {
    let engine = commands::engine_here()?;
    let record = engine.load_record(run).map_err(Failure::Usage)?;
    let report = &record.report;
    let mut artifacts = BTreeMap::new();
    for task in &report.tasks {
        collect_artifacts(&engine, task, &mut artifacts);
    }
    let out = json!({
        "format": FORMAT,
        "run": {
            "id": report.run_id,
            "pipeline": report.name,
            "file": record.pipeline,
            "params": record.params,
            "command_line": record.command_line,
            "started": report.started,
            "seconds": report.wall.as_secs_f64(),
            "exit_code": report.exit_code(),
            "environment": record.environment,
        },
        "tasks": report.tasks.iter().map(|task| activity(&engine, task)).collect::<Vec<_>>(),
        "artifacts": artifacts,
    });
    println!("{}", serde_json::to_string_pretty(&out)?);
    Ok(0)
}

/// A task: what it used and what it made.
fn activity(engine: &Engine, task: &TaskOutcome) -> Value {
    let entry = task.key.and_then(|key| engine.store().entry(&key));
    let key = entry.as_ref().map(|e| &e.explained.key);
    let used = entry.as_ref().map(|entry| {
        let names = &entry.explained;
        json!({
            "params": names.key.params,
            "inputs": named(&names.key.inputs, &names.references, "reference"),
            "files": named(&names.key.files, &names.files, "path"),
            "env": names.key.env.keys().collect::<Vec<_>>(),
            "device": names.key.device,
            "implementation": names.key.extra,
        })
    });
    let made: BTreeMap<&String, &Digest> =
        task.outputs.iter().map(|(name, output)| (name, &output.digest)).collect();
    json!({
        "task": task.id,
        "kind": task.kind,
        "version": key.map(|k| k.version),
        "status": task.status,
        "key": task.key,
        "created": entry.as_ref().map(|e| &e.created),
        "seconds": task.wall.as_secs_f64(),
        // Null where the store has dropped the entry since, or the task never had one.
        "used": used,
        "made": made,
        "published": task.published,
        "error": task.error.as_ref().map(|e| &e.message),
        "denied": task.denied,
    })
}

fn named(
    digests: &BTreeMap<String, Vec<Digest>>,
    names: &BTreeMap<String, Vec<String>>,
    name_key: &str,
) -> Value {
    let all = digests.iter().map(|(place, digests)| {
        let mut names = names.get(place).into_iter().flatten();
        let items = digests
            .iter()
            .map(|digest| json!({ "digest": digest, name_key: names.next() }))
            .collect::<Vec<_>>();
        (place.clone(), Value::from(items))
    });
    Value::Object(all.collect())
}

fn collect_artifacts(engine: &Engine, task: &TaskOutcome, out: &mut BTreeMap<String, Value>) {
    let entry = task.key.and_then(|key| engine.store().entry(&key));
    for (name, output) in &task.outputs {
        let manifest = entry.as_ref().and_then(|e| e.outputs.get(name)).map(|a| &a.manifest);
        let artifact = out.entry(output.digest.to_string()).or_insert_with(|| {
            json!({
                "kind": output.kind,
                "size": output.size,
                "files": manifest.map(|m| &m.files),
                "meta": manifest.map(|m| &m.meta),
                "made_by": [],
            })
        });
        // Two tasks may make the same bytes.
        if let Some(makers) = artifact["made_by"].as_array_mut() {
            makers.push(json!({ "task": task.id, "output": name }));
        }
    }
}

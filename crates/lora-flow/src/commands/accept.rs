//! `lora-flow accept`: a run's results into a file that git keeps, for the next run to be held
//! against.

use std::path::{Path, PathBuf};

use lora_flow_core::{ArtifactKind, Error};
use lora_flow_evaluate::{accepted_entry, accepted_file, accepted_name};
use lora_flow_pipeline::{Status, TaskOutcome};
use serde_json::{Map, Value, json};

use crate::commands::{self, verdict};
use crate::ui::{self, Failure};

pub fn accept(run: &str, file: Option<&Path>, denied: bool) -> Result<i32, Failure> {
    let engine = commands::engine_here()?;
    let record = engine.load_record(run).map_err(Failure::Usage)?;
    let report = &record.report;
    let said_no: Vec<&TaskOutcome> =
        report.tasks.iter().filter(|t| matches!(t.status, Status::Denied { .. })).collect();
    if let (Some(gate), false) = (said_no.first(), denied) {
        let message = format!("the gate `{}` of run {} says no", gate.id, report.run_id);
        return Err(Failure::Usage(
            Error::new(message).with_hint("`--denied` accepts it nevertheless"),
        ));
    }
    let mut entries = Map::new();
    for task in &report.tasks {
        let Some(entry) = task.key.and_then(|key| engine.store().entry(&key)) else { continue };
        for (output, stored) in &entry.outputs {
            if stored.manifest.kind != ArtifactKind::Metrics {
                continue;
            }
            let reference = format!("{}.{output}", task.id);
            let name = accepted_name(&reference);
            let artifact = engine.store().artifact(stored);
            entries.insert(name.to_owned(), accepted_entry(name, &artifact)?);
        }
    }
    if entries.is_empty() {
        return Err(Failure::Usage(Error::new(format!(
            "run {} has no metrics that the store still holds",
            report.run_id
        ))));
    }
    let gates: Map<String, Value> = verdict::read(&engine, report)
        .iter()
        .map(|v| (v.task.id.clone(), v.json["outcome"].clone()))
        .collect();
    let facts = json!({
        "pipeline": report.name,
        "run": report.run_id,
        "lora_flow": record.environment.version,
        "params": record.params,
        "gates": gates,
    });
    let path = match file {
        Some(path) => path.to_owned(),
        None => PathBuf::from("baselines").join(format!("{}.json", report.name)),
    };
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs_err::create_dir_all(parent)?;
    }
    let text = accepted_file(&facts, &entries);
    fs_err::write(&path, &text)?;
    println!(
        "accepted run {}: {} of {} in {} ({:.1} KB)",
        report.run_id,
        ui::count(entries.len(), "result"),
        report.name,
        path.display(),
        text.len() as f64 / 1e3
    );
    Ok(0)
}

//! Running a task kind outside a pipeline, for unit tests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lora_flow_core::{
    Artifact, ArtifactKind, CancelToken, DeviceSpec, Event, LogLevel, NamedArtifact, OutputDir,
    Reporter, Result, TaskContext, TaskContextParts,
};
use lora_flow_data::{Table, cell, dataset_files};
use serde_json::Value;

/// What a task left.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) outputs: BTreeMap<String, PathBuf>,
    pub(crate) report: String,
    pub(crate) summary: Vec<(String, String)>,
    pub(crate) warnings: Vec<String>,
    _dir: tempfile::TempDir,
}

#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl Reporter for Warnings {
    fn event(&self, event: Event) {
        if let Event::Log { level: LogLevel::Warn, message } = event {
            self.0.lock().unwrap().push(message);
        }
    }
}

/// Runs a task; files of `with` are plain paths relative to `root`, inputs are (port, reference,
/// artifact).
pub(crate) fn run(
    kind: &str,
    with: Value,
    root: &Path,
    inputs: Vec<(&str, &str, Artifact)>,
) -> Result<Ran> {
    let kind = crate::TASKS.iter().find(|k| k.name == kind).unwrap();
    let task = (kind.parse)((kind.canonical)(with)?)?;
    assert!(task.validate().is_empty(), "{:?}", task.validate());
    let dir = tempfile::tempdir().unwrap();
    let mut outputs = BTreeMap::new();
    for port in task.outputs().ports {
        let path = dir.path().join(&port.name);
        std::fs::create_dir(&path).unwrap();
        let (kind, meta) = (port.kinds[0], Value::Null);
        let output =
            OutputDir { port: port.name.clone(), kind, path, adopted: BTreeMap::new(), meta };
        outputs.insert(port.name, output);
    }
    let mut named: BTreeMap<String, Vec<NamedArtifact>> = BTreeMap::new();
    for (port, reference, artifact) in inputs {
        let reference = reference.to_owned();
        named.entry(port.to_owned()).or_default().push(NamedArtifact { reference, artifact });
    }
    let files = task.files().into_iter().map(|f| (f.pointer, vec![root.join(f.pattern)])).collect();
    let warnings = Arc::new(Warnings::default());
    let mut cx = TaskContext::new(TaskContextParts {
        inputs: named,
        outputs,
        files,
        scratch: dir.path().join("scratch"),
        state_dir: dir.path().join("state"),
        device: DeviceSpec::Cpu,
        threads: 2,
        allow_network: false,
        cancel: CancelToken::default(),
        reporter: warnings.clone(),
    });
    task.run(&mut cx)?;
    let (outputs, report, summary, _) = cx.finish();
    let outputs = outputs.into_iter().map(|(name, output)| (name, output.path)).collect();
    let warnings = std::mem::take(&mut *warnings.0.lock().unwrap());
    Ok(Ran { outputs, report, summary, warnings, _dir: dir })
}

/// Column names and rows of a Dataset folder.
pub(crate) fn texts(folder: &Path) -> (Vec<String>, Vec<Vec<String>>) {
    let artifact = Artifact::from_dir(ArtifactKind::Dataset, folder).unwrap();
    let table = Table::open(dataset_files(&artifact, "out").unwrap(), &[]).unwrap();
    let columns: Vec<String> = table.columns().iter().map(|c| (*c).to_owned()).collect();
    let mut rows = Vec::new();
    for batch in table.scan(&columns).unwrap() {
        let batch = batch.unwrap().rows;
        for row in 0..batch.num_rows() {
            rows.push(batch.columns().iter().map(|c| cell(c.as_ref(), row).to_string()).collect());
        }
    }
    (columns, rows)
}

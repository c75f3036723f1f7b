//! A pipeline of closures, and a folder to run it in.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lora_flow_core::{ArtifactKind, DeviceSpec, Event, Ports, Result, Task, TaskContext};
use serde_json::{Value, json};

use crate::plan::{InputEdge, Plan, PlannedTask, ResolvedFiles, Resources};
use crate::run::{Engine, Observer, RunOptions, RunReport, State, TaskOutcome};
use crate::source::{SourceFile, Sources, Span};

/// What a task does.
pub(crate) type Body = Arc<dyn Fn(&mut TaskContext) -> Result<()> + Send + Sync>;

/// A task that is a closure.
struct Closure {
    outputs: Ports,
    body: Body,
}

impl fmt::Debug for Closure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Closure")
    }
}

impl Task for Closure {
    fn inputs(&self) -> Ports {
        Ports::none()
    }
    fn outputs(&self) -> Ports {
        self.outputs.clone()
    }
    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        (self.body)(cx)
    }
}

/// A pipeline under construction, and its folder.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
    /// Another folder to run in.
    pub(crate) root: Option<PathBuf>,
    pub(crate) tasks: Vec<PlannedTask>,
    executed: Arc<Mutex<Vec<String>>>,
    pub(crate) options: RunOptions,
    pub(crate) name: String,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            root: None,
            tasks: Vec::new(),
            executed: Arc::default(),
            options: RunOptions { jobs: 1, ..RunOptions::default() },
            name: "bench".to_owned(),
        }
    }

    /// Adds a task with one output `out` of files, taking `inputs` (`task` or `port=task`). Its
    /// output is its parameters and the texts of its inputs.
    pub(crate) fn add(&mut self, id: &str, params: Value, inputs: &[&str]) -> &mut PlannedTask {
        let outputs = Ports::none().required("out", ArtifactKind::Files, "");
        let body = joining(&params);
        self.add_task(id, params, inputs, outputs, body)
    }

    /// Gives a task of [`Bench::add`] other parameters.
    pub(crate) fn set_params(&mut self, id: &str, params: Value) {
        let outputs = self.task(id).outputs.clone();
        let task = self.closure(id, outputs, joining(&params));
        let planned = self.task(id);
        planned.params = params;
        planned.task = task;
    }

    /// Adds a task that does something else.
    pub(crate) fn add_with(
        &mut self,
        id: &str,
        params: Value,
        inputs: &[&str],
        body: impl Fn(&mut TaskContext) -> Result<()> + Send + Sync + 'static,
    ) -> &mut PlannedTask {
        let outputs = Ports::none().required("out", ArtifactKind::Files, "");
        self.add_task(id, params, inputs, outputs, Arc::new(body))
    }

    pub(crate) fn add_task(
        &mut self,
        id: &str,
        params: Value,
        inputs: &[&str],
        outputs: Ports,
        body: Body,
    ) -> &mut PlannedTask {
        let task = self.closure(id, outputs, body);
        self.add_any(id, params, inputs, task)
    }

    /// A task that notes each execution.
    fn closure(&self, id: &str, outputs: Ports, body: Body) -> Arc<dyn Task> {
        let (executed, name) = (self.executed.clone(), id.to_owned());
        let body: Body = Arc::new(move |cx| {
            executed.lock().unwrap().push(name.clone());
            body(cx)
        });
        Arc::new(Closure { outputs, body })
    }

    pub(crate) fn add_any(
        &mut self,
        id: &str,
        params: Value,
        inputs: &[&str],
        task: Arc<dyn Task>,
    ) -> &mut PlannedTask {
        let edges = inputs.iter().map(|text| {
            let (port, reference) = text.split_once('=').unwrap_or((text, text));
            let (producer, output) = reference.split_once('.').unwrap_or((reference, "out"));
            let index = self.tasks.iter().position(|t| t.id == producer).unwrap();
            let (port, reference) = (port.to_owned(), reference.to_owned());
            InputEdge { port, reference, task: index, output: output.to_owned() }
        });
        let planned = PlannedTask {
            id: id.to_owned(),
            kind: "closure".to_owned(),
            kind_version: 1,
            params,
            inputs: edges.collect(),
            needs: Vec::new(),
            input_ports: task.inputs(),
            outputs: task.outputs(),
            task,
            files: Vec::new(),
            publish: Vec::new(),
            publish_spans: Vec::new(),
            network: false,
            env: BTreeMap::new(),
            resources: Resources::default(),
            timeout: None,
            retries: 0,
            forced: false,
            span: Span::new(0, 0),
            param_spans: BTreeMap::new(),
        };
        self.tasks.push(planned);
        self.tasks.last_mut().unwrap()
    }

    /// Makes the last task read outside files.
    pub(crate) fn reads(&mut self, names: &[&str]) {
        let paths = names.iter().map(|n| self.path(n)).collect();
        let files = ResolvedFiles { pointer: "/files".into(), pattern: "*".into(), paths };
        self.tasks.last_mut().unwrap().files.push(files);
    }

    pub(crate) fn task(&mut self, id: &str) -> &mut PlannedTask {
        self.tasks.iter_mut().find(|t| t.id == id).unwrap()
    }

    pub(crate) fn needs(&mut self, id: &str, needed: &str) {
        let index = self.tasks.iter().position(|t| t.id == needed).unwrap();
        self.task(id).needs.push(index);
    }

    fn root(&self) -> &Path {
        self.root.as_deref().unwrap_or_else(|| self.dir.path())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    pub(crate) fn store_dir(&self) -> PathBuf {
        self.path(".lora-flow")
    }

    pub(crate) fn plan(&self) -> Plan {
        let source = SourceFile::new(self.path("p.yaml"), "name: bench\n");
        Plan {
            name: self.name.clone(),
            description: String::new(),
            plugins: Vec::new(),
            env: Vec::new(),
            sources: Sources::new(&source),
            source,
            root: self.root().to_owned(),
            params: json!({}),
            tasks: self.tasks.clone(),
            warnings: Vec::new(),
        }
    }

    pub(crate) fn engine(&self) -> Engine {
        let engine = Engine::open(self.root(), None).unwrap();
        engine.with_retry_delay(Duration::from_millis(5))
    }

    pub(crate) fn run(&self) -> RunReport {
        self.run_watched(Arc::new(Quiet))
    }

    pub(crate) fn run_watched(&self, observer: Arc<dyn Observer>) -> RunReport {
        self.engine().run(&self.plan(), &self.options, observer).unwrap()
    }

    /// Runs, and says which tasks executed, in order.
    pub(crate) fn executes(&self) -> Vec<String> {
        self.taken();
        let report = self.run();
        let failed: Vec<_> = report.tasks.iter().filter_map(|t| t.error.as_ref()).collect();
        assert!(failed.is_empty(), "{failed:?}");
        self.taken()
    }

    /// The tasks that executed since the last call.
    pub(crate) fn taken(&self) -> Vec<String> {
        std::mem::take(&mut self.executed.lock().unwrap())
    }

    /// What `plan` says: a line for each task.
    pub(crate) fn explained(&self) -> Vec<String> {
        let force = &self.options.force;
        let statuses = self.engine().explain(&self.plan(), force, DeviceSpec::Cpu).unwrap();
        let line = |s: crate::run::TaskStatus| match s.state {
            State::Cached => format!("{}: cached", s.id),
            State::CachedRemote => format!("{}: cached (remote)", s.id),
            State::Stale(reasons) => {
                let reasons: Vec<_> = reasons.iter().map(ToString::to_string).collect();
                format!("{}: runs: {}", s.id, reasons.join("; "))
            }
            State::Open(_) => format!("{}: may run: {}", s.id, s.state.reasons().join("; ")),
            State::Blocked(why) => format!("{}: blocked: {why}", s.id),
        };
        statuses.into_iter().map(line).collect()
    }
}

/// A body that writes its parameters and the texts of all inputs.
fn joining(params: &Value) -> Body {
    let params = params.to_string();
    Arc::new(move |cx| {
        let mut all = params.clone();
        for named in cx.inputs().values().flatten() {
            all += &std::fs::read_to_string(named.artifact.file("text")?)?;
        }
        cx.output("out")?.write("text", all)
    })
}

/// Text of a file in the output of a task.
pub(crate) fn text(bench: &Bench, report: &RunReport, id: &str) -> String {
    let engine = bench.engine();
    let key = out(report, id).key.unwrap();
    let entry = engine.store().peek(&key).unwrap();
    let artifact = engine.store().artifact(&entry.outputs["out"]);
    std::fs::read_to_string(artifact.file("text").unwrap()).unwrap()
}

/// The outcome of a task.
pub(crate) fn out<'a>(report: &'a RunReport, id: &str) -> &'a TaskOutcome {
    report.tasks.iter().find(|t| t.id == id).unwrap()
}

/// Watches nothing.
pub(crate) struct Quiet;

impl Observer for Quiet {
    fn task_started(&self, _: &str) {}
    fn task_event(&self, _: &str, _: &Event) {}
    fn task_finished(&self, _: &str, _: &TaskOutcome) {}
}

/// All files below a folder.
pub(crate) fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else {
            files.push(path);
        }
    }
    files.sort();
    files
}

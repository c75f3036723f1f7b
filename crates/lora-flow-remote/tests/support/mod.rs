//! Machines that share a remote, and an S3 server to share it through.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use lora_flow_core::{
    ArtifactKind, CancelToken, DeviceSpec, Event, Ports, Result, Task, TaskContext, TaskKind, kind,
};
use lora_flow_pipeline::{
    CompileOptions, Engine, Objects, Observer, Plan, Remote, RemoteError, RunOptions, RunReport,
    State, TaskOutcome, compile,
};
use lora_flow_remote::{Bucket, Patience};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Writes its text many times, and the texts of its inputs behind it.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Text {
    text: String,
    #[serde(default)]
    times: usize,
}

impl Task for Text {
    fn inputs(&self) -> Ports {
        Ports::none().optional("more", ArtifactKind::Files, "")
    }
    fn outputs(&self) -> Ports {
        Ports::none().required("out", ArtifactKind::Files, "")
    }
    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let mut all = self.text.repeat(self.times.max(1));
        for input in cx.inputs().values().flatten() {
            all += &std::fs::read_to_string(input.artifact.file("text")?)?;
        }
        let out = cx.output("out")?;
        out.write("common", "the same for all")?;
        out.write("text", all)
    }
}

static KINDS: &[&[TaskKind]] = &[&[kind::<Text>("text", 1, "writes a text")]];

pub const PIPELINE: &str = "
version: 1
name: texts
tasks:
  a: { uses: text, with: { text: one } }
  b: { uses: text, inputs: { more: a }, with: { text: two } }
";

/// A folder with a pipeline and a store of its own.
pub struct Machine {
    dir: tempfile::TempDir,
    pub options: RunOptions,
}

impl Machine {
    pub fn new(pipeline: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("p.yaml"), pipeline).unwrap();
        Self { dir, options: RunOptions { jobs: 1, ..RunOptions::default() } }
    }

    pub fn plan(&self) -> Plan {
        let options = CompileOptions { builtin: KINDS, ..CompileOptions::default() };
        compile(&self.dir.path().join("p.yaml"), &options).unwrap()
    }

    pub fn engine(&self, remote: Option<Remote>) -> Engine {
        Engine::open(self.dir.path(), None).unwrap().with_remote(remote)
    }

    /// Runs, and says how each task ended: `ran`, `cached`, `pulled`.
    pub fn run(&self, remote: Option<Remote>) -> Vec<String> {
        words(&self.report(remote))
    }

    pub fn report(&self, remote: Option<Remote>) -> RunReport {
        self.engine(remote).run(&self.plan(), &self.options, Arc::new(Quiet)).unwrap()
    }

    pub fn states(&self, remote: Option<Remote>) -> Vec<State> {
        let engine = self.engine(remote);
        let statuses = engine.explain(&self.plan(), &[], DeviceSpec::Cpu).unwrap();
        statuses.into_iter().map(|s| s.state).collect()
    }

    /// The text that a task made.
    pub fn text(&self, task: &str) -> String {
        let engine = self.engine(None);
        let report = engine.load_run("latest").unwrap();
        let key = report.tasks.iter().find(|t| t.id == task).unwrap().key.unwrap();
        let entry = engine.store().entry(&key).unwrap();
        let artifact = engine.store().artifact(&entry.outputs["out"]);
        std::fs::read_to_string(artifact.file("text").unwrap()).unwrap()
    }

    pub fn is_sound(&self) -> bool {
        self.engine(None).store().verify().unwrap().problems.is_empty()
    }
}

pub fn words(report: &RunReport) -> Vec<String> {
    let word = |t: &TaskOutcome| match (format!("{:?}", t.status).to_lowercase(), t.pulled) {
        (status, true) if status == "cached" => "pulled".to_owned(),
        (status, _) => status,
    };
    report.tasks.iter().map(word).collect()
}

struct Quiet;

impl Observer for Quiet {
    fn task_started(&self, _: &str) {}
    fn task_event(&self, _: &str, _: &Event) {}
    fn task_finished(&self, _: &str, _: &TaskOutcome) {}
}

/// A real S3 server on loopback, in this process, over a folder. It goes on until the process ends.
pub struct Server {
    root: tempfile::TempDir,
    pub endpoint: String,
}

pub const KEY: &str = "testkey";
pub const SECRET: &str = "testsecret";

impl Server {
    pub fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("bucket")).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root.path()).unwrap());
        builder.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let service = builder.build();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                loop {
                    let (socket, _) = listener.accept().await.unwrap();
                    let service = service.clone();
                    tokio::spawn(async move {
                        let http =
                            hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                        let _ = http.serve_connection(TokioIo::new(socket), service).await;
                    });
                }
            });
        });
        Self { root, endpoint }
    }
}

/// Where results are shared.
pub enum Shared {
    S3(Server),
    Folder(tempfile::TempDir),
}

impl Shared {
    pub fn both() -> [Self; 2] {
        [Self::S3(Server::start()), Self::Folder(tempfile::tempdir().unwrap())]
    }

    pub fn bucket(&self) -> Bucket {
        match self {
            Self::S3(server) => s3(&server.endpoint, SECRET, Patience::default()),
            Self::Folder(dir) => {
                let url = format!("file://{}", dir.path().join("cache").display());
                Bucket::open(&url, [], Patience::default()).unwrap()
            }
        }
    }

    pub fn remote(&self) -> Option<Remote> {
        Some(Remote::new(Box::new(self.bucket()), false))
    }

    /// Objects below `v1/objects` or `v1/entries`, as the files they are in.
    pub fn files(&self, what: &str) -> Vec<PathBuf> {
        let root = match self {
            Self::S3(server) => server.root.path().join("bucket/some/prefix"),
            Self::Folder(dir) => dir.path().join("cache"),
        };
        let mut files = Vec::new();
        below(&root.join("v1").join(what), &mut files);
        files.sort();
        files
    }
}

fn below(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => below(&path, files),
            path => files.push(path),
        }
    }
}

pub fn s3(endpoint: &str, secret: &str, patience: Patience) -> Bucket {
    let variables = [
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", KEY),
        ("AWS_SECRET_ACCESS_KEY", secret),
        ("AWS_REGION", "eu-central-1"),
    ];
    let variables = variables.map(|(k, v)| (k.to_owned(), v.to_owned()));
    Bucket::open("s3://bucket/some/prefix", variables, patience).unwrap()
}

pub fn impatient() -> Patience {
    let short = Duration::from_millis(400);
    Patience { connect: short, answer: short, silence: short }
}

/// What is asked of a remote.
#[derive(Debug, Default)]
pub struct Counts {
    pub reads: AtomicUsize,
    pub uploads: AtomicUsize,
}

impl Counts {
    pub fn take(&self) -> (usize, usize) {
        (self.reads.swap(0, Ordering::SeqCst), self.uploads.swap(0, Ordering::SeqCst))
    }
}

/// Counts what is asked, and fails after a number of files was sent.
#[derive(Debug)]
pub struct Watched {
    pub inner: Bucket,
    pub counts: Arc<Counts>,
    pub uploads_left: AtomicI64,
}

impl Watched {
    pub fn remote(inner: Bucket, counts: &Arc<Counts>, uploads_left: i64) -> Option<Remote> {
        let (counts, uploads_left) = (counts.clone(), AtomicI64::new(uploads_left));
        Some(Remote::new(Box::new(Self { inner, counts, uploads_left }), false))
    }
}

impl Objects for Watched {
    fn url(&self) -> &str {
        self.inner.url()
    }
    fn get(&self, name: &str, limit: u64, c: &CancelToken) -> Result<Option<Vec<u8>>, RemoteError> {
        self.counts.reads.fetch_add(1, Ordering::SeqCst);
        self.inner.get(name, limit, c)
    }
    fn size(&self, name: &str, c: &CancelToken) -> Result<Option<u64>, RemoteError> {
        self.inner.size(name, c)
    }
    fn download(
        &self,
        name: &str,
        to: &Path,
        limit: u64,
        c: &CancelToken,
    ) -> Result<Option<u64>, RemoteError> {
        self.counts.reads.fetch_add(1, Ordering::SeqCst);
        self.inner.download(name, to, limit, c)
    }
    fn put(&self, name: &str, bytes: Vec<u8>, c: &CancelToken) -> Result<(), RemoteError> {
        self.inner.put(name, bytes, c)
    }
    fn upload(&self, name: &str, from: &Path, c: &CancelToken) -> Result<(), RemoteError> {
        if self.uploads_left.fetch_sub(1, Ordering::SeqCst) <= 0 {
            return Err(RemoteError::Away(lora_flow_core::Error::new("the line went dead")));
        }
        self.counts.uploads.fetch_add(1, Ordering::SeqCst);
        self.inner.upload(name, from, c)
    }
}

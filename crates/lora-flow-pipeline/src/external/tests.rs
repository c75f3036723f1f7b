use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use lora_flow_core::CancelToken;
use serde_json::json;

use super::*;
use crate::run::tests::{Bench, files_below, out, text};
use crate::run::{ErrorRecord, RunReport, Status};

/// A bench with one plugin, whose program is a shell script.
pub(super) struct Plugin {
    pub(super) bench: Bench,
    head: String,
}

impl Plugin {
    pub(super) fn new(script: &str) -> Self {
        Self::with("command: [sh, main.sh]\n", script)
    }

    pub(super) fn with(head: &str, script: &str) -> Self {
        let plugin = Self { bench: Bench::new(), head: head.to_owned() };
        fs::create_dir(plugin.bench.path("plugin")).unwrap();
        plugin.script(script);
        plugin
    }

    fn script(&self, script: &str) {
        fs::write(self.bench.path("plugin/main.sh"), script).unwrap();
    }

    fn manifest(&self) -> Arc<PluginManifest> {
        let text = format!(
            "protocol: 1\nname: p\nversion: 0.1.0\n{}tasks:\n  work:\n    inputs: {{ in: {{ kind: Files, \
             required: false, many: true }} }}\n    outputs: {{ out: Files }}\n    params: {{ type: object, \
             additionalProperties: true }}\n",
            self.head
        );
        fs::write(self.bench.path("plugin/plugin.yaml"), text).unwrap();
        Arc::new(PluginManifest::load(&self.bench.path("plugin")).unwrap())
    }

    /// Adds the plugin's task anew, as a new process would.
    pub(super) fn load(&mut self, inputs: &[&str]) {
        self.bench.tasks.retain(|t| t.id != "work");
        let params = json!({ "n": 7 });
        let task = ExternalTask::new(self.manifest(), 0, params.clone());
        self.bench.add_any("work", params, inputs, Arc::new(task));
    }

    pub(super) fn run(&mut self) -> RunReport {
        if !self.bench.tasks.iter().any(|t| t.id == "work") {
            self.load(&[]);
        }
        self.bench.run()
    }

    pub(super) fn error(&mut self) -> ErrorRecord {
        let report = self.run();
        let error = out(&report, "work").error.clone();
        error.unwrap_or_else(|| panic!("it must fail: {report:?}"))
    }

    fn log(&self, report: &RunReport) -> String {
        let path = self.bench.engine().log_path(&report.run_id, "work");
        fs::read_to_string(path).unwrap_or_default()
    }
}

/// Shell that finds the output folder in the request.
pub(super) const OUT: &str = r#"request=$(cat); out=$(printf '%s' "$request" | sed 's/.*"out":{"kind":"Files","path":"\([^"]*\)".*/\1/')
"#;
/// Shell that finds the folder for what outlives a try.
pub(super) const STATE: &str = r#"state=$(sed 's/.*"state":"\([^"]*\)".*/\1/')
"#;
pub(super) const DONE: &str = "echo '{\"event\":\"done\"}'\n";

/// The file of a name somewhere below a folder.
fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    files_below(dir).into_iter().find(|p| p.file_name().is_some_and(|n| n == name))
}

#[test]
fn a_good_plugin_reads_its_inputs_and_tells_what_it_does() {
    let mut plugin = Plugin::new(&format!(
        r#"{OUT}
echo '{{"event":"progress","done":1,"total":2,"unit":"file"}}'
echo '{{"event":"log","level":"warn","message":"beware"}}'
echo '{{"event":"metric","name":"x","step":1,"value":0.5}}'
echo '{{"event":"summary","name":"files","value":2}}'
echo '{{"event":"report","text":"a table"}}'
echo '{{"event":"meta","output":"out","value":{{"rows":3}}}}'
echo "to the log" >&2
in=$(printf '%s' "$request" | sed 's/.*"path":"\([^"]*inputs\/in\.1\)".*/\1/')
cat "$in/text" > "$out/text"
printf '%s' "$request" > "$out/request.json"
pwd > "$out/pwd"
env > "$out/env"
{DONE}"#
    ));
    plugin.bench.add("a", json!({ "n": 1 }), &[]);
    plugin.bench.add("b", json!({ "n": 2 }), &[]);
    plugin.load(&["in=a", "in=b"]);
    let report = plugin.run();
    let work = out(&report, "work");
    assert_eq!(work.status, Status::Ran, "{:?}", work.error);
    assert_eq!(text(&plugin.bench, &report, "work"), r#"{"n":2}"#);
    assert_eq!(work.report, "a table\n");
    assert_eq!(work.summary, [("files".to_owned(), "2".to_owned())]);
    let log = plugin.log(&report);
    assert!(log.contains("WARN  beware") && log.contains("DEBUG to the log"), "{log}");

    let engine = plugin.bench.engine();
    let entry = engine.store().peek(&work.key.unwrap()).unwrap();
    assert_eq!(entry.outputs["out"].manifest.meta, json!({ "rows": 3 }));
    let artifact = engine.store().artifact(&entry.outputs["out"]);
    let read = |name: &str| fs::read_to_string(artifact.file(name).unwrap()).unwrap();
    let request: Value = serde_json::from_str(&read("request.json")).unwrap();
    assert_eq!(request["protocol"], 1);
    assert_eq!(request["task"], "work");
    assert_eq!(request["params"], json!({ "n": 7 }));
    assert_eq!(request["network"], false);
    assert_eq!(request["inputs"]["in"][0]["reference"], "a");
    assert_eq!(request["inputs"]["in"][1]["kind"], "Files");
    let scratch = request["scratch"].as_str().unwrap();
    assert!(read("pwd").trim().ends_with("/scratch"), "{}", read("pwd"));
    assert!(!Path::new(scratch).exists(), "gone with the task");
    let names: Vec<String> =
        read("env").lines().filter_map(|l| Some(l.split_once('=')?.0.to_owned())).collect();
    assert!(
        names.contains(&"PATH".to_owned()) && names.contains(&"TMPDIR".to_owned()),
        "{names:?}"
    );
    assert!(!names.iter().any(|n| n.starts_with("CARGO")), "{names:?}");

    let report = plugin.run();
    assert!(report.tasks.iter().all(|t| t.status == Status::Cached));
}

#[test]
fn a_changed_plugin_runs_again() {
    let mut plugin = Plugin::new(&format!("{OUT}echo 1 > $out/text\n{DONE}"));
    plugin.run();
    fs::create_dir_all(plugin.bench.path("plugin/target")).unwrap();
    fs::create_dir_all(plugin.bench.path("plugin/__pycache__")).unwrap();
    for uncounted in ["target/x", "__pycache__/y", ".git"] {
        fs::write(plugin.bench.path("plugin").join(uncounted), "x").unwrap();
    }
    plugin.load(&[]);
    assert_eq!(plugin.bench.explained(), ["work: cached"]);
    plugin.script(&format!("{OUT}echo 2 > $out/text\n{DONE}"));
    plugin.load(&[]);
    assert_eq!(plugin.bench.explained(), ["work: runs: plugin `p` changed"]);
    let report = plugin.run();
    assert_eq!(text(&plugin.bench, &report, "work"), "2\n");
}

#[test]
fn malformed_lines_are_quoted() {
    let cases = [
        ("echo 'loading model'", "it is not JSON: `loading model`"),
        (
            "echo '{\"event\":\"finished\"}'",
            "there is no event `finished`: `{\"event\":\"finished\"}`",
        ),
        (
            "echo '{\"event\":\"done\"}'; echo '{\"event\":\"done\"}'",
            "it had already said how the task ended",
        ),
        ("echo '{\"event\":\"meta\",\"output\":\"x\",\"value\":1}'", "it has no output `x`"),
        ("head -c 300 /dev/zero | tr '\\0' x; echo", "xxx…`"),
    ];
    for (script, wanted) in cases {
        let error = Plugin::new(&format!("cat >/dev/null\n{script}\nsleep 60\n")).error();
        assert!(
            error.message.starts_with("plugin `p` wrote a line that is no event: "),
            "{}",
            error.message
        );
        assert!(error.message.contains(wanted), "{}", error.message);
        assert!(error.hint.unwrap().contains("standard error"));
    }
    let error = Plugin::new("head -c 3000000 /dev/zero | tr '\\0' x; echo\n").error();
    assert_eq!(error.message, "plugin `p` wrote a line of more than 1048576 bytes");
}

#[test]
fn a_flood_is_held_back() {
    // A gigabyte without a line's end, and a line that never ends.
    for flood in ["head -c 1000000000 /dev/zero", "cat /dev/zero"] {
        let mut plugin = Plugin::new(&format!("{flood}\n{DONE}"));
        plugin.load(&[]);
        plugin.bench.task("work").timeout = Some(Duration::from_secs(60));
        let error = plugin.error();
        assert_eq!(error.message, "plugin `p` wrote a line of more than 1048576 bytes", "{flood}");
    }
    // Standard error without an end of line is cut, and does not fail the task.
    let script = format!("{OUT}head -c 50000000 /dev/zero >&2; echo x > $out/text\n{DONE}");
    let mut plugin = Plugin::new(&script);
    let report = plugin.run();
    assert_eq!(out(&report, "work").status, Status::Ran);
    assert!(plugin.log(&report).len() < 1 << 20);
    // Text that would be kept with the entry.
    let script =
        "yes '{\"event\":\"report\",\"text\":\"and on and on and on\"}' | head -n 100000\n";
    let error = Plugin::new(&format!("{OUT}echo x > $out/text\n{script}{DONE}")).error();
    assert_eq!(error.message, "plugin `p` reports more than 1048576 bytes of text");
}

/// Counts what it is told.
#[derive(Default)]
struct Counter(std::sync::atomic::AtomicUsize);

impl crate::run::Observer for Counter {
    fn task_started(&self, _: &str) {}
    fn task_event(&self, _: &str, _: &lora_flow_core::Event) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn task_finished(&self, _: &str, _: &crate::run::TaskOutcome) {}
}

#[test]
fn millions_of_events_reach_nobody() {
    let event = r#"{"event":"progress","done":1,"total":1}"#;
    let mut plugin =
        Plugin::new(&format!("{OUT}echo x > $out/text\nyes '{event}' | head -n 2000000\n{DONE}"));
    plugin.load(&[]);
    let counter = Arc::new(Counter::default());
    let start = Instant::now();
    let report = plugin.bench.run_watched(counter.clone());
    assert_eq!(out(&report, "work").status, Status::Ran, "{:?}", out(&report, "work").error);
    let most = start.elapsed().as_millis() / 20 + 10;
    let told = counter.0.load(Ordering::Relaxed);
    assert!((1..=most as usize).contains(&told), "{told}");

    // While it floods, it can be stopped.
    let mut plugin = Plugin::new(&format!("yes '{event}'\n"));
    plugin.load(&[]);
    plugin.bench.task("work").timeout = Some(Duration::from_millis(500));
    let start = Instant::now();
    let error = plugin.error();
    assert!(error.message.starts_with("out of time"), "{}", error.message);
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn every_bad_end_is_explained() {
    let last_words = "echo 'Traceback: no module named x' >&2\n";
    let cases = [
        ("echo '{\"event\":\"error\",\"message\":\"no such package\",\"hint\":\"spell it\"}'; exit 1".to_owned(), "no such package", Some("spell it")),
        ("exit 0".to_owned(), "plugin `p` ended without saying that it is done", Some("its last line must be `{\"event\":\"done\"}` or an `error` event")),
        (format!("{last_words}exit 3"), "plugin `p` exited with code 3; its last words:\nTraceback: no module named x", None),
        (format!("{DONE}exit 4"), "plugin `p` said that it is done, but exited with code 4", None),
        ("kill -KILL $$".to_owned(), "plugin `p` was killed by signal 9 (SIGKILL)", Some("the system kills processes when memory runs out")),
        ("kill -SEGV $$".to_owned(), "plugin `p` was killed by signal 11 (SIGSEGV)", None),
        ("exit 127".to_owned(), "plugin `p` exited with code 127", Some("a program that it needs is not installed")),
        (format!("cat >/dev/null\n{DONE}"), "the task ended without making its output `out`", Some("this is a mistake of the task's kind, not of the pipeline")),
        (format!("{OUT}ln -s /etc/passwd $out/text\n{DONE}"), "output `out` cannot be kept: the output file `text` is a symbolic link", Some("an artifact holds plain files only: copy the content")),
        (format!("{OUT}mkfifo $out/text\n{DONE}"), "output `out` cannot be kept: the output file `text` is not a plain file", Some("an artifact holds plain files only: copy the content")),
    ];
    for (script, message, hint) in cases {
        let error = Plugin::new(&script).error();
        assert_eq!((error.message.as_str(), error.hint.as_deref()), (message, hint), "{script}");
    }
}

#[test]
fn programs_that_cannot_start_are_explained() {
    let cases = [
        (
            "command: [no-such-program-here]\n",
            "cannot start `no-such-program-here`: it is not installed",
        ),
        ("command: [bin/missing]\n", "bin/missing`: there is no such file"),
        ("command: [./main.sh]\n", "it is not executable"),
        ("command: [\"{build}/x\"]\n", "uses `{build}`, but it has no `build` step"),
    ];
    for (head, wanted) in cases {
        let error = Plugin::with(head, "").error();
        assert!(error.message.contains(wanted), "{}", error.message);
    }
    let mut plugin = Plugin::with("command: [main.sh]\n", "#!/no/such/interpreter\n");
    let script = plugin.bench.path("plugin/main.sh");
    fs::set_permissions(script, fs::Permissions::from_mode(0o755)).unwrap();
    let error = plugin.error();
    assert!(error.message.ends_with("its interpreter is missing"), "{}", error.message);
}

#[test]
fn words_of_the_command_that_name_files_of_the_plugin_become_paths() {
    let mut plugin = Plugin::with(
        "command: [main.sh, data.txt, other]\n",
        &format!("#!/bin/sh\n{OUT}cat \"$1\" > $out/text; echo $2 >> $out/text\n{DONE}"),
    );
    fs::write(plugin.bench.path("plugin/data.txt"), "data\n").unwrap();
    let script = plugin.bench.path("plugin/main.sh");
    fs::set_permissions(script, fs::Permissions::from_mode(0o755)).unwrap();
    let report = plugin.run();
    assert_eq!(text(&plugin.bench, &report, "work"), "data\nother\n");
}

#[test]
fn another_protocol_is_refused() {
    let mut plugin = Plugin::new(DONE);
    let mut manifest = (*plugin.manifest()).clone();
    manifest.protocol = 2;
    let task = ExternalTask::new(Arc::new(manifest), 0, json!({}));
    plugin.bench.add_any("work", json!({}), &[], Arc::new(task));
    assert_eq!(
        plugin.error().message,
        "plugin `p` speaks protocol 2; this version of lora-flow speaks 1"
    );
}

#[test]
fn a_plugin_that_never_reads_gets_a_large_request_all_the_same() {
    let mut plugin = Plugin::new(&format!("sleep 0.05\n{DONE}"));
    let params = json!({ "text": "x".repeat(1 << 20) });
    let task = ExternalTask::new(plugin.manifest(), 0, params.clone());
    plugin.bench.add_any("work", params, &[], Arc::new(task));
    assert_eq!(plugin.error().message, "the task ended without making its output `out`");
}

#[test]
fn a_hanging_plugin_is_stopped_by_its_time_limit_with_all_its_children() {
    let mut plugin = Plugin::new("");
    plugin.script(&format!(
        "{STATE}pids=$state/pids\nsh -c \"sleep 300 & echo \\$! >> $pids; wait\" &\necho $! >> $pids\nwait\n"
    ));
    plugin.load(&[]);
    plugin.bench.task("work").timeout = Some(Duration::from_millis(300));
    let start = Instant::now();
    let error = plugin.error();
    assert!(error.message.starts_with("out of time: its limit is 0.3 s"), "{}", error.message);
    assert!(start.elapsed() < Duration::from_secs(4), "SIGTERM was enough");
    let pids = find(&plugin.bench.store_dir(), "pids").unwrap();
    let pids = fs::read_to_string(pids).unwrap();
    assert_eq!(pids.lines().count(), 2);
    for pid in pids.lines() {
        assert!(is_gone(pid), "process {pid} lives on");
    }
}

/// Whether a process ended, or is a zombie that nobody waited for.
fn is_gone(pid: &str) -> bool {
    (0..100).any(|_| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest.starts_with(['Z', 'X']));
        state.unwrap_or(true) || {
            std::thread::sleep(Duration::from_millis(10));
            false
        }
    })
}

#[test]
fn a_plugin_that_ignores_the_wish_to_stop_is_killed() {
    let mut plugin = Plugin::new("trap '' TERM\nwhile :; do sleep 0.05; done\n");
    let cancel = CancelToken::default();
    plugin.bench.options.cancel = cancel.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        cancel.cancel();
    });
    let start = Instant::now();
    let report = plugin.run();
    assert_eq!(out(&report, "work").status, Status::Cancelled);
    let took = start.elapsed();
    assert!(took > Duration::from_secs(5) && took < Duration::from_secs(15), "{took:?}");
}

/// The process that dies in the next test; as a test of its own it does nothing.
#[test]
fn victim() {
    if std::env::var_os("LORA_FLOW_TEST_PLUGIN_VICTIM").is_some() {
        let write = "echo $$ > $state/pid.new; mv $state/pid.new $state/pid";
        Plugin::new(&format!("{STATE}{write}\nsleep 300\n")).run();
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_plugin_does_not_outlive_a_killed_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "external::tests::victim"])
        .env("LORA_FLOW_TEST_PLUGIN_VICTIM", "1")
        .env("TMPDIR", dir.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let pid_file = loop {
        if let Some(path) = find(dir.path(), "pid") {
            break path;
        }
        assert!(Instant::now() < deadline, "it never starts");
        std::thread::sleep(Duration::from_millis(5));
    };
    let pid = fs::read_to_string(&pid_file).unwrap();
    assert!(Path::new("/proc").join(pid.trim()).exists(), "it runs");
    host.kill().unwrap();
    host.wait().unwrap();
    assert!(is_gone(pid.trim()));
}

#[test]
fn what_a_plugin_leaves_running_does_not_hold_up_the_task() {
    let mut plugin =
        Plugin::new(&format!("{OUT}echo x > $out/text\nsleep 300 &\necho $! > $out/pid\n{DONE}"));
    let start = Instant::now();
    let report = plugin.run();
    assert_eq!(out(&report, "work").status, Status::Ran);
    assert!(start.elapsed() < Duration::from_secs(10));
    let engine = plugin.bench.engine();
    let entry = engine.store().peek(&out(&report, "work").key.unwrap()).unwrap();
    let artifact = engine.store().artifact(&entry.outputs["out"]);
    let pid = fs::read_to_string(artifact.file("pid").unwrap()).unwrap();
    assert!(is_gone(pid.trim()));
}

#[test]
fn a_plugin_is_built_once_for_each_digest() {
    let head = "build: [sh, build.sh]\ncommand: [sh, \"{build}/program\"]\n";
    let mut plugin = Plugin::with(head, "");
    let count = plugin.bench.path("builds");
    let build = |what: &str| {
        format!(
            "echo x >> {}\necho building >&2\nmkdir -p target && touch target/x\n{what}\n",
            count.display()
        )
    };
    let good = format!(
        "cat > $LORA_FLOW_PLUGIN_BUILD/program <<'END'\n{OUT}echo x > $out/text\n{DONE}END\n"
    );
    let script = plugin.bench.path("plugin/build.sh");
    fs::write(&script, build(&good)).unwrap();
    let builds = || fs::read_to_string(&count).unwrap_or_default().lines().count();
    let report = plugin.run();
    assert_eq!(out(&report, "work").status, Status::Ran, "{:?}", out(&report, "work").error);
    assert!(plugin.log(&report).contains("DEBUG building"));
    plugin.bench.options.force = vec!["*".to_owned()];
    assert_eq!(out(&plugin.run(), "work").status, Status::Ran);
    assert_eq!(builds(), 1);
    // A build that was killed leaves products without their mark.
    for mark in files_below(&plugin.bench.store_dir().join("plugins")) {
        if mark.extension().is_some_and(|e| e == "built") {
            fs::remove_file(mark).unwrap();
        }
    }
    assert_eq!(out(&plugin.run(), "work").status, Status::Ran);
    assert_eq!(builds(), 2);

    fs::write(&script, build("echo 'error: E0308' >&2; exit 101")).unwrap();
    plugin.load(&[]);
    assert_eq!(
        plugin.error().message,
        "cannot build plugin `p`: the build exited with code 101; its last words:\nbuilding\nerror: E0308"
    );
    fs::write(&script, build("echo > artifacts.json")).unwrap();
    plugin.load(&[]);
    assert_eq!(
        plugin.error().message,
        "cannot build plugin `p`: the build changed the plugin's own folder"
    );
}

#[test]
fn two_tasks_that_need_a_build_at_once_build_once() {
    let mut plugin =
        Plugin::with("build: [sh, build.sh]\ncommand: [sh, \"{build}/program\"]\n", "");
    let count = plugin.bench.path("builds");
    let script = format!(
        "echo x >> {}\nsleep 0.2\ncat > $LORA_FLOW_PLUGIN_BUILD/program <<'END'\n{OUT}echo x > $out/text\n{DONE}END\n",
        count.display()
    );
    fs::write(plugin.bench.path("plugin/build.sh"), script).unwrap();
    let manifest = plugin.manifest();
    plugin.bench.options.jobs = 3;
    for i in 0..3 {
        let params = json!({ "i": i });
        let task = ExternalTask::new(manifest.clone(), 0, params.clone());
        plugin.bench.add_any(&format!("t{i}"), params, &[], Arc::new(task));
    }
    let report = plugin.bench.run();
    assert_eq!(report.exit_code(), 0, "{report:?}");
    assert_eq!(fs::read_to_string(count).unwrap(), "x\n");
}

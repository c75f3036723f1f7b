//! The scheduler and the records of runs through the program, with tasks that are shell scripts.

#[path = "support/mod.rs"]
mod support;

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{Project, Ran};

/// A project whose plugin has the kind `work`: a shell script in its parameter, with `$out`, `$state`
/// and `$scratch`.
fn project(tasks: &str) -> Project {
    let project = Project::empty();
    project.write(
        "plugin/plugin.yaml",
        "protocol: 1\nname: shell\nversion: 0.1.0\ncommand: [bash, main.sh]\ntasks:\n  work:\n    \
         inputs: { in: { kind: Files, required: false, many: true } }\n    outputs: { files: Files }\n    \
         params: { type: object, required: [run], properties: { run: { type: string } } }\n",
    );
    project.write(
        "plugin/main.sh",
        "request=$(cat)\n\
         field() { printf '%s' \"$request\" | sed \"s/.*\\\"$1\\\":\\\"\\([^\\\"]*\\)\\\".*/\\1/\"; }\n\
         out=$(printf '%s' \"$request\" | sed 's/.*\"outputs\":{\"files\":{\"kind\":\"Files\",\"path\":\"\\([^\"]*\\)\".*/\\1/')\n\
         state=$(field state)\nscratch=$(field scratch)\neval \"$(field run)\"\necho '{\"event\":\"done\"}'\n",
    );
    project.write("pipeline.yaml", format!("name: p\nplugins: [plugin]\ntasks:\n{tasks}"));
    project
}

/// A task of the kind `work`. The script must hold no double quotes.
fn work(id: &str, more: &str, script: &str) -> String {
    assert!(!script.contains(['"', '\\']), "{script}");
    format!("  {id}: {{ uses: work, {more} with: {{ run: \"{script}\" }} }}\n")
}

const QUICK: &str = "echo x > $out/f";

fn start(project: &Project, args: &[&str]) -> Child {
    let mut command = project.command(args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until a file that a task writes is there and has a whole line.
fn wait_for(project: &Project, name: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let found = find(&project.path(".lora-flow/state"), name);
        if let Some(text) = found.filter(|text| text.ends_with('\n')) {
            return text;
        }
        assert!(Instant::now() < deadline, "`{name}` never comes");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn find(dir: &Path, name: &str) -> Option<String> {
    std::fs::read_dir(dir).ok()?.flatten().find_map(|entry| {
        if entry.path().is_dir() {
            return find(&entry.path(), name);
        }
        (entry.file_name() == name).then(|| std::fs::read_to_string(entry.path()).ok())?
    })
}

fn is_gone(pid: &str) -> bool {
    (0..300).any(|_| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest.starts_with(['Z', 'X']));
        state.unwrap_or(true) || {
            std::thread::sleep(Duration::from_millis(10));
            false
        }
    })
}

fn ended(child: Child) -> Ran {
    child.wait_with_output().unwrap().into()
}

#[test]
fn a_task_out_of_time_fails_and_names_its_log() {
    let project = project(&work("slow", "timeout: 1s,", "echo going to sleep >&2; sleep 300"));
    let started = Instant::now();
    let ran = project.expect(1, &["run", "pipeline.yaml"]);
    assert!(started.elapsed() < Duration::from_secs(60));
    assert!(
        ran.stderr.contains("task `slow` failed: out of time: its limit is 1 s"),
        "{}",
        ran.stderr
    );
    let log = ran.stderr.lines().find_map(|l| l.strip_prefix("log: ")).unwrap();
    let log = std::fs::read_to_string(project.path(log)).unwrap();
    assert!(log.contains("going to sleep") && log.contains("ERROR failed: out of time"), "{log}");
}

#[test]
fn a_failing_task_is_tried_again_after_a_pause_that_doubles() {
    let script = "echo x >> $state/tries; test $(wc -l < $state/tries) -ge 3 || exit 7; cp $state/tries $out/f";
    let project = project(&work("flaky", "retries: 2,", script));
    let started = Instant::now();
    let ran = project.expect(0, &["run", "pipeline.yaml"]);
    assert!(started.elapsed() >= Duration::from_secs(3), "1 s and 2 s");
    for told in [
        "try 1 of 3 failed: plugin `shell` exited with code 7; the next one starts in 1 s",
        "try 2 of 3 failed: plugin `shell` exited with code 7; the next one starts in 2 s",
    ] {
        assert!(ran.stderr.contains(told), "{}", ran.stderr);
    }
}

#[test]
fn keep_going_runs_what_does_not_depend_on_a_failure() {
    let tasks = work("bad", "", "exit 1")
        + &work("child", "inputs: { in: bad },", QUICK)
        + &work("free", "", QUICK);
    let project = project(&tasks);
    let states = |args: &[&str]| -> Vec<String> {
        project.expect(1, args);
        let tasks = project.latest()["tasks"].clone();
        tasks.as_array().unwrap().iter().map(|t| t["status"].to_string()).collect()
    };
    let stopped = states(&["run", "pipeline.yaml"]);
    assert_eq!(stopped[0], "\"failed\"");
    assert!(stopped[2].contains("the run stopped: `bad` failed"), "{stopped:?}");
    let kept = states(&["run", "pipeline.yaml", "--keep-going"]);
    assert!(kept[1].contains("upstream `bad` failed"), "{kept:?}");
    assert_eq!(kept[2], "\"ran\"");
}

#[test]
fn interrupt_and_terminate_end_a_run_cleanly() {
    for signal in ["INT", "TERM"] {
        let tasks = work("first", "", QUICK)
            + &work("slow", "needs: [first],", ". $(dirname $0)/slow.sh")
            + &work("after", "inputs: { in: slow },", QUICK);
        let project = project(&tasks);
        // A child of the plugin, and a child of that.
        project.write(
            "plugin/slow.sh",
            "if test -e $state/again; then echo resumed > $out/f; return; fi\n\
             touch $out/half $state/again\n(sleep 300 & echo $! >> $state/p; wait) &\n\
             echo $! >> $state/p\nuntil test $(wc -l < $state/p) = 2; do sleep 0.01; done\n\
             mv $state/p $state/pids\nwait\n",
        );
        let child = start(&project, &["run", "pipeline.yaml"]);
        let pids = wait_for(&project, "pids");
        let id = child.id().to_string();
        let killed = std::process::Command::new("kill").args([&format!("-{signal}"), &id]).status();
        assert!(killed.unwrap().success());
        let ran = ended(child);
        assert_eq!(ran.code, 130, "{}{}", ran.stdout, ran.stderr);
        assert!(ran.stderr.contains("stopping: running tasks save their state"), "{}", ran.stderr);
        for pid in pids.lines() {
            assert!(is_gone(pid), "SIG{signal}: {pid} lives on");
        }
        let statuses: Vec<String> = project.latest()["tasks"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["status"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(statuses, ["ran", "cancelled", "cancelled"]);
        let left = std::fs::read_dir(project.path(".lora-flow/tmp")).unwrap().count();
        assert_eq!(left, 0, "what it had made is discarded");
        assert!(project.expect(0, &["runs"]).stdout.contains("cancelled"));
        // What it kept is there for the next run.
        project.expect(0, &["run", "pipeline.yaml"]);
    }
}

#[test]
fn a_killed_run_is_listed_with_what_it_had_done() {
    let wait = "echo waiting >&2; echo $$ > $state/p; mv $state/p $state/pid; sleep 300";
    let tasks = work("first", "", QUICK)
        + &work("slow", "inputs: { in: first },", wait)
        + &work("after", "inputs: { in: slow },", QUICK);
    let project = project(&tasks);
    let mut child = start(&project, &["run", "pipeline.yaml"]);
    let pid = wait_for(&project, "pid");
    let list = project.expect(0, &["runs"]).stdout;
    assert!(list.contains("running, 1 of 3 tasks done"), "{list}");

    // Its log can be followed, and the end is told.
    let follower = start(&project, &["logs", "-f", "latest", "slow"]);
    project.expect(2, &["logs", "-f", "latest", "slwo"]);
    std::thread::sleep(Duration::from_millis(300));
    child.kill().unwrap();
    child.wait().unwrap();
    let followed = ended(follower);
    assert!(followed.stdout.contains("waiting"), "{}", followed.stdout);
    assert_eq!(followed.code, 1);
    assert!(followed.stderr.contains(" was killed"), "{}", followed.stderr);
    assert!(is_gone(pid.trim()), "the task died with its run");

    let list = project.expect(0, &["runs"]).stdout;
    assert!(list.contains("killed, 1 of 3 tasks done"), "{list}");
    let list: Value = serde_json::from_str(&project.expect(0, &["runs", "--json"]).stdout).unwrap();
    assert_eq!(list[0]["state"], "killed");
    let id = list[0]["run_id"].as_str().unwrap();
    let statuses: Vec<&Value> =
        list[0]["tasks"].as_array().unwrap().iter().map(|t| &t["status"]).collect();
    assert_eq!(statuses[0], "ran");
    assert_eq!(statuses[1], "cancelled");
    assert_eq!(statuses[2]["skipped"], "the run was killed");
    assert!(list[0]["tasks"][0]["outputs"]["files"]["digest"].is_string());
    let shown = project.expect(0, &["show", id]).stdout;
    assert!(shown.contains("killed, 1 of 3 tasks done"), "{shown}");
    assert!(project.expect(0, &["logs", id, "slow"]).stdout.contains("waiting"));
    // `latest` is the last that ended; none has.
    project.expect(2, &["show", "latest"]);
}

#[test]
fn what_a_terminal_would_obey_is_spelt_out() {
    let project = project(&work("bad", "", ". $(dirname $0)/noise.sh"));
    project.write(
        "plugin/noise.sh",
        b"printf '\\033[2Jcleared\\007\\n' >&2\n\
          printf '{\"event\":\"log\",\"level\":\"warn\",\"message\":\"\\\\u001b]0;title\\\\u0007 \\\\u202etxt.exe\"}\\n'\n\
          printf '\\033[31mlast words\\033[0m\\n' >&2\nexit 3\n",
    );
    let ran = project.expect(1, &["run", "pipeline.yaml", "--verbose"]);
    let log = project.expect(0, &["logs", "latest", "bad"]).stdout;
    let shown = project.expect(0, &["show", "latest"]).stdout;
    for (what, text) in [("run", ran.stderr), ("log", log), ("show", ran.stdout + &shown)] {
        let obeyed = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!text.contains(obeyed), "{what}: {text:?}");
        if what != "show" {
            assert!(text.contains("\\u{1b}[2Jcleared\\u{7}"), "{what}: {text}");
            assert!(text.contains("\\u{1b}]0;title\\u{7} \\u{202e}txt.exe"), "{what}: {text}");
        }
        assert!(text.contains("\\u{1b}[31mlast words"), "{what}: {text}");
    }
}

#[test]
fn plugins_see_the_gpus_that_they_were_given() {
    let tasks = work("one", "resources: { gpu: 1 },", "echo 1=$CUDA_VISIBLE_DEVICES > $out/f")
        + &work("two", "resources: { gpu: 2 },", "echo 2=$CUDA_VISIBLE_DEVICES > $out/f")
        + &work("none", "", "echo 0=$CUDA_VISIBLE_DEVICES > $out/f")
        + &work(
            "all",
            "inputs: { in: [one, two, none] }, publish: out,",
            "cat $scratch/inputs/in.*/f > $out/f",
        );
    let project = project(&tasks);
    let mut command = project.command(&["run", "pipeline.yaml", "--gpus", "2", "--jobs", "2"]);
    let ran: Ran = command.env("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b").output().unwrap().into();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let said = std::fs::read_to_string(project.path("out/f")).unwrap();
    assert!(
        said == "1=GPU-a\n2=GPU-a,GPU-b\n0=\n" || said == "1=GPU-b\n2=GPU-a,GPU-b\n0=\n",
        "{said}"
    );
}

/// The last line of a run, without what differs from run to run.
fn last_line(ran: &Ran) -> String {
    let line = ran.stdout.lines().last().unwrap();
    line.split(" · ").nth(1).unwrap().to_owned()
}

#[test]
fn a_run_with_nothing_to_do_leaves_a_note_and_the_next_one_says_the_same() {
    let project =
        project(&format!("{}{}", work("a", "", QUICK), work("b", "inputs: { in: a },", QUICK)));
    let run = || project.expect(0, &["run", "pipeline.yaml"]);
    let notes = || std::fs::read_dir(project.path(".lora-flow/settled")).map_or(0, Iterator::count);
    assert_eq!((last_line(&run()).as_str(), notes()), ("2 ran", 0));
    let first = run();
    assert_eq!((last_line(&first).as_str(), notes()), ("2 cached", 1));
    let before = project.latest();
    let second = run();
    let table = |ran: &Ran| ran.stdout.rsplit_once("\nrun ").unwrap().0.to_owned();
    assert_eq!(table(&first), table(&second));
    let after = project.latest();
    for part in ["tasks", "name"] {
        assert_eq!(before[part], after[part]);
    }
    assert_ne!(before["run_id"], after["run_id"]);
    // Its record is as whole as any other.
    let runs = project.expect(0, &["runs", "--json"]).stdout;
    assert_eq!(serde_json::from_str::<Value>(&runs).unwrap().as_array().unwrap().len(), 3);
    let strings = |ran: &Ran| {
        let id = ran.stdout.rsplit_once("\nrun ").unwrap().1.split(' ').next().unwrap().to_owned();
        let folder = project.path(&format!(".lora-flow/runs/{id}"));
        let mut names: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(strings(&first), strings(&second));
    // Another command has a note of its own.
    project.expect(0, &["run", "pipeline.yaml", "--target", "a"]);
    assert_eq!(notes(), 2);
}

#[test]
fn whatever_changes_is_seen_in_spite_of_a_note() {
    let script = "echo $SEEN > $out/g; cat $(dirname $0)/data/* > $out/f";
    let project = project(&work("t", "publish: out/t,", script));
    project.write("plugin/data/one", "1\n");
    let manifest = std::fs::read_to_string(project.path("plugin/plugin.yaml")).unwrap();
    project.write("plugin/plugin.yaml", manifest.replace("tasks:", "env: [SEEN]\ntasks:"));
    let run = |seen: Option<&str>| {
        let mut command = project.command(&["run", "pipeline.yaml"]);
        seen.map(|value| command.env("SEEN", value));
        let ran: Ran = command.output().unwrap().into();
        assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
        last_line(&ran)
    };
    let settled = |seen: Option<&str>| {
        for _ in 0..3 {
            assert_eq!(run(seen), "1 cached");
        }
    };
    let published = |name: &str| std::fs::read_to_string(project.path("out/t").join(name)).unwrap();
    assert_eq!(run(None), "1 ran");
    settled(None);

    // A file of the plugin, a new one among them, a variable.
    project.write("plugin/data/one", "2\n");
    assert_eq!((run(None).as_str(), published("f").as_str()), ("1 ran", "2\n"));
    settled(None);
    project.write("plugin/data/two", "3\n");
    assert_eq!((run(None).as_str(), published("f").as_str()), ("1 ran", "2\n3\n"));
    settled(None);
    assert_eq!((run(Some("x")).as_str(), published("g").as_str()), ("1 ran", "x\n"));
    settled(Some("x"));
    assert_eq!(run(Some("y")), "1 ran");
    settled(None);

    // What was published was edited: it is put right.
    project.write("out/t/f", "edited\n");
    assert_eq!((run(None).as_str(), published("f").as_str()), ("1 cached", "2\n3\n"));
    settled(None);

    // The pipeline itself.
    let text = std::fs::read_to_string(project.path("pipeline.yaml")).unwrap();
    project.write("pipeline.yaml", text.replace("$SEEN", "new"));
    assert_eq!((run(None).as_str(), published("g").as_str()), ("1 ran", "new\n"));
    settled(None);

    // Damage in the store: an entry, then a blob, then the note itself.
    for folder in ["entries", "objects"] {
        for file in files_below(&project.path(&format!(".lora-flow/{folder}"))) {
            let mut bytes = std::fs::read(&file).unwrap();
            bytes[0] ^= 1;
            let mut permissions = std::fs::metadata(&file).unwrap().permissions();
            #[allow(clippy::permissions_set_readonly_false)]
            permissions.set_readonly(false);
            std::fs::set_permissions(&file, permissions).unwrap();
            std::fs::write(&file, bytes).unwrap();
        }
        assert_eq!(run(None), "1 ran", "{folder}");
        settled(None);
    }
    for file in files_below(&project.path(".lora-flow/settled")) {
        let mut bytes = std::fs::read(&file).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        std::fs::write(&file, bytes).unwrap();
    }
    settled(None);
    assert_eq!(published("f"), "2\n3\n");
}

#[test]
fn outside_files_are_looked_at_in_spite_of_a_note() {
    let project = Project::empty();
    project.write("data/a.jsonl", "{\"text\": \"one\"}\n");
    project.write(
        "pipeline.yaml",
        "name: p\ntasks:\n  rows: { uses: ingest, with: { files: \"data/*.jsonl\" } }\n",
    );
    // A file that changed within two seconds is not taken to be known.
    let age = |name: &str| {
        let then = std::time::SystemTime::now() - Duration::from_secs(100);
        let file = std::fs::File::options().write(true).open(project.path(name)).unwrap();
        file.set_modified(then).unwrap();
    };
    let run = || last_line(&project.expect(0, &["run", "pipeline.yaml"]));
    let notes = || std::fs::read_dir(project.path(".lora-flow/settled")).map_or(0, Iterator::count);
    assert_eq!(run(), "1 ran");
    assert_eq!((run().as_str(), notes()), ("1 cached", 0), "its time of change is too young");
    std::thread::sleep(Duration::from_millis(2100));
    assert_eq!((run().as_str(), notes()), ("1 cached", 1), "hashed once more, and known now");
    assert_eq!(run(), "1 cached");
    project.write("data/a.jsonl", "{\"text\": \"two\"}\n");
    age("data/a.jsonl");
    assert_eq!(run(), "1 ran");
    project.write("data/b.jsonl", "{\"text\": \"more\"}\n");
    assert_eq!(run(), "1 ran");
    std::fs::remove_file(project.path("data/b.jsonl")).unwrap();
    assert_eq!(run(), "1 cached");
}

fn files_below(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        match entry.path().is_dir() {
            true => files.extend(files_below(&entry.path())),
            false => files.push(entry.path()),
        }
    }
    files
}

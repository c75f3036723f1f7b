//! The Python plugins of the project, spoken to over the pipe as the engine does. Without network:
//! pip finds a wheel that the test makes. Skipped where there is no `python3` with `pip`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

/// Makes `demo-1.0-py3-none-any.whl`, with a member whose path leads out of the archive.
const MAKE_WHEEL: &str = r#"
import sys, zipfile
with zipfile.ZipFile(sys.argv[1] + "/demo-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("demo/data/1-first.txt", "One\nline.\n\nTwo.\n \nThree is longer.\n")
    wheel.writestr("demo/data/2-second.txt", "Four: \u00e4.")
    wheel.writestr("demo/other/2-second.txt", "another")
    wheel.writestr("demo/../../../evil.txt", "out")
    wheel.writestr("demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
    wheel.writestr("demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr("demo-1.0.dist-info/RECORD", "")
"#;

const FIRST_SHA256: &str = "65e92f5dc5e1b3f1aa9d37fb5f4f5b9c8c3b0f1a53d3c7b0a3a4e2b3d6a1f0c9";

fn python_with_pip() -> bool {
    let pip = Command::new("python3").args(["-m", "pip", "--version"]).output();
    let found = pip.is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("skipped: there is no `python3` with `pip`");
    }
    found
}

fn python() -> bool {
    let found = Command::new("python3").arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        eprintln!("skipped: there is no `python3`");
    }
    found
}

struct Ran {
    succeeded: bool,
    events: Vec<Value>,
    output: PathBuf,
    _folder: tempfile::TempDir,
}

impl Ran {
    fn last(&self) -> &Value {
        self.events.last().unwrap()
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.output).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.output.join(name)).unwrap()
    }
}

fn run(plugin: &str, params: Value, find_links: &Path) -> Ran {
    let folder = tempfile::tempdir().unwrap();
    let sub = |name: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (output, scratch, state) = (sub("output"), sub("scratch"), sub("state"));
    let request = json!({
        "protocol": 1, "task": plugin, "params": params, "inputs": {},
        "outputs": { "files": { "kind": "Files", "path": output } },
        "scratch": scratch, "state": state, "threads": 1, "network": false,
    });
    let main =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins").join(plugin).join("main.py");
    let mut child = Command::new("python3")
        .arg(main)
        .current_dir(&scratch)
        .env("PIP_FIND_LINKS", find_links)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(request.to_string().as_bytes()).unwrap();
    let ended = child.wait_with_output().unwrap();
    let text = String::from_utf8(ended.stdout).unwrap();
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ran = Ran { succeeded: ended.status.success(), events, output, _folder: folder };
    assert_eq!(ran.last()["event"], if ran.succeeded { "done" } else { "error" });
    // Nothing but the two folders of the plugin was written to.
    assert!(!ran._folder.path().join("evil.txt").exists());
    ran
}

fn wheels() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let made =
        Command::new("python3").args(["-c", MAKE_WHEEL]).arg(folder.path()).status().unwrap();
    assert!(made.success());
    folder
}

fn demo(members: &[&str]) -> Value {
    json!({ "package": "demo", "version": "1.0", "members": members, "sha256": {}, "format": "wheel" })
}

#[test]
fn pip_fetch_takes_the_members_that_are_asked_for() {
    if !python_with_pip() {
        return;
    }
    let wheels = wheels();
    let ran = run("pip-fetch", demo(&["demo/data/*.txt", "*evil.txt"]), wheels.path());
    assert!(ran.succeeded, "{:?}", ran.last());
    assert_eq!(ran.files(), ["1-first.txt", "2-second.txt", "evil.txt"]);
    assert_eq!(ran.read("2-second.txt"), "Four: ä.");
    let meta = ran.events.iter().find(|e| e["event"] == "meta").unwrap();
    assert_eq!(meta["value"]["package"], "demo");
}

#[test]
fn pip_fetch_makes_rows_of_paragraphs() {
    if !python_with_pip() {
        return;
    }
    let wheels = wheels();
    let mut params = demo(&["demo/data/*.txt"]);
    params["rows"] = json!({ "file": "texts.jsonl", "max_chars": 20, "shuffle": false });
    let ran = run("pip-fetch", params.clone(), wheels.path());
    assert_eq!(ran.files(), ["texts.jsonl"]);
    let text = ran.read("texts.jsonl");
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        rows,
        [
            json!({ "id": "1-first#0", "document": "1-first", "text": "One line.\n\nTwo." }),
            json!({ "id": "1-first#1", "document": "1-first", "text": "Three is longer." }),
            json!({ "id": "2-second#0", "document": "2-second", "text": "Four: ä." }),
        ]
    );

    params["rows"]["shuffle"] = json!(true);
    let shuffled = run("pip-fetch", params, wheels.path()).read("texts.jsonl");
    assert_ne!(shuffled, text);
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&shuffled), sorted(&text));
}

#[test]
fn pip_fetch_says_what_is_wrong_and_leaves_nothing() {
    if !python_with_pip() {
        return;
    }
    let wheels = wheels();
    let with = |change: fn(&mut Value)| {
        let mut params = demo(&["demo/data/1-first.txt"]);
        change(&mut params);
        params
    };
    let cases = [
        (
            with(|p| p["sha256"] = json!({ "demo/data/1-first.txt": FIRST_SHA256 })),
            "has another SHA-256 than expected: expected 65e9",
            "the package was changed",
        ),
        (
            with(|p| p["archive_sha256"] = json!(FIRST_SHA256)),
            "`demo-1.0-py3-none-any.whl` has another SHA-256",
            "the package was changed",
        ),
        (
            with(|p| p["sha256"] = json!({ "demo/x": FIRST_SHA256 })),
            "`sha256` names `demo/x`, which is not among the members",
            "",
        ),
        (
            with(|p| p["members"] = json!(["demo/data/1-frist.txt"])),
            "no member `demo/data/1-frist.txt`",
            "`demo/data/1-first.txt`",
        ),
        (
            with(|p| p["members"] = json!(["*2-second.txt"])),
            "would both become the file `2-second.txt`",
            "one of them",
        ),
        (with(|p| p["version"] = json!("1.1")), "there is no wheel of `demo==1.1`", "`1.0`"),
        (
            with(|p| p["package"] = json!("demo-of-nothing")),
            "no wheel of `demo-of-nothing==1.0` among the local archives",
            "--offline",
        ),
    ];
    for (params, message, hint) in cases {
        let ran = run("pip-fetch", params, wheels.path());
        let last = ran.last();
        assert!(!ran.succeeded);
        assert!(last["message"].as_str().unwrap().contains(message), "{message}: {last}");
        assert!(last["hint"].as_str().unwrap_or_default().contains(hint), "{hint}: {last}");
        assert!(ran.files().is_empty(), "{message}: {:?}", ran.files());
    }
}

#[test]
fn tiny_model_writes_the_same_folder_each_time() {
    if !python() {
        return;
    }
    let params = json!({ "seed": 3, "hidden_size": 16, "num_hidden_layers": 1 });
    let (one, two) = (
        run("tiny-model", params.clone(), Path::new("")),
        run("tiny-model", params, Path::new("")),
    );
    assert_eq!(
        one.files(),
        ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    );
    let weights = |ran: &Ran| std::fs::read(ran.output.join("model.safetensors")).unwrap();
    assert!(weights(&one) == weights(&two));
    // embedding 258·16, norms 3·16, attention 16·(16 + 8 + 8 + 16), MLP 3·16·32
    let header = u64::from_le_bytes(weights(&one)[..8].try_into().unwrap()) as usize;
    assert_eq!(weights(&one).len(), 8 + header + 4 * (258 * 16 + 3 * 16 + 16 * 48 + 3 * 16 * 32));
}

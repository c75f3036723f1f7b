//! Real runs killed at random instants over a store in which random bytes were flipped. Whatever
//! happened, the next run must end with the bytes of an undisturbed one, and the store be sound.
//!
//! `LORA_FLOW_CRASH_KILLS=200` kills that often (12 unless told otherwise), and
//! `LORA_FLOW_CRASH_SEED` begins elsewhere.
#![cfg(target_os = "linux")]

#[path = "support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{Project, documents, write_model};

/// Longest time that any run may take on a busy machine; beyond it, it hangs.
const HANGS: Duration = Duration::from_secs(120);

/// A run of this program that was left to itself.
const PIPELINE: &str = r#"version: 1
name: crash
params: { n: 1 }
plugins: [plugin]
tasks:
  docs:
    uses: ingest
    with: { files: docs.jsonl, text: text, split: { train: 0.75, eval: 0.25 } }
  base:
    uses: model
    with: { source: model }
  tokens:
    uses: tokenize
    inputs: { dataset: docs.train, model: base }
    with: { format: text, max_length: 64, packing: true }
  adapter:
    uses: lora-inject
    inputs: { model: base }
    with: { r: 2, target_modules: all-linear, seed: "${{ params.n }}" }
  part:
    uses: make
    matrix: { i: [1, 2, 3, 4] }
    with: { text: "${{ matrix.i }} of ${{ params.n }}", lines: 3000 }
  same:
    uses: make
    with: { text: shared by all, lines: 20000 }
  joined:
    uses: join
    inputs: { parts: part }
    publish: out/joined
  all:
    uses: join
    inputs: { parts: [joined, same] }
    publish: out/all
  merged:
    uses: merge
    inputs: { model: base, adapter: adapter }
    publish: out/merged
"#;

const MANIFEST: &str = r#"protocol: 1
name: lines
version: 0.1.0
command: [sh, main.sh]
tasks:
  make:
    outputs: { files: Files }
    params:
      type: object
      properties: { text: { type: string }, lines: { type: integer } }
  join:
    inputs: { parts: { kind: Files, many: true } }
    outputs: { files: Files }
"#;

/// Writes slowly enough to be killed between any two of its files.
const SCRIPT: &str = r#"request=$(cat)
field() { printf '%s' "$request" | sed "s/.*\"$1\":\"\\([^\"]*\\)\".*/\\1/"; }
out=$(printf '%s' "$request" | sed 's/.*"outputs":{"files":{"kind":"Files","path":"\([^"]*\)".*/\1/')
case "$(field task)" in
make)
  lines=$(printf '%s' "$request" | sed 's/.*"lines":\([0-9]*\).*/\1/')
  yes "$(field text)" | head -n "$lines" > "$out/lines"
  echo '{"event":"progress","done":1,"total":2}'
  sleep 0.02
  echo 'the same in every part' > "$out/common" ;;
join)
  dir=$(printf '%s' "$request" | sed 's/.*"scratch":"\([^"]*\)".*/\1/')/inputs/parts
  for part in "$dir"/*; do
    echo "$(basename "$part")" >> "$out/lines"
    cat "$part/lines" >> "$out/lines"
    cksum < "$part/lines" >> "$out/sums"
  done
  sleep 0.02 ;;
esac
echo '{"event":"done"}'
"#;

/// Values of `params.n`, each of which gives other results.
const VALUES: u64 = 3;

/// Numbers that look random and are the same for the same seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// What a run ends with: bytes of everything published, and the digest of every artifact.
#[derive(Debug, PartialEq)]
struct Results {
    published: BTreeMap<String, Vec<u8>>,
    artifacts: BTreeMap<String, String>,
}

fn project() -> Project {
    let project = Project::empty();
    project.write("pipeline.yaml", PIPELINE);
    project.write("plugin/plugin.yaml", MANIFEST);
    project.write("plugin/main.sh", SCRIPT);
    project.write("docs.jsonl", documents(64));
    write_model(&project.path("model"));
    project
}

fn start(project: &Project, n: u64) -> Child {
    let mut command: Command = project.command(&["run", "pipeline.yaml", "--quiet", "--jobs", "3"]);
    command.args(["--set", &format!("n={n}")]);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits for a run that nobody disturbs. It must end, and end well.
fn ends_well(mut child: Child, what: &str) {
    let deadline = Instant::now() + HANGS;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            let threads = threads(child.id());
            let _ = child.kill();
            let _ = child.wait();
            panic!("{what}: it hangs:\n{threads}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {}\n{told}", output.status);
}

/// What each thread of a process waits for.
fn threads(id: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
    let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
    tasks
        .map(|task| {
            let stat = read(task.path().join("stat"));
            let state = stat.rsplit_once(") ").map_or("", |(_, rest)| &rest[..1]).to_owned();
            let (name, waits) = (read(task.path().join("comm")), read(task.path().join("wchan")));
            format!("{}: {state} {waits}\n", name.trim())
        })
        .collect()
}

fn results(project: &Project) -> Results {
    let mut published = BTreeMap::new();
    for path in files_below(&project.path("out")) {
        let name = path.strip_prefix(project.root()).unwrap().display().to_string();
        // The marker holds times.
        if !name.ends_with(".lora-flow.json") {
            published.insert(name, fs::read(&path).unwrap());
        }
    }
    let mut artifacts = BTreeMap::new();
    for task in project.latest()["tasks"].as_array().unwrap() {
        for (output, artifact) in task["outputs"].as_object().unwrap() {
            let name = format!("{}.{output}", task["id"].as_str().unwrap());
            artifacts.insert(name, artifact["digest"].as_str().unwrap().to_owned());
        }
    }
    Results { published, artifacts }
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => files.extend(files_below(&entry.path())),
            false => files.push(entry.path()),
        }
    }
    files.sort();
    files
}

/// Flips bits of some files of the store, and sometimes cuts one short or removes one.
fn damage(project: &Project, random: &mut Random) {
    let store = project.path(".lora-flow");
    let parts = ["objects", "entries", "last", "runs", "stat-cache.json", "state"];
    for _ in 0..=random.below(4) {
        // The part first: blobs and records are many, indexes few.
        let part = store.join(parts[random.below(parts.len() as u64) as usize]);
        let files = if part.is_file() { vec![part] } else { files_below(&part) };
        if files.is_empty() {
            continue;
        }
        let path = &files[random.below(files.len() as u64) as usize];
        let mut bytes = fs::read(path).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
        match random.below(10) {
            0 => fs::remove_file(path).unwrap(),
            1 => fs::write(path, &bytes[..bytes.len() / 2]).unwrap(),
            _ if bytes.is_empty() => {}
            _ => {
                for _ in 0..=random.below(3) {
                    let at = random.below(bytes.len() as u64) as usize;
                    bytes[at] ^= 1 << random.below(8);
                }
                fs::write(path, &bytes).unwrap();
            }
        }
    }
    // An edit of what was published.
    let published = files_below(&project.path("out"));
    if random.chance(20) && !published.is_empty() {
        let path = &published[random.below(published.len() as u64) as usize];
        if !path.ends_with(".lora-flow.json") {
            fs::write(path, "edited").unwrap();
        }
    }
}

/// Removes some results, so that a run has work to do at any instant.
fn forget(project: &Project, random: &mut Random) {
    for path in files_below(&project.path(".lora-flow/entries")) {
        if random.chance(60) {
            fs::remove_file(path).unwrap();
        }
    }
}

/// Processes that work in the project's folder.
fn alive(project: &Project) -> Vec<String> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let folder = fs::read_link(process.path().join("cwd"));
        if folder.is_ok_and(|f| f.starts_with(project.root())) {
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            // A zombie has no command line, and is nobody's work.
            if !command.is_empty() {
                found.push(command);
            }
        }
    }
    found
}

/// Everything that must hold after an undisturbed run.
fn check(project: &Project, wanted: &Results, what: &str) {
    assert_eq!(results(project), *wanted, "{what}");
    // What others left damaged is set aside at the first time, and gone at the second.
    project.run(&["cache", "verify"]);
    let verified = project.run(&["cache", "verify"]);
    assert_eq!(verified.code, 0, "{what}: {}{}", verified.stdout, verified.stderr);
    let leftovers = files_below(&project.path(".lora-flow/tmp"));
    assert!(leftovers.is_empty(), "{what}: {leftovers:?}");
    for entry in fs::read_dir(project.path("out")).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        assert!(!name.starts_with('.'), "{what}: `{name}` is left beside what was published");
    }
    let locks = fs::read_dir(project.path(".lora-flow/locks")).unwrap().count();
    // That of the store, and the gate at which cleaning waits.
    assert!(locks <= 2, "{what}: {locks} files of locks");
    for _ in 0..200 {
        if alive(project).is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{what}: processes live on: {:?}", alive(project));
}

#[test]
fn runs_killed_at_any_instant_over_a_damaged_store_end_as_undisturbed_ones() {
    let number = |name: &str| std::env::var(name).ok().map(|n| n.parse::<u64>().unwrap());
    let wanted_kills = number("LORA_FLOW_CRASH_KILLS").unwrap_or(12);
    let seed = number("LORA_FLOW_CRASH_SEED").unwrap_or(3);
    let mut random = Random(seed);

    // Undisturbed, each in a project of its own.
    let mut undisturbed = BTreeMap::new();
    let mut takes = Duration::ZERO;
    for n in 0..VALUES {
        let project = project();
        let started = Instant::now();
        ends_well(start(&project, n), "undisturbed");
        takes = takes.max(started.elapsed());
        undisturbed.insert(n, results(&project));
    }
    assert_ne!(undisturbed[&0], undisturbed[&1]);

    let project = project();
    let (mut kills, mut rounds, mut in_pairs) = (0, 0, 0);
    while kills < wanted_kills {
        rounds += 1;
        assert!(rounds < 20 * wanted_kills, "runs end before they are killed");
        let n = random.below(VALUES);
        let what = format!("seed {seed}, round {rounds}, {kills} kills, n={n}");
        match random.below(4) {
            0 => {
                let _ = fs::remove_dir_all(project.path(".lora-flow"));
                let _ = fs::remove_dir_all(project.path("out"));
            }
            1 => {}
            _ => forget(&project, &mut random),
        }
        for _ in 0..=random.below(3) {
            damage(&project, &mut random);
            let pair = random.chance(50);
            in_pairs += u64::from(pair);
            let mut children = vec![start(&project, n)];
            if pair {
                std::thread::sleep(takes.mul_f64(0.001 * random.below(200) as f64));
                children.push(start(&project, n));
            }
            let last = children.len() - 1;
            for (i, mut child) in children.into_iter().enumerate() {
                // One of a pair may survive the other, and must not be held up by its end.
                if i == last && pair && random.chance(30) {
                    ends_well(child, &format!("{what}, the survivor"));
                    continue;
                }
                std::thread::sleep(takes.mul_f64(0.001 * random.below(900) as f64));
                kills += u64::from(child.try_wait().unwrap().is_none());
                let _ = child.kill();
                child.wait().unwrap();
            }
        }
        if random.chance(50) {
            damage(&project, &mut random);
        }
        ends_well(start(&project, n), &what);
        check(&project, &undisturbed[&n], &what);
        // What verification took away comes back.
        ends_well(start(&project, n), &what);
        assert_eq!(results(&project), undisturbed[&n], "{what}, after verification");
    }
    let listed: Value =
        serde_json::from_str(&project.expect(0, &["runs", "--json"]).stdout).unwrap();
    assert!(!listed.as_array().unwrap().is_empty());
    eprintln!("{kills} kills in {rounds} rounds, two runs at once {in_pairs} times");
}

//! Order, parallelism and publishing.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lora_flow_core::{DeviceSpec, Digest};
use proptest::prelude::*;
use serde_json::json;

use super::bench::{Bench, files_below, out};
use crate::run::schedule::total_memory;
use crate::run::{Gpu, Status};
use crate::source::Span;

/// Runs eight sleeping tasks; the most that slept at once.
fn most_at_once(jobs: usize, gpu: usize) -> usize {
    let mut bench = Bench::new();
    bench.options.jobs = jobs;
    let now = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    for i in 0..8 {
        let (now, most) = (now.clone(), most.clone());
        let task = bench.add_with(&format!("t{i}"), json!({ "i": i }), &[], move |cx| {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(25));
            now.fetch_sub(1, Ordering::SeqCst);
            cx.output("out")?.write("text", i.to_string())
        });
        task.resources.gpu = Some(gpu);
    }
    assert_eq!(bench.run().exit_code(), 0);
    most.load(Ordering::SeqCst)
}

#[test]
fn jobs_and_the_one_device_bound_what_runs_at_once() {
    assert_eq!(most_at_once(1, 0), 1);
    let most = most_at_once(3, 0);
    assert!((2..=3).contains(&most), "{most}");
    assert_eq!(most_at_once(4, 1), 1);
}

fn gpus(count: usize) -> Vec<Gpu> {
    (0..count).map(|i| Gpu { ordinal: i, name: format!("GPU-{i}") }).collect()
}

#[test]
fn a_task_is_told_which_gpus_are_its_own() {
    let mut bench = Bench::new();
    bench.options.jobs = 3;
    bench.options.gpus = gpus(2);
    bench.options.device = DeviceSpec::Cuda(0);
    let gate = Arc::new(std::sync::Barrier::new(2));
    for (i, gpu) in [(0, Some(1)), (1, Some(1)), (2, Some(2)), (3, None)] {
        let gate = gate.clone();
        let body = move |cx: &mut lora_flow_core::TaskContext| {
            if gpu == Some(1) {
                gate.wait(); // both at once, or never
            }
            let text = format!("{:?} {}", cx.gpus().unwrap(), cx.device());
            cx.output("out")?.write("text", text)
        };
        let task = bench.add_with(&format!("t{i}"), json!({ "i": i }), &[], body);
        task.resources = crate::plan::Resources { cpu: 1, gpu, memory: None };
    }
    let report = bench.run();
    let texts = ["t0", "t1", "t2", "t3"].map(|id| super::text(&bench, &report, id));
    let mut single = [texts[0].as_str(), texts[1].as_str()];
    single.sort_unstable();
    assert_eq!(single, ["[\"GPU-0\"] cuda:0", "[\"GPU-1\"] cuda:1"]);
    assert_eq!(texts[2], "[\"GPU-0\", \"GPU-1\"] cuda:0");
    assert_eq!(texts[3], "[] cuda:0");
}

/// What executes at a moment.
#[derive(Debug, Default)]
struct Load {
    tasks: usize,
    threads: usize,
    memory: u64,
    gpus: BTreeSet<String>,
    ended: BTreeSet<usize>,
}

/// A task of a random graph.
#[derive(Debug, Clone)]
struct Wish {
    needs: u16,
    cpu: usize,
    gpu: Option<usize>,
    memory: u64,
}

fn wishes() -> impl Strategy<Value = Vec<Wish>> {
    let memory = total_memory().unwrap_or(1 << 30);
    let wish = (any::<u16>(), any::<u16>(), 0..5usize, prop::option::of(0..5usize), 0..8u64)
        .prop_map(move |(a, b, cpu, gpu, eighths)| Wish {
            needs: a & b, // few edges, so that many tasks may run at once
            cpu,
            gpu,
            memory: memory / 4 * eighths, // up to almost twice what there is
        });
    prop::collection::vec(wish, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn no_graph_oversubscribes_the_machine_and_all_end(
        wishes in wishes(),
        jobs in 1..6usize,
        gpu_count in 0..4usize,
    ) {
        let mut bench = Bench::new();
        bench.options.jobs = jobs;
        bench.options.gpus = gpus(gpu_count);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let total = total_memory().unwrap_or(u64::MAX);
        let load = Arc::new(Mutex::new(Load::default()));
        let wrong = Arc::new(Mutex::new(Vec::new()));
        for (i, wish) in wishes.iter().enumerate() {
            let needs: Vec<usize> = (0..i).filter(|j| wish.needs >> j & 1 == 1).collect();
            let (load, wrong, wish, before) = (load.clone(), wrong.clone(), wish.clone(), needs.clone());
            let memory = wish.memory.min(total);
            let gpu = wish.gpu;
            let (cpu, asked_memory) = (wish.cpu, wish.memory);
            let body = move |cx: &mut lora_flow_core::TaskContext| {
                let mine = cx.gpus().unwrap_or_default().to_vec();
                let complain = |what: String| wrong.lock().unwrap().push(format!("t{i}: {what}"));
                {
                    let mut now = load.lock().unwrap();
                    now.tasks += 1;
                    now.threads += cx.threads();
                    now.memory += memory;
                    for gpu in &mine {
                        if !now.gpus.insert(gpu.clone()) {
                            complain(format!("{gpu} is another's"));
                        }
                    }
                    if mine.len() != gpu.unwrap_or(0).min(gpu_count) {
                        complain(format!("it has {mine:?} for {gpu:?}"));
                    }
                    if now.tasks > jobs || now.threads > cpus.max(jobs) || now.memory > total {
                        complain(format!("{now:?}"));
                    }
                    if !before.iter().all(|j| now.ended.contains(j)) {
                        complain(format!("before {before:?}"));
                    }
                }
                std::thread::sleep(Duration::from_millis(1));
                let mut now = load.lock().unwrap();
                now.tasks -= 1;
                now.threads -= cx.threads();
                now.memory -= memory;
                now.gpus.retain(|gpu| !mine.contains(gpu));
                now.ended.insert(i);
                cx.output("out")?.write("text", i.to_string())
            };
            let task = bench.add_with(&format!("t{i}"), json!({ "i": i }), &[], body);
            task.needs = needs;
            let memory = (asked_memory > 0).then_some(asked_memory);
            task.resources = crate::plan::Resources { cpu, gpu, memory };
        }
        let report = bench.run();
        prop_assert_eq!(std::mem::take(&mut *wrong.lock().unwrap()), Vec::<String>::new());
        prop_assert!(report.tasks.iter().all(|t| t.status == Status::Ran), "{:?}", report);
    }
}

#[test]
fn one_job_follows_the_order_of_the_plan() {
    let mut bench = Bench::new();
    for i in 0..5 {
        bench.add(&format!("t{i}"), json!({ "i": i }), &[]);
    }
    assert_eq!(bench.executes(), ["t0", "t1", "t2", "t3", "t4"]);
}

#[test]
fn threads_are_what_the_task_asks_for() {
    let mut bench = Bench::new();
    let body = |cx: &mut lora_flow_core::TaskContext| {
        let threads = cx.threads().to_string();
        cx.output("out")?.write("text", threads)
    };
    bench.add_with("one", json!({ "i": 1 }), &[], body).resources.cpu = 1;
    bench.add_with("all", json!({ "i": 2 }), &[], body);
    bench.add_with("more", json!({ "i": 3 }), &[], body).resources.cpu = 10_000;
    let report = bench.run();
    let cpus = std::thread::available_parallelism().unwrap().to_string();
    let texts = ["one", "all", "more"].map(|id| super::text(&bench, &report, id));
    assert_eq!(texts, ["1".to_owned(), cpus.clone(), cpus]);
}

fn publishing(content: &'static str) -> Bench {
    let mut bench = Bench::new();
    add_publishing(&mut bench, content);
    bench
}

fn add_publishing(bench: &mut Bench, content: &'static str) {
    bench.tasks.clear();
    let target = bench.path("out/model");
    let task = bench.add_with("a", json!({ "content": content }), &[], move |cx| {
        let out = cx.output("out")?;
        out.write("text", content)?;
        out.write("sub/more", "more")?;
        out.write(content, "named by its content")
    });
    task.publish.push(("out".to_owned(), target));
}

fn read(bench: &Bench, name: &str) -> String {
    fs::read_to_string(bench.path("out/model").join(name)).unwrap_or_else(|e| e.to_string())
}

#[test]
fn an_output_is_published_and_kept_as_it_was_made() {
    let bench = publishing("one");
    let report = bench.run();
    assert_eq!(out(&report, "a").published, [bench.path("out/model")]);
    assert_eq!((read(&bench, "text"), read(&bench, "sub/more")), ("one".into(), "more".into()));
    let path = bench.path("out/model/text");
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(meta.nlink(), 1, "a copy, not a link");
    assert_ne!(meta.permissions().mode() & 0o200, 0, "its owner may write it");
    let inode = fs::metadata(bench.path("out/model")).unwrap().ino();

    let report = bench.run();
    assert_eq!(out(&report, "a").status, Status::Cached);
    assert_eq!(out(&report, "a").published, [bench.path("out/model")]);
    assert_eq!(fs::metadata(bench.path("out/model")).unwrap().ino(), inode, "untouched");

    // Changed, deleted, all deleted: repaired from the store, without running.
    fs::write(&path, "edited").unwrap();
    fs::remove_file(bench.path("out/model/sub/more")).unwrap();
    assert_eq!(out(&bench.run(), "a").status, Status::Cached);
    assert_eq!((read(&bench, "text"), read(&bench, "sub/more")), ("one".into(), "more".into()));
    fs::remove_dir_all(bench.path("out")).unwrap();
    bench.run();
    assert_eq!(read(&bench, "text"), "one");
    assert_eq!(bench.taken(), ["a"]);
    assert_eq!(fs::read_dir(bench.path("out")).unwrap().count(), 1, "nothing is left beside it");
    assert!(bench.engine().store().verify().unwrap().problems.is_empty(), "the store is untouched");
}

#[test]
fn a_new_result_replaces_the_old_one_and_spares_other_files() {
    let mut bench = publishing("one");
    bench.run();
    fs::write(bench.path("out/model/notes.txt"), "mine").unwrap();
    fs::create_dir(bench.path("out/model/own")).unwrap();
    fs::write(bench.path("out/model/own/file"), "mine too").unwrap();
    add_publishing(&mut bench, "two");
    // What a killed run may have left.
    fs::create_dir(bench.path("out/.model.lora-flow-1-2-3")).unwrap();
    fs::write(bench.path("out/.model.lora-flow-1-2-3/text"), "half").unwrap();
    assert_eq!(bench.run().exit_code(), 0);
    assert_eq!(
        (read(&bench, "text"), read(&bench, "two")),
        ("two".into(), "named by its content".into())
    );
    assert_eq!(
        (read(&bench, "notes.txt"), read(&bench, "own/file")),
        ("mine".into(), "mine too".into())
    );
    assert!(!bench.path("out/model/one").exists(), "a file of the old artifact alone");
    assert_eq!(fs::read_dir(bench.path("out")).unwrap().count(), 1);
    // A file of the user under a name that the artifact now needs.
    fs::write(bench.path("out/model/three"), "mine").unwrap();
    add_publishing(&mut bench, "three");
    let report = bench.run();
    let error = out(&report, "a").error.as_ref().unwrap();
    assert!(
        error.message.ends_with("the folder holds a file `three` that lora-flow did not make"),
        "{}",
        error.message
    );
    assert_eq!((read(&bench, "text"), read(&bench, "three")), ("two".into(), "mine".into()));
}

#[test]
fn what_is_not_ours_is_not_touched() {
    let bench = publishing("one");
    let target = bench.path("out/model");
    fs::create_dir_all(&target).unwrap();
    fs::write(target.join("text"), "precious").unwrap();
    let report = bench.run();
    let error = out(&report, "a").error.as_ref().unwrap();
    assert_eq!(
        error.message,
        format!(
            "cannot publish `a.out` to `{}`: the folder exists and lora-flow did not make it",
            target.display()
        )
    );
    assert_eq!(report.exit_code(), 1);
    assert_eq!(read(&bench, "text"), "precious");
    // The very same content is taken for ours.
    fs::write(target.join("text"), "one").unwrap();
    fs::write(target.join("one"), "named by its content").unwrap();
    fs::create_dir(target.join("sub")).unwrap();
    fs::write(target.join("sub/more"), "more").unwrap();
    assert_eq!(bench.run().exit_code(), 0);
    assert_eq!(bench.taken(), ["a"], "the result was kept although it was not published");
    // So is what this pipeline published before its store was deleted.
    fs::remove_dir_all(bench.store_dir()).unwrap();
    fs::write(target.join("text"), "edited").unwrap();
    assert_eq!(bench.run().exit_code(), 0);
    assert_eq!(read(&bench, "text"), "one");
    // Another pipeline's folder is not.
    let mut other = bench;
    other.name = "other".to_owned();
    add_publishing(&mut other, "two");
    let report = other.run();
    let error = out(&report, "a").error.as_ref().unwrap();
    assert!(
        error.message.ends_with("the pipeline `bench` published this folder"),
        "{}",
        error.message
    );
    assert_eq!(read(&other, "text"), "one");
}

#[test]
fn damaged_bytes_are_not_published() {
    let bench = publishing("one");
    bench.run();
    fs::remove_dir_all(bench.path("out")).unwrap();
    let store = bench.engine().store().clone();
    let blob = store.blob_path(&Digest::of_bytes(b"more"));
    let time = fs::metadata(&blob).unwrap().modified().unwrap();
    fs::set_permissions(&blob, Permissions::from_mode(0o644)).unwrap();
    fs::write(&blob, "mure").unwrap();
    // As a failing disk does it; what writes to a blob is seen sooner.
    fs::File::open(&blob).unwrap().set_modified(time).unwrap();
    let report = bench.run();
    let error = out(&report, "a").error.as_ref().unwrap();
    assert!(error.message.ends_with("the file `sub/more` is damaged in the store"), "{error:?}");
    assert!(files_below(&bench.path("out")).is_empty());
    store.verify().unwrap();
    assert_eq!(bench.run().exit_code(), 0);
    assert_eq!(read(&bench, "sub/more"), "more");
}

/// A run killed between putting the new folder in place and emptying the old one.
#[test]
fn a_publishing_that_was_cut_short_is_cleaned_up_by_a_run_that_has_nothing_to_do() {
    let bench = publishing("one");
    bench.run();
    let old = bench.path("out/.model.lora-flow-1-2-3");
    fs::create_dir_all(&old).unwrap();
    for entry in fs::read_dir(bench.path("out/model")).unwrap().flatten() {
        if entry.path().is_file() {
            fs::copy(entry.path(), old.join(entry.file_name())).unwrap();
        }
    }
    fs::write(old.join("notes"), "the user's").unwrap();
    let target = bench.path("out/model").canonicalize().unwrap();
    let lock = bench.store_dir().join("locks/publish-0.lock");
    fs::write(&lock, target.to_str().unwrap()).unwrap();
    let report = bench.run();
    assert_eq!(out(&report, "a").status, Status::Cached);
    assert!(!old.exists() && !lock.exists());
    assert_eq!(read(&bench, "notes"), "the user's");
}

#[test]
fn a_file_or_a_link_at_the_target() {
    let bench = publishing("one");
    fs::create_dir_all(bench.path("out")).unwrap();
    fs::write(bench.path("out/model"), "a file").unwrap();
    let report = bench.run();
    let error = out(&report, "a").error.as_ref().unwrap();
    assert!(error.message.ends_with("the target is a file"), "{}", error.message);
    fs::remove_file(bench.path("out/model")).unwrap();
    fs::create_dir_all(bench.path("elsewhere/real")).unwrap();
    std::os::unix::fs::symlink(bench.path("elsewhere/real"), bench.path("out/model")).unwrap();
    assert_eq!(bench.run().exit_code(), 0);
    assert!(bench.path("out/model").is_symlink());
    assert_eq!(fs::read_to_string(bench.path("elsewhere/real/text")).unwrap(), "one");
    assert_eq!(files_below(&bench.path("elsewhere")).len(), 4);
}

/// What is in the way of publishing, before anything ran.
fn in_the_way(bench: &Bench) -> Vec<String> {
    let engine = bench.engine();
    let found = engine.check_targets(&bench.plan(), &[], DeviceSpec::Cpu).unwrap();
    let root = bench.path("").display().to_string();
    found.iter().map(|d| d.to_string().replace(&root, "")).collect()
}

#[test]
fn occupied_targets_are_known_before_anything_runs() {
    let mut bench = publishing("one");
    bench.task("a").publish_spans = vec![Span::new(6, 11)];
    let target = bench.path("out/model");
    assert!(in_the_way(&bench).is_empty(), "nothing is there");
    fs::create_dir_all(bench.path("out")).unwrap();
    fs::write(&target, "a file").unwrap();
    assert_eq!(
        in_the_way(&bench),
        [
            "p.yaml:1:7: cannot publish to `out/model`: the target is a file\n  hint: `publish` names \
          a folder; the artifact's files are put into it"
        ]
    );
    fs::remove_file(&target).unwrap();
    fs::create_dir(&target).unwrap();
    assert!(in_the_way(&bench).is_empty(), "an empty folder");
    fs::write(target.join("text"), "precious").unwrap();
    let not_ours =
        ["p.yaml:1:7: cannot publish to `out/model`: the folder exists and lora-flow did \
                     not make it\n  hint: remove it, or publish to another folder"];
    assert_eq!(in_the_way(&bench), not_ours);
    // The very same content is taken for ours, once it is known.
    for (name, text) in [("text", "one"), ("one", "named by its content"), ("sub/more", "more")] {
        fs::create_dir_all(target.join("sub")).unwrap();
        fs::write(target.join(name), text).unwrap();
    }
    assert_eq!(in_the_way(&bench), not_ours);
    let kept = std::mem::take(&mut bench.task("a").publish);
    assert_eq!(bench.run().exit_code(), 0);
    bench.task("a").publish = kept;
    assert!(in_the_way(&bench).is_empty());
    assert_eq!(bench.run().exit_code(), 0);
    assert!(in_the_way(&bench).is_empty(), "it is ours now");
    bench.name = "other".to_owned();
    let of_another = in_the_way(&bench);
    assert!(of_another[0].contains("the pipeline `bench` published this folder"), "{of_another:?}");
    // A file where a folder on the way has to be.
    fs::remove_dir_all(bench.path("out")).unwrap();
    fs::write(bench.path("out"), "").unwrap();
    assert!(in_the_way(&bench)[0].contains("`out` is not a folder"));
    assert_eq!(bench.taken(), ["a"]);
}

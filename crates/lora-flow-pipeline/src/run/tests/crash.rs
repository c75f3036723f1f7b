//! Damage and death: what a killed process, a broken disk or a curious user may leave.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::bench::{Bench, files_below, out, text};
use crate::run::Status;
use crate::store::Store;

fn chain() -> Bench {
    let mut bench = Bench::new();
    bench.add("a", json!({ "n": "some text" }), &[]);
    bench.add("b", json!({ "n": 2 }), &["a"]);
    bench
}

fn overwrite(path: &PathBuf, bytes: &[u8]) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(path, bytes).unwrap();
}

/// The blob of `a`'s output.
fn blob_of_a(bench: &Bench) -> PathBuf {
    let report = bench.run();
    let engine = bench.engine();
    let entry = engine.store().peek(&out(&report, "a").key.unwrap()).unwrap();
    engine.store().blob_path(&entry.outputs["out"].manifest.files[0].digest)
}

#[test]
fn blobs_are_read_only() {
    let bench = chain();
    let mode = fs::metadata(blob_of_a(&bench)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o444);
}

#[test]
fn a_blob_of_the_wrong_size_or_missing_is_computed_again() {
    for missing in [false, true] {
        let bench = chain();
        let blob = blob_of_a(&bench);
        bench.taken();
        if missing {
            fs::remove_file(&blob).unwrap();
        } else {
            overwrite(&blob, b"cut");
        }
        assert_eq!(bench.explained()[0], "a: runs: entry was corrupt");
        let report = bench.run();
        assert_eq!(bench.taken(), ["a"], "`b` needs nothing: its input has the same bytes");
        assert_eq!(out(&report, "a").reasons, ["entry was corrupt"]);
        assert_eq!(text(&bench, &report, "a"), r#"{"n":"some text"}"#);
        let set_aside = files_below(&bench.store_dir().join("quarantine")).len();
        assert_eq!(set_aside, 1, "the entry; the blob gave way to a sound one");
        assert!(bench.engine().store().verify().unwrap().problems.is_empty());
    }
}

#[test]
fn a_run_sees_that_something_wrote_to_a_blob() {
    let bench = chain();
    let blob = blob_of_a(&bench);
    let whole = fs::read(&blob).unwrap();
    let mut bytes = whole.clone();
    bytes[3] ^= 1;
    overwrite(&blob, &bytes);
    bench.taken();
    assert_eq!(bench.explained()[0], "a: runs: entry was corrupt");
    // What takes the damaged input must not run before that is mended: its result would be wrong
    // under a right key.
    bench.engine().store().entry(&out(&bench.run(), "b").key.unwrap()).unwrap();
    assert_eq!(bench.taken(), ["a"]);
    assert_eq!(fs::read(&blob).unwrap(), whole);
    // Written to, but with the right bytes: read once, and not again.
    overwrite(&blob, &whole);
    let written = fs::metadata(&blob).unwrap().modified().unwrap();
    assert_eq!(bench.explained(), ["a: cached", "b: cached"]);
    assert_ne!(fs::metadata(&blob).unwrap().modified().unwrap(), written, "it is marked again");
}

#[test]
fn verify_finds_a_flipped_bit_and_the_next_run_mends_it() {
    let bench = chain();
    let blob = blob_of_a(&bench);
    let mut bytes = fs::read(&blob).unwrap();
    bytes[3] ^= 1;
    let time = fs::metadata(&blob).unwrap().modified().unwrap();
    overwrite(&blob, &bytes);
    fs::File::open(&blob).unwrap().set_modified(time).unwrap();
    bench.taken();
    assert_eq!(bench.executes(), [""; 0], "as a failing disk does it: only verification can tell");
    let report = bench.engine().store().verify().unwrap();
    assert_eq!(
        (report.blobs, report.entries, report.problems.len()),
        (2, 2, 2),
        "{:?}",
        report.problems
    );
    assert!(report.problems[0].contains("its bytes are not those of its name"));
    assert!(report.problems[1].contains("needs `text`, which is damaged"));
    assert_eq!(bench.executes(), ["a"]);
    assert!(bench.engine().store().verify().unwrap().problems.is_empty());
}

#[test]
fn a_damaged_entry_is_never_served() {
    let bench = chain();
    bench.run();
    let entries = files_below(&bench.store_dir().join("entries"));
    assert_eq!(entries.len(), 2);
    let whole = fs::read(&entries[0]).unwrap();
    let mut flipped = whole.clone();
    let place = flipped.len() / 2;
    flipped[place] ^= 4;
    for damaged in [flipped, whole[..whole.len() / 2].to_vec(), Vec::new()] {
        fs::write(&entries[0], &damaged).unwrap();
        bench.taken();
        assert_eq!(bench.executes().len(), 1);
        assert_eq!(bench.executes(), [""; 0]);
    }
    // An entry under a foreign key.
    fs::copy(&entries[1], &entries[0]).unwrap();
    assert_eq!(bench.executes().len(), 1);
    fs::write(&entries[0], "junk").unwrap();
    assert_eq!(bench.engine().store().verify().unwrap().problems.len(), 1);
}

#[test]
fn what_a_killed_run_left_does_not_matter() {
    let bench = chain();
    Store::open(&bench.store_dir()).unwrap();
    let store = bench.store_dir();
    let leave = |name: &str, text: &str| {
        let path = store.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    leave("tmp/123-4-5", "half an entry");
    leave("tmp/9-9-9/out/out/text", "half a result");
    leave("locks/store.lock", "");
    leave("runs/20200101-000000-0000/logs/a.log", "…");
    leave("last/bench.jsonl", "{\"task\":\"a\",\"key\":\"cut sho");
    leave("stat-cache.json", "{");
    // Blobs were renamed, the entry was not.
    leave("objects/ab/cdef", "orphan");
    assert_eq!(bench.executes(), ["a", "b"]);
    assert!(files_below(&store.join("tmp")).is_empty());
    assert_eq!(bench.executes(), [""; 0]);
    assert_eq!(bench.explained(), ["a: cached", "b: cached"]);
    // A lock's file without a holder.
    let key = out(&bench.run(), "a").key.unwrap();
    leave(&format!("locks/{key}.lock"), "");
    fs::remove_dir_all(store.join("entries")).unwrap();
    assert_eq!(bench.executes(), ["a", "b"]);
}

/// The process that dies in the next test; as a test of its own it does nothing.
#[test]
fn victim() {
    let Ok(dir) = std::env::var("LORA_FLOW_TEST_VICTIM") else { return };
    let bench = victims_pipeline(&PathBuf::from(dir));
    bench.run();
}

/// Tasks with some bytes of their own and some in common, one of them published.
fn victims_pipeline(dir: &Path) -> Bench {
    let mut bench = Bench::new();
    bench.root = Some(dir.to_owned());
    bench.options.jobs = 3;
    for i in 0..12 {
        bench.add_with(&format!("t{i}"), json!({ "i": i }), &[], move |cx| {
            let out = cx.output("out")?;
            out.write("text", format!("{i}").repeat(100_000))?;
            out.write("same", "shared by all")
        });
    }
    let publish = dir.join("published");
    bench.task("t3").publish.push(("out".to_owned(), publish));
    bench
}

#[test]
fn a_run_killed_at_any_instant_leaves_a_valid_store() {
    let exe = std::env::current_exe().unwrap();
    let start = |dir: &Path| {
        let mut command = std::process::Command::new(&exe);
        command.args(["--exact", "run::tests::crash::victim"]);
        command.env("LORA_FLOW_TEST_VICTIM", dir);
        command.stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    // How long a run takes that is left alone: the instants are parts of it, on any machine.
    let whole = {
        let dir = tempfile::tempdir().unwrap();
        let begun = std::time::Instant::now();
        assert!(start(dir.path()).wait().unwrap().success());
        begun.elapsed()
    };
    let mut died = 0;
    for round in 0..8 {
        let dir = tempfile::tempdir().unwrap();
        // Twice, so that the second starts from what the first left.
        for part in [0.1 + 0.1 * f64::from(round), 0.2 + 0.05 * f64::from(round)] {
            let mut child = start(dir.path());
            std::thread::sleep(whole.mul_f64(part));
            child.kill().unwrap();
            died += usize::from(!child.wait().unwrap().success());
        }
        let bench = victims_pipeline(dir.path());
        if dir.path().join(".lora-flow/format").exists() {
            let problems = bench.engine().store().verify().unwrap().problems;
            assert!(problems.is_empty(), "{problems:?}");
        }
        let report = bench.run();
        assert_eq!(report.exit_code(), 0, "{report:?}");
        assert_eq!(text(&bench, &report, "t7"), "7".repeat(100_000));
        let published = fs::read_to_string(dir.path().join("published/text")).unwrap();
        assert_eq!(published, "3".repeat(100_000));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside them");
        let after = bench.run();
        assert!(after.tasks.iter().all(|t| t.status == Status::Cached));
    }
    assert!(died >= 4, "{died} of 16 died early enough to test anything");
}

#[test]
fn whole_parts_of_the_store_may_vanish() {
    let bench = chain();
    for part in ["objects", "entries", "tmp", "locks", "last", "runs", "state"] {
        bench.run();
        fs::remove_dir_all(bench.store_dir().join(part)).unwrap();
        let report = bench.run();
        assert_eq!(report.exit_code(), 0, "without `{part}`");
        assert_eq!(text(&bench, &report, "a"), r#"{"n":"some text"}"#);
    }
}

#[test]
fn a_file_with_a_second_name_is_copied_into_the_store() {
    let mut bench = Bench::new();
    let outside = bench.path("outside");
    let link = outside.clone();
    bench.add_with("a", json!({}), &[], move |cx| {
        fs::write(&link, "linked")?;
        let out = cx.output("out")?;
        fs::hard_link(&link, out.path.join("text"))?;
        Ok(())
    });
    let report = bench.run();
    fs::write(&outside, "other!").unwrap();
    assert_eq!(out(&report, "a").status, Status::Ran);
    assert_eq!(text(&bench, &report, "a"), "linked");
}

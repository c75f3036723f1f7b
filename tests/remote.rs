//! The binary with a remote cache, a lock file, and a store to clean.

#[path = "support/mod.rs"]
mod support;

use support::Project;

const UNTIL: [&str; 2] = ["--target", "train_tokens"];

fn with<'a>(args: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [args, &UNTIL, more].concat()
}

#[test]
fn results_are_shared_through_a_folder() {
    let shared = tempfile::tempdir().unwrap();
    let url = format!("file://{}/cache", shared.path().display());
    let remote = ["--remote", url.as_str()];
    let (one, two) = (Project::new(), Project::new());
    one.expect(0, &with(&["run", "pipeline.yaml"], &remote));
    let plan = two.plan(&with(&[], &remote));
    assert!(plan.values().all(|(state, _)| state == "cached (remote)"), "{plan:?}");
    let status = two.expect(0, &with(&["status", "pipeline.yaml"], &remote)).stdout;
    assert!(status.contains("cached (remote)  docs\n"), "{status}");
    let why = two.expect(0, &[&["why", "pipeline.yaml", "docs"][..], &remote].concat()).stdout;
    assert!(why.starts_with("docs: cached (remote)\n"), "{why}");
    // By the variable too.
    let mut run = two.command(&with(&["run", "pipeline.yaml"], &[]));
    let ran: support::Ran = run.env("LORA_FLOW_REMOTE", &url).output().unwrap().into();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(ran.stdout.matches("cached (remote)").count(), 3, "{}", ran.stdout);
    // What another run made is sent on demand.
    std::fs::remove_dir_all(shared.path().join("cache")).unwrap();
    let sent = two.expect(0, &[&["cache", "push"][..], &remote].concat()).stdout;
    assert!(sent.starts_with("sent 3 entries to file://"), "{sent}");
    two.expect(2, &["cache", "push"]);
    let bad = two.expect(2, &with(&["run", "pipeline.yaml"], &["--remote", "ftp://x/y"])).stderr;
    assert!(bad.contains("bad remote cache `ftp://x/y`"), "{bad}");
}

#[test]
fn a_remote_that_is_away_is_one_warning() {
    let project = Project::new();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut run =
        project.command(&with(&["run", "pipeline.yaml"], &["--remote", "s3://bucket/prefix"]));
    run.env("AWS_ENDPOINT_URL", format!("http://{nobody}"));
    run.env("AWS_ACCESS_KEY_ID", "x").env("AWS_SECRET_ACCESS_KEY", "y");
    let ran: support::Ran = run.output().unwrap().into();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let warning = "the run goes on without the remote cache `s3://bucket/prefix`: ";
    assert_eq!(ran.stderr.matches(warning).count(), 1, "{}", ran.stderr);
    assert_eq!(ran.stderr.matches("WARN").count(), 1, "{}", ran.stderr);
}

#[test]
fn a_locked_run_insists_on_its_inputs() {
    let project = Project::new();
    let run = with(&["run", "pipeline.yaml", "--locked"], &[]);
    let missing = project.expect(2, &run).stderr;
    assert!(missing.contains("there is no lock file `pipeline.lock`"), "{missing}");
    project.expect(0, &["lock", "pipeline.yaml"]);
    project.expect(0, &run);
    let docs = std::fs::read_to_string(project.path("data/docs.jsonl")).unwrap();
    project.write("data/docs.jsonl", docs.replacen('a', "b", 1));
    let refused = project.expect(2, &run).stderr;
    assert!(refused.contains("file `data/docs.jsonl` differs: pinned "), "{refused}");
    assert!(refused.contains("(pipeline.yaml:11:"), "{refused}");
    assert!(refused.contains("nothing was run"), "{refused}");
    project.expect(0, &with(&["run", "pipeline.yaml", "--update-lock"], &[]));
    project.expect(0, &run);
}

#[test]
fn an_occupied_target_is_refused_before_anything_runs() {
    let project = Project::new();
    project.write("out/merged/thesis.txt", "precious");
    let refused = project.expect(2, &["run", "pipeline.yaml"]).stderr;
    assert!(refused.contains("the folder exists and lora-flow did not make it"), "{refused}");
    assert!(refused.contains("(pipeline.yaml:") && refused.contains("nothing was run"));
    assert!(project.plan(&[]).values().all(|(state, _)| state != "cached"));
}

#[test]
fn the_store_is_cleaned_by_size_and_pins_stay() {
    let project = Project::new();
    project.expect(0, &with(&["run", "pipeline.yaml"], &[]));
    project.expect(0, &["cache", "pin", "latest"]);
    let pinned = project.expect(0, &["cache", "pin"]).stdout;
    let gc = ["cache", "gc", "--max-size", "1K"];
    let kept = project.expect(0, &gc);
    assert!(kept.stdout.contains("freed 0 B in 0 entries"), "{}", kept.stdout);
    assert!(kept.stderr.contains("they are pinned or in use"), "{}", kept.stderr);
    project.expect(0, &["cache", "unpin", pinned.trim()]);
    let would = project.expect(0, &[&gc[..], &["--dry-run"]].concat()).stdout;
    assert!(would.contains("tokenize") && would.contains("would free"), "{would}");
    let freed = project.expect(0, &gc).stdout;
    assert_eq!(freed.replace("freed", "would free"), would);
    project.expect(0, &with(&["run", "pipeline.yaml"], &[]));
}

//! Commands around a run: what CI reads of it, and how two runs compare.

#[path = "support/mod.rs"]
mod support;

use serde_json::Value;
use support::Project;

#[test]
fn diff_shows_what_changed_and_by_how_much() {
    let project = Project::new();
    let until = ["--target", "after"];
    let run = |set: &str| {
        let args: Vec<&str> =
            ["run", "pipeline.yaml", "--set", set].iter().chain(&until).copied().collect();
        project.expect(0, &args);
        project.latest()["run_id"].as_str().unwrap().to_owned()
    };
    let (a, b) = (run("learning_rate=0.004"), run("learning_rate=0.002"));
    let shown = project.expect(0, &["diff", &a, &b]).stdout;
    assert!(shown.contains("train.with.learning_rate") && shown.contains("-50.00 %"), "{shown}");
    assert!(!shown.contains("max_steps"), "{shown}");
    let json =
        |args: &[&str]| -> Value { serde_json::from_str(&project.expect(0, args).stdout).unwrap() };
    let diff = json(&["diff", &a, &b, "--json"]);
    let names = |section: &str| -> Vec<String> {
        let rows = diff[section].as_array().unwrap();
        rows.iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names("parameters"), ["params.learning_rate", "train.with.learning_rate"]);
    assert!(names("metrics").contains(&"after.perplexity".to_owned()), "{diff}");
    let all = json(&["diff", &a, &b, "--json", "--all"]);
    assert!(all["parameters"].as_array().unwrap().len() > 10);
    assert!(project.expect(0, &["diff", &a, &a]).stdout.contains("no differences"));
}

#[test]
fn ci_leaves_a_junit_report_and_a_summary() {
    let project = Project::new();
    project.edit("pipeline.yaml", "candidate.perplexity < ", "candidate.perplexity < 0.01 * ");
    project.write("summary.md", "before\n");
    let mut command = project.command(&["run", "pipeline.yaml", "--ci"]);
    command.env("GITHUB_STEP_SUMMARY", project.path("summary.md"));
    assert_eq!(command.output().unwrap().status.code(), Some(3));
    let xml = std::fs::read_to_string(project.path("lora-flow-junit.xml")).unwrap();
    assert_eq!(xml.matches("<testcase ").count(), 10, "{xml}");
    assert!(xml.contains("type=\"denied\"") && xml.contains("0.01 * baseline.perplexity"), "{xml}");
    assert!(xml.contains("<skipped message="), "{xml}");
    let summary = std::fs::read_to_string(project.path("summary.md")).unwrap();
    assert!(summary.starts_with("before\n## tiny: ⛔ a gate said no"), "{summary}");
    assert!(summary.contains("| merged | merge | skipped |"), "{summary}");
    assert!(summary.contains("### gate\n\n```text\n"), "{summary}");
    project.expect(3, &["run", "pipeline.yaml", "--ci", "--junit", "reports/run.xml"]);
    assert!(project.path("reports/run.xml").is_file());
    project.expect(2, &["run", "pipeline.yaml", "--junit", "run.xml"]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let project = Project::empty();
    let mut command = project.command(&["tasks", "--markdown"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command.stdout(writer).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), stderr.as_ref()), (Some(0), ""));
}

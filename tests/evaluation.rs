//! Evaluation and gates through the binary: several models on one base, paired rules, accepted runs,
//! what CI gets, and mistakes in task files.

#[path = "support/mod.rs"]
mod support;

use serde_json::{Value, json};
use support::{Project, documents};

const PLAIN: &str = "\
task: plain
dataset_path: json
dataset_kwargs: { data_files: { test: data/plain.jsonl } }
test_split: test
output_type: loglikelihood_rolling
doc_to_text: \"\"
doc_to_target: text
";

const WORDS: &str = "\
task: words
dataset_path: json
dataset_kwargs: { data_files: { test: data/words.jsonl } }
test_split: test
output_type: multiple_choice
doc_to_text: \"{{begin}}\"
doc_to_target: gold
doc_to_choice: \"{{ [one, two] }}\"
target_delimiter: \" \"
";

const GATE: &str = r#"  scores:
    uses: evaluate-tasks
    inputs: { model: base, tuned: train.adapter }
    with: { tasks: [ evals/*.yaml ], data_files: [ data ], models: [ base, tuned ], max_length: 100 }
  gate:
    uses: gate
    inputs: { candidate: scores.tuned, baseline: scores.base, adapter: train.adapter, training: train.metrics, rows: docs.train }
    with:
      require: [ "candidate.words.acc > baseline.words.acc" ]
      improves:
        - { metric: words.acc }
        - { metric: plain.bits_per_byte, margin: 0.1 }
      not_worse: [ { metric: words.acc_norm, margin: 0.05 } ]
      budget: [ { of: adapter, max: 1MB }, { of: training, metric: peak_rss_bytes, max: 64GB } ]
      no_contamination: [ { train: rows, eval: candidate } ]
"#;

/// The project with two task files instead of perplexities.
fn project() -> Project {
    let project = Project::new();
    let text = std::fs::read_to_string(project.path("pipeline.yaml")).unwrap();
    let (head, rest) = text.split_once("  before:\n").unwrap();
    let merged = &rest[rest.find("  merged:\n").unwrap()..];
    project
        .write("pipeline.yaml", format!("{head}{GATE}{merged}").replace("steps: 12", "steps: 30"));
    project.write("evals/plain.yaml", PLAIN);
    project.write("evals/words.yaml", WORDS);
    // The same words, with others between them, so that no row shares a long run with the training.
    let plain = documents(20);
    let plain = plain.lines().enumerate().map(|(i, line)| {
        let row: Value = serde_json::from_str(line).unwrap();
        let words = row["text"].as_str().unwrap().split(' ').enumerate();
        let words: Vec<String> = words
            .map(|(j, w)| if j % 4 == 3 { format!("{w} n{i}") } else { w.to_owned() })
            .collect();
        json!({ "id": i, "text": words.join(" ") }).to_string() + "\n"
    });
    project.write("data/plain.jsonl", plain.collect::<String>());
    // Words as in the training text against capitals that never stand there.
    let words = (0..40).map(|i| {
        let (begin, next) =
            [("the", "scheduler"), ("a", "worker"), ("one", "artifact"), ("every", "key")][i % 4];
        let (gold, other) = (i / 4 % 2, next.to_uppercase());
        let pair = if gold == 0 { (next.to_owned(), other) } else { (other, next.to_owned()) };
        let row =
            json!({ "begin": format!("{i} {begin}"), "one": pair.0, "two": pair.1, "gold": gold });
        row.to_string() + "\n"
    });
    project.write("data/words.jsonl", words.collect::<String>());
    project
}

fn verdict(project: &Project) -> Value {
    let shown = project.expect(0, &["gate", "explain", "latest", "--json"]);
    serde_json::from_str::<Value>(&shown.stdout).unwrap()["gate"].clone()
}

#[test]
fn a_gate_of_paired_rules_passes_is_explained_and_accepted() {
    let project = project();
    project.expect(0, &["run", "pipeline.yaml"]);
    let json = verdict(&project);
    assert_eq!((&json["passed"], &json["outcome"]), (&json!(true), &json!("pass")), "{json:#}");
    let rules = json["rules"].as_array().unwrap();
    assert_eq!(rules.len(), 7);
    let improves = &rules[1];
    assert_eq!(improves["pointer"], "/improves/0");
    let details = &improves["details"];
    assert_eq!(details["test"], "mcnemar_exact");
    assert_eq!(details["n"], 40);
    let difference = details["candidate"]["value"].as_f64().unwrap()
        - details["baseline"]["value"].as_f64().unwrap();
    let flips = details["gained"].as_f64().unwrap() - details["lost"].as_f64().unwrap();
    assert!((difference - flips / 40.0).abs() < 1e-9);
    let explained = project.expect(0, &["gate", "explain"]).stdout;
    for part in
        ["gate says yes", "McNemar", "gained", "interval", "no_contamination", "scores.tuned"]
    {
        assert!(explained.contains(part), "{part}: {explained}");
    }

    // The accepted run is small, stays the same, and is what a later run is held against.
    project.expect(0, &["accept", "latest", "--file", "baselines/tiny.json"]);
    let accepted = std::fs::read_to_string(project.path("baselines/tiny.json")).unwrap();
    assert!(accepted.len() < 64 * 1024, "{}", accepted.len());
    let diff = project.expect(0, &["diff", "baselines/tiny.json", "latest"]).stdout;
    assert!(!diff.contains("scores.tuned.words.acc "), "{diff}");
    project.edit(
        "pipeline.yaml",
        "      budget:",
        "      max_regression: [ { metric: words.acc, margin: 0.02 } ]\n      accepted: baselines/tiny.json\n      budget:",
    );
    project.expect(0, &["run", "pipeline.yaml"]);
    assert_eq!(verdict(&project)["outcome"], "pass");

    // One training step gives back what was gained.
    let ran = project.expect(3, &["run", "pipeline.yaml", "--set", "steps=1"]);
    assert!(ran.stdout.contains("max_regression"), "{}", ran.stdout);
    let json = verdict(&project);
    let rule = json["rules"].as_array().unwrap().iter().find(|r| r["kind"] == "max_regression");
    assert_eq!(rule.unwrap()["outcome"], "fail", "{json:#}");
    let refused = project.expect(2, &["accept"]);
    assert!(refused.stderr.contains("says no"), "{}", refused.stderr);
    let diff = project.expect(0, &["diff", "baselines/tiny.json", "latest"]).stdout;
    assert!(diff.contains("scores.tuned.words.acc"), "{diff}");

    // Another task file is another question: refused, not compared.
    project.edit("evals/words.yaml", "{{begin}}", "So {{begin}}");
    let ran = project.expect(1, &["run", "pipeline.yaml"]);
    assert!(
        ran.stderr.contains("cannot be compared") && ran.stderr.contains("doc_to_text"),
        "{}",
        ran.stderr
    );
}

#[test]
fn perplexities_of_tokens_are_compared_by_document() {
    let project = Project::new();
    project.edit(
        "pipeline.yaml",
        "      require: [ \"candidate.perplexity < baseline.perplexity\" ]",
        "      improves: [ { metric: perplexity } ]\n      not_worse: [ { metric: loss, margin: 0.01 } ]",
    );
    project.expect(0, &["run", "pipeline.yaml"]);
    let json = verdict(&project);
    let details = &json["rules"][0]["details"];
    assert_eq!(details["test"], "paired_bootstrap", "{json:#}");
    assert_eq!(details["higher_is_better"], false);
    assert!(details["interval"][1].as_f64().unwrap() < 0.0, "{json:#}");
    // Rows that differ are no pairs.
    project.edit(
        "pipeline.yaml",
        "adapter: train.adapter, eval: eval_tokens }",
        "adapter: train.adapter, eval: eval_tokens }\n    with: { limit: 7 }",
    );
    let ran = project.expect(1, &["run", "pipeline.yaml"]);
    assert!(ran.stderr.contains("cannot be compared on `perplexity`"), "{}", ran.stderr);
}

#[test]
fn too_few_samples_block_or_warn_as_the_pipeline_says_and_ci_sees_it() {
    let project = project();
    project.edit("pipeline.yaml", "max_length: 100", "max_length: 100, limit: 4");
    project.edit(
        "pipeline.yaml",
        "      require: [ \"candidate.words.acc > baseline.words.acc\" ]\n",
        "",
    );
    let mut command = project.command(&["run", "pipeline.yaml", "--ci"]);
    command.env("GITHUB_ACTIONS", "true").env("GITLAB_CI", "true");
    command.env("GITHUB_STEP_SUMMARY", project.path("summary.md"));
    let ran: support::Ran = command.output().unwrap().into();
    assert_eq!(ran.code, 3, "{}\n{}", ran.stdout, ran.stderr);
    assert_eq!(verdict(&project)["outcome"], "inconclusive");
    // The annotation stands at the rule's own line.
    let text = std::fs::read_to_string(project.path("pipeline.yaml")).unwrap();
    let line = text.lines().position(|l| l.contains("- { metric: words.acc }")).unwrap() + 1;
    let expected = format!("::error file=pipeline.yaml,line={line},");
    assert!(ran.stderr.contains(&expected), "{expected}: {}", ran.stderr);
    let junit = std::fs::read_to_string(project.path("lora-flow-junit.xml")).unwrap();
    assert!(junit.contains("<testsuite name=\"tiny.gate\""), "{junit}");
    assert!(junit.contains("type=\"inconclusive\""), "{junit}");
    let summary = std::fs::read_to_string(project.path("summary.md")).unwrap();
    assert!(
        summary.contains("❓ blocks") && summary.contains("| metric | before | after |"),
        "{summary}"
    );
    let quality = std::fs::read_to_string(project.path("gl-code-quality-report.json")).unwrap();
    let quality: Value = serde_json::from_str(&quality).unwrap();
    assert_eq!(quality[0]["location"]["path"], "pipeline.yaml");

    project.edit("pipeline.yaml", "      budget:", "      inconclusive: warn\n      budget:");
    let ran = project.expect(0, &["run", "pipeline.yaml"]);
    assert!(ran.stderr.contains("not enough samples to tell"), "{}", ran.stderr);
}

#[test]
fn contaminated_rows_are_listed_and_deny() {
    let project = project();
    let train = std::fs::read_to_string(project.path("data/docs.jsonl")).unwrap();
    let plain = std::fs::read_to_string(project.path("data/plain.jsonl")).unwrap();
    project.write("data/plain.jsonl", format!("{plain}{train}"));
    project.expect(3, &["run", "pipeline.yaml"]);
    let json = verdict(&project);
    let rule = json["rules"].as_array().unwrap().iter().find(|r| r["kind"] == "no_contamination");
    let details = &rule.unwrap()["details"];
    assert_eq!(details["seen_exactly"], details["train_rows"], "{details:#}");
    assert!(details["seen"].as_u64() >= details["train_rows"].as_u64(), "{details:#}");
    assert!(details["rows"][0]["train_row"].as_str().unwrap().contains("row"), "{details:#}");
    assert!(details["scores"]["plain.bits_per_byte"]["clean"].is_number(), "{details:#}");
}

#[test]
fn mistakes_in_task_files_are_found_before_anything_runs() {
    let project = project();
    project.edit("evals/words.yaml", "multiple_choice", "generate_untl");
    project.edit("evals/plain.yaml", "doc_to_target: text", "doc_to_target: \"{{text\"");
    let ran = project.expect(2, &["check", "pipeline.yaml"]);
    for place in
        ["evals/words.yaml:5:14", "evals/plain.yaml:7:16", "did you mean `generate_until`?"]
    {
        assert!(ran.stderr.contains(place), "{place}: {}", ran.stderr);
    }
    assert!(!project.path(".lora-flow").exists());

    // A column that the rows lack, and a split without rows, name file and line as well.
    let project = self::project();
    project.edit("evals/words.yaml", "{{begin}}", "{{beginn}}");
    let target = ["run", "pipeline.yaml", "--target", "scores"];
    let ran = project.expect(1, &target);
    for part in ["words.yaml:6:14", "`beginn`", "did you mean `begin`?", "words.jsonl` row 1"] {
        assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
    }
    let project = self::project();
    project.edit("evals/words.yaml", "gold", "one");
    project.edit("evals/words.yaml", "[one, two]", "[two, two]");
    let ran = project.expect(1, &target);
    assert!(ran.stderr.contains("none of its 2 choices"), "{}", ran.stderr);
    let project = self::project();
    project.edit("evals/plain.yaml", "test_split: test", "test_split: tst");
    let ran = project.expect(1, &target);
    assert!(ran.stderr.contains("there is no split `tst`"), "{}", ran.stderr);
    assert!(ran.stderr.contains("did you mean `test`?"), "{}", ran.stderr);
    let project = self::project();
    project.write("data/words.jsonl", "");
    let ran = project.expect(1, &target);
    assert!(ran.stderr.contains("words.jsonl"), "{}", ran.stderr);
    assert!(ran.stderr.contains("empty"), "{}", ran.stderr);
}

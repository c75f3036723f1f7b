//! The HTML report: whole, self-contained, and with the numbers that the store has.

#[path = "support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::process::Command;

use regex::Regex;
use serde_json::Value;
use support::Project;

/// Two runs of the project that differ in the learning rate.
fn two_runs(project: &Project) -> [String; 2] {
    ["learning_rate=0.004", "learning_rate=0.002"].map(|set| {
        project.expect(0, &["run", "pipeline.yaml", "--set", set]);
        project.latest()["run_id"].as_str().unwrap().to_owned()
    })
}

const WORDS: &str = "\
task: words
dataset_path: json
dataset_kwargs: { data_files: { test: data/words.jsonl } }
test_split: test
output_type: multiple_choice
doc_to_text: \"Which word follows?\\n{{begin}}\"
doc_to_target: gold
doc_to_choice: \"{{ [one, two] }}\"
";

/// What one question shares with the training rows.
const COPIED: &str = "Hm: what DOES a worker read";

/// The project with a task of forty questions to base and adapter, `scores.base` and `scores.tuned`,
/// and with prompts of which only the completion is learnt.
fn with_questions() -> Project {
    let project = Project::new();
    project.edit(
        "pipeline.yaml",
        "  gate:\n",
        "  scores:\n    uses: evaluate-tasks\n    inputs: { model: base, tuned: train.adapter }\n    \
         with: { tasks: [evals/words.yaml], data_files: [data], models: [base, tuned] }\n  \
         pairs:\n    uses: ingest\n    with: { files: data/pairs.jsonl }\n  \
         pair_tokens:\n    uses: tokenize\n    inputs: { dataset: pairs, model: base }\n    \
         with: { format: prompt-completion, max_length: 512 }\n  \
         copied:\n    uses: contamination\n    inputs: { train: pairs, eval: scores.tuned }\n    \
         with: { ngram: 4 }\n  gate:\n",
    );
    project.write("evals/words.yaml", WORDS);
    let words = (0..40).map(|i| {
        let (begin, next) =
            [("the", "scheduler"), ("a", "worker"), ("one", "artifact"), ("every", "key")][i % 4];
        let (gold, other) = (i / 4 % 2, next.to_uppercase());
        let pair = if gold == 0 { (next.to_owned(), other) } else { (other, next.to_owned()) };
        let row = serde_json::json!({
            "begin": if i == 7 { COPIED.to_owned() } else { format!("{i}. {begin} <b>") }, "one": pair.0, "two": pair.1, "gold": gold
        });
        format!("{row}\n")
    });
    project.write("data/words.jsonl", words.collect::<String>());
    let pairs = (1..30).map(|i| {
        let prompt = "What does a worker read? ".repeat(1 + i % 7);
        let row =
            serde_json::json!({ "prompt": prompt, "completion": "its inputs & <nothing> else" });
        format!("{row}\n")
    });
    project.write("data/pairs.jsonl", pairs.collect::<String>());
    project
}

/// Metrics of a run by `task.name`, as `diff` reads them from the store.
fn metrics(project: &Project, run: &str) -> BTreeMap<String, f64> {
    let out = project.expect(0, &["diff", run, run, "--all", "--json"]).stdout;
    let diff: Value = serde_json::from_str(&out).unwrap();
    let rows = diff["metrics"].as_array().unwrap().iter();
    rows.filter_map(|r| Some((r["name"].as_str()?.to_owned(), r["a"].as_f64()?))).collect()
}

/// Cells of a page by `task.metric`: the number behind the cell and the text in it.
fn cells(html: &str) -> BTreeMap<String, (f64, String)> {
    let cell = Regex::new(
        r#"<td[^>]*data-task="([^"]+)" data-metric="([^"]+)" data-value="([^"]+)"[^>]*>([^<]*)"#,
    )
    .unwrap();
    let found = cell.captures_iter(html);
    found
        .map(|c| (format!("{}.{}", &c[1], &c[2]), (c[3].parse().unwrap(), c[4].trim().to_owned())))
        .collect()
}

/// Every number of the store is on the page, and rounded right.
fn assert_numbers(html: &str, metrics: &BTreeMap<String, f64>) {
    let cells = cells(html);
    for (name, value) in metrics.iter().filter(|(name, _)| !name.ends_with("_stderr")) {
        let (raw, text) = cells.get(name).unwrap_or_else(|| panic!("{name} is not on the page"));
        assert_eq!(raw, value, "{name}");
        let read: f64 = text.parse().unwrap_or_else(|_| panic!("{name} shows `{text}`"));
        assert!((read - value).abs() <= 5.1e-5 * value.abs(), "{name}: {text} for {value}");
    }
    assert!(cells.len() > 10, "{cells:?}");
}

#[test]
fn the_page_has_the_numbers_of_the_store_and_needs_nothing_else() {
    let project = Project::new();
    let [run, _] = two_runs(&project);
    project.expect(0, &["report", &run, "-o", "pages/run.html"]);
    let html = std::fs::read_to_string(project.path("pages/run.html")).unwrap();
    assert_numbers(&html, &metrics(&project, &run));
    assert!(html.contains("data-gate=\"gate\""), "{html}");
    for task in ["base", "train", "gate", "merged"] {
        assert!(html.contains(&format!("<td>{task}</td>")), "{task}");
    }
    let outside = Regex::new(r#"(?:src|href)="(?:https?:)?//|url\(|@import"#).unwrap();
    assert!(!outside.is_match(&html));
    let json = html.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
    let data: Value = serde_json::from_str(json).unwrap();
    assert_eq!(data[0]["id"], Value::from(run.as_str()));
    assert_eq!(data[0]["outcome"], "done");
    // Without `-o` it goes beside the user, and `-` is standard output.
    let shown = project.expect(0, &["report", &run, "-o", "-"]).stdout;
    assert_eq!(shown, html);
    project.expect(2, &["report", "nosuchrun"]);
}

#[test]
fn several_runs_stand_side_by_side() {
    let project = Project::new();
    let [a, b] = two_runs(&project);
    let html = project.expect(0, &["report", &a, &b, "-o", "-"]).stdout;
    assert!(html.contains("2 runs compared"), "{html}");
    let differing = html.split("Parameters that differ").nth(1).unwrap();
    let differing = differing.split("</table>").next().unwrap();
    assert!(differing.contains("params.learning_rate"), "{differing}");
    assert!(!differing.contains("max_steps"), "{differing}");
    assert_eq!(html.matches("<details class=\"run\"").count(), 2);
}

#[test]
fn text_of_the_data_stays_text() {
    let project = Project::new();
    let evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> ⟦ & more words here";
    let rows: String = (0..48)
        .map(|i| format!("{}\n", serde_json::json!({ "id": i, "text": format!("{i} {evil}") })))
        .collect();
    project.write("data/docs.jsonl", rows);
    let ran = project.run(&["run", "pipeline.yaml", "--target", "train"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let html = project.expect(0, &["report", "-o", "-"]).stdout;
    assert!(html.contains("&lt;img src=x onerror"), "the example is on the page");
    assert!(!html.contains("<script>alert") && !html.contains("<img src=x"));
    assert_eq!(html.matches("</script>").count(), 1);
}

#[test]
fn answers_stand_side_by_side_and_an_example_shows_what_is_learnt() {
    let project = with_questions();
    project.expect(0, &["run", "pipeline.yaml"]);
    let html = project.expect(0, &["report", "-o", "-"]).stdout;
    assert_numbers(&html, &metrics(&project, "latest"));
    let json = html.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
    let data: Value = serde_json::from_str(json).unwrap();
    let samples = &data[0]["samples"][0];
    assert_eq!(samples["models"], serde_json::json!(["scores.base", "scores.tuned"]));
    let accuracy = |name: &str| metrics(&project, "latest")[&format!("scores.{name}.words.acc")];
    let flips = samples["differing"].as_f64().unwrap();
    assert!(flips >= 40.0 * (accuracy("tuned") - accuracy("base")).abs() - 1e-9 && flips > 0.0);
    let rows = samples["rows"].as_array().unwrap();
    assert_eq!((samples["questions"].as_u64(), rows.len()), (Some(40), 12));
    for (row, differs) in rows.iter().zip((0..).map(|i| f64::from(i) < flips)) {
        let right: Vec<&Value> =
            row["answers"].as_array().unwrap().iter().map(|a| &a["correct"]).collect();
        assert_eq!(right[0] != right[1], differs, "{row}");
        for answer in row["answers"].as_array().unwrap() {
            assert_eq!(answer["correct"], answer["text"] == row["target"], "{row}");
        }
    }
    assert_eq!(html.matches("<article class=\"sample\"").count(), 12);
    assert!(html.contains("</span>\nWhich word follows?\n"), "{html}");
    assert!(html.contains("&lt;b&gt;") && !html.contains("<b>"), "text stays text");

    // The one row that the training has seen, found by its words, and the metrics without it.
    let copied = &data[0]["contamination"][0];
    assert_eq!((&copied["task"], &copied["metrics"]["seen"]), (&"copied".into(), &1.into()));
    assert_eq!(copied["metrics"]["share"], 1.0 / 40.0);
    let row = &copied["found"]["rows"][0];
    assert_eq!(row["row"], "words row 8");
    assert_eq!((&row["exact"], &row["shared"]), (&false.into(), &"what does a worker".into()));
    assert_eq!(copied["found"]["scores"]["words.acc"]["clean_rows"], 39);
    assert!(html.contains("<td>words row 8</td>") && html.contains("what does a worker"), "{html}");

    // The example is the row, and what is learnt of it the completion and the end.
    let example = html.split("data-example=\"pair_tokens.tokens\">").nth(1).unwrap();
    let example = example.split("</pre>").next().unwrap();
    let text = |pattern: &str| {
        let found = Regex::new(pattern).unwrap();
        let joined: String = found.captures_iter(example).map(|c| c[1].to_owned()).collect();
        joined.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    };
    assert_eq!(text("<span class=\"learnt\">([^<]*)<"), "its inputs & <nothing> else<|end|>");
    assert_eq!(text("<span>([^<]*)<"), "What does a worker read? ".repeat(2));
    let mut tokens = data[0]["data"].as_array().unwrap().iter();
    let tokens = tokens.rfind(|d| d["name"] == "pair_tokens.tokens").unwrap();
    let bars = tokens["statistics"]["histogram"].as_array().unwrap().iter();
    let drawn: u64 = bars.map(|b| b["documents"].as_u64().unwrap()).sum();
    assert_eq!(Value::from(drawn), tokens["facts"]["documents"]);
}

/// Opens the page in a real browser: `LORA_FLOW_CHROMIUM=/usr/bin/chromium cargo test -p lora-flow
/// --test report -- --include-ignored`. Screenshots go to `LORA_FLOW_SCREENSHOTS`, if it is set.
#[test]
#[ignore = "needs a Chromium, named by LORA_FLOW_CHROMIUM"]
fn a_browser_shows_the_same_numbers_without_an_error() {
    let chromium = std::env::var("LORA_FLOW_CHROMIUM").expect("LORA_FLOW_CHROMIUM");
    let project = with_questions();
    let [a, b] = two_runs(&project);
    project.expect(0, &["report", &a, "-o", "one.html"]);
    project.expect(0, &["report", &a, &b, "-o", "two.html"]);
    let shots = std::env::var_os("LORA_FLOW_SCREENSHOTS").map(std::path::PathBuf::from);
    for page in ["one", "two"] {
        let url = format!("file://{}", project.path(&format!("{page}.html")).display());
        for (look, size, dark) in [
            ("light", "1100,5000", false),
            ("dark", "1100,5000", true),
            ("phone", "400,5000", false),
        ] {
            // A browser that hangs must not hold the test.
            let mut browser = Command::new("timeout");
            browser
                .args(["--kill-after=5", "60", chromium.as_str()])
                .args([
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--no-first-run",
                    "--hide-scrollbars",
                ])
                .args(["--disable-background-networking", "--disable-component-update"])
                .args(["--disable-sync", "--disable-quic", "--enable-logging=stderr"])
                .arg(format!("--user-data-dir={}", project.path("browser").display()))
                .arg(format!("--window-size={size}"))
                .arg("--dump-dom");
            if dark {
                browser.arg("--force-dark-mode");
            }
            if let Some(shots) = &shots {
                std::fs::create_dir_all(shots).unwrap();
                let file = shots.join(format!("{page}-{look}.png"));
                browser.arg(format!("--screenshot={}", file.display()));
            }
            let out = browser.arg(&url).output().unwrap();
            assert!(out.status.success());
            let (dom, log) =
                (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
            let console: Vec<&str> = log.lines().filter(|l| l.contains("CONSOLE")).collect();
            assert!(console.is_empty(), "{console:?}");
            if page == "one" {
                assert_numbers(&dom, &metrics(&project, &a));
            }
        }
    }
}

//! Every rule of a gate with results that let it pass, deny it and leave it open; with numbers that are
//! missing, on which none may pass; and with results that are not comparable, which are refused. All
//! through `Gate::run`, over artifacts such as the other kinds write.

use arrow_array::builder::{Float64Builder, ListBuilder};
use arrow_array::{ArrayRef, Float64Array, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use tempfile::TempDir;

use super::*;

/// Results of a task `t` on rows `row 0`, `row 1`, …
#[derive(Clone)]
struct Results {
    /// Right or wrong.
    acc: Vec<Option<f64>>,
    /// Of the answer, of ten tokens.
    loglikelihood: Vec<Option<f64>>,
    prediction: Vec<Option<String>>,
    metrics: Value,
    samples: bool,
}

impl Results {
    fn new(right: &[bool]) -> Self {
        let n = right.len();
        let loglikelihood = (0..n).map(|i| Some(-20.0 - (i % 7) as f64)).collect();
        let mut results = Self {
            acc: right.iter().map(|r| Some(f64::from(u8::from(*r)))).collect(),
            loglikelihood,
            prediction: (0..n).map(|i| Some(format!("answer {i}"))).collect(),
            metrics: json!({
                "t.samples": n, "peak_rss_bytes": 5e8, "tokens_per_second": 900.0,
                "meta": {
                    "data": "rows", "tokenizer": "bytes", "prompts": { "apply_chat_template": false },
                    "tasks": { "t": { "rows": "r", "prompts": "p", "config": { "doc_to_text": "q" } } },
                    "metrics": {
                        "t.acc": { "task": "t", "statistic": "mean", "higher_is_better": true, "columns": ["acc"] },
                        "t.loss": { "task": "t", "statistic": "weighted_loss", "higher_is_better": false,
                                    "columns": ["loglikelihood", "tokens"] },
                    },
                },
            }),
            samples: true,
        };
        results.total();
        results
    }

    /// A loss lower or higher by so much a token, not quite the same in all rows.
    fn worse_by(mut self, nats: f64) -> Self {
        for (i, ll) in self.loglikelihood.iter_mut().enumerate() {
            *ll = ll.map(|l| l - 10.0 * nats * (1.0 + 0.02 * (i % 5) as f64));
        }
        self.total();
        self
    }

    fn total(&mut self) {
        let n = self.acc.len() as f64;
        let acc: f64 = self.acc.iter().flatten().sum();
        let loss: f64 = self.loglikelihood.iter().flatten().sum();
        self.metrics["t.acc"] = json!(acc / n);
        self.metrics["t.loss"] = json!(-loss / (10.0 * n));
    }

    fn with(mut self, change: impl Fn(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn write(&self, folder: &Path) {
        fs_err::create_dir_all(folder).unwrap();
        fs_err::write(folder.join("metrics.json"), self.metrics.to_string()).unwrap();
        if !self.samples {
            return;
        }
        let n = self.acc.len();
        let text = |f: &dyn Fn(usize) -> String| -> ArrayRef {
            Arc::new((0..n).map(|i| Some(f(i))).collect::<StringArray>())
        };
        let mut lls = ListBuilder::new(Float64Builder::new());
        for ll in &self.loglikelihood {
            lls.values().append_option(*ll);
            lls.append(true);
        }
        let tokens = (0..n).map(|_| Some(10.0)).collect::<Float64Array>();
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("task", text(&|_| "t".into())),
            ("doc", text(&|i| json!({ "q": question(i) }).to_string())),
            ("doc_hash", text(&|i| format!("row {i}"))),
            ("prompt_hash", text(&|i| format!("prompt {i}"))),
            ("prompt", text(&question)),
            ("acc", Arc::new(Float64Array::from(self.acc.clone()))),
            ("loglikelihood", Arc::new(Float64Array::from(self.loglikelihood.clone()))),
            ("tokens", Arc::new(tokens)),
            ("loglikelihoods", Arc::new(lls.finish())),
            ("prediction", Arc::new(StringArray::from(self.prediction.clone()))),
        ];
        let nullable = columns.into_iter().map(|(name, column)| (name, column, true));
        let batch = RecordBatch::try_from_iter_with_nullable(nullable).unwrap();
        let file = fs_err::File::create(folder.join("samples.parquet")).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }
}

fn question(i: usize) -> String {
    format!("What is number {i} of the list?")
}

/// `gained` rows right in the first alone, `lost` in the second alone, `both` in both.
fn answers(gained: usize, lost: usize, both: usize) -> (Results, Results) {
    let of = |first: bool| [vec![first; gained], vec![!first; lost], vec![true; both]].concat();
    (Results::new(&of(true)), Results::new(&of(false)))
}

/// The inputs of a gate on disk.
struct Inputs {
    dir: TempDir,
    found: BTreeMap<String, Vec<NamedArtifact>>,
    files: BTreeMap<String, Vec<std::path::PathBuf>>,
}

impl Inputs {
    fn new() -> Self {
        let (found, files) = (BTreeMap::new(), BTreeMap::new());
        Self { dir: tempfile::tempdir().unwrap(), found, files }
    }

    fn pair((candidate, baseline): (Results, Results)) -> Self {
        Self::new().results("candidate", &candidate).results("baseline", &baseline)
    }

    fn results(self, name: &str, results: &Results) -> Self {
        results.write(&self.dir.path().join(name));
        self.folder(name, ArtifactKind::Metrics)
    }

    fn file(self, name: &str, kind: ArtifactKind, file: &str, content: impl AsRef<[u8]>) -> Self {
        let folder = self.dir.path().join(name);
        fs_err::create_dir_all(&folder).unwrap();
        fs_err::write(folder.join(file), content).unwrap();
        self.folder(name, kind)
    }

    fn folder(mut self, name: &str, kind: ArtifactKind) -> Self {
        let (name, artifact) = named(name, kind, &self.dir.path().join(name));
        self.found.insert(name, artifact);
        self
    }

    /// Training rows of one text each.
    fn rows(self, texts: &[String]) -> Self {
        let lines: String = texts.iter().map(|t| json!({ "q": t }).to_string() + "\n").collect();
        self.file("rows", ArtifactKind::Files, "rows.jsonl", lines)
    }

    /// Takes the input `baseline` as accepted results of `candidate`.
    fn accepted(mut self, change: impl Fn(String) -> String) -> Self {
        let baseline = self.found.remove("baseline").unwrap();
        let entry = accepted::accepted_entry("candidate", &baseline[0].artifact).unwrap();
        let entries = serde_json::Map::from_iter([("candidate".to_owned(), entry)]);
        let path = self.dir.path().join("accepted.json");
        fs_err::write(&path, change(accepted::accepted_file(&json!({}), &entries))).unwrap();
        self.files.insert("/accepted".into(), vec![path]);
        self
    }

    /// Outcome and the rule's own line in the verdict.
    fn verdict(&self, with: &Value) -> Result<(String, Value)> {
        let gate: Gate = serde_json::from_value(with.clone()).unwrap();
        assert_eq!(gate.validate(), [], "{with}");
        let (_, denied, verdict) =
            judge(&gate, self.dir.path(), self.found.clone(), self.files.clone())?;
        assert_eq!(verdict["passed"], denied.is_none(), "{verdict:#}");
        let outcome = verdict["outcome"].as_str().unwrap().to_owned();
        let lenient = with["inconclusive"] == "warn" && outcome == "inconclusive";
        assert_eq!(denied.is_none(), outcome == "pass" || lenient, "{verdict:#}");
        Ok((outcome, verdict["rules"][0].clone()))
    }

    #[track_caller]
    fn expect(&self, with: &Value, outcome: &str) -> Value {
        let (found, rule) = self.verdict(with).unwrap_or_else(|e| panic!("{with}: {}", e.chain()));
        assert_eq!(found, outcome, "{with}: {rule:#}");
        let own = if outcome == "inconclusive" || outcome == "pass" { outcome } else { "fail" };
        assert_eq!(rule["outcome"], own, "{rule:#}");
        rule
    }

    /// What a gate that cannot judge says.
    #[track_caller]
    fn refusal(&self, with: &Value) -> String {
        match self.verdict(with) {
            Ok((outcome, rule)) => panic!("{with}: {outcome} {rule:#}"),
            Err(e) => e.chain().to_string(),
        }
    }
}

#[test]
fn paired_rules_pass_deny_and_stay_open() {
    let rule = json!({ "improves": [{ "metric": "t.acc" }] });
    Inputs::pair(answers(20, 2, 78)).expect(&rule, "pass");
    Inputs::pair(answers(2, 20, 78)).expect(&rule, "fail");
    let open = Inputs::pair(answers(6, 3, 91)).expect(&rule, "inconclusive");
    let needed = open["details"]["needed_samples"].as_u64().unwrap();
    assert!(needed > 100, "{needed}");
    assert!(open["found"].as_str().unwrap().contains(&needed.to_string()), "{open:#}");
    assert_eq!(open["details"]["test"], "mcnemar_exact");

    let rule = json!({ "not_worse": [{ "metric": "t.acc", "margin": 0.05 }] });
    Inputs::pair(answers(2, 2, 396)).expect(&rule, "pass");
    Inputs::pair(answers(0, 60, 340)).expect(&rule, "fail");
    Inputs::pair(answers(2, 4, 54)).expect(&rule, "inconclusive");

    let rule = json!({ "no_forgetting": [{ "metric": "t.loss", "margin": 0.1 }] });
    let by = |nats: f64, n: usize| {
        let base = Results::new(&vec![true; n]);
        Inputs::pair((base.clone().worse_by(nats), base))
    };
    let passed = by(0.05, 60).expect(&rule, "pass");
    assert_eq!(passed["kind"], "no_forgetting");
    by(0.2, 60).expect(&rule, "fail");
    by(0.05, 5).expect(&rule, "inconclusive");
}

#[test]
fn max_regression_passes_denies_and_stays_open_against_the_accepted_run() {
    let rule =
        json!({ "max_regression": [{ "metric": "t.acc", "margin": 0.05 }], "accepted": "a.json" });
    let judge = |(now, before)| Inputs::pair((now, before)).accepted(|file| file);
    judge(answers(2, 2, 396)).expect(&rule, "pass");
    judge(answers(0, 60, 340)).expect(&rule, "fail");
    judge(answers(2, 4, 54)).expect(&rule, "inconclusive");
    // What was accepted has to be there and be numbers.
    let pair = || Inputs::pair(answers(2, 2, 396));
    let gone = pair().accepted(|file| file.replace("\"candidate\"", "\"other\""));
    assert!(gone.refusal(&rule).contains("has no results of `candidate`"));
    let null = pair().accepted(|file| file.replacen("[0,", "[null,", 1));
    assert!(null.refusal(&rule).contains("keeps no samples of `t.acc`"));
    let old = pair().accepted(|file| file.replace("\"format\": 1", "\"format\": 0"));
    assert!(old.refusal(&rule).contains("has format 0, this is 1"));
}

#[test]
fn budgets_hold_for_sizes_memory_and_speed() {
    let inputs = Inputs::pair(answers(1, 1, 18))
        .file("adapter", ArtifactKind::Adapter, "adapter_model.safetensors", vec![0; 2000])
        .file("empty", ArtifactKind::Adapter, "adapter_config.json", "{}");
    for (limit, outcome) in [
        (json!({ "of": "adapter", "max": "2KB" }), "pass"),
        (json!({ "of": "adapter", "max": 1999 }), "fail"),
        (json!({ "of": "candidate", "metric": "peak_rss_bytes", "max": "500MB" }), "pass"),
        (json!({ "of": "candidate", "metric": "peak_rss_bytes", "max": "400MB" }), "fail"),
        (json!({ "of": "candidate", "metric": "tokens_per_second", "min": 900 }), "pass"),
        (json!({ "of": "candidate", "metric": "tokens_per_second", "min": 901 }), "fail"),
        // No weights are not small weights.
        (json!({ "of": "empty", "max": "2KB" }), "fail"),
    ] {
        inputs.expect(&json!({ "budget": [limit] }), outcome);
    }
    let unknown = json!({ "budget": [{ "of": "candidate", "metric": "peak_rss", "max": "1GB" }] });
    assert!(inputs.refusal(&unknown).contains("`candidate` has no metric `peak_rss`"));
}

#[test]
fn contamination_is_what_is_seen_above_the_share_that_is_tolerated() {
    let rule = |share: f64| json!({ "no_contamination": [{ "train": "rows", "eval": "candidate", "max_share": share }] });
    let others: Vec<String> = (0..5).map(|i| format!("Another text, number {i}")).collect();
    let of = |rows: &[String]| Inputs::pair(answers(1, 1, 18)).rows(rows);
    of(&others).expect(&rule(0.0), "pass");
    let seen = of(&[others, vec![question(3)]].concat());
    let denied = seen.expect(&rule(0.0), "fail");
    assert_eq!(denied["details"]["rows"][0]["row"], "t row 4");
    assert!(denied["details"]["rows"][0]["train_row"].as_str().unwrap().contains("row 6"));
    // The metric without the row that was seen stands beside the one with it.
    assert_eq!(denied["details"]["scores"]["t.acc"]["clean_rows"], 19);
    seen.expect(&rule(0.05), "pass");
}

#[test]
fn a_merge_is_equivalent_if_every_row_is() {
    let rule = json!({ "merge_equivalent": [{ "merged": "candidate", "adapted": "baseline", "tolerance": 0.01 }] });
    let base = Results::new(&[true; 20]);
    let of =
        |change: &dyn Fn(&mut Results)| Inputs::pair((base.clone().with(change), base.clone()));
    of(&|_| ()).expect(&rule, "pass");
    of(&|r| r.loglikelihood[3] = r.loglikelihood[3].map(|l| l + 0.009)).expect(&rule, "pass");
    let apart =
        of(&|r| r.loglikelihood[3] = r.loglikelihood[3].map(|l| l + 0.011)).expect(&rule, "fail");
    assert_eq!(apart["details"]["rows"][0]["row"], "row 3");
    let other = of(&|r| r.prediction[7] = Some("else".into())).expect(&rule, "fail");
    assert_eq!(other["details"]["changed_answers"], 1);
    let lenient = json!({ "merge_equivalent": [
        { "merged": "candidate", "adapted": "baseline", "max_changed_share": 0.05 } ] });
    of(&|r| r.prediction[7] = Some("else".into())).expect(&lenient, "pass");
    of(&|r| r.loglikelihood[3] = Some(f64::NAN)).expect(&rule, "fail");
    of(&|r| r.loglikelihood[3] = None).expect(&rule, "fail");
    // Two sides that are both silent do not agree.
    let silent = base.clone().with(|r| r.loglikelihood[3] = None);
    Inputs::pair((silent.clone(), silent)).expect(&rule, "fail");
    let fewer = Inputs::pair((Results::new(&[true; 19]), base));
    assert!(fewer.refusal(&rule).contains("were not asked the same: 19 and 20 rows"));
}

#[test]
fn expressions_pass_and_deny() {
    let rule = |text: &str| json!({ "require": [text] });
    let inputs = Inputs::pair(answers(20, 2, 78));
    inputs.expect(&rule("candidate.t.acc > baseline.t.acc + 0.1"), "pass");
    inputs.expect(&rule("candidate.t.acc > baseline.t.acc + 0.2"), "fail");
}

/// A gate of each rule that reads results, as a candidate passes it that is 20 rows better and the same
/// in likelihood.
fn rules() -> Vec<Value> {
    vec![
        json!({ "require": ["candidate.t.acc > baseline.t.acc"] }),
        json!({ "improves": [{ "metric": "t.acc" }] }),
        json!({ "improves": [{ "metric": "t.acc", "margin": 0.01 }] }),
        json!({ "not_worse": [{ "metric": "t.acc", "margin": 0.1 }] }),
        json!({ "no_forgetting": [{ "metric": "t.acc", "margin": 0.1 }] }),
        json!({ "budget": [{ "of": "candidate", "metric": "t.acc", "min": 0.01 }] }),
    ]
}

#[test]
fn no_rule_passes_on_a_number_that_is_missing() {
    type Damage = (&'static str, fn(&mut Results));
    let damages: [Damage; 6] = [
        ("null", |r| r.metrics["t.acc"] = Value::Null),
        ("no metric", |r| drop(r.metrics.as_object_mut().unwrap().remove("t.acc"))),
        ("a text", |r| r.metrics["t.acc"] = json!("0.9")),
        ("a row that is NaN", |r| r.acc[5] = Some(f64::NAN)),
        ("a row that is null", |r| r.acc[5] = None),
        ("no samples", |r| r.samples = false),
    ];
    for rule in rules() {
        let (good, base) = answers(20, 0, 80);
        Inputs::pair((good.clone(), base.clone())).expect(&rule, "pass");
        let of_metrics = rule.get("require").or(rule.get("budget")).is_some();
        for (what, damage) in damages {
            // An expression and a budget read the number alone, and never the rows behind it.
            if of_metrics
                && ["a row that is NaN", "a row that is null", "no samples"].contains(&what)
            {
                continue;
            }
            let mut sides = vec![(good.clone().with(damage), base.clone())];
            if rule.get("budget").is_none() {
                sides.push((good.clone(), base.clone().with(damage)));
            }
            for pair in sides {
                let found = Inputs::pair(pair).verdict(&rule);
                let passed = found.as_ref().is_ok_and(|(outcome, _)| outcome != "fail");
                assert!(!passed, "{what}: {rule}: {found:?}");
            }
        }
    }
    // Nor on none at all.
    let nothing = Results::new(&[]);
    for rule in rules() {
        let found = Inputs::pair((nothing.clone(), nothing.clone())).verdict(&rule);
        assert!(!found.as_ref().is_ok_and(|(outcome, _)| outcome == "pass"), "{rule}: {found:?}");
    }
    let merged = json!({ "merge_equivalent": [{ "merged": "candidate", "adapted": "baseline" }] });
    Inputs::pair((nothing.clone(), nothing.clone())).expect(&merged, "fail");
    let seen = json!({ "no_contamination": [{ "train": "rows", "eval": "candidate" }] });
    Inputs::pair((nothing.clone(), nothing)).rows(&[question(1)]).expect(&seen, "fail");
    let none = Inputs::pair(answers(1, 1, 18)).rows(&[]).verdict(&seen);
    assert!(!none.as_ref().is_ok_and(|(outcome, _)| outcome == "pass"), "{none:?}");
}

#[test]
fn results_that_are_not_comparable_are_refused_with_the_reason() {
    let rule = json!({ "improves": [{ "metric": "t.acc" }] });
    let other = |change: fn(&mut Results)| {
        let (candidate, baseline) = answers(20, 2, 78);
        Inputs::pair((candidate, baseline.with(change)))
    };
    type Difference = (fn(&mut Results), &'static str);
    let differences: [Difference; 6] = [
        (|r| r.metrics["meta"]["tokenizer"] = json!("words"), "another tokenizer"),
        (
            |r| r.metrics["meta"]["prompts"]["apply_chat_template"] = json!(true),
            "another way of making prompts (`apply_chat_template`)",
        ),
        (
            |r| r.metrics["meta"]["tasks"]["t"]["config"]["doc_to_text"] = json!("Q: q"),
            "the task file differs (`doc_to_text`)",
        ),
        (
            |r| r.metrics["meta"]["tasks"]["t"]["prompts"] = json!("x"),
            "the same rows were asked with other prompts",
        ),
        (
            |r| r.metrics["meta"]["metrics"]["t.acc"]["statistic"] = json!("perplexity"),
            "they mean different things by it",
        ),
        (|r| r.metrics["meta"]["metrics"] = json!({}), "has no samples for `t.acc`"),
    ];
    for (change, reason) in differences {
        let said = other(change).refusal(&rule);
        assert!(said.contains(reason), "{reason}: {said}");
    }
    // A baseline of other rows, and of another data set as an expression sees it.
    let (candidate, _) = answers(20, 2, 78);
    let said = Inputs::pair((candidate, Results::new(&[true; 99]))).refusal(&rule);
    assert!(said.contains("other rows (100 and 99)"), "{said}");
    let said = other(|r| r.metrics["meta"]["data"] = json!("others"))
        .refusal(&json!({ "require": ["candidate.t.acc > baseline.t.acc"] }));
    assert!(said.contains("were measured on different data"), "{said}");
    // With leave, prompts may differ; the rows may not.
    let shots = json!({ "improves": [{ "metric": "t.acc", "different_prompts": true }] });
    other(|r| r.metrics["meta"]["prompts"]["apply_chat_template"] = json!(true))
        .expect(&shots, "pass");
}

#[test]
fn too_few_samples_warn_where_the_pipeline_says_so() {
    let open = Inputs::pair(answers(6, 3, 91));
    open.expect(
        &json!({ "improves": [{ "metric": "t.acc" }], "inconclusive": "warn" }),
        "inconclusive",
    );
}

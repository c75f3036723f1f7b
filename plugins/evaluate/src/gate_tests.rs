use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use lora_flow_core::{
    Artifact, CancelToken, DeviceSpec, Event, OutputDir, Reporter, TaskContextParts,
};

use super::*;

#[path = "gate_rules_tests.rs"]
mod rules;

struct Quiet;

impl Reporter for Quiet {
    fn event(&self, _: Event) {}
}

/// Runs a gate over `name → metrics.json`; returns report, denial and verdict.
fn run(gate: &Gate, metrics: &[(&str, Value)]) -> Result<(String, Option<String>, Value)> {
    let dir = tempfile::tempdir().unwrap();
    let inputs = metrics.iter().map(|(name, json)| {
        let folder = dir.path().join(name);
        fs_err::create_dir_all(&folder).unwrap();
        fs_err::write(folder.join("metrics.json"), json.to_string()).unwrap();
        named(name, ArtifactKind::Metrics, &folder)
    });
    judge(gate, dir.path(), inputs.collect(), BTreeMap::new())
}

/// A folder as an input of the gate, made by a task of the same name.
fn named(name: &str, kind: ArtifactKind, folder: &Path) -> (String, Vec<NamedArtifact>) {
    let artifact = Artifact::from_dir(kind, folder).unwrap();
    (name.to_owned(), vec![NamedArtifact { reference: name.to_owned(), artifact }])
}

/// The same over inputs of any kind; `dir` is for what the gate writes.
fn judge(
    gate: &Gate,
    dir: &Path,
    inputs: BTreeMap<String, Vec<NamedArtifact>>,
    files: BTreeMap<String, Vec<std::path::PathBuf>>,
) -> Result<(String, Option<String>, Value)> {
    let output = |path: &Path| OutputDir {
        port: "verdict".into(),
        kind: ArtifactKind::Verdict,
        path: path.to_owned(),
        adopted: BTreeMap::new(),
        meta: Value::Null,
    };
    let out = dir.join("verdict");
    fs_err::create_dir_all(&out).unwrap();
    let mut cx = TaskContext::new(TaskContextParts {
        inputs,
        outputs: BTreeMap::from([("verdict".to_owned(), output(&out))]),
        files,
        scratch: dir.to_owned(),
        state_dir: dir.to_owned(),
        device: DeviceSpec::Cpu,
        threads: 1,
        allow_network: false,
        cancel: CancelToken::default(),
        reporter: Arc::new(Quiet),
    });
    gate.run(&mut cx)?;
    let (_, report, _, denied) = cx.finish();
    let verdict = serde_json::from_slice(&fs_err::read(out.join("verdict.json"))?)?;
    Ok((report, denied, verdict))
}

fn gate(require: &[&str]) -> Gate {
    Gate { require: require.iter().map(|r| (*r).to_owned()).collect(), ..Gate::default() }
}

#[test]
fn a_gate_passes_or_denies_with_the_numbers_in_table_and_verdict() {
    let inputs = [("a", json!({ "perplexity": 9.5 })), ("b", json!({ "perplexity": 10 }))];
    let rule = "a.perplexity < 0.97 * b.perplexity";
    let (report, denied, verdict) = run(&gate(&[rule]), &inputs).unwrap();
    assert_eq!(denied, None);
    assert!(report.contains("pass") && report.contains("9.5000 against 9.7000"), "{report}");
    assert_eq!(verdict["passed"], true);
    assert_eq!(verdict["require"][0]["values"]["a.perplexity"], 9.5);

    let hard = "a.perplexity < 0.5 * b.perplexity";
    let (report, denied, verdict) = run(&gate(&[rule, hard]), &inputs).unwrap();
    let denied = denied.unwrap();
    assert!(denied.contains(hard) && !denied.contains(rule), "{denied}");
    assert!(report.contains("FAIL"), "{report}");
    assert_eq!(verdict["passed"], false);
}

#[test]
fn null_denies_and_warnings_do_not() {
    let inputs = [("a", json!({ "perplexity": null, "loss": 3 }))];
    let (_, denied, _) = run(&gate(&["a.perplexity < 5"]), &inputs).unwrap();
    assert!(denied.unwrap().contains("not a finite number"));
    let lenient = Gate { warn: vec!["a.loss < 1".into()], ..gate(&["a.loss < 5"]) };
    let (report, denied, _) = run(&lenient, &inputs).unwrap();
    assert!(denied.is_none() && report.contains("warn"), "{report}");
}

#[test]
fn different_data_and_unknown_names_fail_the_task() {
    let of = |data: &str| json!({ "loss": 1.0, "meta": { "data": data } });
    let rule = gate(&["a.loss <= b.loss"]);
    assert!(run(&rule, &[("a", of("x")), ("b", of("x"))]).unwrap().1.is_none());
    let inputs = [("a", of("x")), ("b", of("y"))];
    assert!(run(&rule, &inputs).unwrap_err().to_string().contains("different data"));
    let allowed = Gate { allow_different_data: true, ..rule };
    assert!(run(&allowed, &inputs).unwrap().1.is_none());
    assert!(run(&gate(&["c.loss < 1"]), &inputs).is_err());
}

#[test]
fn validation_points_at_the_rule() {
    let bad = Gate { warn: vec!["1 < 2".into()], ..gate(&["a.b < 1", "a.b <"]) };
    let pointers: Vec<_> = bad.validate().into_iter().map(|p| p.pointer).collect();
    assert_eq!(pointers, ["/require/1", "/warn/0"]);
    assert_eq!(gate(&[]).validate()[0].pointer, "");
}

#[test]
fn numbers_are_shown_with_five_digits() {
    let shown = [18.2412345, 0.0123456, 1234.5678, 3.0, 2e-9].map(short);
    assert_eq!(shown, ["18.241", "0.012346", "1234.6", "3", "2.0000e-9"]);
}

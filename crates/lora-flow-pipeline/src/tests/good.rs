//! Sound files and the plans they become.

use serde_json::json;

use super::*;
use crate::{GraphFormat, graph};

const MAIN: &str = r#"
version: 1
name: demo
params: { r: 16, ranks: [8, 16], out: out }
env: [WHO]
x-defaults: &defaults
  learning_rate: 1.0e-3
  max_steps: 60.0
tasks:
  scores:
    uses: evaluate
    inputs: { model: base, adapter: train, eval: held_out }
  gate:
    uses: gate
    inputs: { candidate: scores, baseline: before }
    with: { require: ["candidate.perplexity < ${{ 0.5 + 0.5 }} * baseline.perplexity"] }
  corpus: { uses: ingest, with: { files: data, split: { train: 0.9, eval: 0.1 } } }
  base: { uses: model, with: { source: "hf://${{ env.WHO }}/m" }, publish: "${{ params.out }}/base" }
  tokens: { uses: tokenize, inputs: { dataset: corpus.train, model: base } }
  held_out: { uses: tokenize, inputs: { dataset: corpus.eval, model: base } }
  adapter:
    uses: lora-inject
    inputs: { model: base }
    with: { r: "${{ params.r }}", lora_alpha: 32, target_modules: all-linear }
  train:
    uses: train
    inputs: { train: tokens, model: base.model, adapter: adapter }
    with: { <<: *defaults, max_steps: 1e2 }
    resources: { cpu: 2, memory: 2GiB }
    timeout: 10m
    retries: 1
  before: { uses: evaluate, inputs: { model: base, eval: held_out }, needs: [corpus] }
"#;

fn main_plan() -> Plan {
    let mut options = options();
    options.env.insert("WHO".into(), "me".into());
    compile_in(folder().path(), MAIN, &options).unwrap_or_else(|e| panic!("{e}"))
}

fn task<'a>(plan: &'a Plan, id: &str) -> &'a crate::PlannedTask {
    plan.tasks.iter().find(|t| t.id == id).unwrap_or_else(|| panic!("no task {id}"))
}

#[test]
fn plan_is_topological_and_otherwise_in_file_order() {
    let plan = main_plan();
    let ids: Vec<&str> = plan.tasks.iter().map(|t| t.id.as_str()).collect();
    let expected =
        ["corpus", "base", "tokens", "held_out", "adapter", "train", "scores", "before", "gate"];
    assert_eq!(ids, expected);
    for (i, task) in plan.tasks.iter().enumerate() {
        assert!(task.upstream().iter().all(|u| *u < i), "{}", task.id);
    }
}

#[test]
fn parameters_are_canonical_and_expressions_keep_types() {
    let plan = main_plan();
    assert_eq!(
        task(&plan, "adapter").params,
        json!({ "r": 16, "lora_alpha": 32.0, "target_modules": "all-linear" })
    );
    assert_eq!(
        task(&plan, "train").params,
        json!({
            "learning_rate": 0.001, "max_steps": 100, "per_device_train_batch_size": 8, "stop": null
        })
    );
    assert_eq!(task(&plan, "base").params, json!({ "source": "hf://me/m" }));
    let gate = &task(&plan, "gate").params["require"][0];
    assert_eq!(gate, "candidate.perplexity < 1.0 * baseline.perplexity");
}

#[test]
fn edges_files_and_the_rest() {
    let plan = main_plan();
    let train = task(&plan, "train");
    let edges: Vec<_> = train
        .inputs
        .iter()
        .map(|e| {
            (
                e.port.as_str(),
                e.reference.as_str(),
                plan.tasks[e.task].id.as_str(),
                e.output.as_str(),
            )
        })
        .collect();
    // In the order of the ports, not of the file.
    assert_eq!(
        edges,
        [
            ("model", "base.model", "base", "model"),
            ("adapter", "adapter", "adapter", "adapter"),
            ("train", "tokens", "tokens", "tokens"),
        ]
    );
    assert_eq!(train.resources.cpu, 2);
    assert_eq!(train.resources.memory, Some(2 << 30));
    assert_eq!(train.timeout, Some(std::time::Duration::from_secs(600)));
    assert_eq!((train.retries, train.kind_version), (1, 3));
    let corpus = task(&plan, "corpus");
    let names: Vec<_> =
        corpus.files[0].paths.iter().map(|p| p.strip_prefix(&plan.root).unwrap()).collect();
    assert_eq!(names, [std::path::Path::new("data/a.csv"), std::path::Path::new("data/b.csv")]);
    assert_eq!(corpus.files[0].pointer, "/files");
    let base = task(&plan, "base");
    assert_eq!(base.publish, [("model".to_owned(), plan.root.join("out/base"))]);
    assert_eq!(plan.source.snippet(base.span), "base");
    assert_eq!(plan.source.snippet(train.param_span("/learning_rate")), "1.0e-3");
    assert_eq!(plan.source.snippet(corpus.param_span("/split/eval")), "0.1");
    let before = task(&plan, "before");
    assert_eq!(
        before.needs.iter().map(|i| plan.tasks[*i].id.as_str()).collect::<Vec<_>>(),
        ["corpus"]
    );
}

#[test]
fn unused_parameters_are_warned_of() {
    let plan = main_plan();
    let warnings: Vec<String> = plan.warnings.iter().map(|w| w.message.clone()).collect();
    assert_eq!(warnings, ["the parameter `ranks` is never used"]);
    assert_eq!(plan.warnings[0].line_column(), Some((4, 18)));
}

#[test]
fn targets_take_what_they_need() {
    let mut options = options();
    options.env.insert("WHO".into(), "me".into());
    options.targets = vec!["held_out".into(), "adapter".into()];
    let plan = compile_in(folder().path(), MAIN, &options).unwrap();
    let ids: Vec<&str> = plan.tasks.iter().map(|t| t.id.as_str()).collect();
    assert_eq!(ids, ["corpus", "base", "held_out", "adapter"]);
    assert_eq!(plan.tasks[2].inputs[1].task, 1);
}

#[test]
fn files_of_tasks_that_are_not_wanted_may_be_missing() {
    let text = "tasks:\n  a: { uses: ingest, with: { files: nowhere } }\n  \
                b: { uses: model, with: { source: x } }\n";
    assert!(compile(text).is_err());
    let options = CompileOptions { targets: vec!["b".into()], ..options() };
    assert_eq!(compile_in(folder().path(), text, &options).unwrap().tasks.len(), 1);
}

#[test]
fn matrix_fans_out_pairs_and_gathers() {
    let text = r#"
params: { ranks: [8, 16] }
tasks:
  base: { uses: model, with: { source: x } }
  data: { uses: ingest, with: { files: data } }
  tokens: { uses: tokenize, inputs: { dataset: data, model: base } }
  adapter:
    uses: lora-inject
    matrix: { r: "${{ params.ranks }}" }
    inputs: { model: base }
    with: { r: "${{ matrix.r }}", target_modules: all-linear }
  train:
    uses: train
    matrix: { r: [8, 16], lr: [1.0e-4, 1.0e-3] }
    inputs: { model: base, adapter: adapter, train: tokens }
    with: { learning_rate: "${{ matrix.lr }}" }
    publish: "out/r${{ matrix.r }}-lr${{ matrix.lr }}"
  all: { uses: table, inputs: { runs: train.metrics } }
  some: { uses: table, inputs: { runs: ['train[r=8]', 'train[r=16,lr=0.001].metrics'] } }
  last: { uses: model, with: { source: x }, needs: train }
"#;
    let plan = compile(text).unwrap_or_else(|e| panic!("{e}"));
    let ids: Vec<&str> = plan.tasks.iter().map(|t| t.id.as_str()).collect();
    assert_eq!(
        ids,
        [
            "base",
            "data",
            "tokens",
            "adapter[r=8]",
            "adapter[r=16]",
            "train[r=8,lr=0.0001]",
            "train[r=8,lr=0.001]",
            "train[r=16,lr=0.0001]",
            "train[r=16,lr=0.001]",
            "all",
            "some",
            "last",
        ]
    );
    assert_eq!(task(&plan, "adapter[r=16]").params["r"], 16);
    let adapter = &task(&plan, "train[r=16,lr=0.001]").inputs[1];
    assert_eq!((adapter.reference.as_str(), adapter.task), ("adapter[r=16]", 4));
    let runs =
        |id: &str| task(&plan, id).inputs.iter().map(|e| e.reference.clone()).collect::<Vec<_>>();
    assert_eq!(
        runs("all"),
        [
            "train[r=8,lr=0.0001].metrics",
            "train[r=8,lr=0.001].metrics",
            "train[r=16,lr=0.0001].metrics",
            "train[r=16,lr=0.001].metrics",
        ]
    );
    assert_eq!(
        runs("some"),
        ["train[r=8,lr=0.0001]", "train[r=8,lr=0.001]", "train[r=16,lr=0.001].metrics"]
    );
    assert_eq!(task(&plan, "last").needs.len(), 4);
    let options = CompileOptions { targets: vec!["train[r=8,lr=0.001]".into()], ..options() };
    let plan = compile_in(folder().path(), text, &options).unwrap();
    assert_eq!(plan.tasks.len(), 5);
}

#[test]
fn set_changes_parameters() {
    let options = CompileOptions {
        set: vec![("r".into(), "32".into())],
        env: [("WHO".to_owned(), "me".to_owned())].into(),
        ..options()
    };
    let plan = compile_in(folder().path(), MAIN, &options).unwrap();
    assert_eq!(task(&plan, "adapter").params["r"], 32);
    assert_eq!(plan.params["r"], 32);
}

#[test]
fn plugins_offer_kinds_and_defaults() {
    let dir = folder();
    let plug = dir.path().join("tools/plug");
    std::fs::create_dir_all(&plug).unwrap();
    std::fs::write(
        plug.join("plugin.yaml"),
        "protocol: 1\nname: plug\nversion: 0.2\ndescription: d\ncommand: [python3, main.py]\n\
         network: true\nenv: [TOKEN, OTHER, UNSET]\npassthrough: [PROXY]\ntasks:\n  fetch:\n    summary: gets things\n    \
         inputs: { extra: { kind: [Files, Dataset], required: false, many: true, doc: more } }\n    \
         outputs: { files: { kind: Files, doc: it } }\n    params:\n      type: object\n      \
         required: [what]\n      properties:\n        what: { type: string }\n        \
         depth: { type: integer, default: 2 }\n        \
         opts: { type: object, default: {}, properties: { a: { default: x } } }\n",
    )
    .unwrap();
    let text = "env: [TOKEN, UNRELATED]\nplugins: [tools/plug]\ntasks:\n  \
                a: { uses: fetch, with: { what: x } }\n  \
                b: { uses: model, inputs: { files: a }, with: { source: x } }\n";
    let mut options = options();
    for name in ["TOKEN", "OTHER", "UNRELATED", "PROXY"] {
        options.env.insert(name.into(), "1".into());
    }
    let plan = compile_in(dir.path(), text, &options).unwrap_or_else(|e| panic!("{e}"));
    let a = task(&plan, "a");
    assert_eq!(a.params, json!({ "what": "x", "depth": 2, "opts": { "a": "x" } }));
    assert_eq!(a.env.keys().collect::<Vec<_>>(), ["OTHER", "TOKEN"], "all that it may depend on");
    assert!(a.network);
    assert!(task(&plan, "b").env.is_empty() && !task(&plan, "b").network);
    assert_eq!(a.outputs.get("files").unwrap().doc, "it");
    assert!(a.input_ports.get("extra").unwrap().many);
    let manifest = crate::PluginManifest::load(&plug).unwrap();
    assert_eq!((manifest.version.as_str(), manifest.network), ("0.2", true));
    assert_eq!(manifest.kind("fetch").unwrap().params["additionalProperties"], false);
}

#[test]
fn root_moves_relative_paths() {
    let dir = folder();
    let below = dir.path().join("pipelines");
    std::fs::create_dir(&below).unwrap();
    let text = "root: ..\ntasks:\n  a: { uses: ingest, with: { files: data/a.csv } }\n";
    let plan = compile_in(&below, text, &options()).unwrap();
    assert_eq!(plan.root, dir.path().canonicalize().unwrap());
    assert_eq!(plan.name, "p");
}

#[test]
fn graphs() {
    let plan = main_plan();
    insta::assert_snapshot!("graph_mermaid", graph(&plan, GraphFormat::Mermaid, &[]));
    insta::assert_snapshot!("graph_dot", graph(&plan, GraphFormat::Dot, &[]));
    assert!("png".parse::<GraphFormat>().is_err());
}

#[test]
fn an_svg_holds_all_it_needs_and_tells_states() {
    let plan = main_plan();
    insta::assert_snapshot!("graph_svg", graph(&plan, GraphFormat::Svg, &[]));

    let mut plan = plan;
    let hostile = "a<b>&\"'\u{1b}\u{7}]]><script>";
    plan.name = hostile.to_owned();
    plan.tasks[0].id = hostile.to_owned();
    let state =
        |id: &str, state| crate::TaskStatus { id: id.to_owned(), kind: String::new(), state };
    let states = [
        state(hostile, crate::State::Stale(vec![crate::Reason::NeverRun])),
        state(&plan.tasks[1].id, crate::State::Cached),
        state(&plan.tasks[2].id, crate::State::Blocked("gate `g` said no".to_owned())),
    ];
    let svg = graph(&plan, GraphFormat::Svg, &states);
    assert!(!svg.contains("<script") && !svg.contains(['\u{1b}', '\u{7}']), "{svg}");
    assert!(svg.contains("a&lt;b&gt;&amp;&quot;"), "{svg}");
    for part in [
        "class=\"task will\"",
        "class=\"task cached\"",
        "class=\"task blocked\"",
        ": will run\nnever run",
        "gate `g` said no",
        "prefers-color-scheme:dark)",
    ] {
        assert!(svg.contains(part), "{part}");
    }
    // Nothing is fetched: the only address is the name of the language.
    let addresses = svg.matches("://").count();
    assert_eq!(addresses, svg.matches("http://www.w3.org/2000/svg").count());
    assert!(!svg.contains("href") && !svg.contains("url(") && !svg.contains("@import"));
    // Elements that open close.
    for element in ["<svg", "<g ", "<text ", "<title>", "<style>"] {
        let close = format!("</{}>", element.trim_matches(['<', ' ', '>']));
        assert_eq!(svg.matches(element).count(), svg.matches(&close).count(), "{element}");
    }
}

/// Boxes of one layer do not overlap, edges go to the right, and all lies inside of the picture.
#[test]
fn an_svg_of_many_tasks_has_room_for_each() {
    let mut text = String::from("tasks:\n  base: { uses: model, with: { source: x } }\n");
    for i in 0..40 {
        let needs: Vec<String> =
            (0..i).filter(|j| (i * 7 + j * 5) % 11 == 0).map(|j| format!("t{j}")).collect();
        text += &format!(
            "  t{i}: {{ uses: lora-inject, inputs: {{ model: base }}, needs: [{}], with: {{ r: 1, target_modules: a }} }}\n",
            needs.join(", ")
        );
    }
    let plan = compile(&text).unwrap_or_else(|e| panic!("{e}"));
    let svg = graph(&plan, GraphFormat::Svg, &[]);
    let number = |line: &str, name: &str| -> f64 {
        let rest = line.split(&format!(" {name}=\"")).nth(1).unwrap();
        rest.split('"').next().unwrap().parse().unwrap()
    };
    let boxes: Vec<[f64; 4]> = svg
        .lines()
        .filter(|l| l.starts_with("<g class=\"task"))
        .map(|l| {
            ["x", "y", "width", "height"].map(|name| number(&l[l.find("<rect").unwrap()..], name))
        })
        .collect();
    assert_eq!(boxes.len(), 41);
    let head = svg.lines().next().unwrap();
    let (width, height) = (number(head, "width"), number(head, "height"));
    for (i, a) in boxes.iter().enumerate() {
        assert!(
            a[0] >= 0.0 && a[1] >= 0.0 && a[0] + a[2] <= width && a[1] + a[3] <= height,
            "{a:?}"
        );
        for b in &boxes[i + 1..] {
            let apart = a[0] + a[2] <= b[0]
                || b[0] + b[2] <= a[0]
                || a[1] + a[3] <= b[1]
                || b[1] + b[3] <= a[1];
            assert!(apart, "{a:?} and {b:?} overlap");
        }
    }
}

#[test]
fn schema_accepts_good_files_and_refuses_bad_ones() {
    let infos = crate::builtin_kinds(kinds::KINDS);
    let schema = crate::pipeline_schema(&infos);
    let validator = jsonschema::validator_for(&schema).unwrap();
    let json = |text: &str| {
        let source = SourceFile::new("p.yaml", text);
        crate::yaml::parse(&source).unwrap().to_json()
    };
    let errors =
        |text: &str| validator.iter_errors(&json(text)).map(|e| e.to_string()).collect::<Vec<_>>();
    assert_eq!(errors(MAIN), Vec::<String>::new());
    for bad in [
        "tasks: { a: { uses: modle } }",
        "tasks: { a: { uses: model } }",
        "tasks: { a: { uses: model, with: { source: 3 } } }",
        "tasks: { a: { uses: tokenize, with: { format: xml } } }",
        "tasks: { a: { uses: tokenize, with: { max_length: long } } }",
        "tasks: { a: { uses: model, with: { source: x }, color: red } }",
        "tasks: {}",
        "taks: {}",
    ] {
        assert!(!errors(bad).is_empty(), "{bad}");
    }
    // Every description of a parameter reaches the editor.
    assert!(schema.to_string().contains("Peak learning rate."));
}

#[test]
fn reference() {
    insta::assert_snapshot!(crate::reference_page(&crate::builtin_kinds(kinds::KINDS)));
}

#[test]
fn manifests_of_the_plugins_in_this_repository_are_sound() {
    let plugins = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins");
    let mut kinds = Vec::new();
    for entry in std::fs::read_dir(plugins).unwrap().flatten() {
        if entry.path().join(crate::MANIFEST).exists() {
            let manifest = crate::PluginManifest::load(&entry.path());
            let manifest = manifest.unwrap_or_else(|e| panic!("{e}"));
            kinds.extend(manifest.kinds.into_iter().map(|k| k.name));
        }
    }
    kinds.sort();
    assert_eq!(kinds, ["chats", "pip-fetch", "rust-docs", "tiny-model", "tiny-tasks"]);
}

#[test]
fn from_forces_what_waits_and_until_ends_the_plan() {
    let text = "tasks:\n  a: { uses: model, with: { source: x } }\n  \
                b: { uses: model, needs: a, with: { source: x } }\n  \
                c: { uses: model, needs: b, with: { source: x } }\n  \
                d: { uses: model, needs: a, with: { source: x } }\n";
    let forced = |from: &[&str], until: &[&str]| {
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        let options = CompileOptions { from: owned(from), until: owned(until), ..options() };
        match compile_in(folder().path(), text, &options) {
            Ok(plan) => plan
                .tasks
                .iter()
                .map(|t| format!("{}{}", t.id, if t.forced { "!" } else { "" }))
                .collect::<Vec<_>>()
                .join(" "),
            Err(e) => e.to_string(),
        }
    };
    assert_eq!(forced(&[], &[]), "a b c d");
    assert_eq!(forced(&["b"], &[]), "a b! c! d");
    assert_eq!(forced(&["b"], &["b", "d"]), "a b! d");
    assert_eq!(forced(&["a"], &["c"]), "a! b! c!");
    assert_eq!(forced(&[], &["b"]), "a b");
    let refused = forced(&["d"], &["c"]);
    assert!(refused.starts_with("--from:1:1: `d` is not among the tasks"), "{refused}");
    assert_eq!(forced(&["e"], &[]), "--from:1:1: there is no task `e`\n  hint: did you mean `a`?");
}

#[test]
fn a_file_of_parameters_overrides_and_set_has_the_last_word() {
    let text = "params: { a: 1, b: x, opt: { lr: 1, n: 2 } }\n\
                tasks:\n  m: { uses: model, with: { source: x } }\n";
    let with = |name: &str, content: &str, set: &[(&str, &str)]| {
        let dir = folder();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        let options = CompileOptions {
            params_file: Some(path),
            set: set.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            ..options()
        };
        let result = compile_in(dir.path(), text, &options);
        match &result {
            Ok(plan) => plan.params.to_string(),
            Err(_) => super::problems(result),
        }
    };
    assert_eq!(
        with("v.yaml", "a: 2.5\nopt: { lr: 3 }\n", &[("a", "4")]),
        r#"{"a":4,"b":"x","opt":{"lr":3}}"#
    );
    assert_eq!(with("v.json", r#"{"b": "y"}"#, &[]), r#"{"a":1,"b":"y","opt":{"lr":1,"n":2}}"#);
    assert_eq!(with("v.yaml", "", &[]), r#"{"a":1,"b":"x","opt":{"lr":1,"n":2}}"#);
    assert_eq!(
        with("v.yaml", "a: x\nop: 1\nb: \"${{ env.X }}\"\n", &[]),
        "v.yaml:1:4: the parameter `a` is a number in the pipeline, found the string `x`\n\
         v.yaml:2:1: there is no parameter `op`\n    hint: did you mean `opt`?\n\
         v.yaml:3:4: parameters are plain values, not expressions\n    \
         hint: write the expression where the value is used, under `with`\n"
    );
    assert_eq!(
        with("v.yaml", "[1]", &[]),
        "v.yaml:1:1: a file of parameters must be a mapping, found a list\n"
    );
}

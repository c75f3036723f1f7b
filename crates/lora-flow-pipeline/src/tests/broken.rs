//! Broken files and every word said about them.

use super::*;

/// Tasks that others can refer to.
const BASE: &str = "\
tasks:
  corpus: { uses: ingest, with: { files: data/*.csv, split: { train: 0.9, eval: 0.1 } } }
  base: { uses: model, with: { source: hf://org/name } }
  tokens: { uses: tokenize, inputs: { dataset: corpus.train, model: base } }
  adapter: { uses: lora-inject, inputs: { model: base }, with: { target_modules: all-linear } }
";

/// (what is wrong, the file; a leading `+` adds it to [`BASE`]).
const CASES: &[(&str, &str)] = &[
    ("empty file", ""),
    ("only a comment", "# nothing\n"),
    ("a scalar", "hello\n"),
    ("a list", "- a\n- b\n"),
    ("two documents", "tasks: {}\n---\ntasks: {}\n"),
    ("tab as indentation", "tasks:\n\tbase: { uses: model }\n"),
    ("unclosed quote", "name: \"abc\ntasks: {}\n"),
    ("unclosed bracket", "tasks: { base: { uses: model }\n"),
    ("key without colon", "tasks:\n  base\n  uses: model\n"),
    ("colon in a value", "name: a: b\ntasks: {}\n"),
    (
        "unquoted expression in braces",
        "tasks:\n  base: { uses: model, with: { source: ${{ params.x }} } }\n",
    ),
    ("unknown anchor", "tasks: *x\n"),
    ("recursive anchor", "tasks: &x { a: *x }\n"),
    ("duplicate task", "+\n  base: { uses: model, with: { source: b } }\n"),
    ("custom tag", "name: !foo x\ntasks: {}\n"),
    ("infinite number", "params: { x: .inf }\ntasks: {}\n"),
    ("huge number", "params: { x: 123456789012345678901234567890 }\ntasks: {}\n"),
    (
        "unknown keys everywhere",
        "versoin: 1\nsteps: {}\ntasks:\n  base: { uses: model, wth: { source: x }, depends_on: [a], color: red }\n",
    ),
    ("wrong version", "version: 2\nname: 12\nenv: { A: b }\nplugins: x\ntasks: []\n"),
    ("no tasks", "name: x\n"),
    ("empty tasks", "tasks:\n"),
    (
        "task names",
        "tasks:\n  1st: { uses: model, with: { source: x } }\n  a.b: { uses: model, with: { source: x } }\n",
    ),
    (
        "task without uses",
        "tasks:\n  a: { with: { source: x } }\n  b: model\n  c:\n  d: { type: model }\n",
    ),
    ("unknown kind", "tasks:\n  a: { uses: modle }\n  b: { uses: banana }\n"),
    (
        "unknown parameters",
        "+\n  train:\n    uses: train\n    inputs: { model: base, adapter: adapter, train: tokens }\n    with:\n      learnign_rate: 1.0e-4\n      micro_batch_size: 4\n      banana: 1\n",
    ),
    (
        "wrong types",
        "+\n  train:\n    uses: train\n    inputs: { model: base, adapter: adapter, train: tokens }\n    with:\n      learning_rate: fast\n      max_steps: 1.5\n      per_device_train_batch_size: \"8\"\n",
    ),
    (
        "more wrong types",
        "+\n  a: { uses: model, with: { source: 12 } }\n  b: { uses: model, with: [1] }\n  c: { uses: tokenize, inputs: { dataset: corpus.train, model: base }, with: { packing: yes, max_length: 0 } }\n  d: { uses: model, with: { source: } }\n  e: { uses: tokenize, inputs: { dataset: corpus.train, model: base }, with: { max_length: -1 } }\n",
    ),
    (
        "missing parameter",
        "tasks:\n  a: { uses: model }\n  b: { uses: ingest, with: { text: t } }\n",
    ),
    (
        "enumeration",
        "+\n  t:\n    uses: tokenize\n    inputs: { dataset: corpus.train, model: base }\n    with: { format: mesages }\n  u:\n    uses: tokenize\n    inputs: { dataset: corpus.train, model: base }\n    with: { format: xml }\n",
    ),
    (
        "alternatives",
        "+\n  a: { uses: ingest, with: { files: 3 } }\n  b: { uses: ingest, with: { files: [a, 3] } }\n  c: { uses: ingest, with: { files: { a: b } } }\n",
    ),
    (
        "nested",
        "+\n  a: { uses: ingest, with: { files: data, split: { train: most } } }\n  b: { uses: ingest, with: { files: data, split: { train: -0.5 } } }\n  c: { uses: gate, inputs: { a: m }, with: { require: [] } }\n",
    ),
    (
        "tagged alternatives",
        "+\n  a: { uses: train, inputs: { model: base, adapter: adapter, train: tokens }, with: { stop: { by: steps, cuont: 3 } } }\n  b: { uses: train, inputs: { model: base, adapter: adapter, train: tokens }, with: { stop: { by: stpes, count: 3 } } }\n  c: { uses: train, inputs: { model: base, adapter: adapter, train: tokens }, with: { stop: soon } }\n",
    ),
    (
        "expressions",
        "params: { rank: 8, opt: { lr: 1 } }\nenv: [HOME_DIR]\ntasks:\n  a: { uses: model, with: { source: \"${{ params.rnak }}\" } }\n  b: { uses: model, with: { source: \"${{ env.HOMEDIR }}/x\" } }\n  c: { uses: model, with: { source: \"x-${{ env.HOME_DIR }}\" } }\n  d: { uses: model, with: { source: \"${{ params.opt.rl }}\" } }\n  e: { uses: model, with: { source: \"${{ matrix.r }}\" } }\n  f: { uses: model, with: { source: \"${{ rank }}\" } }\n  g: { uses: model, with: { source: \"${{ params.rank + }}\" } }\n  h: { uses: model, with: { source: \"${{ params.rank\" } }\n  i: { uses: model, with: { source: \"a${{ params.opt }}\" } }\n  j: { uses: model, with: { source: \"${{ }}\" } }\n  k: { uses: model, with: { source: \"${{ params.rank }}\" } }\n  l: { uses: model, with: { source: \"${{ params.rank / 0 }}\" } }\n  m: { uses: model, with: { source: \"${{ range(100000000) | sum }}\" } }\n  n: { uses: model, with: { source: \"${{ params.rank | banana }}\", extra: 1 } }\n",
    ),
    ("expression in params", "params: { a: \"${{ env.X }}\", b-c: 1 }\ntasks: {}\n"),
    (
        "unknown task and ports",
        "+\n  t:\n    uses: tokenize\n    inputs: { dataset: corpsu.train, modle: base, banana: base }\n  u: { uses: tokenize, inputs: { model: base } }\n  v: { uses: tokenize }\n  w: { uses: tokenize, inputs: [base] }\n",
    ),
    (
        "outputs and kinds",
        "+\n  t: { uses: tokenize, inputs: { dataset: corpus.trian, model: base } }\n  u: { uses: tokenize, inputs: { dataset: base, model: base } }\n  v: { uses: tokenize, inputs: { dataset: corpus, model: base } }\n  w: { uses: tokenize, inputs: { dataset: base.model, model: base } }\n  x: { uses: tokenize, inputs: { dataset: [corpus.train], model: 3 } }\n  y: { uses: tokenize, inputs: { dataset: 'a[', model: base } }\n",
    ),
    (
        "no cascade from broken parameters",
        "tasks:\n  corpus: { uses: ingest, with: { file: data } }\n  base: { uses: modl, with: { source: x } }\n  t: { uses: tokenize, inputs: { dataset: corpus.train, model: base } }\n",
    ),
    ("gate without inputs", "tasks:\n  g: { uses: gate, with: { require: [x] } }\n"),
    (
        "needs",
        "+\n  a: { uses: model, with: { source: x }, needs: [bsae, adapter.adapter] }\n  b: { uses: model, with: { source: x }, needs: 3 }\n",
    ),
    (
        "cycle",
        "+\n  a: { uses: model, with: { source: x }, needs: [b] }\n  b: { uses: model, with: { source: x }, needs: c }\n  c: { uses: model, with: { source: x }, needs: [base, a] }\n  d: { uses: model, with: { source: x }, needs: d }\n  e: { uses: model, with: { source: x }, needs: a }\n",
    ),
    (
        "publish",
        "+\n  a: { uses: model, with: { source: x }, publish: out/a }\n  b: { uses: model, with: { source: x }, publish: out/../out/a }\n  c: { uses: model, with: { source: x }, publish: out/a/b }\n  d: { uses: model, with: { source: x }, publish: { modle: out/d } }\n  e: { uses: model, with: { source: x }, publish: .lora-flow/x }\n  f: { uses: model, with: { source: x }, publish: . }\n  g: { uses: model, with: { source: x }, publish: [a] }\n",
    ),
    (
        "files",
        "tasks:\n  a: { uses: ingest, with: { files: dta/*.csv } }\n  b: { uses: ingest, with: { files: [data/a.csv, data/*.parquet, data/c.csv] } }\n  c: { uses: ingest, with: { files: ~/data } }\n",
    ),
    (
        "resources",
        "+\n  a: { uses: model, with: { source: x }, resources: { cpus: 2, cpu: 0, memory: lots }, timeout: 10, retries: -1 }\n  b: { uses: model, with: { source: x }, resources: 3, timeout: soon, retries: 1000 }\n",
    ),
    (
        "matrix",
        "params: { ranks: 8 }\ntasks:\n  a: { uses: model, matrix: { s: x }, with: { source: x } }\n  b: { uses: model, matrix: { s: [] }, with: { source: x } }\n  c: { uses: model, matrix: { s: [1, 1] }, with: { source: x } }\n  d: { uses: model, matrix: { s: [a, b] }, with: { source: \"${{ matrix.t }}\" } }\n  e: { uses: model, matrix: { s: \"${{ params.ranks }}\" }, with: { source: x } }\n  f: { uses: model, matrix: [a], with: { source: x } }\n",
    ),
    (
        "matrix references",
        "+\n  sweep: { uses: lora-inject, matrix: { r: [8, 16] }, inputs: { model: base }, with: { r: \"${{ matrix.r }}\", target_modules: [q_proj] }, publish: out/sweep }\n  train: { uses: train, inputs: { model: base, adapter: sweep, train: tokens } }\n  one: { uses: train, inputs: { model: base, adapter: 'sweep[r=32]', train: tokens } }\n  two: { uses: train, inputs: { model: base, adapter: 'sweep[rank=8]', train: tokens } }\n  three: { uses: train, inputs: { model: base, adapter: 'adapter[r=8]', train: tokens } }\n  four: { uses: train, matrix: { r: [8, 32] }, inputs: { model: base, adapter: sweep, train: tokens } }\n",
    ),
    (
        "matrix with wrong values",
        "tasks:\n  base: { uses: model, with: { source: x } }\n  sweep: { uses: lora-inject, matrix: { r: [8, big] }, inputs: { model: base }, with: { r: \"${{ matrix.r }}\", target_modules: a } }\n",
    ),
    ("plugins", "plugins: [plug, nowhere, data, plug]\ntasks:\n  a: { uses: fetch }\n"),
    ("root", "root: nowhere\ntasks:\n  a: { uses: model, with: { source: x } }\n"),
];

#[test]
fn every_word_about_broken_files() {
    let dir = folder();
    std::fs::create_dir(dir.path().join("plug")).unwrap();
    let mut report = String::new();
    for (name, text) in CASES {
        let text = match text.strip_prefix('+') {
            Some(more) => format!("{BASE}{}", more.trim_start_matches('\n')),
            None => (*text).to_owned(),
        };
        let found = problems(compile_in(dir.path(), &text, &options()));
        assert_ne!(found, "no problem\n", "{name}");
        // The lines of BASE are always the same.
        let shown = text.strip_prefix(BASE).map_or(text.clone(), |rest| format!("…\n{rest}"));
        report.push_str(&format!("## {name}\n\n{shown}\n{found}\n"));
    }
    insta::assert_snapshot!(report);
}

#[test]
fn at_least_forty_cases_each_with_its_own_words() {
    assert!(CASES.len() >= 40);
}

#[test]
fn set_and_targets() {
    let text = "params: { r: 8, lr: 1.0e-4, name: x, opt: { b1: 0.9 }, any: null, list: [1] }\n\
                tasks:\n  base: { uses: model, with: { source: x } }\n";
    let mut report = String::new();
    for set in [
        "rr=16",
        "r=abc",
        "name=16",
        "opt.b2=1",
        "opt.b1.x=1",
        "opt=3",
        "r=[1",
        "list=1",
        "list.0=1",
        "r=",
        "r=16",
        "lr=1",
        "name=\"16\"",
        "opt.b1=0.5",
        "opt={b1: 1}",
        "any=x",
        "list=[]",
    ] {
        let (name, value) = set.split_once('=').unwrap();
        let options = CompileOptions { set: vec![(name.into(), value.into())], ..options() };
        let result = compile_in(folder().path(), text, &options);
        let shown = match &result {
            Ok(plan) => format!("{}\n", plan.params),
            Err(_) => problems(result),
        };
        report.push_str(&format!("--set {set}\n  {shown}"));
    }
    for target in ["bsae", "banana", "base"] {
        let options = CompileOptions { targets: vec![target.into()], ..options() };
        let shown = problems(compile_in(folder().path(), text, &options));
        report.push_str(&format!("--target {target}\n  {shown}"));
    }
    insta::assert_snapshot!(report);
}

#[test]
fn plugin_manifests_point_into_themselves() {
    let dir = folder();
    let plug = dir.path().join("plug");
    std::fs::create_dir(&plug).unwrap();
    let mut report = String::new();
    for (name, manifest) in [
        ("empty", ""),
        (
            "nothing right",
            "protocl: 1\nname: 3\nversion: [1]\ncommand: python3 main.py\nnetwork: yes\ncolor: red\ntasks: []\n",
        ),
        ("wrong protocol", "protocol: 2\nname: p\nversion: 0.1\ncommand: []\ntasks: {}\n"),
        (
            "ports",
            "protocol: 1\nname: p\nversion: 0.1.0\ncommand: [x]\ntasks:\n  fetch:\n    sumary: s\n    inputs: { a: { knd: Files }, b: Model, c: { kind: [Model, Adaptr] } }\n    outputs: { d: { kind: [Files, Model], many: true } }\n  other: { params: {} }\n",
        ),
        (
            "paths to read",
            "protocol: 1\nname: p\nversion: 0.1.0\ncommand: [x]\nread: [data, ~/.x, $X/y, \"{params.x}\"]\ntasks: { fetch: { outputs: { files: Files } } }\n",
        ),
        (
            "schema",
            "protocol: 1\nname: p\nversion: 0.1.0\ncommand: [x]\ntasks:\n  fetch:\n    outputs: { files: Files }\n    params: { type: object, properties: { a: { type: strng } } }\n",
        ),
        (
            "kind taken",
            "protocol: 1\nname: p\nversion: 0.1.0\ncommand: [x]\ntasks: { model: { outputs: { files: Files } } }\n",
        ),
        (
            "parameters",
            "protocol: 1\nname: p\nversion: 0.1.0\ncommand: [x]\ntasks:\n  fetch:\n    outputs: { files: Files }\n    params:\n      type: object\n      required: [package]\n      properties: { package: { type: string, description: Name of the package. }, depth: { type: integer, default: 2 } }\n",
        ),
    ] {
        std::fs::write(plug.join("plugin.yaml"), manifest).unwrap();
        let text =
            "plugins: [plug]\ntasks:\n  a: { uses: fetch, with: { pakage: x, depth: deep } }\n";
        let found = problems(compile_in(dir.path(), text, &options()));
        report.push_str(&format!("## {name}\n\n{manifest}\n{found}\n"));
    }
    insta::assert_snapshot!(report);
}

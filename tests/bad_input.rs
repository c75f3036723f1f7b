//! Bad input: broken pipelines, data and models. Each gives one clear error and exit code 1 or 2,
//! never a panic, and leaves the store valid. The messages are snapshots: read them as a user.

#[path = "bad_input_methods.rs"]
mod methods;
#[path = "support/mod.rs"]
mod support;

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use regex::Regex;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use support::{Project, model_config, model_tensors, tokenizer};

/// Name, exit code, what is broken, and the arguments after `run pipeline.yaml`.
type Case = (&'static str, i32, fn(&Project), &'static [&'static str]);

/// Breaks a fresh project in each way and collects what the user sees.
fn messages(cases: &[Case]) -> String {
    let mut out = String::new();
    for (name, code, break_it, args) in cases {
        let project = Project::new();
        break_it(&project);
        let args: Vec<&str> =
            ["run", "pipeline.yaml", "--quiet"].iter().chain(*args).copied().collect();
        let ran = project.run(&args);
        let text = tidy(&ran.stderr, project.root());
        assert_eq!(ran.code, *code, "{name}: {}\n{text}", ran.stdout);
        assert!(!text.contains("panicked"), "{name}: {text}");
        assert!(text.contains("error"), "{name}: no error on stderr: {text}");
        if project.path(".lora-flow").exists() {
            let verify = project.run(&["cache", "verify"]);
            assert_eq!(verify.code, 0, "{name}: {}{}", verify.stdout, verify.stderr);
        }
        let _ = writeln!(out, "━━ {name} ━━ exit code {code}\n{}\n", text.trim_end());
    }
    out
}

/// Takes out what differs between runs and machines.
fn tidy(text: &str, root: &Path) -> String {
    let text = text.replace(&format!("{}/", root.display()), "");
    let text = text.replace(&root.display().to_string(), "[ROOT]");
    let run_id = Regex::new(r"\d{8}-\d{6}-[0-9a-z]+").unwrap();
    run_id.replace_all(&text, "[RUN]").into_owned()
}

fn snapshot(name: &str, text: String) {
    insta::with_settings!({ omit_expression => true }, {
        insta::assert_snapshot!(name, text);
    });
}

#[test]
fn pipelines() {
    snapshot(
        "pipelines",
        messages(&[
            (
                "unknown top-level key",
                2,
                |p| p.edit("pipeline.yaml", "name: tiny", "nmae: tiny"),
                &[],
            ),
            (
                "unknown key of a task",
                2,
                |p| p.edit("pipeline.yaml", "needs: [gate]", "depends_on: [gate]"),
                &[],
            ),
            (
                "unknown kind",
                2,
                |p| p.edit("pipeline.yaml", "uses: tokenize", "uses: tokenise"),
                &[],
            ),
            (
                "unknown parameter",
                2,
                |p| p.edit("pipeline.yaml", "learning_rate: ${{", "learnign_rate: ${{"),
                &[],
            ),
            (
                "parameter of another tool",
                2,
                |p| p.edit("pipeline.yaml", "per_device_train_batch_size", "micro_batch_size"),
                &[],
            ),
            (
                "text for a number",
                2,
                |p| p.edit("pipeline.yaml", "${{ params.learning_rate }}", "fast"),
                &[],
            ),
            (
                "number for a flag",
                2,
                |p| p.edit("pipeline.yaml", "packing: true", "packing: 3"),
                &[],
            ),
            (
                "list for a path",
                2,
                |p| p.edit("pipeline.yaml", "source: models/tiny", "source: [models/tiny]"),
                &[],
            ),
            ("unknown choice", 2, |p| p.edit("pipeline.yaml", "format: text", "format: txt"), &[]),
            ("rank of zero", 2, |p| p.edit("pipeline.yaml", "r: ${{ params.r }}", "r: 0"), &[]),
            ("negative steps", 2, |p| p.edit("pipeline.yaml", "${{ params.steps }}", "-5"), &[]),
            ("fractions above one", 2, |p| p.edit("pipeline.yaml", "eval: 0.25", "eval: 0.5"), &[]),
            (
                "missing required parameter",
                2,
                |p| p.edit("pipeline.yaml", "    with: { source: models/tiny }\n", ""),
                &[],
            ),
            (
                "missing required input",
                2,
                |p| {
                    p.edit(
                        "pipeline.yaml",
                        "adapter: adapter, train: train_tokens",
                        "adapter: adapter",
                    )
                },
                &[],
            ),
            (
                "unknown input",
                2,
                |p| {
                    p.edit(
                        "pipeline.yaml",
                        "adapter: adapter, train:",
                        "adapter: adapter, training:",
                    )
                },
                &[],
            ),
            (
                "input from an unknown task",
                2,
                |p| p.edit("pipeline.yaml", "train: train_tokens", "train: train_tokns"),
                &[],
            ),
            ("unknown output", 2, |p| p.edit("pipeline.yaml", "docs.eval", "docs.evaluation"), &[]),
            ("ambiguous output", 2, |p| p.edit("pipeline.yaml", "docs.eval", "docs"), &[]),
            (
                "wrong kind of artifact",
                2,
                |p| p.edit("pipeline.yaml", "train: train_tokens", "train: docs.train"),
                &[],
            ),
            (
                "cycle",
                2,
                |p| {
                    p.edit(
                        "pipeline.yaml",
                        "    uses: model\n",
                        "    uses: model\n    needs: [merged]\n",
                    )
                },
                &[],
            ),
            (
                "needs an unknown task",
                2,
                |p| p.edit("pipeline.yaml", "needs: [gate]", "needs: [gates]"),
                &[],
            ),
            (
                "unknown reference",
                2,
                |p| p.edit("pipeline.yaml", "params.steps", "params.step"),
                &[],
            ),
            (
                "undeclared environment",
                2,
                |p| p.edit("pipeline.yaml", "params.steps", "env.STEPS"),
                &[],
            ),
            (
                "broken expression",
                2,
                |p| p.edit("pipeline.yaml", "${{ params.steps }}", "${{ params.steps + }}"),
                &[],
            ),
            ("duplicate task", 2, |p| p.edit("pipeline.yaml", "  after:\n", "  before:\n"), &[]),
            (
                "YAML syntax",
                2,
                |p| {
                    p.edit(
                        "pipeline.yaml",
                        "split: { train: 0.75, eval: 0.25 }",
                        "split: { train: 0.75, eval: 0.25",
                    )
                },
                &[],
            ),
            (
                "tab for indentation",
                2,
                |p| p.edit("pipeline.yaml", "    uses: model", "\tuses: model"),
                &[],
            ),
            ("empty file", 2, |p| p.write("pipeline.yaml", ""), &[]),
            ("not UTF-8", 2, |p| p.write("pipeline.yaml", b"name: \xff\xfe\n"), &[]),
            ("a list", 2, |p| p.write("pipeline.yaml", "- run\n- this\n"), &[]),
            (
                "version of the future",
                2,
                |p| p.edit("pipeline.yaml", "version: 1", "version: 9"),
                &[],
            ),
            ("alias bomb", 2, |p| p.write("pipeline.yaml", alias_bomb()), &[]),
            (
                "deep nesting",
                2,
                |p| p.write("pipeline.yaml", format!("tasks: {}", "[".repeat(20_000))),
                &[],
            ),
            ("missing file", 2, |p| std::fs::remove_file(p.path("pipeline.yaml")).unwrap(), &[]),
            (
                "missing data",
                2,
                |p| p.edit("pipeline.yaml", "data/docs.jsonl", "data/*.parquet"),
                &[],
            ),
            (
                "missing plugin",
                2,
                |p| p.edit("pipeline.yaml", "tasks:\n", "plugins: [plugins/none]\ntasks:\n"),
                &[],
            ),
            ("broken plugin manifest", 2, broken_plugin, &[]),
            (
                "broken rule",
                2,
                |p| {
                    p.edit(
                        "pipeline.yaml",
                        "candidate.perplexity < baseline.perplexity",
                        "candidate.perplexity <",
                    )
                },
                &[],
            ),
            (
                "two publish to one place",
                2,
                |p| {
                    p.edit(
                        "pipeline.yaml",
                        "    uses: model\n",
                        "    uses: model\n    publish: out/merged\n",
                    )
                },
                &[],
            ),
            (
                "bad timeout",
                2,
                |p| {
                    p.edit(
                        "pipeline.yaml",
                        "    uses: model\n",
                        "    uses: model\n    timeout: soon\n",
                    )
                },
                &[],
            ),
            ("unknown --set", 2, |_| (), &["--set", "rank=8"]),
            ("--set of another type", 2, |_| (), &["--set", "steps=many"]),
            ("unknown --target", 2, |_| (), &["--target", "trian"]),
            ("unknown --force", 2, |_| (), &["--force=trian"]),
            (
                "several problems at once",
                2,
                |p| {
                    p.edit("pipeline.yaml", "uses: model", "uses: modl");
                    p.edit("pipeline.yaml", "lora_alpha", "alpha");
                    p.edit("pipeline.yaml", "docs.eval", "docs.evil");
                    p.edit("pipeline.yaml", "max_length: 64", "max_length: long");
                },
                &[],
            ),
        ]),
    );
}

fn alias_bomb() -> String {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..12 {
        let aliases = vec![format!("*a{}", i - 1); 9].join(", ");
        let _ = writeln!(text, "a{i}: &a{i} [{aliases}]");
    }
    text
}

fn broken_plugin(p: &Project) {
    p.write(
        "plugins/odd/plugin.yaml",
        "protocol: 1\nname: odd\nversion: 0.1.0\ncomand: [sh, run.sh]\ntasks: {}\n",
    );
    p.edit("pipeline.yaml", "tasks:\n", "plugins: [plugins/odd]\ntasks:\n");
}

#[test]
fn data() {
    snapshot(
        "data",
        messages(&[
            (
                "truncated Parquet",
                1,
                |p| with_parquet(p, |bytes| bytes.truncate(bytes.len() / 2)),
                &[],
            ),
            (
                "Parquet with a spoilt page",
                1,
                |p| with_parquet(p, |bytes| bytes[8..40].fill(0xff)),
                &[],
            ),
            (
                "not Parquet",
                1,
                |p| with_parquet(p, |bytes| *bytes = b"id,text\n1,a\n".to_vec()),
                &[],
            ),
            ("empty Parquet file", 1, |p| with_parquet(p, Vec::clear), &[]),
            (
                "Parquet without rows",
                1,
                |p| {
                    with_columns(p, vec![("text", Arc::new(StringArray::from(Vec::<&str>::new())))])
                },
                &[],
            ),
            ("missing column", 1, |p| p.edit("pipeline.yaml", "text: text", "text: txt"), &[]),
            (
                "numbers for text",
                1,
                |p| with_columns(p, vec![("text", Arc::new(Int64Array::from(vec![1, 2, 3])))]),
                &[],
            ),
            (
                "malformed JSON line",
                1,
                |p| p.write("data/docs.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\"\n"),
                &[],
            ),
            (
                "JSONL that is not UTF-8",
                1,
                |p| p.write("data/docs.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}\n"),
                &[],
            ),
            ("empty JSONL", 1, |p| p.write("data/docs.jsonl", ""), &[]),
            ("ragged CSV", 1, |p| with_csv(p, b"id,text\n1,a\n2,b,c\n"), &[]),
            ("CSV that is not UTF-8", 1, |p| with_csv(p, b"id,text\n1,\xff\n"), &[]),
            ("rows without text", 1, |p| rows(p, |i| json!({ "id": i, "text": " " })), &[]),
            (
                "filter that keeps nothing",
                1,
                |p| p.edit("pipeline.yaml", "text: text", "text: text\n      where: id > 1000"),
                &[],
            ),
            (
                "filter that is not an expression",
                2,
                |p| p.edit("pipeline.yaml", "text: text", "text: text\n      where: id >"),
                &[],
            ),
            (
                "split that gets nothing",
                1,
                |p| p.write("data/docs.jsonl", "{\"text\": \"only one\"}\n"),
                &[],
            ),
            (
                "completions all empty",
                1,
                |p| {
                    rows(p, |i| json!({ "prompt": format!("question {i}"), "completion": "" }));
                    p.edit("pipeline.yaml", "      text: text\n", "");
                    p.edit(
                        "pipeline.yaml",
                        "format: text, max_length: 64, packing: true",
                        "format: prompt-completion, max_length: 64, add_eos: false",
                    );
                },
                &["--target", "train_tokens"],
            ),
            (
                "messages out of order",
                1,
                |p| {
                    rows(
                        p,
                        |i| json!({ "id": i, "messages": [{ "role": "assistant", "content": "b" }, { "role": "narrator", "content": "a" }] }),
                    );
                    p.write(
                        "models/tiny/chat_template.jinja",
                        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}",
                    );
                    p.edit("pipeline.yaml", "      text: text\n", "");
                    p.edit(
                        "pipeline.yaml",
                        "format: text, max_length: 64, packing: true",
                        "format: messages, max_length: 64",
                    );
                },
                &["--target", "train_tokens"],
            ),
            (
                "messages without a chat template",
                1,
                |p| {
                    rows(
                        p,
                        |i| json!({ "id": i, "messages": [{ "role": "user", "content": "b" }, { "role": "assistant", "content": "a" }] }),
                    );
                    p.edit("pipeline.yaml", "      text: text\n", "");
                    p.edit(
                        "pipeline.yaml",
                        "format: text, max_length: 64, packing: true",
                        "format: messages, max_length: 64",
                    );
                },
                &["--target", "train_tokens"],
            ),
        ]),
    );
}

/// Forty rows, each its own, so that both splits get some.
fn rows(p: &Project, row: fn(usize) -> Value) {
    let lines: String = (0..40).map(|i| format!("{}\n", row(i))).collect();
    p.write("data/docs.jsonl", lines);
}

fn with_parquet(p: &Project, spoil: fn(&mut Vec<u8>)) {
    let texts: Vec<String> = (0..200).map(|i| format!("row {i} of the table")).collect();
    let mut bytes = parquet_bytes(vec![("text", Arc::new(StringArray::from(texts)))]);
    spoil(&mut bytes);
    p.write("data/docs.parquet", bytes);
    p.edit("pipeline.yaml", "data/docs.jsonl", "data/docs.parquet");
}

fn with_columns(p: &Project, columns: Vec<(&str, ArrayRef)>) {
    p.write("data/docs.parquet", parquet_bytes(columns));
    p.edit("pipeline.yaml", "data/docs.jsonl", "data/docs.parquet");
}

fn parquet_bytes(columns: Vec<(&str, ArrayRef)>) -> Vec<u8> {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    bytes
}

fn with_csv(p: &Project, content: &[u8]) {
    p.write("data/docs.csv", content);
    p.edit("pipeline.yaml", "data/docs.jsonl", "data/docs.csv");
}

#[test]
fn models() {
    snapshot(
        "models",
        messages(&[
            ("missing folder", 2, |p| p.edit("pipeline.yaml", "models/tiny", "models/tinny"), &[]),
            (
                "folder without weights",
                1,
                |p| std::fs::remove_file(p.path("models/tiny/model.safetensors")).unwrap(),
                &[],
            ),
            (
                "folder without configuration",
                1,
                |p| std::fs::remove_file(p.path("models/tiny/config.json")).unwrap(),
                &[],
            ),
            (
                "folder without tokenizer",
                1,
                |p| std::fs::remove_file(p.path("models/tiny/tokenizer.json")).unwrap(),
                &[],
            ),
            (
                "configuration that is not JSON",
                1,
                |p| p.write("models/tiny/config.json", "{ \"vocab_size\": 258"),
                &[],
            ),
            (
                "unknown architecture",
                1,
                |p| config(p, |c| c["architectures"] = json!(["MambaForCausalLM"])),
                &[],
            ),
            (
                "missing field",
                1,
                |p| {
                    config(p, |c| {
                        c.as_object_mut().unwrap().remove("hidden_size");
                    })
                },
                &[],
            ),
            (
                "RoPE of an unknown type",
                1,
                |p| {
                    config(p, |c| c["rope_scaling"] = json!({ "rope_type": "yarn", "factor": 2.0 }))
                },
                &[],
            ),
            (
                "heads that do not divide",
                1,
                |p| config(p, |c| c["num_key_value_heads"] = json!(3)),
                &[],
            ),
            ("truncated safetensors", 1, |p| cut(p, "models/tiny/model.safetensors", 0.5), &[]),
            ("empty safetensors", 1, |p| p.write("models/tiny/model.safetensors", ""), &[]),
            (
                "safetensors with an absurd header",
                1,
                |p| p.write("models/tiny/model.safetensors", [0xff; 64]),
                &[],
            ),
            (
                "missing tensor",
                1,
                |p| tensors(p, |t| t.retain(|(n, ..)| n != "model.layers.1.mlp.up_proj.weight")),
                &[],
            ),
            (
                "tensor too many",
                1,
                |p| {
                    tensors(p, |t| {
                        t.push(("model.layers.7.mlp.up_proj.weight".into(), vec![1], vec![0.0]))
                    })
                },
                &[],
            ),
            ("wrong shape", 1, |p| tensors(p, |t| t[1].1 = vec![16, 2]), &[]),
            ("NaN in the weights", 1, |p| tensors(p, |t| t[2].2[7] = f32::NAN), &[]),
            ("GGUF of another magic", 1, |p| gguf(p, b"GGML\x03\0\0\0"), &[]),
            ("truncated GGUF", 1, |p| gguf(p, b"GGUF\x03\0\0\0\x05\0\0\0\0\0\0\0\x02\0"), &[]),
            (
                "GGUF with absurd counts",
                1,
                |p| {
                    gguf(
                p,
                b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x7f"
            )
                },
                &[],
            ),
            ("broken tokenizer", 1, |p| p.write("models/tiny/tokenizer.json", "{}"), &[]),
            (
                "tokenizer larger than the model",
                1,
                |p| {
                    let mut t = tokenizer();
                    t["model"]["vocab"]["zz"] = json!(300);
                    p.write("models/tiny/tokenizer.json", t.to_string());
                },
                &[],
            ),
            (
                "target modules that match nothing",
                1,
                |p| p.edit("pipeline.yaml", "all-linear", "[q_prj]"),
                &[],
            ),
            ("rank above the layer's size", 1, |_| (), &["--set", "r=64"]),
            ("learning rate that explodes", 1, |_| (), &["--set", "learning_rate=1.0e+30"]),
        ]),
    );
}

fn config(p: &Project, change: fn(&mut Value)) {
    let mut config = model_config();
    change(&mut config);
    p.write("models/tiny/config.json", config.to_string());
}

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

fn tensors(p: &Project, change: fn(&mut Tensors)) {
    let mut tensors = model_tensors();
    change(&mut tensors);
    p.write("models/tiny/model.safetensors", serialized(tensors));
}

fn serialized(tensors: Tensors) -> Vec<u8> {
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(n, s, d)| {
            let n_bytes = s.iter().product::<usize>() * 4;
            (n, s, d.iter().flat_map(|x| x.to_le_bytes()).take(n_bytes).collect())
        })
        .collect();
    let views =
        bytes.iter().map(|(n, s, b)| (n, TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn cut(p: &Project, name: &str, share: f64) {
    let bytes = std::fs::read(p.path(name)).unwrap();
    p.write(name, &bytes[..(bytes.len() as f64 * share) as usize]);
}

fn gguf(p: &Project, bytes: &[u8]) {
    p.write("models/broken.gguf", bytes);
    p.edit("pipeline.yaml", "models/tiny", "models/broken.gguf");
}

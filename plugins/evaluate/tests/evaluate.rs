//! `evaluate` on a tiny committed model: its numbers, and that batches do not change them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{BooleanBuilder, ListBuilder, UInt32Builder};
use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, UInt32Type};
use arrow_array::{Array, ArrayRef, RecordBatch};
use candle_core::{DType, Device};
use lora_flow_core::{
    Artifact, ArtifactKind, CancelToken, DeviceSpec, Event, NamedArtifact, OutputDir, Reporter,
    Task, TaskContext, TaskContextParts,
};
use lora_flow_evaluate::Evaluate;
use lora_flow_model::batch::Batch;
use lora_flow_model::decoder::Decoder;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};

struct Quiet;

impl Reporter for Quiet {
    fn event(&self, _: Event) {}
}

fn tiny(part: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference/tiny/llama").join(part)
}

fn model() -> Artifact {
    Artifact::from_dir(ArtifactKind::Model, &tiny("model")).unwrap()
}

/// Documents of unequal length, two in the second row.
fn rows() -> Vec<Vec<Vec<u32>>> {
    let document = |start: u32, len: u32| (0..len).map(|i| (start + 7 * i) % 60).collect();
    vec![
        vec![document(1, 9)],
        vec![document(2, 4), document(3, 12)],
        vec![document(4, 2)],
        vec![document(5, 17)],
    ]
}

/// A Tokens artifact of the rows; every token but the first of a document is a target.
fn tokens(dir: &Path, rows: &[Vec<Vec<u32>>], facts: Value) -> Artifact {
    let mut ids = ListBuilder::new(UInt32Builder::new());
    let mut mask = ListBuilder::new(BooleanBuilder::new());
    let mut lengths = ListBuilder::new(UInt32Builder::new());
    for row in rows {
        for document in row {
            ids.values().append_slice(document);
            (0..document.len()).for_each(|i| mask.values().append_value(i > 0));
            lengths.values().append_value(document.len() as u32);
        }
        ids.append(true);
        mask.append(true);
        lengths.append(true);
    }
    let batch = RecordBatch::try_from_iter([
        ("input_ids", Arc::new(ids.finish()) as ArrayRef),
        ("loss_mask", Arc::new(mask.finish()) as ArrayRef),
        ("doc_lengths", Arc::new(lengths.finish()) as ArrayRef),
    ])
    .unwrap();
    let file = std::fs::File::create(dir.join("tokens.parquet")).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let all = rows.concat();
    let count: usize = all.iter().map(Vec::len).sum();
    let mut info = json!({
        "sequences": rows.len(), "documents": all.len(), "tokens": count,
        "supervised": count - all.len(), "truncated_documents": 0, "dropped_documents": 0,
        "max_length": 64, "packing": true, "vocab_size": 64, "tokenizer_digest": null,
        "eos_token_id": null, "text_bytes": 100, "text_words": 20,
    });
    for (key, value) in facts.as_object().unwrap() {
        info[key] = value.clone();
    }
    std::fs::write(dir.join("tokens.json"), info.to_string()).unwrap();
    Artifact::from_dir(ArtifactKind::Tokens, dir).unwrap()
}

struct Evaluated {
    metrics: Value,
    samples: Vec<(u32, u32, u32, f64)>,
    summary: Vec<(String, String)>,
}

fn evaluate(with: Value, tokens: &Artifact, adapter: Option<Artifact>) -> Evaluated {
    let task: Evaluate = serde_json::from_value(with).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let named = |artifact: Artifact| vec![NamedArtifact { reference: "x".into(), artifact }];
    let mut inputs = BTreeMap::from([
        ("model".to_owned(), named(model())),
        ("eval".to_owned(), named(tokens.clone())),
    ]);
    inputs.extend(adapter.map(|a| ("adapter".to_owned(), named(a))));
    let output = OutputDir {
        port: "metrics".into(),
        kind: ArtifactKind::Metrics,
        path: dir.path().to_owned(),
        adopted: BTreeMap::new(),
        meta: Value::Null,
    };
    let mut cx = TaskContext::new(TaskContextParts {
        inputs,
        outputs: BTreeMap::from([("metrics".to_owned(), output)]),
        files: BTreeMap::new(),
        scratch: dir.path().to_owned(),
        state_dir: dir.path().to_owned(),
        device: DeviceSpec::Cpu,
        threads: 2,
        allow_network: false,
        cancel: CancelToken::default(),
        reporter: Arc::new(Quiet),
    });
    task.run(&mut cx).unwrap_or_else(|e| panic!("{}", e.chain()));
    let (_, _, summary, _) = cx.finish();
    let text = std::fs::read_to_string(dir.path().join("metrics.json")).unwrap();
    let file = std::fs::File::open(dir.path().join("samples.parquet")).unwrap();
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap();
    let mut samples = Vec::new();
    for batch in reader {
        let batch = batch.unwrap();
        let number = |name: &str| {
            batch.column_by_name(name).unwrap().as_primitive::<UInt32Type>().values().to_vec()
        };
        let (row, doc, tokens) = (number("row"), number("doc"), number("tokens"));
        let nll = batch.column_by_name("nll").unwrap().as_primitive::<Float64Type>();
        for i in 0..batch.num_rows() {
            samples.push((row[i], doc[i], tokens[i], nll.value(i)));
        }
        assert_eq!(batch.column_by_name("digest").unwrap().null_count(), 0);
    }
    Evaluated { metrics: serde_json::from_str(&text).unwrap(), samples, summary }
}

fn number(metrics: &Value, name: &str) -> f64 {
    metrics[name].as_f64().unwrap_or_else(|| panic!("`{name}` in {metrics}"))
}

#[test]
fn perplexity_is_that_of_the_documents_one_by_one_whatever_the_batches() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = tokens(dir.path(), &rows(), json!({}));
    let decoder = Decoder::load(&model(), &Device::Cpu, DType::F32).unwrap();
    let each: Vec<(f64, f64)> = rows()
        .concat()
        .iter()
        .map(|document| {
            let nll = decoder.nll(&Batch::from_documents(&[document]), None).unwrap();
            (nll.iter().map(|x| f64::from(*x)).sum(), nll.len() as f64)
        })
        .collect();
    let (total, count) = each.iter().fold((0.0, 0.0), |a, e| (a.0 + e.0, a.1 + e.1));
    let mean = total / count;
    let squares: f64 = each.iter().map(|(nll, n)| (nll - mean * n).powi(2)).sum();
    let error = (5.0 / 4.0 * squares).sqrt() / count;

    for with in [
        json!({}),
        json!({ "batch_size": 1 }),
        json!({ "batch_size": 3 }),
        json!({ "max_tokens_per_batch": 1 }),
        json!({ "max_tokens_per_batch": 26 }),
    ] {
        let Evaluated { metrics, samples, summary } = evaluate(with.clone(), &tokens, None);
        let close = |name: &str, expected: f64| {
            let found = number(&metrics, name);
            assert!((found / expected - 1.0).abs() < 1e-5, "{with}: {name} {found}, {expected}");
        };
        close("loss", mean);
        close("perplexity", mean.exp());
        close("perplexity_stderr", mean.exp() * error);
        close("bits_per_token", mean / 2f64.ln());
        close("bits_per_byte", total / 100.0 / 2f64.ln());
        close("word_perplexity", (total / 20.0).exp());
        assert_eq!(number(&metrics, "tokens"), count);
        assert_eq!(summary[0].0, "perplexity");
        assert!(summary[0].1.contains(" ± "), "{summary:?}");
        let places: Vec<_> = samples.iter().map(|s| (s.0, s.1, s.2)).collect();
        assert_eq!(places, [(0, 0, 8), (1, 0, 3), (1, 1, 11), (2, 0, 1), (3, 0, 16)]);
        for (sample, (nll, _)) in samples.iter().zip(&each) {
            assert!((sample.3 - nll).abs() < 1e-4);
        }
    }
}

#[test]
fn the_data_digest_tells_data_apart_and_an_adapter_changes_the_loss() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let all = tokens(one.path(), &rows(), json!({}));
    let part = tokens(two.path(), &rows()[..2], json!({}));
    let adapter = Artifact::from_dir(ArtifactKind::Adapter, &tiny("adapter_after")).unwrap();
    let base = evaluate(json!({}), &all, None).metrics;
    let adapted = evaluate(json!({}), &all, Some(adapter)).metrics;
    assert_ne!(base["loss"], adapted["loss"]);
    assert_eq!(base["meta"]["data"], adapted["meta"]["data"]);
    let other = evaluate(json!({}), &part, None).metrics;
    let limited = evaluate(json!({ "limit": 2 }), &all, None).metrics;
    assert_ne!(base["meta"]["data"], other["meta"]["data"]);
    assert_ne!(base["meta"]["data"], limited["meta"]["data"]);
    assert!((number(&limited, "loss") - number(&other, "loss")).abs() < 1e-6);
    assert!(limited.get("bits_per_byte").is_none(), "the limit leaves out text");
}

#[test]
fn losses_per_byte_are_left_out_where_not_all_text_is_scored() {
    let dir = tempfile::tempdir().unwrap();
    for facts in [json!({ "text_bytes": 0 }), json!({ "documents": 9 })] {
        let tokens = tokens(dir.path(), &rows(), facts);
        assert!(evaluate(json!({}), &tokens, None).metrics.get("byte_perplexity").is_none());
    }
}

use std::path::Path;

use lora_flow_data::TokenSet;
use serde_json::json;

use super::*;
use crate::testing::{Ran, run};

const EOS: u32 = 0;

/// A model folder with a tokenizer of words and a chat template.
fn model(dir: &Path, vocab_size: usize) -> Artifact {
    let words = ["<|end|>", "?", "a", "b", "c", "user:", "assistant:"];
    let vocab: BTreeMap<&str, usize> = words.iter().enumerate().map(|(i, w)| (*w, i)).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{ "id": 0, "content": "<|end|>", "single_word": false, "lstrip": false,
                           "rstrip": false, "normalized": false, "special": true }],
        "post_processor": null, "decoder": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "?" }
    });
    std::fs::create_dir_all(dir).unwrap();
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
    write("tokenizer.json", tokenizer.to_string());
    write("tokenizer_config.json", json!({ "eos_token": "<|end|>" }).to_string());
    write(
        "config.json",
        json!({ "vocab_size": vocab_size, "max_position_embeddings": 64 }).to_string(),
    );
    write(
        "chat_template.jinja",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }} {% endfor %}\
         {% if add_generation_prompt %}assistant:{% endif %}"
            .to_owned(),
    );
    Artifact::from_dir(ArtifactKind::Model, dir).unwrap()
}

fn tokenize(rows: &str, with: Value) -> Result<(Ran, TokenSet)> {
    tokenize_for(rows, with, 7)
}

fn tokenize_for(rows: &str, with: Value, vocab_size: usize) -> Result<(Ran, TokenSet)> {
    let dir = tempfile::tempdir().unwrap();
    let model = model(&dir.path().join("model"), vocab_size);
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("rows.jsonl"), rows).unwrap();
    let dataset = Artifact::from_dir(ArtifactKind::Dataset, &data).unwrap();
    let inputs = vec![("dataset", "docs.train", dataset), ("model", "base", model)];
    let ran = run("tokenize", with, dir.path(), inputs)?;
    let tokens = Artifact::from_dir(ArtifactKind::Tokens, &ran.outputs["tokens"])?;
    Ok((ran, TokenSet::open(&tokens)?))
}

#[test]
fn text_is_packed_and_counted() {
    let rows = "{\"text\": \"a b c\"}\n{\"text\": \" \"}\n{\"text\": \"c\"}\n{\"text\": null}\n";
    let (ran, set) = tokenize(rows, json!({ "max_length": 8, "packing": true })).unwrap();
    assert_eq!(set.rows(), 1);
    assert_eq!(set.row(0).input_ids, [2, 3, 4, EOS, 4, EOS]);
    assert_eq!(set.row(0).loss_mask, [false, true, true, true, false, true]);
    assert_eq!(set.row(0).doc_lengths, [4, 2]);
    assert_eq!((set.info.text_bytes, set.info.text_words), (6, 4));
    assert_eq!(set.info.dropped_documents, 2);
    assert_eq!(ran.warnings, ["2 of 4 rows without text were dropped"]);
    assert!(ran.report.contains("a⟦ b c <|end|>⟧"), "{}", ran.report);
    let (_, plain) = tokenize(rows, json!({ "max_length": 8, "limit": 1 })).unwrap();
    assert_eq!((plain.rows(), plain.info.packing), (1, false));
}

#[test]
fn long_text_is_split_or_truncated() {
    let rows = format!("{{\"text\": \"{}\"}}\n", "a ".repeat(20).trim());
    let (_, set) = tokenize(&rows, json!({ "max_length": 8 })).unwrap();
    assert_eq!(set.iter().map(|r| r.input_ids.len()).collect::<Vec<_>>(), [8, 8, 5]);
    let with = json!({ "max_length": 8, "overflow": "truncate" });
    let (ran, set) = tokenize(&rows, with).unwrap();
    assert_eq!((set.tokens(), set.info.truncated_documents), (8, 1));
    assert_eq!(set.info.text_bytes, 15);
    assert!(ran.warnings[0].contains("1 of 1 rows are longer"), "{:?}", ran.warnings);
}

#[test]
fn completions_and_conversations_are_masked() {
    let rows = "{\"prompt\": \"a b \", \"completion\": \"c\"}\n";
    let with = json!({ "format": "prompt-completion", "max_length": 8 });
    let (_, set) = tokenize(rows, with).unwrap();
    assert_eq!(set.row(0).input_ids, [2, 3, 4, EOS]);
    assert_eq!(set.row(0).loss_mask, [false, false, true, true]);
    let with =
        json!({ "format": "prompt-completion", "max_length": 8, "completion_only_loss": false });
    let (_, set) = tokenize(rows, with).unwrap();
    assert_eq!(set.row(0).loss_mask, [false, true, true, true]);

    let rows = json!({ "chat": [{ "role": "user", "content": "a" },
                                { "role": "assistant", "content": "b c" }] });
    let with = json!({ "format": "messages", "columns": { "messages": "chat" } });
    let (ran, set) = tokenize(&rows.to_string(), with).unwrap();
    assert_eq!(set.row(0).input_ids, [5, 2, EOS, 6, 3, 4, EOS]);
    assert_eq!(set.row(0).loss_mask, [false, false, false, false, true, true, true]);
    assert!(ran.summary.iter().any(|(name, value)| name == "supervised" && value == "42.9 %"));
}

#[test]
fn what_is_said_about_bad_data() {
    let error = tokenize("{\"txt\": \"a\"}\n", json!({})).unwrap_err();
    assert_eq!(error.to_string(), "`docs.train/rows.jsonl` has no column `text`");
    let error = tokenize("{\"text\": 5}\n", json!({})).unwrap_err();
    assert!(error.to_string().contains("holds numbers (Int64), not text"), "{error}");
    let error = tokenize("{\"text\": \"\"}\n", json!({})).unwrap_err();
    assert_eq!(error.to_string(), "none of the 1 rows became tokens: 1 without text");
    let error = tokenize_for("{\"text\": \"c\"}\n", json!({}), 4).unwrap_err();
    assert!(error.to_string().contains("gives id 4 (`c`), but the model has only 4"), "{error}");
    let rows = json!({ "messages": [{ "role": "user", "content": "a" }] }).to_string();
    let with = json!({ "format": "messages" });
    let error = tokenize(&rows, with).unwrap_err();
    assert!(error.chain().starts_with("`docs.train/rows.jsonl` row 1: the conversation has no"));
}

#[test]
fn problems_are_found_before_anything_runs() {
    let problems = |with: Value| -> Vec<String> {
        let task = Tokenize::deserialize(with).unwrap();
        task.validate().into_iter().map(|p| p.pointer).collect()
    };
    assert!(problems(json!({})).is_empty());
    for (with, pointer) in [
        (json!({ "max_length": 1 }), "/max_length"),
        (json!({ "limit": 0 }), "/limit"),
        (json!({ "completion_only_loss": true }), "/completion_only_loss"),
        (json!({ "assistant_only_loss": false }), "/assistant_only_loss"),
        (json!({ "format": "messages", "overflow": "split" }), "/overflow"),
        (json!({ "columns": { "prompt": "q" } }), "/columns/prompt"),
        (json!({ "format": "messages", "columns": { "text": "q" } }), "/columns/text"),
        (json!({ "chat_template": "x" }), "/chat_template"),
        (json!({ "format": "messages", "chat_template": "{% if %}" }), "/chat_template"),
        (json!({ "format": "messages", "date": "tomorrow" }), "/date"),
    ] {
        assert_eq!(problems(with.clone()), [pointer], "{with}");
    }
    let error = (crate::TASKS[1].parse)(json!({ "sequence_len": 4 })).unwrap_err();
    assert!(error.to_string().contains("sequence_len"), "{error}");
}

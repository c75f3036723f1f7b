//! The Tokens artifact: written, packed, read back, refused.

use std::collections::BTreeMap;

use lora_flow_core::{Artifact, ArtifactKind};
use lora_flow_data::{
    Document, DropReason, Encoded, TextTokenizer, TokenSet, TokensSummary, TokensWriter,
    TokensWriterOptions,
};
use proptest::prelude::*;
use serde_json::{Value, json};

/// A tokenizer of words; `unk` for all others.
fn tokenizer() -> TextTokenizer {
    let vocab: BTreeMap<String, u32> = (0..100).map(|i| (format!("w{i}"), i)).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [], "post_processor": null, "decoder": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w0" }
    });
    TextTokenizer::new(json.to_string().as_bytes(), &Value::Null, None).unwrap()
}

fn document(ids: Vec<u32>) -> Document {
    let targets = (0..ids.len()).map(|i| i > 0).collect();
    Document { ids, targets, bytes: 3, words: 1 }
}

fn row(document: Document) -> Encoded {
    Encoded { documents: vec![document], ..Encoded::default() }
}

fn write(
    folder: &std::path::Path,
    rows: Vec<Encoded>,
    max_length: usize,
    packing: bool,
) -> lora_flow_core::Result<TokensSummary> {
    let tokenizer = tokenizer();
    let options = TokensWriterOptions {
        max_length,
        packing,
        vocab_size: tokenizer.vocab_size(),
        tokenizer_digest: Some(tokenizer.digest()),
        eos_token_id: None,
    };
    let mut writer = TokensWriter::new(folder, options)?;
    for row in rows {
        writer.push(row)?;
    }
    writer.finish(&tokenizer)
}

fn open(folder: &std::path::Path) -> lora_flow_core::Result<TokenSet> {
    TokenSet::open(&Artifact::from_dir(ArtifactKind::Tokens, folder).unwrap())
}

/// Documents of a set, in a canonical order.
fn sorted(set: &TokenSet) -> Vec<(Vec<u32>, Vec<bool>)> {
    let mut all: Vec<_> = set
        .iter()
        .flat_map(|row| row.documents().map(|d| (d.input_ids.to_vec(), d.loss_mask.to_vec())))
        .collect();
    all.sort();
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn packing_keeps_every_document_whole(
        ids in proptest::collection::vec(proptest::collection::vec(0u32..100, 2..32), 1..80),
    ) {
        let rows = || ids.iter().map(|ids| row(document(ids.clone()))).collect::<Vec<_>>();
        let (packed, plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let summary = write(packed.path(), rows(), 32, true).unwrap();
        write(plain.path(), rows(), 32, false).unwrap();
        let (packed, plain) = (open(packed.path()).unwrap(), open(plain.path()).unwrap());
        prop_assert_eq!(plain.rows(), ids.len());
        prop_assert!(packed.iter().all(|row| row.input_ids.len() <= 32));
        prop_assert_eq!(sorted(&packed), sorted(&plain));
        prop_assert_eq!(packed.supervised() as u64, summary.info.supervised);
        prop_assert_eq!(packed.tokens() as u64, summary.info.tokens);
        prop_assert_eq!(summary.info.documents, ids.len() as u64);
        for (row, given) in plain.iter().zip(&ids) {
            prop_assert_eq!(row.input_ids, &given[..]);
            prop_assert_eq!(row.doc_lengths, &[given.len() as u32][..]);
        }
    }
}

#[test]
fn equal_rows_give_equal_bytes() {
    let rows = || (2..2000u32).map(|n| row(document(vec![n % 97; 2 + n as usize % 30]))).collect();
    let bytes = || {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), rows(), 32, true).unwrap();
        std::fs::read(dir.path().join("tokens.parquet")).unwrap()
    };
    assert_eq!(bytes(), bytes());
}

#[test]
fn rows_in_are_rows_out_or_counted() {
    let dir = tempfile::tempdir().unwrap();
    let rows = vec![
        row(document(vec![1, 2, 3])),
        Encoded::dropped(DropReason::Empty),
        Encoded { truncated: true, ..row(document(vec![4, 5])) },
        Encoded::dropped(DropReason::NothingSupervised),
    ];
    let summary = write(dir.path(), rows, 8, true).unwrap();
    assert_eq!(summary.rows, 4);
    assert_eq!((summary.info.documents, summary.info.sequences), (2, 1));
    assert_eq!((summary.info.dropped_documents, summary.info.truncated_documents), (2, 1));
    assert_eq!(summary.info.text_bytes, 6);
    let report = summary.report();
    assert_eq!(
        report,
        "rows         4\n  dropped    1 without text\n  dropped    1 with nothing supervised within \
         `max_length`\n  truncated  1 to 8 tokens\ndocuments    2\ntokens       5, 3 supervised (60.0 %)\n\
         lengths      least 2, median 2, 90 % 3, 99 % 3, most 3\nsequences    1 of at most 8 tokens, \
         62.5 % full, packed\nexample (⟦supervised⟧):\n  w1⟦ w2 w3⟧\n"
    );
}

#[test]
fn nothing_to_learn_is_an_error_that_shows_an_example() {
    let dir = tempfile::tempdir().unwrap();
    let masked = Document { targets: vec![false; 2], ..document(vec![7, 8]) };
    let error = write(dir.path(), vec![row(masked)], 8, false).unwrap_err();
    assert!(error.to_string().contains("no token of the 1 documents is supervised"), "{error}");
    assert!(error.to_string().ends_with("w7 w8"), "{error}");
    let rows = vec![Encoded::dropped(DropReason::Empty); 3];
    let error = write(dir.path(), rows, 8, false).unwrap_err();
    assert_eq!(error.to_string(), "none of the 3 rows became tokens: 3 without text");
}

#[test]
fn contradictions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let info = write(dir.path(), vec![row(document(vec![1, 2, 3]))], 8, false).unwrap().info;
    let refuse = |ids: &[u32], mask: &[bool], lengths: &[u32]| {
        TokenSet::from_rows(info.clone(), [(ids, mask, lengths)]).unwrap_err().chain()
    };
    assert!(refuse(&[1, 100], &[false, true], &[2]).contains("token id 100 is not below"));
    assert!(refuse(&[1, 2], &[false], &[2]).contains("`loss_mask` has 1 entries for 2 tokens"));
    assert!(refuse(&[1, 2], &[false, true], &[1]).contains("`doc_lengths` are [1]"));
    assert!(refuse(&[1, 2], &[false, true], &[2, 0]).contains("`doc_lengths`"));
    assert!(
        refuse(&[1, 2], &[false, true], &[1, 1]).contains("token 1 is the first of its document")
    );
    assert!(refuse(&[], &[], &[]).contains("without tokens"));

    let path = dir.path().join("tokens.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"sequences\": 1", "\"sequences\": 2")).unwrap();
    let error = open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("promises 2 sequences"), "{error}");
    std::fs::write(&path, "{").unwrap();
    assert!(open(dir.path()).unwrap_err().chain().contains("`tokens.json` cannot be read"));
    std::fs::write(&path, text).unwrap();
    let parquet = dir.path().join("tokens.parquet");
    let bytes = std::fs::read(&parquet).unwrap();
    std::fs::write(&parquet, &bytes[..bytes.len() / 2]).unwrap();
    assert!(open(dir.path()).unwrap_err().to_string().contains("is damaged"));
}

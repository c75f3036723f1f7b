use std::str::FromStr;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value as Gguf;
use tokenizers::Tokenizer;

use super::GgufBuilder;
use crate::gguf::GgufFile;
use crate::gguf_tokenizer::{TokenizerFiles, from_gguf};

/// Specials, the printable bytes, and a few merges.
fn builder(pre: Option<&str>) -> GgufBuilder {
    let mut tokens: Vec<String> =
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "[PAD0]"].map(Into::into).into();
    let mut types = vec![3, 3, 3, 4, 5];
    tokens.extend(('!'..='~').map(String::from));
    tokens.extend(["Ġ", "Ċ", "ĠĠ", "he", "12", "123"].map(String::from));
    types.resize(tokens.len(), 1);
    let mut builder = GgufBuilder::llama(GgmlDType::F32);
    let strings = |v: &[String]| Gguf::Array(v.iter().cloned().map(Gguf::String).collect());
    let merges = ["Ġ Ġ", "h e", "1 2", "12 3"].map(String::from);
    for (key, value) in [
        ("model", Gguf::String("gpt2".into())),
        ("tokens", strings(&tokens)),
        ("token_type", Gguf::Array(types.into_iter().map(Gguf::I32).collect())),
        ("merges", strings(&merges)),
        ("unknown_token_id", Gguf::U32(0)),
        ("padding_token_id", Gguf::U32(2)),
    ] {
        builder.metadata.insert(format!("tokenizer.ggml.{key}"), value);
    }
    if let Some(pre) = pre {
        builder.metadata.insert("tokenizer.ggml.pre".into(), Gguf::String(pre.into()));
    }
    builder
        .metadata
        .insert("tokenizer.chat_template".into(), Gguf::String("{{ messages }}".into()));
    builder
}

fn read(builder: &GgufBuilder) -> lora_flow_core::Result<TokenizerFiles> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, builder.bytes()).unwrap();
    from_gguf(&GgufFile::open(&path).unwrap())
}

fn tokens(pre: Option<&str>, text: &str) -> Vec<String> {
    let tokenizer = Tokenizer::from_str(&read(&builder(pre)).unwrap().tokenizer).unwrap();
    tokenizer.encode(text, true).unwrap().get_tokens().to_vec()
}

#[test]
fn pre_tokenizers_split_digits_as_their_models_do() {
    let text = "he 1234";
    assert_eq!(tokens(Some("smollm"), text), ["he", "Ġ", "1", "2", "3", "4"]);
    assert_eq!(tokens(Some("qwen2"), text), ["he", "Ġ", "1", "2", "3", "4"]);
    assert_eq!(tokens(Some("llama-bpe"), text), ["<|im_start|>", "he", "Ġ", "123", "4"]);
    assert_eq!(tokens(Some("gpt-2"), text), ["he", "Ġ", "123", "4"]);
    assert_eq!(tokens(None, text), ["he", "Ġ", "123", "4"]);
    // Digits end the run of spaces: one space stays with nothing before a digit.
    assert_eq!(tokens(Some("smollm"), "x  12"), ["x", "ĠĠ", "1", "2"]);
}

#[test]
fn special_and_added_tokens_are_whole_and_padding_is_left_out() {
    let files = read(&builder(Some("smollm"))).unwrap();
    let tokenizer = Tokenizer::from_str(&files.tokenizer).unwrap();
    let encoded = tokenizer.encode("<|im_start|>he<tool><|im_end|>", false).unwrap();
    assert_eq!(encoded.get_ids()[0], 1);
    assert_eq!(encoded.get_tokens(), ["<|im_start|>", "he", "<tool>", "<|im_end|>"]);
    assert_eq!(tokenizer.decode(encoded.get_ids(), true).unwrap(), "he<tool>");
    assert_eq!(tokenizer.token_to_id("[PAD0]"), None);
}

#[test]
fn config_names_the_special_tokens() {
    let files = read(&builder(Some("smollm"))).unwrap();
    assert_eq!(files.config["bos_token"], "<|im_start|>");
    assert_eq!(files.config["eos_token"], "<|im_end|>");
    assert_eq!(files.config["pad_token"], "<|im_end|>");
    assert_eq!(files.config["unk_token"], "<|endoftext|>");
    assert_eq!(files.config["add_bos_token"], false);
    assert_eq!(files.config["model_max_length"], 128);
    assert_eq!(files.chat_template.as_deref(), Some("{{ messages }}"));
}

#[test]
fn the_beginning_token_is_added_where_the_file_says_so() {
    let mut builder = builder(Some("smollm"));
    builder.metadata.insert("tokenizer.ggml.add_bos_token".into(), Gguf::Bool(true));
    let tokenizer = Tokenizer::from_str(&read(&builder).unwrap().tokenizer).unwrap();
    assert_eq!(tokenizer.encode("he", true).unwrap().get_tokens(), ["<|im_start|>", "he"]);
    assert_eq!(tokenizer.encode("he", false).unwrap().get_tokens(), ["he"]);
}

#[test]
fn what_cannot_be_rebuilt_is_refused_by_name() {
    let error = |key: &str, value: Gguf| {
        let mut builder = builder(Some("smollm"));
        builder.metadata.insert(format!("tokenizer.ggml.{key}"), value);
        read(&builder).unwrap_err().chain()
    };
    assert!(error("model", Gguf::String("llama".into())).contains("`llama`"));
    assert!(error("pre", Gguf::String("tekken".into())).contains("`tekken`"));
    assert!(error("token_type", Gguf::Array(vec![Gguf::I32(1)])).contains("token_type"));
    assert!(error("eos_token_id", Gguf::U32(100_000)).contains("eos_token_id"));
    let merges = Gguf::Array(vec![Gguf::String("q zz".into())]);
    assert!(error("merges", merges).contains("do not fit"));
    let twice = Gguf::Array(vec![Gguf::String("a".into()); 105]);
    assert!(error("tokens", twice).contains("`a` stands twice"));
}

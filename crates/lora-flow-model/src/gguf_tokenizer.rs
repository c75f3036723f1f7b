//! Hugging Face's tokenizer files rebuilt from GGUF metadata.
//!
//! GGUF names the pre-tokenizer (`tokenizer.ggml.pre`) without describing it; the descriptions
//! here are those of the models' own `tokenizer.json`, so that the ids are theirs.

use std::str::FromStr;

use lora_flow_core::{Error, Result, ResultExt};
use serde_json::{Map, Value, json};

use crate::gguf::{self, GgufFile};

/// Splits of Llama 3 (digits in groups of up to three).
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Splits of Qwen 2 and 3 (digits one by one).
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Token types of GGUF (`tokenizer.ggml.token_type`).
mod token_type {
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER_DEFINED: i64 = 4;
    pub const UNUSED: i64 = 5;
}

/// The files of a tokenizer.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenizerFiles {
    /// `tokenizer.json`.
    pub tokenizer: String,
    /// `tokenizer_config.json`.
    pub config: Value,
    /// `chat_template.jinja`, if the model has one.
    pub chat_template: Option<String>,
}

/// Rebuilds the tokenizer files from the metadata of a GGUF file.
///
/// # Errors
/// When the tokenizer is not byte-level BPE, its pre-tokenizer is not known, or the lists do not
/// fit each other.
pub fn from_gguf(file: &GgufFile) -> Result<TokenizerFiles> {
    let model = required(file.string("tokenizer.ggml.model")?, file, "tokenizer.ggml.model")?;
    if model != "gpt2" {
        return Err(file.error(format!("tokenizer model `{model}` is not supported")).with_hint(
            "only byte-level BPE (`gpt2`) can be rebuilt; use a folder with `tokenizer.json`",
        ));
    }
    let pre = PreTokenizer::named(file.string("tokenizer.ggml.pre")?, file)?;
    let tokens = strings(file, "tokenizer.ggml.tokens")?;
    let types = token_types(file, tokens.len())?;

    let mut vocab = Map::new();
    let mut added = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let kind = types.get(id).copied().unwrap_or(1);
        if kind == token_type::UNUSED {
            continue;
        }
        if vocab.insert((*token).to_owned(), json!(id)).is_some() {
            return Err(file.error(format!("token `{token}` stands twice in the vocabulary")));
        }
        let special = matches!(kind, token_type::UNKNOWN | token_type::CONTROL);
        if special || kind == token_type::USER_DEFINED {
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": special,
            }));
        }
    }
    let merges = strings(file, "tokenizer.ggml.merges")?
        .into_iter()
        .map(|m| match m.split_once(' ') {
            Some((a, b)) => Ok(json!([a, b])),
            None => Err(file.error(format!("merge `{m}` is not two tokens"))),
        })
        .collect::<Result<Vec<_>>>()?;

    let special = |name: &str| -> Result<Option<(usize, &str)>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = file.integer(&key)? else { return Ok(None) };
        let token = tokens.get(id).ok_or_else(|| {
            file.error(format!("`{key}` is {id}, beyond the {} tokens", tokens.len()))
        })?;
        Ok(Some((id, token)))
    };
    let bos = special("bos")?;
    let eos = special("eos")?;
    let add_bos = file.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(pre.add_bos);
    let add_eos = file.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let template =
        PostTemplate { bos: bos.filter(|_| add_bos), eos: eos.filter(|_| add_eos) }.to_json();

    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": pre.normalizer,
        "pre_tokenizer": pre.pre_tokenizer,
        "post_processor": template,
        "decoder": byte_level(true, true, true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    })
    .to_string();
    tokenizers::Tokenizer::from_str(&tokenizer)
        .map_err(|e| file.error("the tokenizer's lists do not fit each other").with_source(e))?;

    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "add_prefix_space": false,
        "clean_up_tokenization_spaces": false,
    });
    for (field, key) in [
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("pad_token", "padding"),
        ("unk_token", "unknown"),
    ] {
        if let Some((_, token)) = special(key)? {
            config[field] = json!(token);
        }
    }
    if let Some(architecture) = file.string("general.architecture")?
        && let Some(length) = file.integer(&format!("{architecture}.context_length"))?
    {
        config["model_max_length"] = json!(length);
    }
    let chat_template = file.string("tokenizer.chat_template")?.map(str::to_owned);
    Ok(TokenizerFiles { tokenizer, config, chat_template })
}

/// Checks that a `tokenizer.json` can be used with a model: it is readable and has no token
/// beyond the embedding.
///
/// # Errors
/// When it is not.
pub fn check(tokenizer: &str, vocab_size: usize) -> Result<()> {
    let tokenizer = tokenizers::Tokenizer::from_str(tokenizer)
        .map_err(|e| Error::new("cannot read `tokenizer.json`").with_source(e))?;
    let vocab = tokenizer.get_vocab(true);
    match vocab.iter().max_by_key(|(_, id)| **id) {
        Some((token, id)) if *id as usize >= vocab_size => Err(Error::new(format!(
            "token `{token}` of `tokenizer.json` has the id {id}, but the model's embedding has \
             only {vocab_size} rows"
        ))
        .with_hint(
            "the tokenizer belongs to another model, or tokens were added without resizing it",
        )),
        Some(_) => Ok(()),
        None => Err(Error::new("`tokenizer.json` has an empty vocabulary")),
    }
}

/// What `tokenizer.ggml.pre` stands for.
struct PreTokenizer {
    normalizer: Value,
    pre_tokenizer: Value,
    ignore_merges: bool,
    /// Whether a beginning-of-sequence token is added where the file does not say.
    add_bos: bool,
}

impl PreTokenizer {
    fn named(name: Option<&str>, file: &GgufFile) -> Result<Self> {
        let plain = |pre_tokenizer| Self {
            normalizer: Value::Null,
            pre_tokenizer,
            ignore_merges: false,
            add_bos: false,
        };
        Ok(match name {
            // Files from before the key existed are GPT-2-like.
            None | Some("default" | "gpt-2" | "gpt2") => plain(byte_level(false, true, true)),
            Some("smollm") => plain(sequence(
                json!({ "type": "Digits", "individual_digits": true }),
                byte_level(false, true, true),
            )),
            Some("llama-bpe" | "llama3" | "llama-v3") => Self {
                ignore_merges: true,
                add_bos: true,
                ..plain(sequence(split(LLAMA3), byte_level(false, true, false)))
            },
            Some("qwen2") => Self {
                normalizer: json!({ "type": "NFC" }),
                ..plain(sequence(split(QWEN2), byte_level(false, false, false)))
            },
            Some(other) => {
                return Err(file
                    .error(format!(
                        "pre-tokenizer `{other}` (`tokenizer.ggml.pre`) is not supported"
                    ))
                    .with_hint(
                        "supported are `smollm`, `llama-bpe`, `qwen2`, `gpt-2` and `default`; or \
                         use a folder with `tokenizer.json`",
                    ));
            }
        })
    }
}

fn byte_level(add_prefix_space: bool, trim_offsets: bool, use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": add_prefix_space,
        "trim_offsets": trim_offsets, "use_regex": use_regex,
    })
}

fn split(regex: &str) -> Value {
    json!({
        "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false,
    })
}

fn sequence(first: Value, second: Value) -> Value {
    json!({ "type": "Sequence", "pretokenizers": [first, second] })
}

/// Tokens put around a text.
struct PostTemplate<'a> {
    bos: Option<(usize, &'a str)>,
    eos: Option<(usize, &'a str)>,
}

impl PostTemplate<'_> {
    fn to_json(&self) -> Value {
        if self.bos.is_none() && self.eos.is_none() {
            return Value::Null;
        }
        let around = |sequence: &str, type_id: u32| -> Vec<Value> {
            let token =
                |(_, t): (usize, &str)| json!({ "SpecialToken": { "id": t, "type_id": type_id } });
            let text = json!({ "Sequence": { "id": sequence, "type_id": type_id } });
            self.bos.map(token).into_iter().chain([text]).chain(self.eos.map(token)).collect()
        };
        let mut specials = Map::new();
        for (id, token) in [self.bos, self.eos].into_iter().flatten() {
            specials
                .insert(token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] }));
        }
        json!({
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": ([around("A", 0), around("B", 1)].concat()),
            "special_tokens": specials,
        })
    }
}

fn required<T>(value: Option<T>, file: &GgufFile, key: &str) -> Result<T> {
    value.ok_or_else(|| file.error(format!("metadata `{key}` is missing")))
}

fn strings<'a>(file: &'a GgufFile, key: &str) -> Result<Vec<&'a str>> {
    required(file.array(key)?, file, key)?
        .iter()
        .map(|v| match v {
            gguf::Value::String(s) => Ok(s.as_str()),
            _ => Err(file.error(format!("metadata `{key}` holds something else than strings"))),
        })
        .collect()
}

/// Types of the tokens; empty when the file has none.
fn token_types(file: &GgufFile, tokens: usize) -> Result<Vec<i64>> {
    let key = "tokenizer.ggml.token_type";
    let Some(values) = file.array(key)? else { return Ok(Vec::new()) };
    if values.len() != tokens {
        return Err(file.error(format!("`{key}` has {} entries for {tokens} tokens", values.len())));
    }
    values
        .iter()
        .map(|v| match v {
            gguf::Value::Int(i) => {
                i64::try_from(*i).context(format!("`{key}` holds a number out of range"))
            }
            _ => Err(file.error(format!("metadata `{key}` holds something else than integers"))),
        })
        .collect::<Result<_, Error>>()
}

//! A tokenizer as a training run needs it: ids and byte spans, special tokens, a digest.

use std::collections::BTreeSet;

use lora_flow_core::{Artifact, Digest, Error, Result, ResultExt};
use serde_json::Value;
use tokenizers::{PostProcessorWrapper, Tokenizer};

/// A special token: its text and its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialToken {
    /// As it stands in text.
    pub text: String,
    /// As the model sees it.
    pub id: u32,
}

/// Start and end of a token in the bytes of its text.
pub type ByteSpan = (usize, usize);

/// `tokenizer.json` with what `tokenizer_config.json` adds to it. Encoding never adds special
/// tokens by itself: what the tokenizer would put in front is [`TextTokenizer::prefix`].
pub struct TextTokenizer {
    inner: Tokenizer,
    digest: Digest,
    vocab_size: usize,
    prefix: Vec<u32>,
    bos: Option<SpecialToken>,
    eos: Option<SpecialToken>,
    /// Names (`bos_token`, …) and texts that templates may use.
    named: Vec<(String, String)>,
    special_texts: BTreeSet<String>,
    chat_template: Option<String>,
}

/// Names under which `tokenizer_config.json` keeps special tokens.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl TextTokenizer {
    /// The tokenizer of a Model artifact: `tokenizer.json`, and where they are there
    /// `tokenizer_config.json` and `chat_template.jinja`.
    ///
    /// # Errors
    /// When the first is missing, or one of them cannot be understood.
    pub fn open(model: &Artifact) -> Result<Self> {
        let json = fs_err::read(model.file("tokenizer.json")?)?;
        let config = match model.get("tokenizer_config.json") {
            Some(path) => serde_json::from_slice(&fs_err::read(path)?)
                .context("`tokenizer_config.json` cannot be read")?,
            None => Value::Null,
        };
        let template = match model.get("chat_template.jinja") {
            Some(path) => Some(fs_err::read_to_string(path)?),
            None => None,
        };
        Self::new(&json, &config, template)
    }

    /// A tokenizer from the content of its files; `config` may be null. A chat template in the
    /// configuration is used where `chat_template` is none.
    ///
    /// # Errors
    /// When a part cannot be understood, or a special token is not in the vocabulary.
    pub fn new(json: &[u8], config: &Value, chat_template: Option<String>) -> Result<Self> {
        // Reading panics on some contradictions, such as a merge into a token that the vocabulary
        // lacks; for us they are errors like any other.
        let mut inner = std::panic::catch_unwind(|| Tokenizer::from_bytes(json))
            .map_err(|_| {
                Error::new("`tokenizer.json` contradicts itself")
                    .with_hint("its merges may name tokens that its vocabulary lacks")
            })?
            .map_err(|e| Error::new("`tokenizer.json` cannot be read").with_source(e))?;
        // Both are settings of someone's last use of the tokenizer, saved with it.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| Error::new("`tokenizer.json` cannot be used").with_source(e))?;
        let added_before = leading_special(&inner)?;
        inner.with_post_processor(None::<PostProcessorWrapper>);

        let named: Vec<(String, String)> = NAMES
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), token_text(&config[*name])?)))
            .collect();
        let special = |name: &str| -> Result<Option<SpecialToken>> {
            let Some((_, text)) = named.iter().find(|(n, _)| n == name) else { return Ok(None) };
            let id = inner.token_to_id(text).ok_or_else(|| {
                Error::new(format!("the {name} `{text}` is not in the tokenizer's vocabulary"))
                    .with_hint("`tokenizer.json` and `tokenizer_config.json` do not fit together")
            })?;
            Ok(Some(SpecialToken { text: text.clone(), id }))
        };
        let (bos, eos) = (special("bos_token")?, special("eos_token")?);
        let prefix = match config["add_bos_token"].as_bool() {
            None => added_before,
            Some(true) => bos.iter().map(|t| t.id).collect(),
            Some(false) => Vec::new(),
        };
        let vocab_size =
            inner.get_vocab(true).values().max().map_or(0, |largest| *largest as usize + 1);
        let special_texts = inner
            .get_added_tokens_decoder()
            .values()
            .filter(|token| token.special)
            .map(|token| token.content.clone())
            .collect();
        Ok(Self {
            digest: Digest::of_bytes(json),
            vocab_size,
            prefix,
            bos,
            eos,
            named,
            special_texts,
            chat_template: chat_template.or_else(|| template_in(config)),
            inner,
        })
    }

    /// BLAKE3 of `tokenizer.json`, equal to the digest of that file in a Model artifact.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Ids that go before every text: BOS, or nothing.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// The token that begins a text, whether or not it is added.
    pub fn bos(&self) -> Option<&SpecialToken> {
        self.bos.as_ref()
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<&SpecialToken> {
        self.eos.as_ref()
    }

    /// Special tokens by the names that chat templates use (`bos_token`, `eos_token`, …).
    pub fn named_tokens(&self) -> &[(String, String)] {
        &self.named
    }

    /// The chat template, if the model has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The special token that a text ends with.
    pub(crate) fn special_at_end<'a>(&'a self, text: &str) -> Option<&'a str> {
        self.special_texts.iter().map(String::as_str).find(|special| text.ends_with(special))
    }

    /// The longest special token that a text starts with.
    pub(crate) fn special_at_start<'a>(&'a self, text: &str) -> Option<&'a str> {
        self.special_texts
            .iter()
            .map(String::as_str)
            .filter(|special| text.starts_with(special))
            .max_by_key(|special| special.len())
    }

    /// The ids of a text; special tokens written out in it become their ids.
    ///
    /// # Errors
    /// When the tokenizer cannot encode it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|e| Error::new("the tokenizer cannot encode a text").with_source(e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of a text, each with the bytes of the text it stands for.
    ///
    /// # Errors
    /// When the tokenizer cannot encode it.
    pub fn encode_with_spans(&self, text: &str) -> Result<(Vec<u32>, Vec<ByteSpan>)> {
        let encoding = self
            .inner
            .encode(text, false)
            .map_err(|e| Error::new("the tokenizer cannot encode a text").with_source(e))?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
    }

    /// The text of ids, special tokens written out.
    ///
    /// # Errors
    /// When the tokenizer cannot decode them.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner
            .decode(ids, false)
            .map_err(|e| Error::new("the tokenizer cannot decode ids").with_source(e))
    }

    /// The tokenizer itself, for streaming decoders.
    pub fn inner(&self) -> &Tokenizer {
        &self.inner
    }
}

/// The ids that the tokenizer's own post-processor puts before a text.
fn leading_special(tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let encoding = tokenizer
        .encode("a", true)
        .map_err(|e| Error::new("`tokenizer.json` cannot encode a text").with_source(e))?;
    let added = encoding.get_special_tokens_mask().iter().take_while(|mask| **mask == 1).count();
    Ok(encoding.get_ids()[..added].to_vec())
}

/// A special token in a configuration: a string, or an object with `content`.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
}

/// The chat template in a configuration: a string, or a list of named ones with a `default`.
fn template_in(config: &Value) -> Option<String> {
    let template = &config["chat_template"];
    if let Some(text) = template.as_str() {
        return Some(text.to_owned());
    }
    let named = template.as_array()?;
    let default = named.iter().find(|t| t["name"] == "default").or_else(|| named.first())?;
    default["template"].as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing;

    #[test]
    fn bos_comes_from_the_post_processor_or_the_configuration() {
        let bos = |post: bool, config: Value| {
            TextTokenizer::new(&testing::tokenizer_json(post), &config, None).unwrap().prefix
        };
        let with = |add: bool| json!({ "bos_token": "<s>", "add_bos_token": add });
        assert_eq!(bos(false, Value::Null), [] as [u32; 0]);
        assert_eq!(bos(true, Value::Null), [testing::BOS]);
        assert_eq!(bos(true, with(false)), [] as [u32; 0]);
        assert_eq!(bos(true, with(true)), [testing::BOS]);
        assert_eq!(bos(false, with(true)), [testing::BOS]);
    }

    #[test]
    fn spans_cover_the_text_and_encoding_round_trips() {
        let tokenizer = testing::tokenizer();
        let text = "héllo <|end|> world";
        let (ids, spans) = tokenizer.encode_with_spans(text).unwrap();
        assert_eq!(ids, tokenizer.encode(text).unwrap());
        assert!(ids.contains(&testing::EOS));
        assert_eq!(spans.first().unwrap().0, 0);
        assert_eq!(spans.last().unwrap().1, text.len());
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }

    #[test]
    fn special_token_out_of_the_vocabulary_is_named() {
        let config = json!({ "eos_token": { "content": "<|stop|>" } });
        let error =
            TextTokenizer::new(&testing::tokenizer_json(false), &config, None).err().unwrap();
        assert!(error.to_string().contains("`<|stop|>`"), "{error}");
    }

    #[test]
    fn a_broken_tokenizer_is_an_error_and_no_panic() {
        let json = String::from_utf8(testing::tokenizer_json(false)).unwrap();
        // The merge of two tokens is missing, which the library meets with a panic.
        let broken = json.replace("\"Ġw\":256", "\"q\":256").replace("\"or\":257", "\"z\":257");
        for json in ["{}", "", "[1]", broken.as_str()] {
            let error = TextTokenizer::new(json.as_bytes(), &Value::Null, None).err().unwrap();
            assert!(error.to_string().starts_with("`tokenizer.json`"), "{error}");
        }
    }

    #[test]
    fn template_may_stand_in_the_configuration() {
        let list = json!({ "chat_template": [
            { "name": "tool_use", "template": "t" }, { "name": "default", "template": "d" },
        ] });
        assert_eq!(template_in(&list).as_deref(), Some("d"));
        assert_eq!(template_in(&json!({ "chat_template": "x" })).as_deref(), Some("x"));
        assert_eq!(template_in(&Value::Null), None);
    }
}

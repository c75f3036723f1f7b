//! A small byte-level tokenizer for unit tests: one token a byte, `<|end|>`, `<s>` and the two
//! marks of a chat.

use serde_json::{Value, json};

use crate::TextTokenizer;

pub(crate) const EOS: u32 = 258;
pub(crate) const BOS: u32 = 259;
pub(crate) const IM_START: u32 = 260;
pub(crate) const IM_END: u32 = 261;

/// SmolLM2's chat template.
pub(crate) const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// `tokenizer.json`, with a post-processor that puts `<s>` in front or with none.
pub(crate) fn tokenizer_json(bos: bool) -> Vec<u8> {
    let mut next = 256u32;
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u32 {
        let code = if matches!(byte, 33..=126 | 161..=172 | 174..=255) {
            byte
        } else {
            next += 1;
            next - 1
        };
        vocab.insert(char::from_u32(code).unwrap().to_string(), byte.into());
    }
    vocab.insert("Ġw".into(), 256.into());
    vocab.insert("or".into(), 257.into());
    let special = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true })
    };
    let post = json!({
        "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } },
                   { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } },
                 { "Sequence": { "id": "B", "type_id": 0 } }],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [BOS], "tokens": ["<s>"] } }
    });
    let byte_level = |add_prefix_space: bool| {
        json!({ "type": "ByteLevel", "add_prefix_space": add_prefix_space,
                "trim_offsets": true, "use_regex": true })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(EOS, "<|end|>"), special(BOS, "<s>"),
                         special(IM_START, "<|im_start|>"), special(IM_END, "<|im_end|>")],
        "normalizer": null,
        "pre_tokenizer": byte_level(false),
        "post_processor": if bos { post } else { Value::Null },
        "decoder": byte_level(true),
        "model": { "type": "BPE", "dropout": null, "unk_token": null,
                   "continuing_subword_prefix": null, "end_of_word_suffix": null,
                   "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                   "vocab": vocab, "merges": [["Ġ", "w"], ["o", "r"]] }
    })
    .to_string()
    .into_bytes()
}

/// Ends texts with `<|end|>`, adds no BOS.
pub(crate) fn tokenizer() -> TextTokenizer {
    let config = json!({ "eos_token": "<|end|>" });
    TextTokenizer::new(&tokenizer_json(false), &config, None).unwrap()
}

/// Begins texts with `<s>`, ends them with `<|end|>`.
pub(crate) fn tokenizer_with_bos() -> TextTokenizer {
    let config = json!({ "eos_token": "<|end|>", "bos_token": "<s>" });
    TextTokenizer::new(&tokenizer_json(true), &config, None).unwrap()
}

/// Ends texts and turns with `<|im_end|>`, as SmolLM2 does.
pub(crate) fn chat_tokenizer(template: &str) -> TextTokenizer {
    let config = json!({ "eos_token": "<|im_end|>", "bos_token": "<|im_start|>" });
    TextTokenizer::new(&tokenizer_json(false), &config, Some(template.to_owned())).unwrap()
}

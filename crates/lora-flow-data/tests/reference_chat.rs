//! Conversations as transformers renders them: with SmolLM2's chat template
//! (`tests/reference/tokenizer.json`), with templates of our own that use what the families' use
//! (`tests/reference/templates`), and with those of other projects (`chat.json`).

use std::collections::BTreeMap;
use std::path::Path;

use lora_flow_data::ChatTemplate;
use minijinja::Value as Jinja;
use serde_json::Value;

fn json(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference").join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn conversations_are_rendered_as_transformers_does() {
    let source = json("tokenizer_small.json")["chat_template"].as_str().unwrap().to_owned();
    let template = ChatTemplate::new(&source, &[], &BTreeMap::new(), None).unwrap();
    let values = json("tokenizer.json");
    let chats = values["chats"].as_array().unwrap();
    assert_eq!(chats.len(), 6);
    for chat in chats {
        let text = |message: &Value, key: &str| message[key].as_str().unwrap().to_owned();
        let turns: Vec<_> = chat["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| (text(m, "role"), text(m, "content")))
            .collect();
        let turns: Vec<_> = turns.iter().map(|(r, c)| (r.as_str(), c.as_str())).collect();
        let prompt = chat["add_generation_prompt"].as_bool().unwrap();
        assert_eq!(template.render_turns(&turns, prompt).unwrap(), text(chat, "text"));
    }
}

/// The conversations of `chat.json` with their keys in order, which templates see.
fn chats() -> Jinja {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference/chat.json");
    let all: Jinja = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    all.get_attr("chats").unwrap()
}

/// What a template makes of a conversation of `chat.json`: the text and what the assistant says.
fn render(source: &str, values: &Value, name: &str) -> Result<(String, Vec<String>), String> {
    let (chat, ordered) = (&values["chats"][name], chats().get_attr(name).unwrap());
    let tokens = values["tokens"].as_object().unwrap().iter();
    let tokens: Vec<_> =
        tokens.map(|(name, text)| (name.clone(), text.as_str().unwrap().to_owned())).collect();
    let of_call = ["messages", "tools", "add_generation_prompt"];
    let more = chat.as_object().unwrap().iter().filter(|(k, _)| !of_call.contains(&k.as_str()));
    let more: BTreeMap<_, _> = more.map(|(k, v)| (k.clone(), v.clone())).collect();
    let template = ChatTemplate::new(source, &tokens, &more, values["date"].as_str())
        .map_err(|e| e.chain())?;
    let messages: Vec<Jinja> = ordered.get_attr("messages").unwrap().try_iter().unwrap().collect();
    let tools = ordered.get_attr("tools").ok().filter(|t| !t.is_undefined());
    let tools = tools.unwrap_or_else(|| Jinja::from(()));
    let prompt = chat["add_generation_prompt"].as_bool().unwrap_or(false);
    let text = template.render(&messages, &tools, prompt).map_err(|e| e.chain())?;
    if !template.marks_assistant() || prompt {
        return Ok((text, Vec::new()));
    }
    let rendered = template.render_with_assistant(&messages, &tools).map_err(|e| e.chain())?;
    assert_eq!(rendered.text, text);
    let said = rendered.assistant.iter().map(|span| text[span.clone()].to_owned());
    Ok((text.clone(), said.collect()))
}

#[test]
fn our_own_templates_give_the_texts_and_the_spans_of_transformers() {
    let values = json("chat.json");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference/templates");
    for (name, chats) in values["own"].as_object().unwrap() {
        let source = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        for (chat, expected) in chats.as_object().unwrap() {
            let made = render(&source, &values, chat);
            let Some(text) = expected["text"].as_str() else {
                assert!(made.is_err(), "{name} {chat}: {made:?}, not {}", expected["error"]);
                continue;
            };
            let (ours, said) = made.unwrap_or_else(|e| panic!("{name} {chat}: {e}"));
            assert_eq!(ours, text, "{name} {chat}");
            if expected["assistant"].is_array() && !said.is_empty() {
                let theirs: Vec<String> =
                    serde_json::from_value(expected["assistant"].clone()).unwrap();
                assert_eq!(said, theirs, "{name} {chat}");
            }
        }
    }
}

/// Template by template of other projects, which are not in this repository:
/// `LORA_FLOW_CHAT_TEMPLATES_DIR` names the folder that `tests/reference/README.md` says how to get.
#[test]
#[ignore = "needs the templates of other projects"]
fn templates_of_others_give_the_texts_of_transformers() {
    let Some(folder) = std::env::var_os("LORA_FLOW_CHAT_TEMPLATES_DIR") else {
        eprintln!("skipped: LORA_FLOW_CHAT_TEMPLATES_DIR names no folder");
        return;
    };
    let digest = |text: &str| lora_flow_core::Digest::of_bytes(text.as_bytes()).to_string();
    let values = json("chat.json");
    let mut unequal = Vec::new();
    for (name, template) in values["others"].as_object().unwrap() {
        let source = std::fs::read_to_string(Path::new(&folder).join(name)).unwrap();
        assert_eq!(digest(&source), template["template"].as_str().unwrap(), "{name}: another one");
        let (mut equal, mut refused, mut all) = (0, 0, 0);
        for (chat, expected) in template["renderings"].as_object().unwrap() {
            let made = render(&source, &values, chat);
            // Templates that do not expect a content of `null` fail in transformers; here nothing
            // is said.
            if chat == "null" && !matches!(&made, Ok((text, _)) if *expected == digest(text)) {
                continue;
            }
            all += 1;
            match (&made, expected.as_str().unwrap()) {
                (Err(_), "refused") => refused += 1,
                (Ok((text, _)), theirs) if digest(text) == theirs => equal += 1,
                (made, theirs) => {
                    unequal.push(format!("{name} {chat}: {made:?} for {theirs}"));
                }
            }
        }
        println!("{name:<32} equal {equal:>2}, refused by both {refused:>2}, of {all}");
    }
    assert!(unequal.is_empty(), "{}", unequal.join("\n"));
}

//! Conversations rendered with SmolLM2's chat template, against transformers
//! (`tests/reference/tokenizer.json`).

use std::collections::BTreeMap;
use std::path::Path;

use lora_flow_data::ChatTemplate;
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

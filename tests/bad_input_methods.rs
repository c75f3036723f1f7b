//! Bad input of templates, variants and training. Part of `bad_input.rs`.

use serde_json::json;

use crate::support::{Project, model_config, model_tensors};
use crate::{messages, serialized, snapshot};

/// Conversations of two turns, through a chat template.
fn chats(p: &Project, template: &str, roles: [&'static str; 3]) {
    let turn = |role: &str| json!({ "role": role, "content": "well" });
    let line = json!({ "messages": roles.map(turn) }).to_string() + "\n";
    let lines: String = (0..40).map(|i| line.replace("well", &format!("well {i}"))).collect();
    p.write("data/docs.jsonl", lines);
    p.write("models/tiny/chat_template.jinja", template);
    p.edit("pipeline.yaml", "      text: text\n", "");
    let format = "format: messages, max_length: 64";
    p.edit("pipeline.yaml", "format: text, max_length: 64, packing: true", format);
}

fn inject(p: &Project, more: &str) {
    let line = "      target_modules: all-linear\n";
    p.edit("pipeline.yaml", line, &format!("{line}      {more}\n"));
}

fn training(p: &Project, more: &str) {
    p.edit(
        "pipeline.yaml",
        "      save_steps: 2\n",
        &format!("      save_steps: 2\n      {more}\n"),
    );
}

/// Trains the adapter of `base` on another base, which has `field` of its config changed.
fn other_base(p: &Project, field: &str, value: serde_json::Value, tensors: crate::Tensors) {
    let mut config = model_config();
    config[field] = value;
    p.write("models/other/config.json", config.to_string());
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        let bytes = std::fs::read(p.path(&format!("models/tiny/{file}"))).unwrap();
        p.write(&format!("models/other/{file}"), bytes);
    }
    p.write("models/other/model.safetensors", serialized(tensors));
    p.edit(
        "pipeline.yaml",
        "  train_tokens:",
        "  other:\n    uses: model\n    with: { source: models/other }\n  train_tokens:",
    );
    p.edit(
        "pipeline.yaml",
        "inputs: { model: base, adapter: adapter",
        "inputs: { model: other, adapter: adapter",
    );
}

const CHAT: [&str; 3] = ["system", "user", "assistant"];

#[test]
fn methods() {
    snapshot(
        "methods",
        messages(&[
            (
                "chat template that fails",
                1,
                |p| {
                    chats(
                        p,
                        "{{ messages[0].content }}{{ raise_exception('no system turns') }}",
                        CHAT,
                    )
                },
                &["--target", "train_tokens"],
            ),
            (
                "chat template that never marks the assistant",
                1,
                |p| {
                    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% generation %}{% endgeneration %}{% endfor %}";
                    chats(p, template, CHAT);
                },
                &["--target", "train_tokens"],
            ),
            (
                "system turn in the middle",
                1,
                |p| {
                    chats(
                        p,
                        "{% for m in messages %}{{ m.content }}{% endfor %}",
                        ["user", "system", "assistant"],
                    )
                },
                &["--target", "train_tokens"],
            ),
            (
                "setting of another format",
                2,
                |p| p.edit("pipeline.yaml", "packing: true", "columns: { instruction: question }"),
                &[],
            ),
            ("unknown start", 2, |p| inject(p, "init_lora_weights: eva"), &[]),
            (
                "DoRA on PiSSA",
                2,
                |p| inject(p, "init_lora_weights: pissa\n      use_dora: true"),
                &[],
            ),
            (
                "modules to save that match nothing",
                1,
                |p| inject(p, "modules_to_save: [classifier]"),
                &[],
            ),
            (
                "modules to save that share weights",
                1,
                |p| inject(p, "modules_to_save: [lm_head]"),
                &[],
            ),
            ("full fine-tuning of an adapter", 2, |p| training(p, "method: full"), &[]),
            (
                "early stopping without evaluations",
                2,
                |p| training(p, "early_stopping_patience: 3"),
                &[],
            ),
            (
                "learning rate in words",
                2,
                |p| p.edit("pipeline.yaml", "${{ params.learning_rate }}", "small"),
                &[],
            ),
            (
                "adapter of another base",
                1,
                |p| {
                    let mut kept = model_tensors();
                    kept.retain(|(name, ..)| !name.starts_with("model.layers.1."));
                    other_base(p, "num_hidden_layers", json!(1), kept);
                },
                &["--target", "train"],
            ),
            (
                "adapter of a base of other shapes",
                1,
                |p| {
                    let mut narrow = model_tensors();
                    for (name, shape, data) in &mut narrow {
                        if name.contains("mlp.") {
                            // 48 instead of 64, whichever side that is.
                            shape.iter_mut().filter(|n| **n == 64).for_each(|n| *n = 48);
                            data.truncate(shape.iter().product());
                        }
                    }
                    other_base(p, "intermediate_size", json!(48), narrow);
                },
                &["--target", "train"],
            ),
            (
                "prompts that leave no room for what is learnt",
                1,
                |p| {
                    let row = |i: usize| json!({ "prompt": format!("{i} {}", "well ".repeat(30)), "completion": "yes" });
                    let lines: String = (0..40).map(|i| row(i).to_string() + "\n").collect();
                    p.write("data/docs.jsonl", lines);
                    p.edit("pipeline.yaml", "      text: text\n", "");
                    p.edit(
                        "pipeline.yaml",
                        "format: text, max_length: 64, packing: true",
                        "format: prompt-completion, max_length: 64",
                    );
                },
                &["--target", "train_tokens"],
            ),
            (
                "weight of no adapter",
                1,
                |p| {
                    p.edit(
                        "pipeline.yaml",
                        "  before:",
                        "  both:\n    uses: combine\n    inputs: { model: base, one: train.adapter }\n    with: { weights: { two: 0.5 } }\n  before:",
                    );
                },
                &["--target", "both", "--set", "steps=2"],
            ),
            (
                "rank of an exact combination",
                2,
                |p| {
                    p.edit(
                        "pipeline.yaml",
                        "  before:",
                        "  both:\n    uses: combine\n    inputs: { model: base, one: train.adapter }\n    with: { r: 4, density: 2.0 }\n  before:",
                    );
                },
                &[],
            ),
        ]),
    );
}

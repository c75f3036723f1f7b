//! The real SmolLM2-135M-Instruct against transformers in f32 (`tests/reference/smollm2.json`):
//! weights from the GGUF, logits of three prompts. The training steps are in `lora-flow-train`.

use lora_flow_model::batch::Batch;

#[path = "../../../tests/reference/support.rs"]
mod support;
use support::{float, floats, ids, json, list, smollm2_gguf, values};

#[test]
#[ignore = "reads the file that LORA_FLOW_SMOLLM2_GGUF names"]
fn smollm2_logits_equal_transformers() {
    let Some(path) = smollm2_gguf() else { return };
    let decoder = support::smollm2(&path);
    let reference = json("smollm2.json");
    let columns = ids(&reference["columns"]);
    let prompts: Vec<_> = list(&reference["prompts"]).iter().map(|p| ids(&p["ids"])).collect();
    // All prompts as documents of one batch.
    let logits = decoder.logits(&Batch::from_documents(&prompts), None).unwrap();
    let mut worst = 0f64;
    let mut start = 0;
    for (prompt, values_of) in prompts.iter().zip(list(&reference["prompts"])) {
        for expected in list(&values_of["logits"]) {
            let position = start + expected["position"].as_u64().unwrap() as usize;
            let row = values(&logits.get(position).unwrap());
            let argmax = (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
            assert_eq!(argmax as u64, expected["argmax"].as_u64().unwrap(), "{position}");
            let (max, min) = (row[argmax], row.iter().copied().fold(f32::INFINITY, f32::min));
            let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
            let mut ours = vec![max, min, (f64::from(max) + sum.ln()) as f32];
            ours.extend(columns.iter().map(|c| row[*c as usize]));
            let mut theirs: Vec<f32> =
                ["max", "min", "logsumexp"].map(|k| float(&expected[k]) as f32).to_vec();
            theirs.extend(floats(&expected["columns"]));
            worst = worst.max(support::max_difference(&ours, &theirs));
        }
        start += prompt.len();
    }
    println!("SmolLM2: max |Δ logit| {worst:.2e}");
    assert!(worst <= 3e-4, "max |Δ logit| {worst:.2e}");
}

//! Five tiny random models against transformers and PEFT (`tests/reference/tiny`): logits with and
//! without an adapter, packed and alone, and the gradient of every adapter tensor.

use lora_flow_model::adapter::LoraGrads;
use lora_flow_model::batch::Batch;
use lora_flow_model::decoder::{Checkpoint, PassOptions};

#[path = "../../../tests/reference/support.rs"]
mod support;
use support::{Tiny, batch, documents, float, max_difference, relative, relative_distance, values};

/// Logits are of the order of 1.
const LOGITS: f64 = 2e-5;
/// Relative distance ‖ours − theirs‖ / ‖theirs‖ of each gradient.
const GRADIENT: f64 = 1e-5;

fn check_logits(variant: &str) {
    let tiny = Tiny::load(variant);
    let prompts = tiny.prompts();
    let (mut worst, mut moved) = (0.0, 0.0);
    for (which, adapter) in [("base", None), ("adapter", Some(&tiny.adapter))] {
        let mut all = Vec::new();
        for (n, prompt) in prompts.iter().enumerate() {
            let theirs = tiny.tensor(&format!("logits.{n}.{which}"));
            let alone = Batch::from_documents(&[prompt]);
            let ours = values(&tiny.decoder.logits(&alone, adapter).unwrap());
            worst = f64::max(worst, max_difference(&ours, &theirs));
            if which == "adapter" {
                let base = tiny.tensor(&format!("logits.{n}.base"));
                moved = f64::max(moved, max_difference(&ours, &base));
            }
            all.extend(theirs);
        }
        // The same prompts as documents of one batch.
        let packed = Batch::from_documents(&prompts);
        let ours = values(&tiny.decoder.logits(&packed, adapter).unwrap());
        worst = f64::max(worst, max_difference(&ours, &all));
    }
    println!("{variant}: max |Δ logit| {worst:.2e}; the adapter moves logits by {moved:.2}");
    assert!(worst <= LOGITS, "{variant}: max |Δ logit| {worst:.2e} > {LOGITS:.0e}");
    assert!(moved > 0.1, "{variant}: the adapter does nothing");
}

fn check_gradients(variant: &str) {
    let tiny = Tiny::load(variant);
    let batch = batch(&documents(&tiny.values["grad_documents"]));
    let count = batch.supervised();
    for checkpoint in [Checkpoint::None, Checkpoint::Full] {
        let options = PassOptions { grad_scale: 1.0 / count as f32, dropout: None, checkpoint };
        let mut grads = LoraGrads::zeros(&tiny.adapter);
        let loss = tiny.decoder.loss_and_grad(&batch, &tiny.adapter, &options, &mut grads).unwrap();
        let mean = loss.nll_sum() / loss.count() as f64;
        let off = relative(mean, float(&tiny.values["grad_loss"]));
        assert!(off < 1e-6, "{variant}: loss {mean} is {off:.1e} away");

        let mut worst = (0.0, String::new());
        for (module, grad) in tiny.adapter.modules.iter().zip(&grads.modules) {
            for (which, ours) in [("A", &grad.a), ("B", &grad.b)] {
                let name = format!("base_model.model.{}.lora_{which}.weight", module.path);
                let theirs = tiny.tensor(&format!("grad.{name}"));
                let distance = relative_distance(ours, &theirs);
                assert!(distance <= GRADIENT, "{variant} {checkpoint:?} {name}: {distance:.2e}");
                if distance >= worst.0 {
                    worst = (distance, name);
                }
            }
        }
        println!(
            "{variant} {checkpoint:?}: loss {off:.1e}, gradient {:.1e} ({})",
            worst.0, worst.1
        );
    }
}

macro_rules! variants {
    ($($name:ident),*) => {
        const NAMES: [&str; 5] = [$(stringify!($name)),*];
        mod logits { $(#[test] fn $name() { super::check_logits(stringify!($name)) })* }
        mod gradients { $(#[test] fn $name() { super::check_gradients(stringify!($name)) })* }
    };
}
variants!(llama, llama_untied, mistral, qwen2, qwen3);

#[test]
fn every_committed_variant_is_tested() {
    assert_eq!(NAMES, support::VARIANTS);
    let entries = std::fs::read_dir(support::folder().join("tiny")).unwrap();
    let mut there: Vec<_> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    there.sort();
    assert_eq!(there, NAMES);
}

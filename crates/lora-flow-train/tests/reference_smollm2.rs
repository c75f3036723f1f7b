//! Ten LoRA steps on the real SmolLM2-135M-Instruct in f32 against PEFT
//! (`tests/reference/smollm2.json`), from an adapter given by a formula.

use std::collections::BTreeMap;

use lora_flow_model::lora::{Lora, LoraConfig, TargetModules};
use serde_json::Value;

#[path = "../../../tests/reference/support.rs"]
mod support;
#[path = "../../../tests/reference/training.rs"]
mod training;
use support::{documents, float, hashed, json, list, projection, relative, smollm2_gguf, values};

/// Sums of squares that add up to relative distances.
#[derive(Default)]
struct Distance {
    squared_error: f64,
    squared_norm: f64,
}

impl Distance {
    fn add(&mut self, error: f64, norm: f64) {
        self.squared_error += error.powi(2);
        self.squared_norm += norm.powi(2);
    }

    fn relative(&self) -> f64 {
        (self.squared_error / self.squared_norm).sqrt()
    }
}

/// The adapter of `tests/reference/README.md`.
fn initial(decoder: &lora_flow_model::decoder::Decoder, lora: &Value) -> Lora {
    let config = LoraConfig {
        r: lora["r"].as_u64().unwrap() as usize,
        lora_alpha: float(&lora["lora_alpha"]),
        target_modules: TargetModules::AllLinear,
        ..LoraConfig::default()
    };
    let mut adapter = Lora::init(&config, &decoder.linear_modules(), 0).unwrap();
    let exponent = |key: &str| lora[key].as_i64().unwrap() as i32;
    for (m, module) in adapter.modules.iter_mut().enumerate() {
        let (a, b) = (module.a.dims2().unwrap(), module.b.dims2().unwrap());
        module.a = hashed(0, m as u32, a, exponent("exponent_a"));
        module.b = hashed(1, m as u32, b, exponent("exponent_b"));
    }
    adapter
}

#[test]
#[ignore = "reads the file that LORA_FLOW_SMOLLM2_GGUF names; slow without --release"]
fn smollm2_ten_steps_equal_peft() {
    let Some(path) = smollm2_gguf() else { return };
    let reference = json("smollm2.json");
    let decoder = support::smollm2(&path);
    let start = initial(&decoder, &reference["lora"]);
    let steps = training::steps(&reference);
    let rows = reference["rows_per_step"].as_u64().unwrap() as usize;
    // Step s takes rows s·rows and the next ones, modulo their number.
    let all = list(&reference["documents"]);
    let of_step = |s: usize| {
        let picked = (0..rows).map(|n| all[(s * rows + n) % all.len()].clone()).collect();
        documents(&Value::Array(picked))
    };
    let trained = training::run(
        &decoder,
        start.clone(),
        &reference["settings"],
        steps,
        (0..steps.len()).map(of_step).collect(),
        rows,
    );

    let (mut whole, mut sampled, mut worst_norm) = (Distance::default(), 0f64, 0f64);
    let mut adapter = Distance::default();
    let mut updates = BTreeMap::new();
    let modules = list(&reference["modules"]);
    assert_eq!(modules.len(), trained.lora.modules.len());
    for (m, expected) in modules.iter().enumerate() {
        let (before, after) = (&start.modules[m], &trained.lora.modules[m]);
        assert_eq!(after.path, expected["path"].as_str().unwrap());
        for (kind, key) in [(0, "a"), (1, "b")] {
            let (before, after) =
                if kind == 0 { (&before.a, &after.a) } else { (&before.b, &after.b) };
            let columns = after.dims2().unwrap().1;
            let (before, after, expected) = (values(before), values(after), &expected[key]);
            let update: Vec<f64> =
                after.iter().zip(&before).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
            let update_norm = update.iter().map(|u| u * u).sum::<f64>().sqrt();
            worst_norm = worst_norm.max(relative(support::norm(&after), float(&expected["norm"])));
            worst_norm = worst_norm.max(relative(update_norm, float(&expected["update_norm"])));
            let probes = list(&expected["projections"]);
            for (probe, theirs) in probes.iter().enumerate() {
                let ours = projection(probe as u32, kind, m as u32, columns, &update);
                let weight = 1.0 / (probes.len() as f64).sqrt();
                let error = (ours - float(theirs)) * weight;
                whole.add(error, float(&expected["update_norm"]) * weight);
                adapter.add(error, float(&expected["norm"]) * weight);
            }
            for (at, theirs) in list(&expected["at"]).iter().zip(list(&expected["entries"])) {
                let ours = after[at.as_u64().unwrap() as usize];
                sampled = sampled.max((f64::from(ours) - float(theirs)).abs());
            }
            updates.insert((m, key), update_norm);
        }
    }
    println!(
        "SmolLM2, ten steps: losses {:.1e}, gradient norms {:.1e}, adapter {:.1e}, update {:.1e}, \
         norms {worst_norm:.1e}, entries {sampled:.1e}",
        trained.loss,
        trained.grad_norm,
        adapter.relative(),
        whole.relative(),
    );
    assert!(updates.values().all(|u| *u > 0.0), "a tensor did not move");
    assert!(trained.loss <= 3e-6, "a loss is {:.1e} off", trained.loss);
    assert!(trained.grad_norm <= 1e-5, "a gradient norm is {:.1e} off", trained.grad_norm);
    assert!(adapter.relative() <= 3e-6, "the adapter is {:.1e} off", adapter.relative());
    assert!(whole.relative() <= 5e-5, "the update is {:.1e} off", whole.relative());
    assert!(sampled <= 1e-6, "an entry is {sampled:.1e} off");
    assert!(worst_norm <= 1e-5, "a norm is {worst_norm:.1e} off");
}

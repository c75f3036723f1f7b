//! Runs the real training loop over committed steps. Included by path after `support.rs`.

use std::sync::{Arc, Mutex};

use lora_flow_core::{CancelToken, Digest, Event, Reporter};
use lora_flow_model::decoder::Decoder;
use lora_flow_model::lora::Lora;
use lora_flow_train::{DataOrder, Run, Sequence, TrainConfig, train};
use serde_json::Value;

use super::support::{Document, float, list, relative};

/// Keeps the metrics.
#[derive(Default)]
struct Metrics(Mutex<Vec<(String, f64)>>);

impl Reporter for Metrics {
    fn event(&self, event: Event) {
        if let Event::Metric { name, value, .. } = event {
            self.0.lock().unwrap().push((name, value));
        }
    }
}

impl Metrics {
    fn series(&self, name: &str) -> Vec<f64> {
        self.0.lock().unwrap().iter().filter(|(n, _)| n == name).map(|(_, v)| *v).collect()
    }
}

/// What ten steps gave, as far as it is compared.
pub struct Trained {
    pub lora: Lora,
    /// Largest relative difference of a loss.
    pub loss: f64,
    /// Largest relative difference of a gradient norm.
    pub grad_norm: f64,
}

/// Trains `lora` on the documents of each step, `rows` of them in a pass, and compares losses,
/// gradient norms and learning rates with those of `steps`.
pub fn run(
    decoder: &Decoder,
    lora: Lora,
    settings: &Value,
    steps: &[Value],
    documents: Vec<Vec<Document>>,
    rows: usize,
) -> Trained {
    let in_step = documents[0].len();
    let config = TrainConfig {
        learning_rate: float(&settings["learning_rate"]),
        warmup_steps: settings["warmup_steps"].as_u64().unwrap(),
        max_steps: settings["total_steps"].as_u64(),
        weight_decay: float(&settings["weight_decay"]),
        loraplus_lr_ratio: settings["loraplus_lr_ratio"].as_f64(),
        max_grad_norm: float(&settings["max_grad_norm"]),
        per_device_train_batch_size: rows,
        gradient_accumulation_steps: in_step / rows,
        ..TrainConfig::default()
    };
    // The loop shuffles; rows are laid out so that its order gives the committed steps.
    let total = documents.len() * in_step;
    let mut order = DataOrder::new((0..total).collect(), &config);
    let mut sequences = vec![Sequence::default(); total];
    for (step, documents) in documents.into_iter().enumerate() {
        for (place, document) in order.step(step as u64).concat().into_iter().zip(documents) {
            sequences[place] = Sequence {
                doc_lengths: vec![document.ids.len() as u32],
                input_ids: document.ids,
                loss_mask: document.mask,
            };
        }
    }
    let metrics = Arc::new(Metrics::default());
    let state = tempfile::tempdir().unwrap();
    let outcome = train(Run {
        decoder,
        lora,
        train: &sequences,
        eval: None,
        config: &config,
        state_dir: state.path(),
        identity: Digest::of_bytes(b"reference"),
        reporter: metrics.clone(),
        cancel: CancelToken::default(),
    })
    .unwrap_or_else(|e| panic!("{}", e.chain()));

    let worst = |metric: &str, key: &str| {
        let ours = metrics.series(metric);
        let theirs: Vec<f64> = steps.iter().map(|s| float(&s[key])).collect();
        assert_eq!(ours.len(), theirs.len(), "number of steps");
        let difference = |(a, b): (&f64, &f64)| if a == b { 0.0 } else { relative(*a, *b) };
        ours.iter().zip(&theirs).map(difference).fold(0.0, f64::max)
    };
    let rate = worst("train/learning_rate", "lr");
    assert!(rate < 1e-8, "learning rates differ by {rate:.1e}");
    Trained {
        loss: worst("train/loss", "loss"),
        grad_norm: worst("train/grad_norm", "grad_norm"),
        lora: outcome.lora,
    }
}

/// The steps of a values file.
pub fn steps(values: &Value) -> &[Value] {
    list(&values["steps"])
}

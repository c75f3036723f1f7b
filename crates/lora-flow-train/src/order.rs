//! Which rows belong to which step.
//!
//! As in `transformers`: each epoch is a new permutation, cut into batches of
//! `per_device_train_batch_size` rows of which the last may be smaller; `gradient_accumulation_steps`
//! batches make a step, and the last step of an epoch takes the batches that are left. Everything
//! is a function of the seed and the step, so a resumed run needs no state beyond its step.

use lora_flow_core::Digest;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::config::TrainConfig;

/// How many steps a run has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steps {
    /// Steps in an epoch.
    pub per_epoch: u64,
    /// Steps of the run: `max_steps`, or ⌈`num_train_epochs` · `per_epoch`⌉.
    pub total: u64,
}

/// The rows of each step.
#[derive(Debug, Clone)]
pub struct DataOrder {
    rows: Vec<usize>,
    seed: u64,
    batch_size: usize,
    accumulation: usize,
    epoch: Option<(u64, Vec<usize>)>,
}

/// Random numbers for one purpose: a stream named by it, the seed and an index.
pub(crate) fn stream(purpose: &str, seed: u64, index: &[u64]) -> ChaCha8Rng {
    let name = format!("lora-flow/{purpose}/{seed}/{index:?}");
    ChaCha8Rng::from_seed(Digest::of_bytes(name.as_bytes()).0)
}

impl DataOrder {
    /// The order of `rows`.
    pub fn new(rows: Vec<usize>, config: &TrainConfig) -> Self {
        Self {
            rows,
            seed: config.seed,
            batch_size: config.per_device_train_batch_size.max(1),
            accumulation: config.gradient_accumulation_steps.max(1),
            epoch: None,
        }
    }

    /// Steps of the run.
    pub fn steps(&self, config: &TrainConfig) -> Steps {
        let batches = self.rows.len().div_ceil(self.batch_size);
        let per_epoch = batches.div_ceil(self.accumulation) as u64;
        let epochs = (config.num_train_epochs * per_epoch as f64).ceil() as u64;
        Steps { per_epoch, total: config.max_steps.unwrap_or(epochs) }
    }

    /// The batches of the step that follows `done` finished steps: rows of each pass.
    pub fn step(&mut self, done: u64) -> Vec<Vec<usize>> {
        let batch_size = self.batch_size;
        let in_step = batch_size * self.accumulation;
        let per_epoch = self.rows.len().div_ceil(in_step).max(1) as u64;
        let start = (done % per_epoch) as usize * in_step;
        let order = self.permutation(done / per_epoch);
        let end = (start + in_step).min(order.len());
        order[start.min(end)..end].chunks(batch_size).map(<[usize]>::to_vec).collect()
    }

    /// Fisher–Yates with a stream of the seed and the epoch.
    fn permutation(&mut self, epoch: u64) -> &[usize] {
        if self.epoch.as_ref().is_none_or(|(e, _)| *e != epoch) {
            let mut order = self.rows.clone();
            let mut rng = stream("data-order", self.seed, &[epoch]);
            for i in (1..order.len()).rev() {
                // Multiply and shift: the bias is below 2⁻⁵⁰ for any data set.
                let j = (u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64;
                order.swap(i, j as usize);
            }
            self.epoch = Some((epoch, order));
        }
        self.epoch.as_ref().map_or(&[], |(_, order)| order)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(batch: usize, accumulation: usize) -> TrainConfig {
        TrainConfig {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulation,
            num_train_epochs: 1.5,
            ..TrainConfig::default()
        }
    }

    #[test]
    fn every_row_comes_once_an_epoch_and_the_last_step_takes_the_rest() {
        let config = config(2, 3);
        let mut order = DataOrder::new((0..15).collect(), &config);
        // 8 batches, of which 3, 3 and 2 make a step.
        assert_eq!(order.steps(&config), Steps { per_epoch: 3, total: 5 });
        let sizes = |step: &[Vec<usize>]| step.iter().map(Vec::len).collect::<Vec<_>>();
        let epoch: Vec<_> = (0..3).map(|s| order.step(s)).collect();
        assert_eq!(
            epoch.iter().map(|s| sizes(s)).collect::<Vec<_>>(),
            [vec![2, 2, 2], vec![2, 2, 2], vec![2, 1]]
        );
        let mut seen: Vec<_> = epoch.concat().concat();
        let first = seen.clone();
        seen.sort_unstable();
        assert_eq!(seen, (0..15).collect::<Vec<_>>());
        assert_ne!(first, seen, "shuffled");
        let second: Vec<_> = (3..6).flat_map(|s| order.step(s).concat()).collect();
        assert_ne!(first, second, "another order each epoch");
        // Any step can be asked for at any time.
        assert_eq!(DataOrder::new((0..15).collect(), &config).step(4), order.step(4));
    }

    #[test]
    fn max_steps_goes_before_epochs_and_the_seed_matters() {
        let one = TrainConfig { max_steps: Some(7), ..config(4, 1) };
        let two = TrainConfig { seed: 1, ..one.clone() };
        let (mut a, mut b) =
            (DataOrder::new((0..40).collect(), &one), DataOrder::new((0..40).collect(), &two));
        assert_eq!(a.steps(&one).total, 7);
        assert_ne!(a.step(0), b.step(0));
    }
}

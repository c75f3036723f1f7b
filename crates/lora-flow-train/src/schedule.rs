//! The learning rate of each step, by the formulas of `transformers/optimization.py`.

use std::f64::consts::PI;

use crate::config::{LrSchedulerKwargs, LrSchedulerType, TrainConfig, WsdDecay};

/// The learning rate over a whole run.
#[derive(Debug, Clone)]
pub struct Schedule {
    kind: LrSchedulerType,
    kwargs: LrSchedulerKwargs,
    learning_rate: f64,
    warmup: f64,
    total: f64,
}

impl Schedule {
    /// The schedule of a run of `total` steps. The warmup is `warmup_steps` or else
    /// ⌈total · `warmup_ratio`⌉.
    pub fn new(config: &TrainConfig, total: u64) -> Self {
        let warmup = if config.warmup_steps > 0 {
            config.warmup_steps as f64
        } else {
            (total as f64 * config.warmup_ratio).ceil()
        };
        Self {
            kind: config.lr_scheduler_type,
            kwargs: config.lr_scheduler_kwargs.clone(),
            learning_rate: config.learning_rate,
            warmup,
            total: total as f64,
        }
    }

    /// The same shape with another highest rate.
    pub fn with_learning_rate(self, learning_rate: f64) -> Self {
        Self { learning_rate, ..self }
    }

    /// Learning rate that the step uses which follows `done` finished steps.
    pub fn at(&self, done: u64) -> f64 {
        self.learning_rate * self.factor(done as f64)
    }

    fn factor(&self, step: f64) -> f64 {
        use LrSchedulerType as T;
        if self.kind == T::Constant {
            return 1.0;
        }
        let k = &self.kwargs;
        if step < self.warmup {
            let rise = step / self.warmup.max(1.0);
            // This schedule alone starts at its floor.
            let floor = k.min_lr_rate.filter(|_| self.kind == T::WarmupStableDecay).unwrap_or(0.0);
            return rise * (1.0 - floor) + floor;
        }
        // Share of the steps after the warmup.
        let progress = (step - self.warmup) / (self.total - self.warmup).max(1.0);
        let wave = |cycles: f64, at: f64| 0.5 * (1.0 + (PI * cycles * 2.0 * at).cos());
        match self.kind {
            T::Constant | T::ConstantWithWarmup => 1.0,
            T::Linear => ((self.total - step) / (self.total - self.warmup).max(1.0)).max(0.0),
            T::Cosine => wave(k.num_cycles.unwrap_or(0.5), progress).max(0.0),
            T::CosineWithRestarts if progress >= 1.0 => 0.0,
            T::CosineWithRestarts => {
                let at = (k.num_cycles.unwrap_or(1.0) * progress).rem_euclid(1.0);
                (0.5 * (1.0 + (PI * at).cos())).max(0.0)
            }
            T::CosineWithMinLr => {
                let floor = k.min_lr.map(|lr| lr / self.learning_rate).or(k.min_lr_rate);
                let floor = floor.unwrap_or(0.0);
                (wave(k.num_cycles.unwrap_or(0.5), progress) * (1.0 - floor) + floor).max(0.0)
            }
            T::Polynomial => {
                let end = k.lr_end.unwrap_or(1e-7) / self.learning_rate;
                if step > self.total {
                    return end;
                }
                (1.0 - end) * (1.0 - progress).powf(k.power.unwrap_or(1.0)) + end
            }
            T::InverseSqrt => {
                let timescale = if self.warmup > 0.0 { self.warmup } else { 10_000.0 };
                1.0 / ((step + timescale - self.warmup) / timescale).sqrt()
            }
            T::WarmupStableDecay => {
                let decay = k.num_decay_steps.map_or((self.total * 0.1).ceil(), |s| s as f64);
                let at = (step - (self.total - decay).max(self.warmup)) / decay.max(1.0);
                let at = at.clamp(0.0, 1.0);
                let shape = match k.decay_type.unwrap_or(WsdDecay::Linear) {
                    WsdDecay::Linear => 1.0 - at,
                    WsdDecay::Cosine => wave(0.5, at),
                    WsdDecay::OneMinusSqrt => 1.0 - at.sqrt(),
                };
                let floor = k.min_lr_rate.unwrap_or(0.0);
                shape * (1.0 - floor) + floor
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(kind: LrSchedulerType, kwargs: LrSchedulerKwargs, steps: &[u64]) -> Vec<f64> {
        let config = TrainConfig {
            learning_rate: 0.5,
            warmup_steps: 10,
            lr_scheduler_type: kind,
            lr_scheduler_kwargs: kwargs,
            ..TrainConfig::default()
        };
        let schedule = Schedule::new(&config, 110);
        steps.iter().map(|s| schedule.at(*s) / 0.5).collect()
    }

    fn check(kind: LrSchedulerType, kwargs: LrSchedulerKwargs, expected: &[(u64, f64)]) {
        let steps: Vec<_> = expected.iter().map(|e| e.0).collect();
        let found = factors(kind, kwargs, &steps);
        for ((step, expected), found) in expected.iter().zip(found) {
            assert!(
                (expected - found).abs() < 1e-12,
                "{kind:?} at {step}: {found}, not {expected}"
            );
        }
    }

    #[test]
    fn schedules_have_their_closed_forms() {
        use LrSchedulerType as T;
        let none = LrSchedulerKwargs::default;
        let root = 0.5f64.sqrt();
        check(T::Constant, none(), &[(0, 1.0), (109, 1.0)]);
        check(T::ConstantWithWarmup, none(), &[(0, 0.0), (5, 0.5), (10, 1.0), (109, 1.0)]);
        check(T::Linear, none(), &[(0, 0.0), (1, 0.1), (10, 1.0), (60, 0.5), (110, 0.0)]);
        let quarter = 0.5 * (1.0 + root);
        check(T::Cosine, none(), &[(5, 0.5), (10, 1.0), (35, quarter), (60, 0.5), (110, 0.0)]);
        let restarts = LrSchedulerKwargs { num_cycles: Some(2.0), ..none() };
        check(T::CosineWithRestarts, restarts, &[(10, 1.0), (35, 0.5), (60, 1.0), (110, 0.0)]);
        let floor = LrSchedulerKwargs { min_lr: Some(0.05), ..none() };
        check(T::CosineWithMinLr, floor, &[(10, 1.0), (60, 0.55), (110, 0.1)]);
        let square = LrSchedulerKwargs { power: Some(2.0), lr_end: Some(0.05), ..none() };
        check(T::Polynomial, square, &[(10, 1.0), (60, 0.9 * 0.25 + 0.1), (110, 0.1)]);
        check(T::InverseSqrt, none(), &[(5, 0.5), (10, 1.0), (40, 0.5), (90, 1.0 / 3.0)]);
        let wsd = LrSchedulerKwargs {
            num_decay_steps: Some(20),
            decay_type: Some(WsdDecay::OneMinusSqrt),
            min_lr_rate: Some(0.2),
            ..none()
        };
        check(
            T::WarmupStableDecay,
            wsd,
            &[(0, 0.2), (5, 0.6), (10, 1.0), (90, 1.0), (95, 0.6), (110, 0.2)],
        );
    }

    #[test]
    fn warmup_ratio_is_rounded_up_and_yields_to_warmup_steps() {
        let mut config = TrainConfig { warmup_ratio: 0.03, ..TrainConfig::default() };
        assert_eq!(Schedule::new(&config, 110).warmup, 4.0);
        config.warmup_steps = 2;
        assert_eq!(Schedule::new(&config, 110).warmup, 2.0);
    }
}

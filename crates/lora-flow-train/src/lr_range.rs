//! `learning_rate: auto`: a short range test (Smith 2017) before the run.
//!
//! The rate grows by the same factor every step, from far too small to far too large, over the
//! first batches of the run; what was trained is thrown away. The rate taken is the one at which
//! the smoothed loss has fallen half way to its lowest. (Where it is lowest is of little use:
//! Adam's steps are bounded, and the loss of an adapter that has gone too far may stay flat instead
//! of rising. Where it falls fastest from one step to the next is a matter of the batches.) The
//! curve is kept, so that anyone can choose otherwise.

use serde::Serialize;

/// Steps of the test.
pub(crate) const STEPS: u64 = 40;
/// First and last rate.
const RATES: (f64, f64) = (1e-6, 1.0);
/// Weight of the past in the smoothed loss.
const MEMORY: f64 = 0.7;
/// The test ends where the smoothed loss is so many times its lowest.
const DIVERGED: f64 = 2.0;
/// Steps whose mean is the loss at the start.
const START: usize = 5;
/// A lowest loss above this share of the start is no fall.
const LEAST_FALL: f64 = 0.98;
/// The smoothed curve lags by M/(1 − M) = 2.3 steps, in which the rate more than doubles.
const LAG: f64 = MEMORY / (1.0 - MEMORY);

/// One step of the test.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RangePoint {
    /// Rate of the step.
    pub learning_rate: f64,
    /// Loss of the batch before the step.
    pub loss: f64,
    /// Running mean of the losses, corrected for its start.
    pub smoothed: f64,
}

/// The test as it goes on.
#[derive(Debug, Clone, Default)]
pub(crate) struct RangeTest {
    pub(crate) curve: Vec<RangePoint>,
    mean: f64,
}

impl RangeTest {
    /// Rate of step `i`.
    pub(crate) fn rate(i: u64) -> f64 {
        let (first, last) = RATES;
        first * (last / first).powf(i as f64 / (STEPS - 1) as f64)
    }

    /// Notes a step; false once the loss has left for good.
    pub(crate) fn push(&mut self, learning_rate: f64, loss: f64) -> bool {
        if !loss.is_finite() {
            return false;
        }
        self.mean = MEMORY * self.mean + (1.0 - MEMORY) * loss;
        let correction = 1.0 - MEMORY.powi(self.curve.len() as i32 + 1);
        let smoothed = self.mean / correction;
        self.curve.push(RangePoint { learning_rate, loss, smoothed });
        smoothed < DIVERGED * self.lowest().map_or(f64::INFINITY, |p| p.smoothed)
    }

    fn lowest(&self) -> Option<&RangePoint> {
        self.curve.iter().min_by(|a, b| a.smoothed.total_cmp(&b.smoothed))
    }

    /// The rate to train with.
    pub(crate) fn choice(&self) -> Option<f64> {
        if self.curve.is_empty() {
            return None;
        }
        let first = &self.curve[..self.curve.len().min(START)];
        let start = first.iter().map(|p| p.smoothed).sum::<f64>() / first.len() as f64;
        let lowest = self.lowest()?.smoothed;
        if lowest > LEAST_FALL * start {
            return None;
        }
        let half = 0.5 * (start + lowest);
        let at = self.curve.iter().find(|p| p.smoothed <= half)?.learning_rate;
        let (first, last) = RATES;
        let factor = (last / first).powf(1.0 / (STEPS - 1) as f64);
        let rate = at / factor.powf(LAG);
        // Two digits: the test cannot tell more, and people read it.
        let unit = 10f64.powf(rate.log10().floor() - 1.0);
        Some((rate / unit).round() * unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_is_where_the_loss_has_fallen_half_way() {
        let mut test = RangeTest::default();
        for i in 0..STEPS {
            let rate = RangeTest::rate(i);
            // Falls around 1e-3 with the noise of its batches, then explodes.
            let fall = 2.0 / (1.0 + (-4.0 * (rate / 1e-3).log10()).exp());
            let noise = 0.1 * (i as f64 * 2.4).sin();
            let loss = 4.0 - fall + noise + (rate / 0.1).powi(3);
            if !test.push(rate, loss) {
                break;
            }
        }
        assert!(test.curve.len() < STEPS as usize, "ends when the loss has left");
        let choice = test.choice().unwrap();
        assert!((6e-4..=1.7e-3).contains(&choice), "{choice}");
        let mut flat = RangeTest::default();
        assert!(flat.choice().is_none());
        assert!((0..STEPS).all(|i| flat.push(RangeTest::rate(i), 3.0)));
        assert_eq!(flat.choice(), None, "nothing fell");
        assert!((RangeTest::rate(STEPS - 1) - 1.0).abs() < 1e-12);
    }
}

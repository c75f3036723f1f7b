//! Bootstrap (Efron & Tibshirani 1993): standard errors as the harness draws them, and paired
//! intervals of a difference.

use rayon::prelude::*;

use crate::metric::{Sample, Statistic, Totals};
use crate::stats::normal;
use crate::stats::python_random::PythonRandom;

/// Replicates that share one generator in the harness.
const CHUNK: usize = 1000;

/// Standard deviation of a statistic over `replicates` samples drawn with replacement, the i-th
/// thousand from Python's generator seeded with i: the numbers that lm-evaluation-harness reports.
pub(crate) fn stderr(statistic: Statistic, samples: &[Sample], replicates: usize) -> Option<f64> {
    let chunk = CHUNK.min(replicates);
    if samples.len() < 2 || chunk < 2 {
        return None;
    }
    let values: Vec<f64> = (0..replicates / chunk)
        .into_par_iter()
        .flat_map_iter(|seed| {
            let mut random = PythonRandom::new(seed as u32);
            let mut totals = Totals::new(statistic, [samples]);
            (0..chunk).map(move |_| {
                totals.clear();
                for _ in 0..samples.len() {
                    totals.add(&samples[random.choice(samples.len())], 1.0);
                }
                totals.value()
            })
        })
        .collect();
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    Some((values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt())
}

/// What the paired bootstrap says of candidate − baseline.
#[derive(Debug, Clone)]
pub(crate) struct Paired {
    /// Difference over all rows.
    pub(crate) difference: f64,
    /// Standard deviation of the replicates.
    pub(crate) stderr: f64,
    /// Replicates, sorted.
    replicates: Vec<f64>,
    /// Bias correction z₀ and acceleration a of the BCa interval.
    bias: f64,
    acceleration: f64,
}

/// Draws rows in pairs: the same row of both sides, whole, so that what makes a row hard for both
/// cancels. Replicate r of thousand i comes from Python's generator seeded with `seed + i`. None
/// when a side has fewer than two rows or its value is not defined.
pub(crate) fn paired(
    statistic: Statistic,
    candidate: &[Sample],
    baseline: &[Sample],
    replicates: usize,
    seed: u32,
) -> Option<Paired> {
    let n = candidate.len();
    if n < 2 || n != baseline.len() {
        return None;
    }
    let totals = || {
        let new = || Totals::new(statistic, [candidate, baseline]);
        (new(), new())
    };
    let (mut a, mut b) = totals();
    for (c, d) in candidate.iter().zip(baseline) {
        a.add(c, 1.0);
        b.add(d, 1.0);
    }
    let difference = a.value() - b.value();
    let jackknife: Vec<f64> = candidate
        .iter()
        .zip(baseline)
        .map(|(c, d)| {
            a.add(c, -1.0);
            b.add(d, -1.0);
            let without = a.value() - b.value();
            a.add(c, 1.0);
            b.add(d, 1.0);
            without
        })
        .collect();
    let mut values: Vec<f64> = (0..replicates.div_ceil(CHUNK))
        .into_par_iter()
        .flat_map_iter(|chunk| {
            let mut random = PythonRandom::new(seed.wrapping_add(chunk as u32));
            let (mut a, mut b) = totals();
            (0..CHUNK.min(replicates - chunk * CHUNK)).map(move |_| {
                a.clear();
                b.clear();
                for _ in 0..n {
                    let row = random.choice(n);
                    a.add(&candidate[row], 1.0);
                    b.add(&baseline[row], 1.0);
                }
                a.value() - b.value()
            })
        })
        .filter(|v: &f64| v.is_finite())
        .collect();
    if !difference.is_finite() || values.len() < 2 {
        return None;
    }
    values.sort_by(f64::total_cmp);
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let spread = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (count - 1.0);
    // Share of replicates below the difference, those equal to it counted half: with few distinct
    // values, as for means of 0 and 1, the plain share would be biased.
    let below = values.partition_point(|v| *v < difference - 1e-12) as f64;
    let at_most = values.partition_point(|v| *v <= difference + 1e-12) as f64;
    let share = (0.5 * (below + at_most) / count).clamp(0.5 / count, 1.0 - 0.5 / count);
    let middle = jackknife.iter().sum::<f64>() / n as f64;
    let (squares, cubes) = jackknife.iter().fold((0.0, 0.0), |(s, c), v| {
        let d = middle - v;
        (s + d * d, c + d * d * d)
    });
    let acceleration = if squares > 0.0 { cubes / (6.0 * squares.powf(1.5)) } else { 0.0 };
    Some(Paired {
        difference,
        stderr: spread.sqrt(),
        replicates: values,
        bias: normal::quantile(share),
        acceleration,
    })
}

impl Paired {
    /// The difference below which a share `p` of the distribution lies: the end of a one-sided BCa
    /// interval (Efron 1987).
    pub(crate) fn bound(&self, p: f64) -> f64 {
        let z = self.bias + normal::quantile(p);
        let shifted = normal::cdf(self.bias + z / (1.0 - self.acceleration * z));
        let last = self.replicates.len() - 1;
        let at = shifted * last as f64;
        let (low, part) = (at.floor() as usize, at.fract());
        let value = self.replicates[low.min(last)];
        value + part * (self.replicates[(low + 1).min(last)] - value)
    }

    /// Share of the replicates at or below `margin`: how often the gain would not have been seen.
    pub(crate) fn p_at_most(&self, margin: f64) -> f64 {
        let count = self.replicates.partition_point(|v| *v <= margin);
        (count + 1) as f64 / (self.replicates.len() + 1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_paired_interval_of_a_mean_is_that_of_the_differences() {
        let mut random = PythonRandom::new(5);
        let base: Vec<Sample> = (0..200).map(|_| vec![10.0 * random.random()]).collect();
        let better: Vec<Sample> = base.iter().map(|b| vec![b[0] + 0.5 + random.random()]).collect();
        let found = paired(Statistic::Mean, &better, &base, 4000, 1).unwrap();
        // The shared part has a spread of 2.9; the differences one of 0.29.
        let expected = 0.29 / 200f64.sqrt();
        assert!((found.difference - 1.0).abs() < 0.1, "{}", found.difference);
        assert!((found.stderr / expected - 1.0).abs() < 0.15, "{}", found.stderr);
        let (low, high) = (found.bound(0.05), found.bound(0.95));
        assert!((high - low - 2.0 * 1.645 * expected).abs() < 0.3 * expected, "{low} {high}");
        assert!(found.p_at_most(0.0) < 0.001 && found.p_at_most(2.0) > 0.99);
        assert!(paired(Statistic::Mean, &better[..1], &base[..1], 100, 1).is_none());
    }
}

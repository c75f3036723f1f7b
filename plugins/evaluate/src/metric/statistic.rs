//! How the samples of a metric add up to one number.
//!
//! Every metric here is a function of sums over samples. So its value, a bootstrap replicate (each
//! sample counted as often as it was drawn) and a jackknife replicate (one sample taken out again)
//! are the same code, and a paired test works on any metric.

use super::{bleu, chrf};

/// What one sample contributes; its meaning depends on the [`Statistic`].
pub(crate) type Sample = Vec<f64>;

/// A function of sums over samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Statistic {
    /// Mean of `[value]`.
    Mean,
    /// exp(−mean) of `[log-likelihood]`.
    Perplexity,
    /// exp(−Σ a / Σ b) of `[a, b]`: log-likelihood and words, bytes or tokens.
    WeightedPerplexity,
    /// −Σ a / Σ b / ln 2 of `[a, b]`.
    BitsPerByte,
    /// −Σ a / Σ b of `[a, b]`.
    WeightedLoss,
    /// F1 of class 1 of `[truth, prediction]`, truth −1 standing for none of the classes.
    F1,
    /// Mean F1 over the classes that occur as truth or prediction, of the same.
    F1Macro,
    /// Matthews correlation coefficient of the same (Gorodkin 2004 for several classes).
    Mcc,
    /// Corpus BLEU of [`bleu::WIDTH`] counts.
    Bleu,
    /// Corpus chrF of [`chrf::WIDTH`] counts.
    Chrf,
}

const NAMES: [(Statistic, &str); 10] = [
    (Statistic::Mean, "mean"),
    (Statistic::Perplexity, "perplexity"),
    (Statistic::WeightedPerplexity, "weighted_perplexity"),
    (Statistic::BitsPerByte, "bits_per_byte"),
    (Statistic::WeightedLoss, "weighted_loss"),
    (Statistic::F1, "f1"),
    (Statistic::F1Macro, "f1_macro"),
    (Statistic::Mcc, "matthews_corrcoef"),
    (Statistic::Bleu, "bleu"),
    (Statistic::Chrf, "chrf"),
];

impl Statistic {
    /// Its name in results.
    pub(crate) fn name(self) -> &'static str {
        NAMES.iter().find(|(s, _)| *s == self).map_or("", |(_, n)| n)
    }

    /// The statistic of a name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        NAMES.iter().find(|(_, n)| *n == name).map(|(s, _)| *s)
    }

    /// Whether a table of truth and prediction is counted.
    fn is_table(self) -> bool {
        matches!(self, Self::F1 | Self::F1Macro | Self::Mcc)
    }

    /// Numbers that a sample has.
    pub(crate) fn width(self) -> usize {
        match self {
            Self::Mean | Self::Perplexity => 1,
            Self::Bleu => bleu::WIDTH,
            Self::Chrf => chrf::WIDTH,
            _ => 2,
        }
    }

    /// Value over all samples.
    pub(crate) fn of(self, samples: &[Sample]) -> f64 {
        let mut totals = Totals::new(self, [samples]);
        samples.iter().for_each(|s| totals.add(s, 1.0));
        totals.value()
    }

    /// Analytic standard error with samples as the independent units, where there is a plain one:
    /// sample sd / √n of a mean, and the delta method on a ratio of sums,
    /// n/(n−1) · Σ (aᵢ − m·bᵢ)² / (Σ b)².
    pub(crate) fn stderr(self, samples: &[Sample]) -> Option<f64> {
        let n = samples.len() as f64;
        if n < 2.0 {
            return None;
        }
        let ratio = || {
            let (a, b) = samples.iter().fold((0.0, 0.0), |(a, b), s| (a + s[0], b + s[1]));
            let mean = a / b;
            let squares: f64 = samples.iter().map(|s| (s[0] - mean * s[1]).powi(2)).sum();
            ((n / (n - 1.0) * squares).sqrt() / b, mean)
        };
        match self {
            Self::Mean => {
                let mean = samples.iter().map(|s| s[0]).sum::<f64>() / n;
                let squares: f64 = samples.iter().map(|s| (s[0] - mean).powi(2)).sum();
                Some((squares / (n - 1.0)).sqrt() / n.sqrt())
            }
            Self::WeightedLoss => Some(ratio().0),
            Self::BitsPerByte => Some(ratio().0 / std::f64::consts::LN_2),
            Self::WeightedPerplexity => {
                let (error, mean) = ratio();
                Some(error * (-mean).exp())
            }
            _ => None,
        }
    }
}

/// Sums over weighted samples.
#[derive(Debug, Clone)]
pub(crate) struct Totals {
    statistic: Statistic,
    /// Sum of the weights, then the sums; for a table, counts by truth (−1 first) and prediction.
    sums: Vec<f64>,
    classes: usize,
}

impl Totals {
    /// Empty sums, wide enough for all the given samples.
    pub(crate) fn new<'a>(
        statistic: Statistic,
        all: impl IntoIterator<Item = &'a [Sample]>,
    ) -> Self {
        let classes = if statistic.is_table() {
            let values = all.into_iter().flatten().flatten();
            values.fold(0.0f64, |max, x| max.max(*x)) as usize + 1
        } else {
            0
        };
        let width = if statistic.is_table() { (classes + 1) * classes } else { statistic.width() };
        Self { statistic, sums: vec![0.0; 1 + width], classes }
    }

    /// Back to nothing.
    pub(crate) fn clear(&mut self) {
        self.sums.fill(0.0);
    }

    /// Counts a sample `weight` times; −1 takes it out.
    pub(crate) fn add(&mut self, sample: &[f64], weight: f64) {
        self.sums[0] += weight;
        if self.statistic.is_table() {
            let (truth, prediction) = (sample[0], sample[1]);
            let cell = (truth + 1.0) as usize * self.classes + prediction as usize;
            self.sums[1 + cell] += weight;
            return;
        }
        for (sum, x) in self.sums[1..].iter_mut().zip(sample) {
            *sum += weight * x;
        }
    }

    /// The value; not a number where it is not defined.
    pub(crate) fn value(&self) -> f64 {
        let (n, sums) = (self.sums[0], &self.sums[1..]);
        if n <= 0.0 {
            return f64::NAN;
        }
        match self.statistic {
            Statistic::Mean => sums[0] / n,
            Statistic::Perplexity => (-sums[0] / n).exp(),
            Statistic::WeightedPerplexity => (-sums[0] / sums[1]).exp(),
            Statistic::BitsPerByte => -sums[0] / sums[1] / std::f64::consts::LN_2,
            Statistic::WeightedLoss => -sums[0] / sums[1],
            Statistic::F1 => self.f1(1).unwrap_or(0.0),
            Statistic::F1Macro => {
                let all: Vec<f64> = (0..self.classes).filter_map(|class| self.f1(class)).collect();
                all.iter().sum::<f64>() / all.len() as f64
            }
            Statistic::Mcc => self.mcc(),
            Statistic::Bleu => bleu::score(sums),
            Statistic::Chrf => chrf::score(sums),
        }
    }

    fn cell(&self, truth: isize, prediction: usize) -> f64 {
        self.sums[1 + (truth + 1) as usize * self.classes + prediction]
    }

    /// 2·tp / (2·tp + fp + fn); none for a class that does not occur.
    fn f1(&self, class: usize) -> Option<f64> {
        if class >= self.classes {
            return None;
        }
        let hits = self.cell(class as isize, class);
        let predicted: f64 = (-1..self.classes as isize).map(|t| self.cell(t, class)).sum();
        let there: f64 = (0..self.classes).map(|p| self.cell(class as isize, p)).sum();
        let sum = predicted + there;
        (sum > 0.0).then(|| 2.0 * hits / sum)
    }

    /// Cov(t, p) / √(Cov(t, t)·Cov(p, p)) over one-hot truth and prediction; 0 if either is constant.
    fn mcc(&self) -> f64 {
        let n = self.sums[0];
        let (mut hits, mut both, mut truths, mut predictions) = (0.0, 0.0, 0.0, 0.0);
        for class in -1..self.classes as isize {
            let there: f64 = (0..self.classes).map(|p| self.cell(class, p)).sum();
            truths += there * there;
            if class < 0 {
                continue;
            }
            let predicted: f64 =
                (-1..self.classes as isize).map(|t| self.cell(t, class as usize)).sum();
            hits += self.cell(class, class as usize);
            both += there * predicted;
            predictions += predicted * predicted;
        }
        let spread = (n * n - truths) * (n * n - predictions);
        if spread > 0.0 { (hits * n - both) / spread.sqrt() } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(rows: &[&[f64]]) -> Vec<Sample> {
        rows.iter().map(|r| r.to_vec()).collect()
    }

    #[test]
    fn ratios_weigh_samples_by_their_size() {
        let rows = samples(&[&[-10.0, 4.0], &[-2.0, 2.0]]);
        assert_eq!(Statistic::WeightedLoss.of(&rows), 2.0);
        assert_eq!(Statistic::WeightedPerplexity.of(&rows), 2.0f64.exp());
        assert_eq!(Statistic::BitsPerByte.of(&rows), 2.0 / std::f64::consts::LN_2);
        assert!(Statistic::Mean.of(&[]).is_nan());
    }

    #[test]
    fn a_sample_taken_out_leaves_the_value_of_the_others() {
        let rows = samples(&[&[0.0, 1.0], &[1.0, 1.0], &[2.0, 0.0], &[1.0, 2.0], &[-1.0, 0.0]]);
        for statistic in [Statistic::F1, Statistic::F1Macro, Statistic::Mcc, Statistic::Mean] {
            let mut totals = Totals::new(statistic, [rows.as_slice()]);
            rows.iter().for_each(|r| totals.add(r, 1.0));
            totals.add(&rows[2], -1.0);
            let mut others = rows.clone();
            others.remove(2);
            let mut expected = Totals::new(statistic, [rows.as_slice()]);
            others.iter().for_each(|r| expected.add(r, 1.0));
            assert!((totals.value() - expected.value()).abs() < 1e-12, "{statistic:?}");
        }
    }
}

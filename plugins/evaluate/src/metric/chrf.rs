//! Corpus chrF (Popović 2015) with sacreBLEU's defaults: n-grams of one to six characters without
//! whitespace, recall counted twice (β = 2), no words.
//!
//! A sample is, for each order, the n-grams of the text, of the reference, and those in common.

use std::collections::HashMap;

use super::text::split;

/// Longest n-gram.
const ORDER: usize = 6;
/// Numbers of a sample.
pub(crate) const WIDTH: usize = 3 * ORDER;

/// What one text and its reference contribute.
pub(crate) fn sample(prediction: &str, reference: &str) -> Vec<f64> {
    let characters = |text: &str| split(text).flat_map(str::chars).collect::<Vec<_>>();
    let (prediction, reference) = (characters(prediction), characters(reference));
    let mut out = Vec::with_capacity(WIDTH);
    for n in 1..=ORDER {
        let mut left: HashMap<&[char], usize> = HashMap::new();
        reference.windows(n).for_each(|gram| *left.entry(gram).or_default() += 1);
        // Without n-grams in the reference those of the text are not counted either.
        let there = !left.is_empty();
        let mut shared = 0;
        for gram in prediction.windows(n) {
            if let Some(count) = left.get_mut(gram).filter(|count| **count > 0) {
                *count -= 1;
                shared += 1;
            }
        }
        let grams = |text: &[char]| (text.len() + 1).saturating_sub(n);
        let predicted = if there { grams(&prediction) } else { 0 };
        out.extend([predicted, grams(&reference), shared].map(|x| x as f64));
    }
    out
}

/// chrF2 of summed samples, 0 to 100: precision and recall are means over the orders that occur.
pub(crate) fn score(sums: &[f64]) -> f64 {
    const FACTOR: f64 = 4.0;
    let (mut precision, mut recall, mut orders) = (0.0, 0.0, 0.0);
    for order in sums.chunks_exact(3) {
        if order[0] > 0.0 && order[1] > 0.0 {
            precision += order[2] / order[0];
            recall += order[2] / order[1];
            orders += 1.0;
        }
    }
    if precision + recall == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (precision / orders, recall / orders);
    100.0 * (1.0 + FACTOR) * precision * recall / (FACTOR * precision + recall)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_score_a_hundred_whatever_the_blanks() {
        assert!((score(&sample("ab c\ndef", "abc def")) - 100.0).abs() < 1e-9);
        assert_eq!(score(&sample("abc", "xyz")), 0.0);
        assert_eq!(score(&sample("", "xyz")), 0.0);
    }
}

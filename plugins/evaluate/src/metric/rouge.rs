//! ROUGE-1, -2 and -L (Lin 2004) as the package `rouge-score` computes them without stemming: words
//! are runs of lower-case ASCII letters and digits; the F-measure of precision and recall.

use std::collections::HashMap;

fn words(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit());
    words.filter(|w| !w.is_empty()).map(str::to_owned).collect()
}

fn f_measure(shared: usize, predicted: usize, target: usize) -> f64 {
    if shared == 0 { 0.0 } else { 2.0 * shared as f64 / (predicted + target) as f64 }
}

/// F-measure of the n-grams in common.
pub(crate) fn rouge_n(prediction: &str, target: &str, n: usize) -> f64 {
    let (prediction, target) = (words(prediction), words(target));
    let mut left: HashMap<&[String], usize> = HashMap::new();
    target.windows(n).for_each(|gram| *left.entry(gram).or_default() += 1);
    let mut shared = 0;
    for gram in prediction.windows(n) {
        if let Some(count) = left.get_mut(gram).filter(|count| **count > 0) {
            *count -= 1;
            shared += 1;
        }
    }
    let grams = |words: &[String]| (words.len() + 1).saturating_sub(n);
    f_measure(shared, grams(&prediction), grams(&target))
}

/// F-measure of the longest common subsequence.
pub(crate) fn rouge_l(prediction: &str, target: &str) -> f64 {
    let (prediction, target) = (words(prediction), words(target));
    let mut row = vec![0usize; prediction.len() + 1];
    for word in &target {
        let mut diagonal = 0;
        for (j, other) in prediction.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if word == other { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    f_measure(row[prediction.len()], prediction.len(), target.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_counted_with_multiplicity_and_in_order() {
        let (p, t) = ("The cat sat; the cat.", "a cat: the mat");
        assert_eq!(rouge_n(p, t, 1), 2.0 * 2.0 / 9.0);
        assert_eq!(rouge_n("a b c", "x a b", 2), 0.5);
        assert_eq!(rouge_l("a b c d", "a c b d"), 0.75);
        assert_eq!((rouge_n("", "a", 1), rouge_n("a", "a", 2), rouge_l("", "")), (0.0, 0.0, 0.0));
    }
}

//! Corpus BLEU (Papineni et al. 2002) with sacreBLEU's defaults: tokenizer 13a, case kept,
//! exponential smoothing of n-gram orders without a match, up to four words.
//!
//! A sample is `[words of the text, words of the reference, matches of 1…4 words, n-grams of 1…4
//! words]`; the score is a function of their sums.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;

use super::text::{is_space, split};

/// Longest n-gram.
const ORDER: usize = 4;
/// Numbers of a sample.
pub(crate) const WIDTH: usize = 2 + 2 * ORDER;

/// Period and comma stand apart unless a digit is before, or after, them; a dash stands apart after
/// a digit.
static RULES: LazyLock<[(Option<Regex>, &str); 3]> = LazyLock::new(|| {
    [
        (Regex::new(r"([^0-9])([.,])").ok(), "$1 $2 "),
        (Regex::new(r"([.,])([^0-9])").ok(), " $1 $2"),
        (Regex::new(r"([0-9])(-)").ok(), "$1 $2 "),
    ]
});

/// The words of mteval-v13a.
fn words(text: &str) -> Vec<String> {
    let text = text
        .trim_end_matches(is_space)
        .replace("<skipped>", "")
        .replace("-\n", "")
        .replace('\n', " ");
    let text = text.replace("&quot;", "\"").replace("&amp;", "&");
    let text = text.replace("&lt;", "<").replace("&gt;", ">");
    let mut apart = String::from(" ");
    for c in text.chars() {
        match c {
            // All ASCII punctuation but the apostrophe, comma, dash and period.
            ' '..='&' | '('..='+' | '/' | ':'..='@' | '['..='`' | '{'..='~' => {
                apart.extend([' ', c, ' ']);
            }
            c => apart.push(c),
        }
    }
    apart.push(' ');
    for (rule, with) in RULES.iter() {
        if let Some(rule) = rule {
            apart = rule.replace_all(&apart, *with).into_owned();
        }
    }
    split(&apart).map(str::to_owned).collect()
}

/// What one text and its reference contribute.
pub(crate) fn sample(prediction: &str, reference: &str) -> Vec<f64> {
    let (prediction, reference) = (words(prediction), words(reference));
    let mut out = vec![0.0; WIDTH];
    (out[0], out[1]) = (prediction.len() as f64, reference.len() as f64);
    for n in 1..=ORDER {
        let mut left: HashMap<&[String], usize> = HashMap::new();
        reference.windows(n).for_each(|gram| *left.entry(gram).or_default() += 1);
        for gram in prediction.windows(n) {
            out[1 + ORDER + n] += 1.0;
            if let Some(count) = left.get_mut(gram).filter(|count| **count > 0) {
                *count -= 1;
                out[1 + n] += 1.0;
            }
        }
    }
    out
}

/// BLEU of summed samples, 0 to 100.
pub(crate) fn score(sums: &[f64]) -> f64 {
    let (words, reference) = (sums[0], sums[1]);
    let (matches, grams) = (&sums[2..2 + ORDER], &sums[2 + ORDER..]);
    if matches.iter().all(|m| *m == 0.0) || grams.contains(&0.0) {
        return 0.0;
    }
    let brevity = if words < reference { (1.0 - reference / words).exp() } else { 1.0 };
    let mut smooth = 1.0;
    let mut log_sum = 0.0;
    for (matches, grams) in matches.iter().zip(grams) {
        let precision = if *matches == 0.0 {
            smooth *= 2.0;
            100.0 / (smooth * grams)
        } else {
            100.0 * matches / grams
        };
        log_sum += precision.ln();
    }
    brevity * (log_sum / ORDER as f64).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokenizer_parts_punctuation_but_not_numbers() {
        let found = words("It's 3.5-4, \"ok\" (a.b) &amp; 1,000.\n");
        let expected = [
            "It's", "3.5", "-", "4", ",", "\"", "ok", "\"", "(", "a", ".", "b", ")", "&", "1,000",
            ".",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn equal_texts_score_a_hundred_and_short_ones_nothing() {
        let text = "the cat sat on the mat";
        assert!((score(&sample(text, text)) - 100.0).abs() < 1e-9);
        assert_eq!(score(&sample("a b c", "a b c")), 0.0, "there is no n-gram of four words");
        assert_eq!(score(&sample("w x y z", "a b c d")), 0.0);
    }
}

//! Texts compared with targets: `exact_match` and the F1 of words.

use std::collections::HashMap;

use super::MetricOptions;

/// Whitespace as Python knows it: Unicode's, and the four separators of ASCII.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// `text.split()` in Python.
pub(crate) fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// ASCII punctuation, Python's `string.punctuation`.
fn is_punctuation(c: char) -> bool {
    c.is_ascii_punctuation()
}

/// Whether prediction and target are equal once both went through the options, in the harness's
/// order: regular expressions, case, punctuation, numbers. Nothing is stripped by itself.
pub(crate) fn exact_match(prediction: &str, target: &str, options: &MetricOptions) -> bool {
    let clean = |text: &str| {
        let mut text = text.to_owned();
        for regex in &options.regexes_to_ignore {
            text = regex.replace_all(&text, "").into_owned();
        }
        if options.ignore_case {
            text = text.to_lowercase();
        }
        if options.ignore_punctuation {
            text.retain(|c| !is_punctuation(c));
        }
        if options.ignore_numbers {
            text.retain(|c| !c.is_ascii_digit());
        }
        text
    };
    clean(prediction) == clean(target)
}

/// Words as SQuAD compares them (Rajpurkar et al. 2016): lower case, no punctuation, no articles.
fn words(text: &str) -> Vec<String> {
    let text: String = text.to_lowercase().chars().filter(|c| !is_punctuation(*c)).collect();
    let words = split(&text).filter(|w| !matches!(*w, "a" | "an" | "the"));
    words.map(str::to_owned).collect()
}

/// Harmonic mean of precision and recall of the words, with multiplicity. Where one side has no
/// words, 1 if neither has.
pub(crate) fn token_f1(prediction: &str, target: &str) -> f64 {
    let (prediction, target) = (words(prediction), words(target));
    if prediction.is_empty() || target.is_empty() {
        return f64::from(u8::from(prediction.is_empty() && target.is_empty()));
    }
    let mut left: HashMap<&str, i64> = HashMap::new();
    target.iter().for_each(|w| *left.entry(w).or_default() += 1);
    let mut shared = 0;
    for word in &prediction {
        if let Some(n) = left.get_mut(word.as_str()).filter(|n| **n > 0) {
            *n -= 1;
            shared += 1;
        }
    }
    2.0 * f64::from(shared) / (prediction.len() + target.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_match_normalises_only_what_it_is_told() {
        let plain = MetricOptions::default();
        assert!(exact_match("Yes", "Yes", &plain));
        assert!(!exact_match("yes", "Yes", &plain) && !exact_match(" Yes", "Yes", &plain));
        let lenient = MetricOptions {
            ignore_case: true,
            ignore_punctuation: true,
            ignore_numbers: true,
            regexes_to_ignore: vec![regex::Regex::new(r"\s").unwrap()],
        };
        assert!(exact_match(" yes, 12!", "Yes", &lenient));
    }

    #[test]
    fn f1_counts_shared_words_once_each() {
        assert_eq!(token_f1("The cat, the dog!", "a cat"), 2.0 / 3.0);
        assert_eq!(token_f1("b b", "b"), 2.0 / 3.0);
        assert_eq!((token_f1("", "the"), token_f1("x", ""), token_f1("x", "y")), (1.0, 0.0, 0.0));
    }
}

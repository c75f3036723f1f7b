//! The report of tokenizing: counts, lengths, and one document with its targets marked.

use std::fmt::Write;

use lora_flow_core::Result;

use crate::document::Document;
use crate::tokenizer::TextTokenizer;
use crate::tokens_writer::TokensSummary;

/// A document written out, its supervised stretches between `⟦` and `⟧`; longer texts lose their
/// middle so that about `max_chars` characters are left.
///
/// # Errors
/// When the tokenizer cannot decode it.
pub fn render_masked(
    document: &Document,
    tokenizer: &TextTokenizer,
    max_chars: usize,
) -> Result<String> {
    let mut out = String::new();
    let mut start = 0;
    // Decoders treat the start of a text in their own way (they drop its space), so a stretch is
    // what it adds to the text before it.
    let mut before = String::new();
    while start < document.ids.len() {
        let target = document.targets[start];
        let end = start + document.targets[start..].iter().take_while(|t| **t == target).count();
        let whole = tokenizer.decode(&document.ids[..end])?;
        let text = match whole.strip_prefix(&before) {
            Some(added) => added.to_owned(),
            None => tokenizer.decode(&document.ids[start..end])?,
        };
        if target {
            out.push('⟦');
            out.push_str(&text);
            out.push('⟧');
        } else {
            out.push_str(&text);
        }
        before = whole;
        start = end;
    }
    let chars = out.chars().count();
    if chars <= max_chars {
        return Ok(out);
    }
    let half = max_chars / 2;
    let head: String = out.chars().take(half).collect();
    let tail: String = out.chars().skip(chars - half).collect();
    Ok(format!("{head} … {} characters … {tail}", group_digits(chars as u64 - 2 * half as u64)))
}

impl TokensSummary {
    /// The report: what came in, what went out, what was lost, and the example.
    pub fn report(&self) -> String {
        let info = &self.info;
        let mut out = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(out, "{name:<12} {value}");
        };
        line("rows", group_digits(self.rows));
        for (reason, count) in &self.dropped {
            line("  dropped", format!("{} {}", group_digits(*count), reason.text()));
        }
        if self.split_rows > 0 {
            line(
                "  split",
                format!("{} longer than {} tokens", group_digits(self.split_rows), info.max_length),
            );
        }
        if info.truncated_documents > 0 {
            line(
                "  truncated",
                format!("{} to {} tokens", group_digits(info.truncated_documents), info.max_length),
            );
        }
        line("documents", group_digits(info.documents));
        line(
            "tokens",
            format!(
                "{}, {} supervised ({})",
                group_digits(info.tokens),
                group_digits(info.supervised),
                percent(info.supervised, info.tokens)
            ),
        );
        line(
            "lengths",
            self.statistics
                .lengths
                .iter()
                .map(|(name, length)| format!("{name} {length}"))
                .collect::<Vec<_>>()
                .join(", "),
        );
        let room = info.sequences * info.max_length as u64;
        line(
            "sequences",
            format!(
                "{} of at most {} tokens, {} full{}",
                group_digits(info.sequences),
                info.max_length,
                percent(info.tokens, room),
                if info.packing { ", packed" } else { "" }
            ),
        );
        if self.joined_tokens > 0 {
            line(
                "note",
                format!(
                    "in {} rows one token holds the end of the prompt and the start of the \
                     completion; end prompts without a space",
                    group_digits(self.joined_tokens)
                ),
            );
        }
        let _ = writeln!(out, "example (⟦supervised⟧):");
        for line in self.example.lines() {
            let _ = writeln!(out, "  {line}");
        }
        out
    }
}

/// Digits in groups of three.
pub fn group_digits(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

fn percent(part: u64, whole: u64) -> String {
    format!("{:.1} %", 100.0 * part as f64 / whole.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(group_digits),
            ["0", "999", "1,000", "1,234,567"].map(str::to_owned)
        );
    }

    #[test]
    fn long_examples_lose_their_middle() {
        let tokenizer = testing::tokenizer();
        let ids = tokenizer.encode(&"x".repeat(300)).unwrap();
        let document = Document { targets: vec![false; ids.len()], ids, bytes: 0, words: 0 };
        let text = render_masked(&document, &tokenizer, 100).unwrap();
        assert!(text.contains("… 200 characters …"), "{text}");
    }
}

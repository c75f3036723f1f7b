//! `statistics.json` beside tokens: how long the documents are, and the first one piece by piece with
//! what is learnt of it. For people and the report; nothing is computed from it.

use lora_flow_core::Result;
use serde::{Deserialize, Serialize};

use crate::document::Document;
use crate::tokenizer::TextTokenizer;

/// Its name in the artifact.
pub const STATISTICS_FILE: &str = "statistics.json";

/// Bars of the histogram, at most.
const BARS: u32 = 16;
/// Tokens of the example, from its start and from its end.
const HEAD: usize = 160;
const TAIL: usize = 96;

/// What `statistics.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenStatistics {
    /// Tokens of a document: name of the percentile and its value, ascending.
    pub lengths: Vec<(String, u32)>,
    /// Documents by length, in bars of equal width.
    pub histogram: Vec<Bar>,
    /// The first document.
    pub example: Example,
}

/// Documents of `from` to `to` tokens, both counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bar {
    /// Fewest tokens.
    pub from: u32,
    /// Most tokens.
    pub to: u32,
    /// How many there are.
    pub documents: u64,
}

/// A document as text; of a long one the middle is left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Example {
    /// From its start.
    pub head: Vec<Piece>,
    /// Tokens left out.
    pub skipped: usize,
    /// Up to its end.
    pub tail: Vec<Piece>,
}

/// A token as text; or the few that make one character together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// The text, special tokens written out.
    pub text: String,
    /// Whether it is a target of the loss.
    pub learnt: bool,
}

impl TokenStatistics {
    /// Statistics of documents, their lengths ascending.
    ///
    /// # Errors
    /// When the tokenizer cannot decode the example.
    pub fn new(lengths: &[u32], example: &Document, tokenizer: &TextTokenizer) -> Result<Self> {
        Ok(Self {
            lengths: percentiles(lengths),
            histogram: histogram(lengths),
            example: Example::new(example, tokenizer)?,
        })
    }
}

/// Percentiles of ascending lengths, by nearest rank.
fn percentiles(lengths: &[u32]) -> Vec<(String, u32)> {
    let at = |percent: usize| {
        let rank = (lengths.len() * percent).div_ceil(100).max(1) - 1;
        lengths.get(rank).copied().unwrap_or(0)
    };
    [(0, "least"), (50, "median"), (90, "90 %"), (99, "99 %"), (100, "most")]
        .map(|(percent, name)| (name.to_owned(), at(percent)))
        .to_vec()
}

fn histogram(lengths: &[u32]) -> Vec<Bar> {
    let (least, most) =
        (lengths.first().copied().unwrap_or(0), lengths.last().copied().unwrap_or(0));
    let width = (most - least + 1).div_ceil(BARS);
    let mut bars: Vec<Bar> = (0..(most - least + 1).div_ceil(width))
        .map(|i| least + i * width)
        .map(|from| Bar { from, to: from + width - 1, documents: 0 })
        .collect();
    for length in lengths {
        bars[((length - least) / width) as usize].documents += 1;
    }
    bars
}

impl Example {
    fn new(document: &Document, tokenizer: &TextTokenizer) -> Result<Self> {
        let n = document.ids.len();
        let skipped = n.saturating_sub(HEAD + TAIL);
        let head = if skipped > 0 { HEAD } else { n };
        Ok(Self {
            head: pieces(document, 0, head, tokenizer)?,
            skipped,
            tail: pieces(document, head + skipped, n, tokenizer)?,
        })
    }
}

/// Tokens `start..end` as text. Decoders treat the start of a text in their own way (they drop its
/// space), so a token is what it adds to the text before it.
fn pieces(
    document: &Document,
    start: usize,
    end: usize,
    tokenizer: &TextTokenizer,
) -> Result<Vec<Piece>> {
    let mut out = Vec::new();
    let mut before = tokenizer.decode(&document.ids[..start])?;
    let mut from = start;
    for to in start + 1..=end {
        let learnt = document.targets[from];
        let whole = tokenizer.decode(&document.ids[..to])?;
        // Half a character is shown with its other half, unless only one of them is learnt.
        if whole.ends_with('\u{FFFD}') && to < end && document.targets[to] == learnt {
            continue;
        }
        let text = match whole.strip_prefix(&before) {
            Some(added) => added.to_owned(),
            None => tokenizer.decode(&document.ids[from..to])?,
        };
        out.push(Piece { text, learnt });
        (before, from) = (whole, to);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn bars_hold_every_document_once() {
        for lengths in [vec![7], vec![2, 3, 3, 4], (2..=513).collect::<Vec<u32>>()] {
            let bars = histogram(&lengths);
            assert!(bars.len() <= BARS as usize, "{bars:?}");
            assert_eq!(bars.iter().map(|b| b.documents).sum::<u64>(), lengths.len() as u64);
            for bar in &bars {
                let inside = lengths.iter().filter(|l| (bar.from..=bar.to).contains(l));
                assert_eq!(inside.count() as u64, bar.documents, "{bar:?}");
            }
        }
    }

    #[test]
    fn an_example_is_the_text_with_what_is_learnt_of_it() {
        let tokenizer = testing::tokenizer();
        let text = "häh 日本 ".repeat(60);
        let ids = tokenizer.encode(&text).unwrap();
        let targets: Vec<bool> = (0..ids.len()).map(|i| i >= 4).collect();
        let document = Document { targets, ids, bytes: 0, words: 0 };
        let example = Example::new(&document, &tokenizer).unwrap();
        assert_eq!(example.skipped, document.ids.len() - HEAD - TAIL);
        let joined = |pieces: &[Piece]| pieces.iter().map(|p| p.text.as_str()).collect::<String>();
        assert_eq!(joined(&example.head), tokenizer.decode(&document.ids[..HEAD]).unwrap());
        assert!(text.ends_with(joined(&example.tail).trim_start_matches('\u{FFFD}')));
        let masked: Vec<_> = example.head.iter().take_while(|p| !p.learnt).cloned().collect();
        assert_eq!(joined(&masked), tokenizer.decode(&document.ids[..4]).unwrap());
        assert!(example.head.iter().skip(masked.len()).all(|p| p.learnt));
    }
}

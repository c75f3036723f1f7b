//! A token document: what one row of data becomes, before packing.

/// What happens to a document that is longer than a training sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// It becomes several documents, one after the other; no token is lost.
    Split,
    /// Its end is cut off.
    Truncate,
}

/// Tokens that attend to each other, and which of them are targets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Document {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Whether each token is one that the model is trained to predict; as long as `ids`. The
    /// first is never a target, since nothing comes before it.
    pub targets: Vec<bool>,
    /// Bytes of text it stands for.
    pub bytes: u64,
    /// Words of text it stands for ([`count_words`]).
    pub words: u64,
}

impl Document {
    /// Number of targets.
    pub fn supervised(&self) -> usize {
        self.targets.iter().filter(|t| **t).count()
    }
}

/// Why a row became no document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DropReason {
    /// It has no text (or no completion), or only white space.
    Empty,
    /// A single token has nothing to be predicted from.
    TooShort,
    /// Nothing that is supervised fits into `max_length`.
    NothingSupervised,
}

impl DropReason {
    /// In words, for the report: `3 rows …`.
    pub fn text(self) -> &'static str {
        match self {
            Self::Empty => "without text",
            Self::TooShort => "of a single token",
            Self::NothingSupervised => "with nothing supervised within `max_length`",
        }
    }
}

/// What one row became.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Its documents: one, several if split, none if dropped.
    pub documents: Vec<Document>,
    /// Its end was cut off.
    pub truncated: bool,
    /// Why it became no document.
    pub dropped: Option<DropReason>,
    /// A token spans the end of the prompt and the start of the completion.
    pub joined_token: bool,
}

impl Encoded {
    /// A row that became no document.
    pub fn dropped(reason: DropReason) -> Self {
        Self { dropped: Some(reason), ..Self::default() }
    }
}

/// Words of a text as evaluation harnesses count them: pieces between runs of white space, by
/// Python's idea of it, an empty piece at either end included.
pub fn count_words(text: &str) -> u64 {
    let is_space = |c: char| c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}');
    let mut words = 1;
    let mut in_space = false;
    for c in text.chars() {
        let space = is_space(c);
        words += u64::from(space && !in_space);
        in_space = space;
    }
    words
}

/// Cuts a document into consecutive ones of at most `max_length` tokens. The last one has at
/// least two, so that its tokens can be targets; the first keeps the counts of text.
pub fn split_document(document: Document, max_length: usize) -> Vec<Document> {
    let total = document.ids.len();
    if total <= max_length || max_length < 3 {
        return vec![document];
    }
    let mut pieces = Vec::with_capacity(total.div_ceil(max_length));
    let mut start = 0;
    while start < total {
        let mut end = (start + max_length).min(total);
        if total - end == 1 {
            end -= 1;
        }
        let mut targets = document.targets[start..end].to_vec();
        targets[0] = false;
        pieces.push(Document {
            ids: document.ids[start..end].to_vec(),
            targets,
            bytes: 0,
            words: 0,
        });
        start = end;
    }
    pieces[0].bytes = document.bytes;
    pieces[0].words = document.words;
    pieces
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn words_are_counted_as_python_splits() {
        // len(re.split(r"\s+", text))
        for (text, words) in [
            ("", 1),
            ("a", 1),
            ("a b", 2),
            (" a  b\n", 4),
            ("a\u{1f}b", 2),
            ("a\u{a0}b", 2),
            ("\n", 2),
        ] {
            assert_eq!(count_words(text), words, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn splitting_loses_no_token(total in 1usize..200, max_length in 3usize..50) {
            let ids: Vec<u32> = (0..total as u32).collect();
            let document = Document {
                targets: (0..total).map(|i| i > 0).collect(), ids: ids.clone(), bytes: 9, words: 3,
            };
            let pieces = split_document(document, max_length);
            prop_assert_eq!(pieces.iter().flat_map(|p| p.ids.clone()).collect::<Vec<_>>(), ids);
            prop_assert_eq!(pieces.iter().map(|p| p.bytes).sum::<u64>(), 9);
            for piece in &pieces {
                prop_assert!(piece.ids.len() <= max_length);
                prop_assert!(piece.ids.len() >= 2 || total == 1);
                prop_assert_eq!(piece.supervised(), piece.ids.len() - 1);
            }
        }
    }
}

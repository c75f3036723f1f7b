//! Format `text`: a text, with BOS where the tokenizer wants it and EOS at its end.

use lora_flow_core::Result;

use super::RowEncoder;
use crate::document::{Document, DropReason, Encoded, Overflow};

impl RowEncoder<'_> {
    pub(super) fn text(&self, text: &str) -> Result<Encoded> {
        if text.trim().is_empty() {
            return Ok(Encoded::dropped(DropReason::Empty));
        }
        // Spans cost time and are needed only to tell how much text a cut leaves.
        let (body, body_spans) = if self.options.overflow == Overflow::Truncate {
            let (ids, spans) = self.tokenizer.encode_with_spans(text)?;
            (ids, Some(spans))
        } else {
            (self.tokenizer.encode(text)?, None)
        };
        let prefix = self.missing_prefix(&body);
        let mut ids = Vec::with_capacity(prefix.len() + body.len() + 1);
        ids.extend_from_slice(prefix);
        ids.extend_from_slice(&body);
        ids.extend(self.missing_eos(&body));
        let spans = body_spans.map(|spans| {
            let mut all = vec![(0, 0); prefix.len()];
            all.extend(spans);
            all
        });
        let document = Document { targets: vec![true; ids.len()], ids, ..Document::default() };
        Ok(self.fit(document, text, spans.as_deref()))
    }
}

#[cfg(test)]
mod tests {
    use crate::document::{DropReason, Overflow};
    use crate::formats::{ColumnNames, FormatKind, FormatOptions, RowEncoder};
    use crate::testing::{self, BOS, EOS};
    use crate::tokenizer::TextTokenizer;

    fn encoder(tokenizer: &TextTokenizer, max_length: usize, overflow: Overflow) -> RowEncoder<'_> {
        let options = FormatOptions {
            kind: FormatKind::Text,
            columns: ColumnNames::default(),
            max_length,
            overflow,
            add_eos: true,
            completion_only_loss: false,
            assistant_only_loss: false,
        };
        RowEncoder::new(tokenizer, options, None).unwrap()
    }

    #[test]
    fn eos_is_there_once_and_supervised_bos_never_doubled() {
        let tokenizer = testing::tokenizer_with_bos();
        let encoder = encoder(&tokenizer, 64, Overflow::Split);
        for text in ["ab", "ab<|end|>", "<s>ab", "<s>ab<|end|>"] {
            let document = encoder.text(text).unwrap().documents.remove(0);
            assert_eq!(document.ids, [BOS, 97, 98, EOS], "{text}");
            assert_eq!(document.targets, [false, true, true, true], "{text}");
            assert_eq!(document.bytes, text.len() as u64);
        }
    }

    #[test]
    fn long_texts_are_split_without_loss_or_cut_and_counted() {
        let tokenizer = testing::tokenizer();
        let text = "abcdefghijklmnop";
        let split = encoder(&tokenizer, 8, Overflow::Split).text(text).unwrap();
        let lengths: Vec<_> = split.documents.iter().map(|d| d.ids.len()).collect();
        assert_eq!(lengths, [8, 7, 2], "the last piece is not EOS alone");
        assert!(!split.truncated);
        assert_eq!(split.documents.iter().map(|d| d.bytes).sum::<u64>(), 16);
        let cut = encoder(&tokenizer, 8, Overflow::Truncate).text(text).unwrap();
        assert!(cut.truncated);
        assert_eq!(cut.documents[0].ids.len(), 8);
        assert_eq!(cut.documents[0].bytes, 8);
        assert!(!cut.documents[0].ids.contains(&EOS), "a cut text has not ended");
    }

    #[test]
    fn white_space_is_no_text() {
        let tokenizer = testing::tokenizer();
        let encoder = encoder(&tokenizer, 8, Overflow::Split);
        assert_eq!(encoder.text(" \n").unwrap().dropped, Some(DropReason::Empty));
    }
}

//! Format `prompt-completion`: the two are joined as they stand and encoded together, so that the
//! ids are those of the whole text. A token is supervised if it holds any of the completion.

use lora_flow_core::Result;

use super::RowEncoder;
use crate::document::{Document, DropReason, Encoded};

impl RowEncoder<'_> {
    pub(super) fn prompt_completion(&self, prompt: &str, completion: &str) -> Result<Encoded> {
        if completion.trim().is_empty() {
            return Ok(Encoded::dropped(DropReason::Empty));
        }
        let text = format!("{prompt}{completion}");
        let (body, body_spans) = self.tokenizer.encode_with_spans(&text)?;
        let boundary = prompt.len();
        let prefix = self.missing_prefix(&body);
        let mut ids = prefix.to_vec();
        let mut spans = vec![(0, 0); prefix.len()];
        let mut targets = vec![!self.options.completion_only_loss; prefix.len()];
        let mut joined_token = false;
        for (id, (start, end)) in body.iter().zip(body_spans) {
            let answers = end > boundary || start >= boundary;
            joined_token |= start < boundary && end > boundary;
            ids.push(*id);
            spans.push((start, end));
            targets.push(answers || !self.options.completion_only_loss);
        }
        if let Some(eos) = self.missing_eos(&body) {
            ids.push(eos);
            spans.push((text.len(), text.len()));
            targets.push(true);
        }
        let document = Document { ids, targets, ..Document::default() };
        Ok(Encoded { joined_token, ..self.fit(document, &text, Some(&spans)) })
    }
}

#[cfg(test)]
mod tests {
    use crate::document::{DropReason, Overflow};
    use crate::formats::{ColumnNames, FormatKind, FormatOptions, RowEncoder};
    use crate::testing::{self, BOS, EOS};
    use crate::tokenizer::TextTokenizer;

    fn encoder(tokenizer: &TextTokenizer, max_length: usize) -> RowEncoder<'_> {
        let options = FormatOptions {
            kind: FormatKind::PromptCompletion,
            columns: ColumnNames::default(),
            max_length,
            overflow: Overflow::Truncate,
            add_eos: true,
            completion_only_loss: true,
            assistant_only_loss: false,
        };
        RowEncoder::new(tokenizer, options, None).unwrap()
    }

    #[test]
    fn completion_and_eos_are_supervised() {
        let tokenizer = testing::tokenizer_with_bos();
        let encoded = encoder(&tokenizer, 32).prompt_completion("ab:", "cd").unwrap();
        let document = &encoded.documents[0];
        assert_eq!(document.ids, [BOS, 97, 98, u32::from(b':'), 99, 100, EOS]);
        assert_eq!(document.targets, [false, false, false, false, true, true, true]);
        assert!(!encoded.joined_token);
    }

    #[test]
    fn a_token_over_the_boundary_is_supervised_and_told() {
        let tokenizer = testing::tokenizer();
        // ` w` is one token of the test tokenizer.
        let encoded = encoder(&tokenizer, 32).prompt_completion("a ", "w").unwrap();
        assert!(encoded.joined_token);
        assert_eq!(encoded.documents[0].targets, [false, true, true]);
    }

    #[test]
    fn a_prompt_that_leaves_no_room_is_dropped() {
        let tokenizer = testing::tokenizer();
        let encoder = encoder(&tokenizer, 4);
        let dropped = encoder.prompt_completion("abcd", "e").unwrap();
        assert_eq!(dropped.dropped, Some(DropReason::NothingSupervised));
        let kept = encoder.prompt_completion("abc", "e").unwrap();
        assert!(kept.truncated);
        assert_eq!(kept.documents[0].bytes, 4);
        assert_eq!(encoder.prompt_completion("a", "").unwrap().dropped, Some(DropReason::Empty));
    }
}

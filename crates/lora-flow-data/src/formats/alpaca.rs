//! Format `alpaca`: an instruction, perhaps with an input, and the answer. Through the model's chat
//! template where there is one, as one turn of user and assistant; else under the headings that
//! the format is known by.

use lora_flow_core::Result;
use minijinja::Value;

use super::RowEncoder;
use crate::document::{DropReason, Encoded};

impl RowEncoder<'_> {
    pub(super) fn alpaca(&self, instruction: &str, input: &str, output: &str) -> Result<Encoded> {
        if instruction.trim().is_empty() || output.trim().is_empty() {
            return Ok(Encoded::dropped(DropReason::Empty));
        }
        if self.template.is_none() {
            let input = match input.trim() {
                "" => String::new(),
                input => format!("### Input:\n{input}\n\n"),
            };
            let prompt = format!("### Instruction:\n{instruction}\n\n{input}### Response:\n");
            return self.prompt_completion(&prompt, output);
        }
        let question = match input.trim() {
            "" => instruction.to_owned(),
            input => format!("{instruction}\n{input}"),
        };
        let turn = |role: &str, content: &str| {
            Value::from_pairs([("role", Value::from(role)), ("content", Value::from(content))])
        };
        let messages = vec![turn("user", &question), turn("assistant", output)];
        self.conversation(&messages, &Value::from(()), self.options.completion_only_loss)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::chat_template::ChatTemplate;
    use crate::document::{DropReason, Overflow};
    use crate::formats::{ColumnNames, FormatKind, FormatOptions, RowEncoder};
    use crate::testing::{self, CHATML};
    use crate::token_report::render_masked;
    use crate::tokenizer::TextTokenizer;

    fn encoder(tokenizer: &TextTokenizer, template: bool) -> RowEncoder<'_> {
        let options = FormatOptions {
            kind: FormatKind::Alpaca,
            columns: ColumnNames::default(),
            max_length: 256,
            overflow: Overflow::Truncate,
            add_eos: true,
            completion_only_loss: true,
            assistant_only_loss: false,
        };
        let template = template.then(|| {
            let tokens = tokenizer.named_tokens();
            ChatTemplate::new(CHATML, tokens, &BTreeMap::new(), None).unwrap()
        });
        RowEncoder::new(tokenizer, options, template).unwrap()
    }

    #[test]
    fn headings_stand_where_there_is_no_template() {
        let tokenizer = testing::chat_tokenizer(CHATML);
        let text = |input: &str| {
            let encoded = encoder(&tokenizer, false).alpaca("Add.", input, "4").unwrap();
            render_masked(&encoded.documents[0], &tokenizer, 1000).unwrap()
        };
        assert_eq!(
            text("2, 2"),
            "### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n⟦4<|im_end|>⟧"
        );
        assert_eq!(text(" "), "### Instruction:\nAdd.\n\n### Response:\n⟦4<|im_end|>⟧");
    }

    #[test]
    fn a_template_makes_a_turn_of_it() {
        let tokenizer = testing::chat_tokenizer(CHATML);
        let encoded = encoder(&tokenizer, true).alpaca("Add.", "2, 2", "4").unwrap();
        let text = render_masked(&encoded.documents[0], &tokenizer, 1000).unwrap();
        assert!(
            text.ends_with("user\nAdd.\n2, 2<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n"),
            "{text}"
        );
        let none = encoder(&tokenizer, true).alpaca("Add.", "", "").unwrap();
        assert_eq!(none.dropped, Some(DropReason::Empty));
    }
}

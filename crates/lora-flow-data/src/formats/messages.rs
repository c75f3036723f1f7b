//! Format `messages`: a conversation through the model's chat template. The template alone says
//! where BOS and the ends of turns stand; EOS is added only if it ends in no special token.

use std::ops::Range;

use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_schema::DataType;
use lora_flow_core::{Error, Result};
use minijinja::Value;

use super::{RowEncoder, list_items};
use crate::assistant_spans::holds_mark;
use crate::cell::cell;
use crate::chat_template::Rendered;
use crate::columns::type_name;
use crate::document::{Document, DropReason, Encoded};

/// Roles that templates know.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Checks that a column holds lists of messages.
pub(super) fn conversations<'a>(
    array: &'a dyn Array,
    name: &str,
    place: &str,
) -> Result<&'a dyn Array> {
    let is_messages = match array.data_type() {
        DataType::List(item) => match item.data_type() {
            DataType::Struct(fields) => {
                let has = |name: &str| fields.iter().any(|f| f.name() == name);
                (has("role") && has("content")) || (has("from") && has("value"))
            }
            _ => false,
        },
        _ => false,
    };
    if is_messages {
        return Ok(array);
    }
    Err(Error::new(format!(
        "column `{name}` of {place} holds {}, not lists of messages",
        type_name(array.data_type())
    ))
    .with_hint("each row needs a list of objects with `role` and `content`"))
}

impl RowEncoder<'_> {
    pub(super) fn messages(
        &self,
        conversations: &dyn Array,
        tools: Option<&dyn Array>,
        row: usize,
    ) -> Result<Encoded> {
        let Some(turns) = list_items(conversations, row).filter(|turns| !turns.is_empty()) else {
            return Ok(Encoded::dropped(DropReason::Empty));
        };
        let messages = messages(turns.as_ref())?;
        let said = check_order(&messages, self.options.assistant_only_loss)?;
        if !said {
            return Ok(Encoded::dropped(DropReason::Empty));
        }
        let tools = tools.map_or_else(|| Value::from(()), |t| without_nulls(&cell(t, row)));
        self.conversation(&messages, &tools, self.options.assistant_only_loss)
    }

    /// A conversation whose order is checked, through the template.
    pub(super) fn conversation(
        &self,
        messages: &[Value],
        tools: &Value,
        assistant_only_loss: bool,
    ) -> Result<Encoded> {
        let Some(template) = &self.template else {
            return Err(Error::new("the model has no chat template"));
        };
        let (text, supervised) = if assistant_only_loss {
            let rendered = template.render_with_assistant(messages, tools)?;
            if rendered.assistant.is_empty() {
                return Err(Error::new(
                    "the chat template never marks what the assistant says, so nothing would be \
                     learnt",
                )
                .with_hint(
                    "put its `{% generation %}` block around the assistant's text, or set \
                     `assistant_only_loss: false`",
                ));
            }
            let ranges = self.with_turn_ends(&rendered, template.marks_assistant());
            (rendered.text, Some(ranges))
        } else {
            (template.render(messages, tools, false)?, None)
        };
        let (mut ids, mut spans) = self.tokenizer.encode_with_spans(&text)?;
        let mut targets = match &supervised {
            None => vec![true; ids.len()],
            Some(ranges) => mark_tokens(&spans, ranges),
        };
        let ended = self.tokenizer.special_at_end(text.trim_end()).is_some();
        let last_says = messages.last().map(role) == Some("assistant".into());
        if !ended
            && last_says
            && let Some(eos) = self.missing_eos(&ids)
        {
            ids.push(eos);
            spans.push((text.len(), text.len()));
            targets.push(true);
        }
        let document = Document { ids, targets, ..Document::default() };
        Ok(self.fit(document, &text, Some(&spans)))
    }

    /// The assistant's text so that each turn ends with the token that ends it. Where the
    /// template marks the text itself it is taken at its word, but EOS is supervised even if it
    /// stands just after the block; else white space after the end token is left out.
    fn with_turn_ends(&self, rendered: &Rendered, marked: bool) -> Vec<Range<usize>> {
        let text = &rendered.text;
        let eos = self.tokenizer.eos().map(|t| t.text.as_str());
        let turn = |range: &Range<usize>| {
            let trimmed = text[range.clone()].trim_end();
            let ended = self.tokenizer.special_at_end(trimmed).is_some();
            let end = match (marked, ended) {
                (false, true) => range.start + trimmed.len(),
                (true, false) => match self.tokenizer.special_at_start(&text[range.end..]) {
                    Some(next) if Some(next) == eos => range.end + next.len(),
                    _ => range.end,
                },
                _ => range.end,
            };
            range.start..end
        };
        rendered.assistant.iter().map(turn).collect()
    }
}

/// Whether each token holds any byte of a range; both are in order.
fn mark_tokens(spans: &[(usize, usize)], ranges: &[Range<usize>]) -> Vec<bool> {
    let mut next = 0;
    spans
        .iter()
        .map(|&(start, end)| {
            while ranges.get(next).is_some_and(|range| range.end <= start) {
                next += 1;
            }
            ranges.get(next).is_some_and(|range| end > range.start || start >= range.start)
        })
        .collect()
}

/// The messages of a row as templates want them.
fn messages(turns: &dyn Array) -> Result<Vec<Value>> {
    let fields = turns.as_struct_opt().map(|s| s.fields().clone()).unwrap_or_default();
    let sharegpt = !fields.iter().any(|f| f.name() == "role");
    (0..turns.len())
        .map(|i| {
            let message = cell(turns, i);
            let message = if sharegpt { from_sharegpt(&message)? } else { without_nulls(&message) };
            if mentions_mark(&message) {
                return Err(Error::new(format!(
                    "turn {} holds the noncharacter U+FDD0 or U+FDD1",
                    i + 1
                ))
                .with_hint("clean the text; no valid text holds them"));
            }
            Ok(message)
        })
        .collect()
}

/// `from` and `value` as `role` and `content`.
fn from_sharegpt(message: &Value) -> Result<Value> {
    let get = |key: &str| message.get_attr(key).unwrap_or_default();
    let from = get("from");
    let role = match from.as_str().unwrap_or_default() {
        "human" | "user" => "user",
        "gpt" | "assistant" | "chatgpt" | "bing" => "assistant",
        "system" => "system",
        "tool" | "function" | "observation" => "tool",
        other => other,
    };
    Ok(Value::from_pairs([("role", Value::from(role)), ("content", get("value"))]))
}

/// A table gives every message all keys; those that are null were not there. `content` stays.
fn without_nulls(value: &Value) -> Value {
    use minijinja::value::ValueKind;
    match value.kind() {
        ValueKind::Map => {
            let keys = value.try_iter().into_iter().flatten();
            Value::from_pairs(keys.filter_map(|key| {
                let item = value.get_item(&key).ok()?;
                if item.is_none() && key.as_str() != Some("content") {
                    return None;
                }
                Some((key, without_nulls(&item)))
            }))
        }
        ValueKind::Seq => {
            value.try_iter().into_iter().flatten().map(|item| without_nulls(&item)).collect()
        }
        _ => value.clone(),
    }
}

fn mentions_mark(value: &Value) -> bool {
    use minijinja::value::ValueKind;
    match value.kind() {
        ValueKind::String => holds_mark(value.as_str().unwrap_or_default()),
        ValueKind::Map => value
            .try_iter()
            .into_iter()
            .flatten()
            .any(|key| value.get_item(&key).is_ok_and(|item| mentions_mark(&item))),
        ValueKind::Seq => value.try_iter().into_iter().flatten().any(|item| mentions_mark(&item)),
        _ => false,
    }
}

fn role(message: &Value) -> String {
    message.get_attr("role").ok().and_then(|r| r.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Refuses unknown roles and orders that no conversation has; gives whether the assistant says
/// anything (or, where all is supervised, anyone).
fn check_order(messages: &[Value], assistant_only: bool) -> Result<bool> {
    let mut said = false;
    let mut user_spoke = false;
    for (i, message) in messages.iter().enumerate() {
        let turn = i + 1;
        let role = role(message);
        let content = message.get_attr("content").unwrap_or_default();
        match role.as_str() {
            "" => return Err(Error::new(format!("turn {turn} has no role"))),
            "system" | "developer" if i > 0 => {
                return Err(Error::new(format!("turn {turn} is `{role}`, which must come first")));
            }
            "assistant" | "tool" if !user_spoke => {
                return Err(Error::new(format!(
                    "turn {turn} is `{role}`, but no `user` has spoken before"
                )));
            }
            "user" => user_spoke = true,
            known if ROLES.contains(&known) => {}
            _ => {
                let error = Error::new(format!("turn {turn} has the unknown role `{role}`"));
                let listed = ROLES.map(|r| format!("`{r}`")).join(", ");
                return Err(match lora_flow_core::nearest(&role, ROLES) {
                    Some(near) => {
                        error.with_hint(format!("did you mean `{near}`? roles are {listed}"))
                    }
                    None => error.with_hint(format!("roles are {listed}")),
                });
            }
        }
        let filled = content.as_str().map_or_else(
            || !content.is_none() && !content.is_undefined() && content.is_true(),
            |text| !text.trim().is_empty(),
        ) || message.get_attr("tool_calls").is_ok_and(|calls| calls.is_true());
        said |= filled && (role == "assistant" || !assistant_only);
    }
    if assistant_only && !messages.iter().any(|m| role(m) == "assistant") {
        return Err(Error::new("the conversation has no `assistant` turn, so nothing to learn")
            .with_hint("drop such rows with `where`, or set `assistant_only_loss: false`"));
    }
    Ok(said)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::chat_template::ChatTemplate;
    use crate::document::Overflow;
    use crate::formats::{ColumnNames, FormatKind, FormatOptions};
    use crate::table::{Batch, Table};
    use crate::testing::{self, CHATML, IM_END};
    use crate::token_report::render_masked;
    use crate::{DataFile, FileFormat, TextTokenizer};

    fn encode(
        tokenizer: &TextTokenizer,
        rows: &str,
        assistant_only_loss: bool,
    ) -> Result<Vec<Encoded>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("chat.jsonl");
        std::fs::write(&path, rows).unwrap();
        let file = DataFile::new("chat.jsonl", path, Some(FileFormat::Jsonl)).unwrap();
        let table = Table::open(vec![file], &[])?;
        let options = FormatOptions {
            kind: FormatKind::Messages,
            columns: ColumnNames::default(),
            max_length: 512,
            overflow: Overflow::Truncate,
            add_eos: true,
            completion_only_loss: false,
            assistant_only_loss,
        };
        let source = tokenizer.chat_template().unwrap();
        let template = ChatTemplate::new(source, tokenizer.named_tokens(), &BTreeMap::new(), None)?;
        let encoder = RowEncoder::new(tokenizer, options, Some(template))?;
        let batches: Vec<Batch> = table.scan(&encoder.columns())?.collect::<Result<_>>()?;
        Ok(batches.iter().map(|b| encoder.encode(b)).collect::<Result<Vec<_>>>()?.concat())
    }

    const CHAT: &str = r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "bye"}]}"#;

    #[test]
    fn chatml_supervises_the_assistant_and_its_end_once() {
        let tokenizer = testing::chat_tokenizer(CHATML);
        let encoded = encode(&tokenizer, CHAT, true).unwrap();
        let document = &encoded[0].documents[0];
        assert_eq!(
            render_masked(document, &tokenizer, 1000).unwrap(),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n\
             <|im_start|>assistant\n⟦yo<|im_end|>⟧\n<|im_start|>user\nx<|im_end|>\n\
             <|im_start|>assistant\n⟦bye<|im_end|>⟧\n"
        );
        let ends = document.ids.iter().zip(&document.targets);
        assert_eq!(ends.filter(|(id, target)| **id == IM_END && **target).count(), 2);
    }

    #[test]
    fn generation_blocks_get_their_end_token() {
        let template = "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}\
                        {{ m.content }}{% endgeneration %}<|im_end|>{% else %}U:{{ m.content }}\n\
                        {% endif %}{% endfor %}";
        let tokenizer = testing::chat_tokenizer(template);
        let encoded = encode(&tokenizer, CHAT, true).unwrap();
        assert_eq!(
            render_masked(&encoded[0].documents[0], &tokenizer, 1000).unwrap(),
            "U:s\nU:hi\nA:⟦yo<|im_end|>⟧U:x\nA:⟦bye<|im_end|>⟧"
        );
    }

    #[test]
    fn a_template_without_an_end_gets_eos_and_all_may_be_supervised() {
        let template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}";
        let tokenizer = testing::chat_tokenizer(template);
        let encoded = encode(&tokenizer, CHAT, false).unwrap();
        let document = &encoded[0].documents[0];
        assert_eq!(document.ids.iter().filter(|id| **id == IM_END).count(), 1);
        assert_eq!(document.ids.last(), Some(&IM_END));
        assert_eq!(document.supervised(), document.ids.len() - 1);
    }

    #[test]
    fn sharegpt_names_are_understood() {
        let tokenizer = testing::chat_tokenizer(CHATML);
        let row = r#"{"messages": [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}"#;
        let encoded = encode(&tokenizer, row, true).unwrap();
        let text = tokenizer.decode(&encoded[0].documents[0].ids).unwrap();
        assert!(
            text.ends_with("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n")
        );
    }

    #[test]
    fn bad_roles_name_row_and_turn() {
        let tokenizer = testing::chat_tokenizer(CHATML);
        let row = |turns: &[&str]| {
            let turns: Vec<String> = turns
                .iter()
                .map(|role| format!(r#"{{"role": "{role}", "content": "c"}}"#))
                .collect();
            format!("{{\"messages\": [{}]}}\n", turns.join(", "))
        };
        for (turns, message) in [
            (&["user", "asistant"][..], "turn 2 has the unknown role `asistant`"),
            (&["assistant", "user"], "turn 1 is `assistant`, but no `user` has spoken before"),
            (&["user", "system", "assistant"], "turn 2 is `system`, which must come first"),
            (&["system", "user"], "the conversation has no `assistant` turn"),
        ] {
            let rows = row(&["user", "assistant"]) + &row(turns);
            let error = encode(&tokenizer, &rows, true).unwrap_err();
            let chain = error.chain();
            assert!(chain.starts_with("`chat.jsonl` row 2") && chain.contains(message), "{chain}");
        }
        let error = encode(&tokenizer, r#"{"messages": ["hello"]}"#, true).unwrap_err();
        assert!(
            error.to_string().contains("holds lists of text, not lists of messages"),
            "{error}"
        );
    }

    #[test]
    fn tokens_are_marked_by_any_byte_of_a_range() {
        let spans = [(0, 2), (2, 4), (4, 4), (4, 6), (6, 9)];
        assert_eq!(mark_tokens(&spans, &[3..5, 9..9]), [false, true, true, true, false]);
        assert_eq!(mark_tokens(&spans, &[0..1, 8..9]), [true, false, false, false, true]);
    }
}

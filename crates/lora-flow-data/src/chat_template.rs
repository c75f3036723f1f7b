//! Chat templates, rendered as transformers renders them.
//!
//! The environment is Jinja2's as transformers sets it up: `trim_blocks`, `lstrip_blocks`, loop
//! controls, `raise_exception`, `strftime_now`, `tojson` without HTML escapes, Python's string and
//! dict methods, and values printed as Python prints them.

use std::collections::BTreeMap;
use std::ops::Range;

use lora_flow_core::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value};

use crate::assistant_spans;
use crate::jinja;

/// Name of the template in errors.
const NAME: &str = "chat template";

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Variables that every rendering sees: special tokens, then the user's own.
    globals: Vec<(String, Value)>,
    marks_assistant: bool,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// The bytes of it that the assistant says.
    pub assistant: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Compiles a template. `tokens` are special tokens by name (`bos_token`, …), `variables`
    /// whatever else the template is to see (`enable_thinking`, …). `date` (`2025-01-31`) is what
    /// `strftime_now` gives; without it a template that asks is an error, since the same input
    /// would not give the same text tomorrow.
    ///
    /// # Errors
    /// When the template or the date cannot be understood.
    pub fn new(
        source: &str,
        tokens: &[(String, String)],
        variables: &BTreeMap<String, serde_json::Value>,
        date: Option<&str>,
    ) -> Result<Self> {
        let mut environment = jinja::environment();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|e| Error::new("template syntax").with_source(e))?;
        environment.set_syntax(syntax);
        environment.add_filter(assistant_spans::FILTER, assistant_spans::mark);
        let date = date.map(parse_date).transpose()?;
        environment.add_function("strftime_now", move |format: &str| {
            let Some(date) = date else {
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, NO_DATE));
            };
            jiff::fmt::strtime::format(format, date).map_err(|e| {
                minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}"))
            })
        });
        // Jinja2 reads every line ending as a line feed.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let marked = assistant_spans::with_filter_blocks(&source);
        let marks_assistant = marked.is_some();
        environment
            .add_template_owned(NAME, marked.unwrap_or(source))
            .map_err(|e| template_error(&e))?;
        let globals = tokens
            .iter()
            .map(|(name, text)| (name.clone(), Value::from(text.as_str())))
            .chain(variables.iter().map(|(name, value)| (name.clone(), jinja::from_json(value))))
            .collect();
        Ok(Self { environment, globals, marks_assistant })
    }

    /// Whether the template says itself where the assistant speaks (`{% generation %}`).
    pub fn marks_assistant(&self) -> bool {
        self.marks_assistant
    }

    /// The text of a conversation: messages are maps with `role`, `content` and whatever the
    /// template knows; `tools` is none or a list.
    ///
    /// # Errors
    /// When the template fails or refuses the conversation.
    pub fn render(
        &self,
        messages: &[Value],
        tools: &Value,
        add_generation_prompt: bool,
    ) -> Result<String> {
        Ok(assistant_spans::unmark(&self.run(messages, tools, add_generation_prompt)?).0)
    }

    /// The text of a conversation given as roles and contents.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_turns(
        &self,
        turns: &[(&str, &str)],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let messages: Vec<Value> = turns
            .iter()
            .map(|(role, content)| Value::from_pairs([("role", *role), ("content", *content)]))
            .collect();
        self.render(&messages, &Value::from(()), add_generation_prompt)
    }

    /// The text of a whole conversation, and where the assistant speaks in it.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and when the template marks nothing and rendering up to a
    /// turn does not give the beginning of the whole.
    pub fn render_with_assistant(&self, messages: &[Value], tools: &Value) -> Result<Rendered> {
        let marked = self.run(messages, tools, false)?;
        if self.marks_assistant {
            let (text, assistant) = assistant_spans::unmark(&marked);
            return Ok(Rendered { text, assistant });
        }
        let text = marked;
        let mut assistant = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if message.get_attr("role").ok().as_ref().and_then(Value::as_str) != Some("assistant") {
                continue;
            }
            // With the generation prompt, as at inference time; templates that put nothing or
            // something else there are taken at their word without it.
            let prompt = self.run(&messages[..i], tools, true)?;
            let start = if text.starts_with(&prompt) {
                prompt.len()
            } else {
                self.prefix(&text, &messages[..i], tools)?
            };
            let end = self.prefix(&text, &messages[..=i], tools)?;
            if start < end {
                assistant.push(start..end);
            }
        }
        Ok(Rendered { text, assistant })
    }

    /// Length of the rendering of the first messages, which must begin the whole text.
    fn prefix(&self, text: &str, messages: &[Value], tools: &Value) -> Result<usize> {
        let part = self.run(messages, tools, false)?;
        if text.starts_with(&part) {
            return Ok(part.len());
        }
        let common = text.bytes().zip(part.bytes()).take_while(|(a, b)| a == b).count();
        Err(Error::new(format!(
            "the chat template cannot tell what the assistant says: rendered up to turn {} the \
             conversation does not begin as the whole does (they part after {common} bytes)",
            messages.len()
        ))
        .with_hint(
            "put `{% generation %}` … `{% endgeneration %}` around the assistant's text in the \
             chat template, or train on whole conversations with `assistant_only_loss: false`",
        ))
    }

    /// The rendered text, with marks.
    fn run(
        &self,
        messages: &[Value],
        tools: &Value,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let none = || Value::from(());
        let own = [
            ("messages", Value::from(messages.to_vec())),
            ("tools", tools.clone()),
            ("documents", none()),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let context = Value::from_pairs(
            self.globals.iter().map(|(name, value)| (name.as_str(), value.clone())).chain(own),
        );
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(context))
            .map_err(|e| template_error(&e))
    }
}

const NO_DATE: &str = "the template asks for today's date";

fn parse_date(date: &str) -> Result<jiff::civil::Date> {
    date.parse().map_err(|e: jiff::Error| {
        Error::new(format!("`{date}` is not a date"))
            .with_hint("write it as `2025-01-31`")
            .with_source(e)
    })
}

fn template_error(e: &minijinja::Error) -> Error {
    let what = jinja::what(e);
    let line = e.line().map_or_else(String::new, |line| format!(" line {line}"));
    let error = Error::new(format!("chat template{line}: {what}"));
    if what == NO_DATE {
        error.with_hint("set `date: 2025-01-31` or another; a fixed one keeps results the same")
    } else {
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::CHATML;

    fn template(source: &str) -> ChatTemplate {
        let tokens = [("eos_token".to_owned(), "<|im_end|>".to_owned())];
        ChatTemplate::new(source, &tokens, &BTreeMap::new(), None).unwrap()
    }

    fn turns(turns: &[(&str, &str)]) -> Vec<Value> {
        turns.iter().map(|(r, c)| Value::from_pairs([("role", *r), ("content", *c)])).collect()
    }

    fn said(rendered: &Rendered) -> Vec<&str> {
        rendered.assistant.iter().map(|r| &rendered.text[r.clone()]).collect()
    }

    #[test]
    fn chatml_renders_and_marks_by_prefixes() {
        let t = template(CHATML);
        assert_eq!(
            t.render_turns(&[("system", "s"), ("user", "hi")], true).unwrap(),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        );
        let chat = turns(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
        let rendered = t.render_with_assistant(&chat, &Value::from(())).unwrap();
        assert!(rendered.text.starts_with("<|im_start|>system\nYou are a helpful AI assistant"));
        assert_eq!(said(&rendered), ["b<|im_end|>\n", "d<|im_end|>\n"]);
    }

    #[test]
    fn generation_blocks_mark_the_assistant() {
        let t = template(
            "{% for m in messages %}\n    {% if m.role == 'assistant' %}\n{% generation %}\n\
             {{ m.content }}{{ eos_token }}{% endgeneration %}\n\n    {% else %}\n\
             [{{ m.content }}]{% endif %}\n{% endfor %}",
        );
        assert!(t.marks_assistant());
        let chat = turns(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
        let rendered = t.render_with_assistant(&chat, &Value::from(())).unwrap();
        assert_eq!(rendered.text, "[a]b<|im_end|>\n[c]d<|im_end|>\n");
        assert_eq!(said(&rendered), ["b<|im_end|>", "d<|im_end|>"]);
    }

    #[test]
    fn a_template_that_rewrites_earlier_turns_is_refused() {
        let t =
            template("{% for m in messages %}{{ m.content if loop.last else '…' }}|{% endfor %}");
        let chat = turns(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
        let error = t.render_with_assistant(&chat, &Value::from(())).unwrap_err();
        assert!(error.to_string().contains("cannot tell what the assistant says"), "{error}");
        assert!(error.hint().unwrap().contains("{% generation %}"));
    }

    #[test]
    fn functions_and_printing_are_those_of_transformers() {
        let t = template(
            "{{ messages[0] | tojson }}|{{ {'a': [1, 2.0], 'ü': '<&>'} | tojson(indent=2) }}|\
             {{ true }} {{ none }} {{ missing }}|{{ 'x'.upper() }}|\
             {% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        );
        let text = t.render_turns(&[("user", "é\n\"")], false).unwrap();
        assert_eq!(
            text,
            "{\"role\": \"user\", \"content\": \"é\\n\\\"\"}|{\n  \"a\": [\n    1,\n    2.0\n  ],\n  \
             \"ü\": \"<&>\"\n}|True None |X|02"
        );
    }

    #[test]
    fn line_endings_and_tests_are_those_of_jinja2() {
        let t = template(
            "a\r\n{{ none is iterable }}{{ 'x' is iterable }}{{ missing is iterable }}\r\n\
             {% if tools is iterable and tools | length > 0 %}\r\nT{% endif %}\r\n\
             {{ {} is sequence }}{{ 3 is sequence }}",
        );
        let text = t.render_turns(&[("user", "a")], false).unwrap();
        assert_eq!(text, "a\nFalseTrueTrue\nTrueFalse");
    }

    #[test]
    fn exceptions_and_dates_are_told_plainly() {
        let t = template("{{ raise_exception('roles must alternate') }}");
        let error = t.render_turns(&[("user", "a")], false).unwrap_err();
        assert_eq!(error.to_string(), "chat template line 1: roles must alternate");
        let t = template("{{ strftime_now('%d %b %Y') }}");
        let error = t.render_turns(&[("user", "a")], false).unwrap_err();
        assert!(error.hint().unwrap().contains("`date:"), "{error}");
        let t = ChatTemplate::new(
            "{{ strftime_now('%d %b %Y') }}",
            &[],
            &BTreeMap::new(),
            Some("2024-07-26"),
        );
        assert_eq!(t.unwrap().render_turns(&[], false).unwrap(), "26 Jul 2024");
        let error = ChatTemplate::new("{% if %}", &[], &BTreeMap::new(), None).err().unwrap();
        assert!(error.to_string().contains("line 1"), "{error}");
    }
}

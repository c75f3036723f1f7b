//! Formats: what the columns of a row mean, and how the row becomes token documents.

mod alpaca;
mod messages;
mod prompt_completion;
mod text;

use arrow_array::Array;
use arrow_array::cast::AsArray;
use lora_flow_core::{Error, Result, ResultExt};
use rayon::prelude::*;

use crate::chat_template::ChatTemplate;
use crate::columns::require_text;
use crate::document::{Document, DropReason, Encoded, Overflow, count_words, split_document};
use crate::table::Batch;
use crate::tokenizer::TextTokenizer;

/// The formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FormatKind {
    /// One column of text, all of it supervised.
    Text,
    /// A prompt and what the model is to answer.
    PromptCompletion,
    /// A conversation: a list of messages with roles.
    Messages,
    /// An instruction, perhaps with an input, and the answer to it.
    Alpaca,
}

/// Names of the columns that the formats read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnNames {
    /// Of format `text`.
    pub text: String,
    /// Of format `prompt-completion`.
    pub prompt: String,
    /// Of format `prompt-completion`.
    pub completion: String,
    /// Of format `messages`.
    pub messages: String,
    /// Of format `messages`: functions the model may call, if there is such a column.
    pub tools: Option<String>,
    /// Of format `alpaca`.
    pub instruction: String,
    /// Of format `alpaca`: what the instruction is about, if there is such a column.
    pub input: Option<String>,
    /// Of format `alpaca`.
    pub output: String,
}

impl Default for ColumnNames {
    fn default() -> Self {
        Self {
            text: "text".into(),
            prompt: "prompt".into(),
            completion: "completion".into(),
            messages: "messages".into(),
            tools: None,
            instruction: "instruction".into(),
            input: Some("input".into()),
            output: "output".into(),
        }
    }
}

/// How rows become documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormatOptions {
    /// What the columns mean.
    pub kind: FormatKind,
    /// Names of the columns.
    pub columns: ColumnNames,
    /// Most tokens of a document.
    pub max_length: usize,
    /// What happens to longer ones; `Split` is for format `text`.
    pub overflow: Overflow,
    /// End each text with EOS, supervised, unless it already ends so.
    pub add_eos: bool,
    /// Supervise the completion alone.
    pub completion_only_loss: bool,
    /// Supervise what the assistant says alone.
    pub assistant_only_loss: bool,
}

/// Turns rows into token documents.
pub struct RowEncoder<'a> {
    tokenizer: &'a TextTokenizer,
    options: FormatOptions,
    template: Option<ChatTemplate>,
}

impl<'a> RowEncoder<'a> {
    /// An encoder; format `messages` needs the template.
    ///
    /// # Errors
    /// When the tokenizer or the model lacks what the options ask for.
    pub fn new(
        tokenizer: &'a TextTokenizer,
        options: FormatOptions,
        template: Option<ChatTemplate>,
    ) -> Result<Self> {
        if options.add_eos && tokenizer.eos().is_none() {
            return Err(Error::new("the tokenizer has no `eos_token` to end texts with")
                .with_hint(
                    "name it in the model's tokenizer_config.json, or set `add_eos: false`",
                ));
        }
        if options.kind == FormatKind::Messages && template.is_none() {
            return Err(Error::new(
                "the model has no chat template, which format `messages` needs",
            )
            .with_hint(
                "set `chat_template`, put a `chat_template.jinja` beside the model, or use \
                     format `prompt-completion`",
            ));
        }
        Ok(Self { tokenizer, options, template })
    }

    /// The columns it reads, in the order in which [`RowEncoder::encode`] wants them.
    pub fn columns(&self) -> Vec<String> {
        let names = &self.options.columns;
        match self.options.kind {
            FormatKind::Text => vec![names.text.clone()],
            FormatKind::PromptCompletion => vec![names.prompt.clone(), names.completion.clone()],
            FormatKind::Messages => {
                std::iter::once(names.messages.clone()).chain(names.tools.clone()).collect()
            }
            FormatKind::Alpaca => [names.instruction.clone(), names.output.clone()]
                .into_iter()
                .chain(names.input.clone())
                .collect(),
        }
    }

    /// Encodes the rows of a batch, in parallel; the result does not depend on how many threads
    /// there are.
    ///
    /// # Errors
    /// For the first row that its format does not allow.
    pub fn encode(&self, batch: &Batch) -> Result<Vec<Encoded>> {
        let columns =
            self.columns()
                .iter()
                .map(|name| {
                    batch.rows.column_by_name(name).map(AsRef::as_ref).ok_or_else(|| {
                        Error::new(format!("`{}` has no column `{name}`", batch.file))
                    })
                })
                .collect::<Result<Vec<&dyn Array>>>()?;
        let place = format!("`{}`", batch.file);
        let rows = batch.rows.num_rows();
        let text = |i: usize, name: &str| require_text_or_null(columns[i], name, &place);
        let names = &self.options.columns;
        let results: Vec<Result<Encoded>> = match self.options.kind {
            FormatKind::Text => {
                let texts = text(0, &names.text)?;
                self.each(rows, |row| self.text(cell_text(texts, row)))
            }
            FormatKind::PromptCompletion => {
                let prompts = text(0, &names.prompt)?;
                let completions = text(1, &names.completion)?;
                self.each(rows, |row| {
                    self.prompt_completion(cell_text(prompts, row), cell_text(completions, row))
                })
            }
            FormatKind::Alpaca => {
                let instructions = text(0, &names.instruction)?;
                let outputs = text(1, &names.output)?;
                let inputs = match &names.input {
                    Some(name) => text(2, name)?,
                    None => None,
                };
                self.each(rows, |row| {
                    let input = cell_text(inputs, row);
                    self.alpaca(cell_text(instructions, row), input, cell_text(outputs, row))
                })
            }
            FormatKind::Messages => {
                let conversations = messages::conversations(columns[0], &names.messages, &place)?;
                let tools = columns.get(1).copied();
                self.each(rows, |row| self.messages(conversations, tools, row))
            }
        };
        results
            .into_iter()
            .enumerate()
            .map(|(row, encoded)| encoded.with_context(|| batch.place(row)))
            .collect()
    }

    fn each(
        &self,
        rows: usize,
        encode: impl Fn(usize) -> Result<Encoded> + Sync + Send,
    ) -> Vec<Result<Encoded>> {
        (0..rows).into_par_iter().with_min_len(4).map(encode).collect()
    }

    /// Ids of the tokenizer's prefix, unless the text begins with it.
    fn missing_prefix(&self, ids: &[u32]) -> &[u32] {
        let prefix = self.tokenizer.prefix();
        if ids.starts_with(prefix) { &[] } else { prefix }
    }

    /// EOS, if the options ask for it and the ids do not end in it.
    fn missing_eos(&self, ids: &[u32]) -> Option<u32> {
        let eos = self.tokenizer.eos()?.id;
        (self.options.add_eos && ids.last() != Some(&eos)).then_some(eos)
    }

    /// Applies `max_length` and drops what leaves nothing to learn. `text` and `spans` say which
    /// bytes stand behind each id (an empty span at the end for EOS); without spans the text is
    /// taken whole.
    fn fit(&self, mut document: Document, text: &str, spans: Option<&[(usize, usize)]>) -> Encoded {
        let max_length = self.options.max_length;
        document.bytes = text.len() as u64;
        document.words = count_words(text);
        if let Some(first) = document.targets.first_mut() {
            *first = false;
        }
        let mut encoded = Encoded::default();
        if document.ids.len() > max_length && self.options.overflow == Overflow::Truncate {
            document.ids.truncate(max_length);
            document.targets.truncate(max_length);
            encoded.truncated = true;
            let kept = spans
                .and_then(|spans| spans.get(max_length - 1))
                .and_then(|(_, end)| text.get(..*end));
            if let Some(kept) = kept {
                document.bytes = kept.len() as u64;
                document.words = count_words(kept);
            }
        }
        if document.ids.len() < 2 {
            return Encoded::dropped(DropReason::TooShort);
        }
        if encoded.truncated && document.supervised() == 0 {
            return Encoded::dropped(DropReason::NothingSupervised);
        }
        encoded.documents = split_document(document, max_length);
        encoded
    }
}

/// A column of text; one that holds nothing but nulls counts as such.
fn require_text_or_null<'a>(
    array: &'a dyn Array,
    name: &str,
    place: &str,
) -> Result<Option<&'a arrow_array::StringArray>> {
    if array.data_type() == &arrow_schema::DataType::Null {
        return Ok(None);
    }
    require_text(array, name, place).map(Some)
}

fn cell_text(column: Option<&arrow_array::StringArray>, row: usize) -> &str {
    column.filter(|c| !c.is_null(row)).map_or("", |c| c.value(row))
}

/// A list column's items for one row.
fn list_items(array: &dyn Array, row: usize) -> Option<arrow_array::ArrayRef> {
    let list = array.as_list_opt::<i32>()?;
    (!list.is_null(row)).then(|| list.value(row))
}

//! `tokenize`: rows of a data set as training sequences of token ids with a loss mask.

use std::collections::BTreeMap;

use lora_flow_core::{
    Artifact, ArtifactKind, Error, Ports, Problem, Result, ResultExt, Task, TaskContext,
};
use lora_flow_data::{
    ChatTemplate, ColumnNames, Encoded, FormatKind, FormatOptions, Overflow, RowEncoder, Table,
    TextTokenizer, TokensSummary, TokensWriter, TokensWriterOptions, dataset_files, group_digits,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Parameters of `tokenize`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tokenize {
    /// What a row is: `text` (one text, all of it learnt), `prompt-completion` (a prompt and the
    /// answer to learn), `messages` (a conversation, through the model's chat template),
    /// `sharegpt` (the same with `from` and `value`) or `alpaca` (an instruction, perhaps an
    /// input, and the output to learn: through the chat template if there is one, else under the
    /// headings `### Instruction:`, `### Input:` and `### Response:`).
    #[serde(default)]
    pub format: Format,
    /// Most tokens of a training sequence.
    #[serde(default = "default_max_length")]
    pub max_length: usize,
    /// Put several short documents into one sequence. Attention and positions stay within each
    /// document, so the loss is the same and only padding is saved.
    #[serde(default)]
    pub packing: bool,
    /// What to do with rows longer than `max_length`: `split` them into consecutive documents
    /// (format `text`, its default) or `truncate` them (default of the others).
    #[serde(default)]
    pub overflow: Option<OnOverflow>,
    /// Learn the completion alone and not the prompt. Default `true` for the formats
    /// `prompt-completion` and `alpaca`; the others do not have it.
    #[serde(default)]
    pub completion_only_loss: Option<bool>,
    /// Learn what the assistant says alone. Default `true` for the formats `messages` and
    /// `sharegpt`; the others do not have it.
    #[serde(default)]
    pub assistant_only_loss: Option<bool>,
    /// Names of the columns to read.
    #[serde(default)]
    pub columns: TokenColumns,
    /// End every text with the tokenizer's EOS, learnt too, unless it ends so already. Without it
    /// a model does not learn to stop.
    #[serde(default = "yes")]
    pub add_eos: bool,
    /// Take at most this many rows, the first ones.
    #[serde(default)]
    pub limit: Option<u64>,
    /// Chat template (Jinja) to use instead of the model's own.
    #[serde(default)]
    pub chat_template: Option<String>,
    /// Further variables for the chat template, such as `enable_thinking: false`.
    #[serde(default)]
    pub chat_template_kwargs: BTreeMap<String, Value>,
    /// The date, as `2025-01-31`, for chat templates that print today's: a fixed one, so that the
    /// same data give the same tokens tomorrow.
    #[serde(default)]
    pub date: Option<String>,
}

/// What a row of data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Column `text`.
    #[default]
    Text,
    /// Columns `prompt` and `completion`, joined as they stand.
    PromptCompletion,
    /// Column `messages`: a list of `{role, content}` (or `{from, value}`).
    Messages,
    /// Columns `instruction`, `input` and `output`.
    Alpaca,
    /// Column `conversations`: a list of `{from, value}`.
    Sharegpt,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::PromptCompletion => "prompt-completion",
            Self::Messages => "messages",
            Self::Alpaca => "alpaca",
            Self::Sharegpt => "sharegpt",
        }
    }

    fn is_chat(self) -> bool {
        matches!(self, Self::Messages | Self::Sharegpt)
    }
}

/// What to do with rows that are too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnOverflow {
    /// Make consecutive documents of them; nothing is lost.
    Split,
    /// Cut their end off; the report counts them.
    Truncate,
}

/// Names of the columns to read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TokenColumns {
    /// Text, for format `text`.
    pub text: String,
    /// Prompt, for format `prompt-completion`.
    pub prompt: String,
    /// Completion, for format `prompt-completion`.
    pub completion: String,
    /// Conversation, for format `messages`.
    pub messages: String,
    /// Functions that the model may call, for the formats `messages` and `sharegpt`; none if left
    /// out.
    pub tools: Option<String>,
    /// Conversation, for format `sharegpt`.
    pub conversations: String,
    /// Instruction, for format `alpaca`.
    pub instruction: String,
    /// What the instruction is about, for format `alpaca`; `null` where there is no such column.
    pub input: Option<String>,
    /// Answer, for format `alpaca`.
    pub output: String,
}

impl Default for TokenColumns {
    fn default() -> Self {
        let names = ColumnNames::default();
        Self {
            text: names.text,
            prompt: names.prompt,
            completion: names.completion,
            messages: names.messages,
            tools: names.tools,
            conversations: "conversations".into(),
            instruction: names.instruction,
            input: names.input,
            output: names.output,
        }
    }
}

fn default_max_length() -> usize {
    1024
}

fn yes() -> bool {
    true
}

/// Least `max_length`: below it a document cannot be split into pieces that can be learnt.
const LEAST_MAX_LENGTH: usize = 8;

impl Task for Tokenize {
    fn inputs(&self) -> Ports {
        Ports::none().required("dataset", ArtifactKind::Dataset, "the rows").required(
            "model",
            ArtifactKind::Model,
            "the model whose tokenizer to use",
        )
    }

    fn outputs(&self) -> Ports {
        Ports::none().required("tokens", ArtifactKind::Tokens, "the training sequences")
    }

    fn validate(&self) -> Vec<Problem> {
        let mut out = Vec::new();
        if self.max_length < LEAST_MAX_LENGTH {
            out.push(Problem::at(
                "/max_length",
                format!(
                    "`max_length` is {}; it must be at least {LEAST_MAX_LENGTH}",
                    self.max_length
                ),
            ));
        }
        if self.limit == Some(0) {
            out.push(Problem::at("/limit", "`limit` of 0 leaves no rows"));
        }
        if self.overflow == Some(OnOverflow::Split) && self.format != Format::Text {
            out.push(
                Problem::at(
                    "/overflow",
                    format!(
                        "`overflow: split` would part answers from their questions in format `{}`",
                        self.format.name()
                    ),
                )
                .with_hint("use `overflow: truncate`, or raise `max_length`"),
            );
        }
        let of = |pointer: &str, given: bool, formats: &[Format]| {
            (given && !formats.contains(&self.format)).then(|| {
                let name = pointer.trim_start_matches('/').replace('/', ".");
                let formats: Vec<_> = formats.iter().map(|f| format!("`{}`", f.name())).collect();
                Problem::at(
                    pointer,
                    format!(
                        "`{name}` belongs to format {}, and this is format `{}`",
                        formats.join(" or "),
                        self.format.name()
                    ),
                )
            })
        };
        let only = |pointer: &str, given: bool, format: Format| of(pointer, given, &[format]);
        let chats = [Format::Messages, Format::Sharegpt];
        let templated = [Format::Messages, Format::Sharegpt, Format::Alpaca];
        let answers = [Format::PromptCompletion, Format::Alpaca];
        let names = TokenColumns::default();
        let columns = &self.columns;
        out.extend(
            [
                of("/completion_only_loss", self.completion_only_loss.is_some(), &answers),
                of("/assistant_only_loss", self.assistant_only_loss.is_some(), &chats),
                of("/chat_template", self.chat_template.is_some(), &templated),
                of("/chat_template_kwargs", !self.chat_template_kwargs.is_empty(), &templated),
                of("/date", self.date.is_some(), &templated),
                only("/columns/text", columns.text != names.text, Format::Text),
                only("/columns/prompt", columns.prompt != names.prompt, Format::PromptCompletion),
                only(
                    "/columns/completion",
                    columns.completion != names.completion,
                    Format::PromptCompletion,
                ),
                only("/columns/messages", columns.messages != names.messages, Format::Messages),
                of("/columns/tools", columns.tools.is_some(), &chats),
                only(
                    "/columns/conversations",
                    columns.conversations != names.conversations,
                    Format::Sharegpt,
                ),
                only(
                    "/columns/instruction",
                    columns.instruction != names.instruction,
                    Format::Alpaca,
                ),
                only("/columns/input", columns.input != names.input, Format::Alpaca),
                only("/columns/output", columns.output != names.output, Format::Alpaca),
            ]
            .into_iter()
            .flatten(),
        );
        // Compiling a template reads nothing but its text.
        let template = self.chat_template.as_deref();
        for (pointer, source, date) in
            [("/chat_template", template, None), ("/date", Some(""), self.date.as_deref())]
        {
            if let Some(source) = source
                && let Err(e) = ChatTemplate::new(source, &[], &BTreeMap::new(), date)
            {
                let problem = Problem::at(pointer, e.to_string());
                out.push(match e.hint() {
                    Some(hint) => problem.with_hint(hint),
                    None => problem,
                });
            }
        }
        out
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let model = cx.input("model")?.clone();
        let tokenizer = TextTokenizer::open(&model)?;
        let limits = ModelLimits::read(&model)?;
        if let Some(positions) = limits.positions
            && self.max_length > positions
        {
            cx.warn(format!(
                "`max_length` is {}, but the model was made for {positions} positions",
                self.max_length
            ));
        }
        let encoder = RowEncoder::new(&tokenizer, self.options(), self.template(&tokenizer)?)?;
        let reference = cx.many("dataset").first().map_or("dataset", |n| n.reference.as_str());
        let table = Table::open(dataset_files(cx.input("dataset")?, reference)?, &[])?;
        let total = self.limit.map_or(table.rows(), |limit| limit.min(table.rows()));
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(cx.threads())
            .build()
            .context("cannot start threads")?;
        let mut writer = TokensWriter::new(
            &cx.output("tokens")?.path,
            TokensWriterOptions {
                max_length: self.max_length,
                packing: self.packing,
                vocab_size: tokenizer.vocab_size(),
                tokenizer_digest: Some(tokenizer.digest()),
                eos_token_id: tokenizer.eos().map(|t| t.id),
            },
        )?;

        let mut done = 0;
        for batch in table.scan(&encoder.columns())? {
            cx.check_cancelled()?;
            let mut batch = batch?;
            let left = usize::try_from(total - done).unwrap_or(usize::MAX);
            batch.rows = batch.rows.slice(0, batch.rows.num_rows().min(left));
            // Rows in pieces, so that progress and cancellation do not wait for a long batch.
            let rows = batch.rows.num_rows();
            for start in (0..rows).step_by(PIECE_ROWS) {
                cx.check_cancelled()?;
                let mut piece = batch.clone();
                piece.rows = batch.rows.slice(start, PIECE_ROWS.min(rows - start));
                piece.first_row += start as u64;
                for encoded in pool.install(|| encoder.encode(&piece))? {
                    limits.check(&encoded, &tokenizer)?;
                    writer.push(encoded)?;
                }
                done += piece.rows.num_rows() as u64;
                cx.progress(done, Some(total), "row", "");
            }
            if done == total {
                break;
            }
        }
        let summary = writer.finish(&tokenizer)?;
        self.tell(cx, &summary);
        Ok(())
    }
}

/// Rows encoded between two reports of progress.
const PIECE_ROWS: usize = 128;

impl Tokenize {
    fn options(&self) -> FormatOptions {
        let kind = match self.format {
            Format::Text => FormatKind::Text,
            Format::PromptCompletion => FormatKind::PromptCompletion,
            Format::Messages | Format::Sharegpt => FormatKind::Messages,
            Format::Alpaca => FormatKind::Alpaca,
        };
        let overflow = match self.overflow {
            Some(OnOverflow::Split) => Overflow::Split,
            Some(OnOverflow::Truncate) => Overflow::Truncate,
            None if self.format == Format::Text => Overflow::Split,
            None => Overflow::Truncate,
        };
        let columns = self.columns.clone();
        FormatOptions {
            kind,
            columns: ColumnNames {
                text: columns.text,
                prompt: columns.prompt,
                completion: columns.completion,
                messages: match self.format {
                    Format::Sharegpt => columns.conversations,
                    _ => columns.messages,
                },
                tools: columns.tools,
                instruction: columns.instruction,
                input: columns.input,
                output: columns.output,
            },
            max_length: self.max_length,
            overflow,
            add_eos: self.add_eos,
            completion_only_loss: self.completion_only_loss.unwrap_or(true),
            assistant_only_loss: self.assistant_only_loss.unwrap_or(true),
        }
    }

    fn template(&self, tokenizer: &TextTokenizer) -> Result<Option<ChatTemplate>> {
        let source = self.chat_template.as_deref().or(tokenizer.chat_template());
        let Some(source) =
            source.filter(|_| self.format.is_chat() || self.format == Format::Alpaca)
        else {
            return Ok(None);
        };
        ChatTemplate::new(
            source,
            tokenizer.named_tokens(),
            &self.chat_template_kwargs,
            self.date.as_deref(),
        )
        .map(Some)
    }

    fn tell(&self, cx: &mut TaskContext, summary: &TokensSummary) {
        let info = &summary.info;
        for (reason, count) in &summary.dropped {
            cx.warn(format!(
                "{} of {} rows {} were dropped",
                group_digits(*count),
                group_digits(summary.rows),
                reason.text()
            ));
        }
        if info.truncated_documents > 0 {
            cx.warn(format!(
                "{} of {} rows are longer than `max_length` and were truncated",
                group_digits(info.truncated_documents),
                group_digits(summary.rows)
            ));
        }
        cx.report(summary.report());
        cx.summary("sequences", group_digits(info.sequences));
        cx.summary("tokens", group_digits(info.tokens));
        if info.supervised + info.documents != info.tokens {
            let share = 100.0 * info.supervised as f64 / info.tokens.max(1) as f64;
            cx.summary("supervised", format!("{share:.1} %"));
        }
    }
}

/// What the model's `config.json` says about ids and positions.
struct ModelLimits {
    vocab_size: Option<usize>,
    positions: Option<usize>,
}

impl ModelLimits {
    fn read(model: &Artifact) -> Result<Self> {
        let Some(path) = model.get("config.json") else {
            return Ok(Self { vocab_size: None, positions: None });
        };
        let text = std::fs::read(path).context("`config.json` cannot be read")?;
        let config: Value =
            serde_json::from_slice(&text).context("`config.json` cannot be read")?;
        let number = |name: &str| config[name].as_u64().and_then(|n| usize::try_from(n).ok());
        Ok(Self { vocab_size: number("vocab_size"), positions: number("max_position_embeddings") })
    }

    /// Refuses ids that the model has no embedding for.
    fn check(&self, encoded: &Encoded, tokenizer: &TextTokenizer) -> Result<()> {
        let Some(vocab_size) = self.vocab_size else { return Ok(()) };
        let ids = encoded.documents.iter().flat_map(|d| &d.ids);
        match ids.copied().find(|id| *id as usize >= vocab_size) {
            None => Ok(()),
            Some(id) => Err(Error::new(format!(
                "the tokenizer gives id {id} (`{}`), but the model has only {vocab_size} embeddings",
                tokenizer.decode(&[id]).unwrap_or_default()
            ))
            .with_hint("the tokenizer is not this model's, or tokens were added to it alone")),
        }
    }
}

#[cfg(test)]
#[path = "tokenize_tests.rs"]
mod tests;

//! From rows to prompts: templates, worked examples, chat templates, in the harness's way.

use lora_flow_core::{Error, Result, nearest};
use lora_flow_data::{ChatTemplate, jinja, python_str};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, Value};
use serde_json::Value as Json;

use crate::metric::text::is_space;
use crate::stats::python_random::PythonRandom;
use crate::tasks::literal::literal;
use crate::tasks::rows::Rows;
use crate::tasks::task_file::{Choices, Target, TaskFile};

/// How the prompts of all tasks are put together.
#[derive(Clone, Copy, Default)]
pub(crate) struct PromptOptions<'a> {
    pub(crate) chat: Option<&'a ChatTemplate>,
    pub(crate) system: Option<&'a str>,
    /// Each example is a turn of its own.
    pub(crate) multiturn: bool,
    pub(crate) seed: u32,
}

/// One question, ready to be asked.
#[derive(Debug, Clone)]
pub(crate) struct Question {
    pub(crate) prompt: String,
    pub(crate) target: Json,
    pub(crate) choices: Vec<String>,
    /// Between prompt and choice.
    pub(crate) delimiter: String,
}

/// The templates of a task over its rows.
pub(crate) struct Prompter<'a> {
    task: &'a TaskFile,
    env: Environment<'static>,
    columns: Vec<String>,
}

impl<'a> Prompter<'a> {
    /// Jinja as the harness sets it up: an undefined name is an error, a trailing line feed stays.
    pub(crate) fn new(task: &'a TaskFile, columns: &[String]) -> Self {
        let mut env = jinja::environment();
        env.set_undefined_behavior(UndefinedBehavior::Strict);
        if let Ok(syntax) = SyntaxConfig::builder().keep_trailing_newline(true).build() {
            env.set_syntax(syntax);
        }
        env.add_filter(
            "regex_replace",
            |text: String, pattern: String, with: String| -> Result<String, minijinja::Error> {
                let regex = regex::Regex::new(&pattern).map_err(|e| {
                    minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, e.to_string())
                })?;
                // Python writes `\1` for what is `$1` here.
                let with = regex::Regex::new(r"\\(\d+)").map_or(with.clone(), |r| {
                    r.replace_all(&with.replace('$', "$$"), "$${$1}").into_owned()
                });
                Ok(regex.replace_all(&text, with.as_str()).into_owned())
            },
        );
        Self { task, env, columns: columns.to_vec() }
    }

    fn is_column(&self, name: &str) -> bool {
        self.columns.iter().any(|c| c == name)
    }

    /// A template over a row; an error names the place of the template and the row.
    fn render(&self, pointer: &str, template: &str, row: &Value, place: &str) -> Result<String> {
        self.env.render_str(template, row).map_err(|e| {
            let what = jinja::what(&e);
            let error = Error::new(format!("{}: {what}, for {place}", self.task.place(pointer)));
            if e.kind() != minijinja::ErrorKind::UndefinedError {
                return error;
            }
            let names = self.env.template_from_str(template).map(|t| t.undeclared_variables(false));
            let mut missing: Vec<String> =
                names.unwrap_or_default().into_iter().filter(|n| !self.is_column(n)).collect();
            missing.sort();
            let Some(name) = missing.first().filter(|_| !self.columns.is_empty()) else {
                return error;
            };
            let message =
                format!("{}: there is no column `{name}`, for {place}", self.task.place(pointer));
            let hint = match nearest(name, self.columns.iter().map(String::as_str)) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("the columns are {}", self.columns.join(", ")),
            };
            Error::new(message).with_hint(hint)
        })
    }

    /// A column or a template, as text.
    fn text(&self, pointer: &str, template: &str, row: &Value, place: &str) -> Result<String> {
        if !self.is_column(template) {
            return self.render(pointer, template, row, place);
        }
        let value = row.get_item(&Value::from(template)).unwrap_or_default();
        match value.as_str() {
            Some(text) => Ok(text.to_owned()),
            None => Err(Error::new(format!(
                "{}: the column `{template}` is not text, for {place}",
                self.task.place(pointer)
            ))),
        }
    }

    fn target(&self, target: &Target, row: &Value, place: &str) -> Result<Json> {
        let template = match target {
            Target::Fixed(value) => return Ok(value.clone()),
            Target::Template(template) => template,
        };
        if self.is_column(template) {
            let value = row.get_item(&Value::from(template.as_str())).unwrap_or_default();
            if value.is_none() || value.is_undefined() {
                return Err(Error::new(format!(
                    "{}: the target is null, for {place}",
                    self.task.place("/doc_to_target")
                )));
            }
            return Ok(serde_json::to_value(&value)?);
        }
        let text = self.render("/doc_to_target", template, row, place)?;
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if digits && self.task.doc_to_choice.is_some() {
            return Ok(text.parse::<u64>().map_or_else(|_| Json::from(text), Json::from));
        }
        if text.len() >= 2 && text.starts_with('[') && text.ends_with(']') {
            return Ok(literal(&text).unwrap_or_else(|| Json::from(text)));
        }
        Ok(Json::from(text))
    }

    fn choices(&self, choices: &Choices, row: &Value, place: &str) -> Result<Vec<String>> {
        let template = match choices {
            Choices::Fixed(texts) => return Ok(texts.clone()),
            Choices::Template(template) => template,
        };
        let value = if self.is_column(template) {
            serde_json::to_value(row.get_item(&Value::from(template.as_str())).unwrap_or_default())?
        } else {
            literal(&self.render("/doc_to_choice", template, row, place)?).unwrap_or_default()
        };
        let texts: Option<Vec<String>> = value.as_array().and_then(|items| {
            items.iter().map(|v| v.as_str().filter(|s| !s.is_empty()).map(str::to_owned)).collect()
        });
        texts.filter(|t| t.len() > 1).ok_or_else(|| {
            Error::new(format!(
                "{}: the choices are not a list of two or more strings, for {place}",
                self.task.place("/doc_to_choice")
            ))
            .with_hint("a column with a list, or a template such as `{{ [a, b, c] }}`")
        })
    }

    /// The questions of a split, in order. `examples` are rows to take worked examples from, and
    /// whether the row asked about may be among them.
    pub(crate) fn questions(
        &self,
        rows: &Rows,
        examples: Option<&(Rows, bool)>,
        options: PromptOptions<'_>,
    ) -> Result<Vec<Question>> {
        let mut random = PythonRandom::new(options.seed);
        let questions = rows.rows.iter().zip(&rows.places);
        questions
            .map(|(row, place)| self.question(row, place, examples, options, &mut random))
            .collect()
    }

    /// The texts of a rolling log-likelihood, which has no prompts.
    pub(crate) fn texts(&self, rows: &Rows) -> Result<Vec<Question>> {
        let all = rows.rows.iter().zip(&rows.places);
        all.map(|(row, place)| {
            let target = self.target(&self.task.doc_to_target, row, place)?;
            let text = target.as_str().filter(|t| !t.is_empty()).ok_or_else(|| {
                Error::new(format!(
                    "{}: the text is empty or no text, for {place}",
                    self.task.place("/doc_to_target")
                ))
            })?;
            Ok(Question {
                prompt: String::new(),
                target: Json::from(text),
                choices: Vec::new(),
                delimiter: String::new(),
            })
        })
        .collect()
    }

    fn question(
        &self,
        row: &Value,
        place: &str,
        examples: Option<&(Rows, bool)>,
        options: PromptOptions<'_>,
        random: &mut PythonRandom,
    ) -> Result<Question> {
        let task = self.task;
        let target = self.target(&task.doc_to_target, row, place)?;
        let choices = match &task.doc_to_choice {
            Some(choices) => self.choices(choices, row, place)?,
            None => Vec::new(),
        };
        let mut turns: Vec<Turn> = Vec::new();
        let description = match task.description.as_str() {
            "" => String::new(),
            d if self.is_column(d) => self.text("/description", d, row, place)?,
            d => self.render("/description", d, row, place)?,
        };
        let system = join(options.system.unwrap_or(""), &description, &task.fewshot.delimiter);
        if !system.is_empty() {
            turns.push(Turn::new("system", system, ""));
        }
        if let Some((pool, with_row)) = examples {
            for i in self.pick(pool, row.clone(), *with_row, random)? {
                self.example(&pool.rows[i], &pool.places[i], &mut turns)?;
            }
        }
        let question = self.text("/doc_to_text", &task.doc_to_text, row, place)?;
        let prefix = match &task.gen_prefix {
            Some(p) => Some(self.text("/gen_prefix", p, row, place)?).filter(|p| !p.is_empty()),
            None => None,
        };
        self.ask(question, None, prefix.as_deref(), &task.target_delimiter, "", &mut turns)?;
        let prompt = match options.chat {
            None => turns.iter().map(|t| format!("{}{}", t.text, t.after)).collect(),
            Some(template) => chat(template, turns, options.multiturn, prefix.is_some())?,
        };
        let open = prefix.as_deref().is_some_and(|p| !p.ends_with(is_space));
        let delimiter = match options.chat {
            Some(_) if !open => String::new(),
            _ => task.target_delimiter.clone(),
        };
        Ok(Question { prompt, target, choices, delimiter })
    }

    /// Rows for the worked examples of one question.
    fn pick(
        &self,
        pool: &Rows,
        row: Value,
        with_row: bool,
        random: &mut PythonRandom,
    ) -> Result<Vec<usize>> {
        let n = self.task.num_fewshot;
        let others = || (0..pool.rows.len()).filter(|i| !with_row || pool.rows[*i] != row);
        let too_few = || {
            Error::new(format!(
                "{}: `num_fewshot` is {n}, and there are {} rows to take examples from",
                self.task.place("/num_fewshot"),
                others().count()
            ))
        };
        let drawn = if with_row { n + 1 } else { n };
        if self.task.fewshot.first_n {
            let first: Vec<usize> = others().take(n).collect();
            return if first.len() == n { Ok(first) } else { Err(too_few()) };
        }
        if drawn > pool.rows.len() {
            return Err(too_few());
        }
        let mut picked = random.sample(pool.rows.len(), drawn);
        if with_row {
            picked.retain(|i| pool.rows[*i] != row);
            picked.truncate(n);
            if picked.len() < n {
                let rest: Vec<usize> = others().collect();
                if rest.len() < n {
                    return Err(too_few());
                }
                picked = random.sample(rest.len(), n).into_iter().map(|i| rest[i]).collect();
            }
        }
        Ok(picked)
    }

    fn example(&self, row: &Value, place: &str, turns: &mut Vec<Turn>) -> Result<()> {
        let (task, shot) = (self.task, &self.task.fewshot);
        let template = shot.doc_to_text.as_ref().unwrap_or(&task.doc_to_text);
        let question = self.text("/doc_to_text", template, row, place)?;
        let target =
            self.target(shot.doc_to_target.as_ref().unwrap_or(&task.doc_to_target), row, place)?;
        let choices = match shot.doc_to_choice.as_ref().or(task.doc_to_choice.as_ref()) {
            Some(choices) => self.choices(choices, row, place)?,
            None => Vec::new(),
        };
        let answer = match &target {
            Json::Array(all) => all.first().cloned().unwrap_or_default(),
            one => one.clone(),
        };
        let answer = match &answer {
            Json::String(text) => Some(text.clone()),
            Json::Number(n) => n.as_u64().and_then(|i| choices.get(i as usize).cloned()),
            _ => None,
        };
        let answer = answer.ok_or_else(|| {
            Error::new(format!(
                "{}: `{target}` is neither text nor the number of a choice, for {place}",
                task.place("/doc_to_target")
            ))
        })?;
        let prefix = match &task.gen_prefix {
            Some(p) => Some(self.text("/gen_prefix", p, row, place)?).filter(|p| !p.is_empty()),
            None => None,
        };
        let delimiters = (&shot.target_delimiter, &shot.delimiter);
        self.ask(question, Some(answer), prefix.as_deref(), delimiters.0, delimiters.1, turns)
    }

    fn ask(
        &self,
        question: String,
        answer: Option<String>,
        prefix: Option<&str>,
        delimiter: &str,
        after: &str,
        turns: &mut Vec<Turn>,
    ) -> Result<()> {
        let answer = answer.filter(|a| !a.is_empty());
        let needs = |prefix: &str| {
            !question.is_empty() && !question.ends_with(is_space) && !prefix.starts_with(is_space)
        };
        let delimit = match prefix {
            None => answer.is_some(),
            Some(prefix) => needs(prefix),
        };
        turns.push(Turn::new("user", question, if delimit { delimiter } else { "" }));
        match (answer, prefix) {
            (Some(answer), prefix) => {
                turns.push(Turn::new("assistant", join(prefix.unwrap_or(""), &answer, " "), after));
            }
            (None, Some(prefix)) => turns.push(Turn::new("assistant", prefix.to_owned(), "")),
            (None, None) => {}
        }
        Ok(())
    }
}

/// A message, and what follows it where there is no chat template.
struct Turn {
    role: &'static str,
    text: String,
    after: String,
}

impl Turn {
    fn new(role: &'static str, text: String, after: &str) -> Self {
        Self { role, text, after: after.to_owned() }
    }
}

/// Two texts with a delimiter between them, unless one is empty or there is whitespace already.
fn join(a: &str, b: &str, delimiter: &str) -> String {
    let apart =
        !a.is_empty() && !b.is_empty() && !a.ends_with(is_space) && !b.starts_with(is_space);
    format!("{a}{}{b}", if apart { delimiter } else { "" })
}

/// The conversation through the model's template. Unless each example is a turn, all of them and
/// the question are one message of the user.
fn chat(
    template: &ChatTemplate,
    mut turns: Vec<Turn>,
    multiturn: bool,
    continued: bool,
) -> Result<String> {
    if !multiturn {
        let system = (turns.first().is_some_and(|t| t.role == "system")).then(|| turns.remove(0));
        let last =
            (turns.last().is_some_and(|t| t.role == "assistant")).then(|| turns.pop()).flatten();
        if let Some(turn) = turns.last_mut() {
            turn.after.clear();
        }
        let text: String = turns.iter().map(|t| format!("{}{}", t.text, t.after)).collect();
        turns = system.into_iter().chain([Turn::new("user", text, "")]).chain(last).collect();
    }
    let messages: Vec<(&str, &str)> = turns.iter().map(|t| (t.role, t.text.as_str())).collect();
    let text = template.render_turns(&messages, !continued)?;
    if !continued {
        return Ok(text);
    }
    // The answer has been begun: everything that the template puts after it goes.
    let begun = turns.last().map_or("", |t| t.text.as_str());
    let at = text.rfind(begun.trim()).ok_or_else(|| {
        Error::new("the chat template does not show the beginning of the answer (`gen_prefix`)")
    })?;
    let whole = begun.trim_start();
    let end = if text[at..].starts_with(whole) { whole.len() } else { begun.trim().len() };
    Ok(text[..at + end].to_owned())
}

/// `json.dumps(row, indent=2, ensure_ascii=False)`, which the harness hashes.
pub(crate) fn dumped(row: &Value) -> Result<String> {
    let env = jinja::environment();
    env.render_str("{{ row | tojson(indent=2) }}", Value::from_pairs([("row", row.clone())]))
        .map_err(|e| Error::new("a row cannot be written as JSON").with_source(e))
}

/// `str(target)` in Python.
pub(crate) fn shown(target: &Json) -> Result<String> {
    python_str(&jinja::from_json(target))
        .map_err(|e| Error::new("a target cannot be shown").with_source(e))
}

//! What a model said to each question of a task, and the metrics of that.

use lora_flow_core::{Error, Result};
use serde_json::{Value as Json, json};

use crate::metric::{Metric, MetricOptions, Sample, bleu, chrf, rouge, text};
use crate::stats::bootstrap;
use crate::tasks::model::{Judge, LogLikelihood};
use crate::tasks::prompt::Question;
use crate::tasks::task_file::{MetricSpec, OutputType, TaskFile};

/// Metrics whose standard error the harness draws with few replicates, because each is slow.
const SLOW_REPLICATES: usize = 100;

/// The answer to one question.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    /// Of each choice; of the target alone; or of the whole text.
    pub(crate) loglikelihoods: Vec<LogLikelihood>,
    /// What was generated.
    pub(crate) text: Option<String>,
}

/// A metric over all questions.
#[derive(Debug, Clone)]
pub(crate) struct Measured {
    /// As in results: `acc,none`.
    pub(crate) spec: MetricSpec,
    pub(crate) filter: String,
    pub(crate) samples: Vec<Sample>,
    pub(crate) value: f64,
    pub(crate) stderr: Option<f64>,
}

/// A task, asked and measured.
pub(crate) struct Judged {
    pub(crate) answers: Vec<Answer>,
    pub(crate) measured: Vec<Measured>,
    /// Shown as the answer: the choice, or the filtered text.
    pub(crate) predictions: Vec<Option<String>>,
    /// Whether it is right, where that is a question of yes and no.
    pub(crate) correct: Vec<Option<bool>>,
}

/// Asks every question.
pub(crate) fn ask(
    task: &TaskFile,
    questions: &[Question],
    judge: &Judge<'_>,
    progress: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<Answer>> {
    let told = |lls: Vec<LogLikelihood>| Answer { loglikelihoods: lls, text: None };
    match task.output_type {
        OutputType::Generate => {
            let prompts: Vec<&str> = questions.iter().map(|q| q.prompt.as_str()).collect();
            let texts = judge.generate(&prompts, &task.generation, progress)?;
            let answer = |text| Answer { loglikelihoods: Vec::new(), text: Some(text) };
            Ok(texts.into_iter().map(answer).collect())
        }
        OutputType::Rolling => {
            let texts: Vec<String> = questions.iter().map(|q| as_text(&q.target)).collect();
            Ok(judge.rolling(&texts, progress)?.into_iter().map(|ll| told(vec![ll])).collect())
        }
        OutputType::LogLikelihood => {
            let pairs: Vec<(String, String)> =
                questions.iter().map(|q| (q.prompt.clone(), as_text(&q.target))).collect();
            let all = judge.loglikelihoods(&pairs, progress)?;
            Ok(all.into_iter().map(|ll| told(vec![ll])).collect())
        }
        OutputType::MultipleChoice => {
            let mut pairs = Vec::new();
            for q in questions {
                let choices = q.choices.iter();
                pairs.extend(choices.map(|c| (q.prompt.clone(), format!("{}{c}", q.delimiter))));
            }
            let total = pairs.len().max(1);
            let mut scaled = |done: usize| progress(done * questions.len() / total);
            let mut all = judge.loglikelihoods(&pairs, &mut scaled)?.into_iter();
            let of = |q: &Question| told(all.by_ref().take(q.choices.len()).collect());
            Ok(questions.iter().map(of).collect())
        }
    }
}

/// A target as text.
pub(crate) fn as_text(target: &Json) -> String {
    match target {
        Json::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The index of the largest; of equals the first.
fn argmax(values: impl IntoIterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (i, value) in values.into_iter().enumerate() {
        if value > best.1 {
            best = (i, value);
        }
    }
    best.0
}

/// Measures a task.
///
/// # Errors
/// When a target is none of the choices, a log-likelihood or a metric is not a number.
pub(crate) fn measure(
    task: &TaskFile,
    questions: &[Question],
    places: &[String],
    answers: Vec<Answer>,
    bootstrap_iters: usize,
) -> Result<Judged> {
    for (answer, place) in answers.iter().zip(places) {
        if let Some(ll) = answer.loglikelihoods.iter().find(|ll| !ll.sum.is_finite()) {
            return Err(Error::new(format!(
                "{}: the log-likelihood of {place} is {}",
                task.place("/doc_to_target"),
                ll.sum
            ))
            .with_hint("check the weights and the adapter for values that are not finite"));
        }
    }
    let mut judged = Judged {
        predictions: vec![None; answers.len()],
        correct: vec![None; answers.len()],
        measured: Vec::new(),
        answers,
    };
    for (f, chain) in task.filters.iter().enumerate() {
        let texts: Vec<Option<String>> = judged
            .answers
            .iter()
            .map(|a| {
                a.text.as_ref().map(|t| chain.filters.iter().fold(t.clone(), |t, f| f.apply(&t)))
            })
            .collect();
        for (m, spec) in task.metrics.iter().enumerate() {
            let scorer = Scorer { task, metric: spec.metric, options: &spec.options };
            let mut samples = Vec::with_capacity(questions.len());
            for (i, question) in questions.iter().enumerate() {
                let answer = &judged.answers[i];
                samples.push(scorer.sample(question, answer, texts[i].as_deref(), &places[i])?);
            }
            if f == 0 && m == 0 {
                for (i, question) in questions.iter().enumerate() {
                    let answer = &judged.answers[i];
                    judged.predictions[i] = match task.output_type {
                        OutputType::MultipleChoice => {
                            question.choices.get(best(answer, |_| 1.0)).cloned()
                        }
                        _ => texts[i].clone(),
                    };
                }
            }
            if f == 0 && matches!(spec.metric, Metric::Acc | Metric::ExactMatch) {
                for (correct, sample) in judged.correct.iter_mut().zip(&samples) {
                    *correct = correct.or(Some(sample[0] > 0.0));
                }
            }
            let statistic = spec.metric.statistic();
            let value = statistic.of(&samples);
            if !value.is_finite() {
                return Err(Error::new(format!(
                    "{}: `{}` is {value} over {} samples",
                    task.place(&format!("/metric_list/{m}")),
                    spec.metric.name(),
                    samples.len()
                )));
            }
            let replicates = match spec.metric {
                Metric::Bleu | Metric::Chrf => bootstrap_iters.min(SLOW_REPLICATES),
                _ => bootstrap_iters,
            };
            let stderr = statistic
                .stderr(&samples)
                .or_else(|| bootstrap::stderr(statistic, &samples, replicates));
            let (spec, filter) = (spec.clone(), chain.name.clone());
            judged.measured.push(Measured { spec, filter, samples, value, stderr });
        }
    }
    Ok(judged)
}

/// The choice with the highest log-likelihood over `length`.
fn best(answer: &Answer, length: impl Fn(usize) -> f64) -> usize {
    argmax(answer.loglikelihoods.iter().enumerate().map(|(i, ll)| ll.sum / length(i)))
}

struct Scorer<'a> {
    task: &'a TaskFile,
    metric: Metric,
    options: &'a MetricOptions,
}

impl Scorer<'_> {
    fn wrong_target(&self, question: &Question, place: &str, wanted: &str) -> Error {
        Error::new(format!(
            "{}: the target `{}` is {wanted}, for {place}",
            self.task.place("/doc_to_target"),
            as_text(&question.target)
        ))
    }

    /// What a question contributes to the metric.
    fn sample(
        &self,
        question: &Question,
        answer: &Answer,
        said: Option<&str>,
        place: &str,
    ) -> Result<Sample> {
        match self.task.output_type {
            OutputType::MultipleChoice => self.choice(question, answer, place),
            OutputType::Generate => self.generated(question, said.unwrap_or_default(), place),
            OutputType::LogLikelihood => Ok(match self.metric {
                Metric::Acc => vec![f64::from(u8::from(answer.loglikelihoods[0].greedy))],
                _ => vec![answer.loglikelihoods[0].sum],
            }),
            OutputType::Rolling => {
                let LogLikelihood { sum, tokens, .. } = answer.loglikelihoods[0];
                let text = as_text(&question.target);
                let size = match self.metric {
                    Metric::WordPerplexity => words(&text),
                    Metric::TokenPerplexity => tokens,
                    _ => text.len(),
                };
                Ok(vec![sum, size as f64])
            }
        }
    }

    /// Which choices are right.
    fn truths(&self, question: &Question, place: &str) -> Result<Vec<usize>> {
        let n = question.choices.len();
        let one = |target: &Json| -> Option<usize> {
            match target {
                Json::Number(i) => i.as_u64().map(|i| i as usize).filter(|i| *i < n),
                Json::Bool(b) => Some(usize::from(*b)).filter(|i| *i < n),
                Json::String(text) => question.choices.iter().position(|c| c == text),
                _ => None,
            }
        };
        let all: Option<Vec<usize>> = match &question.target {
            Json::Array(items) if !items.is_empty() => items.iter().map(one).collect(),
            target => one(target).map(|t| vec![t]),
        };
        all.ok_or_else(|| self.wrong_target(question, place, &format!("none of its {n} choices")))
    }

    fn choice(&self, question: &Question, answer: &Answer, place: &str) -> Result<Sample> {
        let truths = self.truths(question, place)?;
        let choices = &question.choices;
        let right = |choice: usize| vec![f64::from(u8::from(truths.contains(&choice)))];
        let single = || match truths[..] {
            [one] => Ok(one),
            _ => Err(self
                .wrong_target(question, place, "more than one choice")
                .with_hint(format!("`{}` needs a single one", self.metric.name()))),
        };
        Ok(match self.metric {
            Metric::AccNorm => right(best(answer, |i| choices[i].chars().count() as f64)),
            Metric::AccBytes => right(best(answer, |i| choices[i].len() as f64)),
            Metric::ExactMatch => {
                let any = truths.iter().any(|t| answer.loglikelihoods[*t].greedy);
                vec![f64::from(u8::from(any))]
            }
            Metric::F1 if choices.len() != 2 => {
                let at = self.task.place("/metric_list");
                let message =
                    format!("{at}: `f1` needs two choices, {place} has {}", choices.len());
                return Err(Error::new(message).with_hint("use `f1_macro`"));
            }
            Metric::F1 | Metric::F1Macro | Metric::Mcc => {
                vec![single()? as f64, best(answer, |_| 1.0) as f64]
            }
            Metric::BrierScore => {
                let truth = single()?;
                let max = answer.loglikelihoods.iter().map(|l| l.sum).fold(f64::MIN, f64::max);
                let odds: Vec<f64> =
                    answer.loglikelihoods.iter().map(|l| (l.sum - max).exp()).collect();
                let sum: f64 = odds.iter().sum();
                let squares = odds
                    .iter()
                    .enumerate()
                    .map(|(i, o)| (o / sum - f64::from(u8::from(i == truth))).powi(2));
                vec![squares.sum()]
            }
            _ => right(best(answer, |_| 1.0)),
        })
    }

    fn generated(&self, question: &Question, said: &str, place: &str) -> Result<Sample> {
        let targets: Vec<String> = match (&question.target, question.choices.as_slice()) {
            (Json::Array(items), _) if !items.is_empty() => items.iter().map(as_text).collect(),
            (Json::Number(n), choices) if !choices.is_empty() => {
                let choice = n.as_u64().and_then(|i| choices.get(i as usize));
                let choice = choice.ok_or_else(|| {
                    self.wrong_target(question, place, "the number of none of its choices")
                })?;
                vec![choice.clone()]
            }
            (target, _) => vec![as_text(target)],
        };
        let most = |score: &dyn Fn(&str) -> f64| {
            vec![targets.iter().map(|t| score(t)).fold(f64::MIN, f64::max)]
        };
        let single = || match &targets[..] {
            [one] => Ok(one.as_str()),
            _ => Err(self
                .wrong_target(question, place, "a list")
                .with_hint(format!("`{}` takes a single reference", self.metric.name()))),
        };
        Ok(match self.metric {
            Metric::TokenF1 => most(&|t| text::token_f1(said, t)),
            Metric::Rouge1 => most(&|t| rouge::rouge_n(said, t, 1)),
            Metric::Rouge2 => most(&|t| rouge::rouge_n(said, t, 2)),
            Metric::RougeL => most(&|t| rouge::rouge_l(said, t)),
            Metric::Bleu => bleu::sample(said, single()?),
            Metric::Chrf => chrf::sample(said, single()?),
            _ => most(&|t| f64::from(u8::from(text::exact_match(said, t, self.options)))),
        })
    }
}

/// Words as the harness counts them: the pieces between runs of whitespace, empty ends included.
fn words(of: &str) -> usize {
    let mut pieces = 1;
    let mut blank = false;
    for c in of.chars() {
        let space = text::is_space(c);
        pieces += usize::from(space && !blank);
        blank = space;
    }
    pieces
}

impl Measured {
    /// `acc,none`.
    pub(crate) fn key(&self) -> String {
        format!("{},{}", self.spec.metric.name(), self.filter)
    }

    /// `acc_stderr,none`.
    pub(crate) fn stderr_key(&self) -> String {
        format!("{}_stderr,{}", self.spec.metric.name(), self.filter)
    }

    /// The name in `metrics.json` below the task's, and of the column in `samples.parquet`.
    pub(crate) fn flat(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        match self.filter.as_str() {
            "none" => self.spec.metric.name().to_owned(),
            filter => {
                let filter: String = filter.chars().map(plain).collect();
                format!("{}_{filter}", self.spec.metric.name())
            }
        }
    }

    /// What a paired test has to know.
    pub(crate) fn meta(&self, task: &str) -> Json {
        json!({
            "task": task,
            "statistic": self.spec.metric.statistic().name(),
            "higher_is_better": self.spec.higher_is_better,
            "columns": [self.flat()],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_that_are_no_numbers_are_refused_with_the_row() {
        let text = "task: t\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_target: gold\n\
                    doc_to_choice: [\"a\", \"b\"]\nmetric_list: [ { metric: acc } ]\n";
        let task =
            TaskFile::parse(lora_flow_yaml::source::SourceFile::new("t.yaml", text)).unwrap();
        let question = Question {
            prompt: "q".into(),
            target: json!(0),
            choices: vec!["a".into(), "b".into()],
            delimiter: String::new(),
        };
        let answer = |second: f64| Answer {
            loglikelihoods: [-1.0, second]
                .map(|sum| LogLikelihood { sum, greedy: false, tokens: 1 })
                .to_vec(),
            text: None,
        };
        let (questions, places) = (vec![question.clone(), question], ["row 1", "row 2"]);
        let places = places.map(str::to_owned);
        for wrong in [f64::NAN, f64::NEG_INFINITY, f64::INFINITY] {
            let answers = vec![answer(-2.0), answer(wrong)];
            let error = measure(&task, &questions, &places, answers, 0).err().unwrap().to_string();
            assert!(error.contains("t.yaml:4:16: the log-likelihood of row 2 is"), "{error}");
        }
        let judged = measure(&task, &questions, &places, vec![answer(-2.0), answer(-0.5)], 0);
        assert_eq!(judged.unwrap().measured[0].value, 0.5);
    }

    #[test]
    fn words_are_pieces_between_blanks_and_ties_go_to_the_first() {
        assert_eq!(words(""), 1);
        assert_eq!(words("a  b\n"), 3);
        assert_eq!(words(" a"), 2);
        assert_eq!(argmax([1.0, 3.0, 3.0]), 1);
    }
}

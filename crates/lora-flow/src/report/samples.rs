//! What models said to the same questions, side by side.

use std::collections::BTreeMap;

use lora_flow_evaluate::AnsweredSample;
use serde::Serialize;

/// Questions shown of a task.
const SHOWN: usize = 12;
/// Characters shown of a text.
const CHARS: usize = 600;

/// The questions of one task, and some of them with all answers.
#[derive(Debug, Serialize)]
pub struct SamplesView {
    pub task: String,
    /// The evaluations, in the order of the answers.
    pub models: Vec<String>,
    /// Questions that all of them were asked.
    pub questions: usize,
    /// Those on which they are not all right or all wrong.
    pub differing: usize,
    pub rows: Vec<SampleView>,
}

/// A question and the answers.
#[derive(Debug, Serialize)]
pub struct SampleView {
    pub doc_id: u32,
    pub prompt: String,
    pub target: String,
    pub answers: Vec<AnswerView>,
}

/// An answer, and whether it is right where that is a question of yes and no.
#[derive(Debug, Serialize)]
pub struct AnswerView {
    pub text: String,
    pub correct: Option<bool>,
}

/// The answers to the questions of a task, by row and digest of the row.
type Questions = BTreeMap<(u32, String), Vec<AnsweredSample>>;

/// Answers of several evaluations, by task. Shown are the first questions on which the models differ
/// in being right, then those to which they said different things, then the others, each in the order
/// of the rows.
pub fn side_by_side(evaluations: Vec<(String, Vec<AnsweredSample>)>) -> Vec<SamplesView> {
    // An evaluation stands beside those of the same task; one may hold several tasks.
    let mut tasks: BTreeMap<String, (Vec<String>, Questions)> = BTreeMap::new();
    for (name, samples) in evaluations {
        for sample in samples {
            let (models, rows) = tasks.entry(sample.task.clone()).or_default();
            if models.last() != Some(&name) {
                models.push(name.clone());
            }
            let key = (sample.doc_id, sample.digest.clone());
            let answers = rows.entry(key).or_default();
            // Only rows that every model so far has answered can be completed.
            if answers.len() + 1 == models.len() {
                answers.push(sample);
            }
        }
    }
    tasks.into_iter().filter_map(|(task, (models, rows))| view(task, models, rows)).collect()
}

fn view(task: String, models: Vec<String>, rows: Questions) -> Option<SamplesView> {
    let mut rows: Vec<Vec<AnsweredSample>> =
        rows.into_values().filter(|answers| answers.len() == models.len()).collect();
    let questions = rows.len();
    let differs = |row: &[AnsweredSample], of: fn(&AnsweredSample, &AnsweredSample) -> bool| {
        row.windows(2).any(|pair| of(&pair[0], &pair[1]))
    };
    let judged = |row: &[AnsweredSample]| differs(row, |a, b| a.correct != b.correct);
    let said = |row: &[AnsweredSample]| differs(row, |a, b| a.answer != b.answer);
    let differing = rows.iter().filter(|row| judged(row)).count();
    // Stable: within each group the rows keep their order.
    rows.sort_by_key(|row| (!judged(row), !said(row)));
    rows.truncate(SHOWN);
    let rows: Vec<SampleView> = rows.into_iter().filter_map(sample).collect();
    (!rows.is_empty()).then_some(SamplesView { task, models, questions, differing, rows })
}

fn sample(answers: Vec<AnsweredSample>) -> Option<SampleView> {
    let first = answers.first()?;
    Some(SampleView {
        doc_id: first.doc_id,
        // After worked examples the question stands at the end.
        prompt: last_chars(&first.prompt),
        target: first_chars(&first.target),
        answers: answers
            .iter()
            .map(|a| AnswerView { text: first_chars(&a.answer), correct: a.correct })
            .collect(),
    })
}

fn first_chars(text: &str) -> String {
    match text.char_indices().nth(CHARS) {
        None => text.to_owned(),
        Some((end, _)) => format!("{} …", &text[..end]),
    }
}

fn last_chars(text: &str) -> String {
    match text.chars().count().checked_sub(CHARS) {
        None | Some(0) => text.to_owned(),
        Some(skip) => format!("… {}", text.chars().skip(skip).collect::<String>()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(doc_id: u32, answer: &str, correct: bool) -> AnsweredSample {
        AnsweredSample {
            task: "t".into(),
            doc_id,
            digest: format!("d{doc_id}"),
            prompt: format!("q{doc_id}"),
            target: "yes".into(),
            answer: answer.into(),
            correct: Some(correct),
        }
    }

    #[test]
    fn rows_on_which_models_differ_come_first_and_their_number_is_bounded() {
        let n = 2 * SHOWN as u32;
        let base = (0..n).map(|i| said(i, if i == 5 { "nope" } else { "no" }, false)).collect();
        let tuned = (0..n).map(|i| said(i, if i == 9 { "yes" } else { "no" }, i == 9)).collect();
        // The third was asked fewer questions: only what all were asked can be compared.
        let third = (0..n - 1).map(|i| said(i, "no", false)).collect();
        let name = str::to_owned;
        let views = side_by_side(vec![(name("a"), base), (name("b"), tuned), (name("c"), third)]);
        let [view] = &views[..] else { panic!("{views:?}") };
        assert_eq!(view.models, ["a", "b", "c"]);
        assert_eq!((view.questions, view.differing), (n as usize - 1, 1));
        let order: Vec<u32> = view.rows.iter().map(|r| r.doc_id).collect();
        assert_eq!(order[..4], [9, 5, 0, 1]);
        assert_eq!(order.len(), SHOWN);
        let right: Vec<_> = view.rows[0].answers.iter().map(|a| a.correct).collect();
        assert_eq!(right, [Some(false), Some(true), Some(false)]);
    }

    #[test]
    fn long_texts_keep_the_end_of_a_prompt_and_the_start_of_an_answer() {
        let long = format!("first{}last", "é".repeat(CHARS));
        assert!(last_chars(&long).starts_with("… é") && last_chars(&long).ends_with("last"));
        assert!(first_chars(&long).starts_with("first") && first_chars(&long).ends_with("é …"));
        assert_eq!(first_chars("short"), "short");
    }
}

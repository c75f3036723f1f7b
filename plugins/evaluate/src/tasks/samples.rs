//! `samples.parquet` read back: what was asked, and what the model said.

use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::types::UInt32Type;
use arrow_array::{Array, RecordBatch};
use lora_flow_core::Result;

use crate::gate::side::{batches, text_at};

/// A question with a model's answer.
#[derive(Debug, Clone, PartialEq)]
pub struct AnsweredSample {
    /// The task's name.
    pub task: String,
    /// Its row of the task.
    pub doc_id: u32,
    /// Tells rows apart: two models' answers with equal digests are to the same question.
    pub digest: String,
    /// What the model was given.
    pub prompt: String,
    /// What was expected.
    pub target: String,
    /// What it said: the choice, or the text that it generated after the task's filter.
    pub answer: String,
    /// Whether that is right, where it is a question of yes and no.
    pub correct: Option<bool>,
}

/// The samples of an evaluation that have an answer; log-likelihoods of given texts have none.
///
/// # Errors
/// When the file cannot be read.
pub fn answered_samples(path: &Path) -> Result<Vec<AnsweredSample>> {
    let mut out = Vec::new();
    for batch in batches(path)? {
        out.extend((0..batch.num_rows()).filter_map(|row| sample(&batch, row)));
    }
    Ok(out)
}

fn sample(batch: &RecordBatch, row: usize) -> Option<AnsweredSample> {
    let text = |column: &str| text_at(batch, column, row).map(str::to_owned);
    let correct = batch.column_by_name("correct")?.as_boolean_opt()?;
    Some(AnsweredSample {
        task: text("task")?,
        doc_id: batch.column_by_name("doc_id")?.as_primitive_opt::<UInt32Type>()?.value(row),
        digest: text("doc_hash")?,
        prompt: text("prompt")?,
        target: text("target")?,
        answer: text("prediction")?,
        correct: (!correct.is_null(row)).then(|| correct.value(row)),
    })
}

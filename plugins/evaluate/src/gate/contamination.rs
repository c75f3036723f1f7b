//! `no_contamination`: rows of the evaluation that the training has seen.
//!
//! Texts are compared as lower-case words. A row counts as seen if its whole text is a training
//! row's, or if it shares a run of `ngram` words with one (13 by default, as Brown et al. 2020 and
//! others after them). Every seen row is listed with the row that shows it, and where the
//! evaluation's results are given, the metrics are stated on the clean rows as well.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use lora_flow_core::{ArtifactKind, Error, NamedArtifact, Problem, Result, ResultExt};
use lora_flow_data::{Table, cell, dataset_files};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::gate::named::Named;
use crate::gate::side::{Side, batches, text_at};
use crate::metric::Sample;

/// Rows listed in the verdict.
const LISTED: usize = 100;

/// Training rows held against evaluation rows.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoContamination {
    /// Input with the training rows, a data set.
    pub train: String,
    /// Input with the evaluation rows: a data set, or the results of `evaluate-tasks`.
    pub eval: String,
    /// Text columns of the training rows; all if left out.
    #[serde(default)]
    pub train_columns: Vec<String>,
    /// Text columns of the evaluation rows; all if left out. Of results, `doc`, the row itself.
    #[serde(default)]
    pub eval_columns: Vec<String>,
    /// Words in a row that count as copied.
    #[serde(default = "ngram")]
    pub ngram: usize,
    /// Seen rows that are tolerated, as a share of all.
    #[serde(default)]
    pub max_share: f64,
}

pub(crate) fn ngram() -> usize {
    13
}

impl NoContamination {
    pub(crate) fn check(&self, pointer: &str) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.ngram < 2 {
            let message = format!("`ngram` is {}, it must be at least 2", self.ngram);
            problems.push(Problem::at(format!("{pointer}/ngram"), message));
        }
        if !(0.0..1.0).contains(&self.max_share) {
            let message =
                format!("`max_share` is {}, it must be at least 0 and below 1", self.max_share);
            problems.push(Problem::at(format!("{pointer}/max_share"), message));
        }
        problems
    }

    /// Compares the rows.
    ///
    /// # Errors
    /// When an input has no rows or no text.
    pub(crate) fn judge(&self, train: &NamedArtifact, eval: &NamedArtifact) -> Result<Named> {
        let Some(found) = self.compare(train, eval)? else {
            let message = "there are no evaluation rows or no training rows: nothing was compared";
            return Ok(Named::settled(false, message.to_owned(), json!({})));
        };
        let mut details = found.counts();
        details["max_share"] = json!(self.max_share);
        details["rows"] = json!(&found.seen[..found.seen.len().min(LISTED)]);
        if !found.scores.is_null() {
            details["scores"] = found.scores.clone();
        }
        Ok(Named::settled(found.share() <= self.max_share, found.headline(), details))
    }

    /// Finds the seen rows; none if one side has no rows.
    ///
    /// # Errors
    /// When an input cannot be read or has no text.
    pub(crate) fn compare(
        &self,
        train: &NamedArtifact,
        eval: &NamedArtifact,
    ) -> Result<Option<Overlap>> {
        let rows =
            texts(eval, &self.eval_columns).with_context(|| format!("input `{}`", self.eval))?;
        let mut watch = Watch::new(&rows, self.ngram);
        let mut train_rows = 0usize;
        each_text(train, &self.train_columns, &mut |place, text| {
            train_rows += 1;
            watch.look(place, text);
        })
        .with_context(|| format!("input `{}`", self.train))?;
        if rows.is_empty() || train_rows == 0 {
            return Ok(None);
        }
        let mut scores = Value::Null;
        if eval.artifact.kind == ArtifactKind::Metrics && !watch.hits.is_empty() {
            let side = Side::open(&self.eval, &eval.artifact)?;
            scores = clean_scores(&side, &watch.hits.keys().copied().collect())?;
        }
        let seen = watch.hits.into_iter().map(|(i, hit)| Seen {
            row: rows[i].0.clone(),
            train_row: hit.place,
            exact: hit.exact,
            shared: hit.shared,
        });
        let seen = seen.collect();
        Ok(Some(Overlap { eval_rows: rows.len(), train_rows, ngram: self.ngram, seen, scores }))
    }
}

/// What two sets of rows share.
pub(crate) struct Overlap {
    pub(crate) eval_rows: usize,
    pub(crate) train_rows: usize,
    pub(crate) ngram: usize,
    /// In the order of the evaluation rows.
    pub(crate) seen: Vec<Seen>,
    /// Every metric on all rows and on the clean ones, where the evaluation's results are given.
    pub(crate) scores: Value,
}

/// An evaluation row that the training has seen.
#[derive(Debug, Serialize)]
pub(crate) struct Seen {
    pub(crate) row: String,
    /// The first training row that shows it.
    pub(crate) train_row: String,
    /// Whether the whole text is that row's.
    pub(crate) exact: bool,
    /// Words that both have.
    pub(crate) shared: String,
}

impl Overlap {
    pub(crate) fn share(&self) -> f64 {
        self.seen.len() as f64 / self.eval_rows as f64
    }

    /// The numbers.
    pub(crate) fn counts(&self) -> Value {
        json!({
            "eval_rows": self.eval_rows,
            "train_rows": self.train_rows,
            "ngram": self.ngram,
            "seen": self.seen.len(),
            "seen_exactly": self.whole(),
            "share": self.share(),
        })
    }

    /// In a line.
    pub(crate) fn headline(&self) -> String {
        let first = self.seen.first();
        let first = first.map(|s| format!("; first: {} in {}", s.row, s.train_row));
        format!(
            "{} of {} evaluation rows were seen in {} training rows ({} whole){}",
            self.seen.len(),
            self.eval_rows,
            self.train_rows,
            self.whole(),
            first.unwrap_or_default()
        )
    }

    fn whole(&self) -> usize {
        self.seen.iter().filter(|s| s.exact).count()
    }
}

/// Words in lower case without punctuation.
fn words(text: &str) -> Vec<String> {
    let apart = text.split(|c: char| !c.is_alphanumeric());
    apart.filter(|w| !w.is_empty()).map(str::to_lowercase).collect()
}

fn hash(words: &[String]) -> u64 {
    // A fixed key: the same verdict on every run.
    let mut hasher = DefaultHasher::new();
    words.hash(&mut hasher);
    hasher.finish()
}

struct Hit {
    place: String,
    exact: bool,
    shared: String,
}

/// What to look for, and what was found by evaluation row.
struct Watch {
    ngram: usize,
    grams: HashMap<u64, Vec<usize>>,
    wholes: HashMap<Vec<String>, Vec<usize>>,
    hits: BTreeMap<usize, Hit>,
}

impl Watch {
    fn new(rows: &[(String, String)], ngram: usize) -> Self {
        let mut watch =
            Self { ngram, grams: HashMap::new(), wholes: HashMap::new(), hits: BTreeMap::new() };
        for (i, (_, text)) in rows.iter().enumerate() {
            let words = words(text);
            for gram in words.windows(ngram) {
                let owners = watch.grams.entry(hash(gram)).or_default();
                if owners.last() != Some(&i) {
                    owners.push(i);
                }
            }
            if !words.is_empty() {
                watch.wholes.entry(words).or_default().push(i);
            }
        }
        watch
    }

    fn look(&mut self, place: &str, text: &str) {
        let words = words(text);
        let hit = |exact, shared: &[String]| Hit {
            place: place.to_owned(),
            exact,
            shared: shared.iter().take(40).cloned().collect::<Vec<_>>().join(" "),
        };
        for i in self.wholes.get(&words).into_iter().flatten() {
            let entry = self.hits.entry(*i).or_insert_with(|| hit(true, &words));
            if !entry.exact {
                *entry = hit(true, &words);
            }
        }
        for gram in words.windows(self.ngram) {
            for i in self.grams.get(&hash(gram)).into_iter().flatten() {
                self.hits.entry(*i).or_insert_with(|| hit(false, gram));
            }
        }
    }
}

/// Place and text of every row.
fn texts(input: &NamedArtifact, columns: &[String]) -> Result<Vec<(String, String)>> {
    let mut out = Vec::new();
    each_text(input, columns, &mut |place, text| out.push((place.to_owned(), text.to_owned())))?;
    Ok(out)
}

fn each_text(
    input: &NamedArtifact,
    columns: &[String],
    visit: &mut dyn FnMut(&str, &str),
) -> Result<()> {
    if input.artifact.kind == ArtifactKind::Metrics {
        for batch in batches(input.artifact.file("samples.parquet")?)? {
            for row in 0..batch.num_rows() {
                let task = text_at(&batch, "task", row).unwrap_or_default();
                let doc = text_at(&batch, "doc", row)
                    .ok_or_else(|| Error::new("these results keep no rows (`doc`)"))?;
                let doc: Value = serde_json::from_str(doc)?;
                let mut text = String::new();
                let fields = doc.as_object().into_iter().flatten();
                for (_, value) in fields.filter(|(k, _)| columns.is_empty() || columns.contains(k))
                {
                    gather(value, &mut text);
                }
                visit(&format!("{task} row {}", row + 1), &text);
            }
        }
        return Ok(());
    }
    let table = Table::open(dataset_files(&input.artifact, &input.reference)?, &[])?;
    let chosen: Vec<String> = match columns {
        [] => table.columns().into_iter().map(str::to_owned).collect(),
        some => some.to_vec(),
    };
    for batch in table.scan(&chosen)? {
        let batch = batch?;
        for row in 0..batch.rows.num_rows() {
            let mut text = String::new();
            for column in batch.rows.columns() {
                gather(&serde_json::to_value(cell(column.as_ref(), row))?, &mut text);
            }
            visit(&batch.place(row), &text);
        }
    }
    Ok(())
}

/// All text of a value.
fn gather(value: &Value, out: &mut String) {
    match value {
        Value::String(text) => {
            out.push_str(text);
            out.push('\n');
        }
        Value::Array(items) => items.iter().for_each(|v| gather(v, out)),
        Value::Object(map) => map.values().for_each(|v| gather(v, out)),
        _ => {}
    }
}

/// Every metric on all rows and on those that were not seen.
fn clean_scores(side: &Side, seen: &HashSet<usize>) -> Result<Value> {
    let mut out = serde_json::Map::new();
    let Some(path) = side.samples() else { return Ok(Value::Null) };
    // Places of the rows of each task among all.
    let mut places: HashMap<String, Vec<usize>> = HashMap::new();
    let mut at = 0;
    for batch in batches(path)? {
        for row in 0..batch.num_rows() {
            places
                .entry(text_at(&batch, "task", row).unwrap_or_default().to_owned())
                .or_default()
                .push(at);
            at += 1;
        }
    }
    for metric in side.metrics() {
        let info = side.info(&metric)?;
        let task = metric.split('.').next().unwrap_or_default();
        let Some(places) = places.get(task) else { continue };
        let rows = side.rows(&metric)?;
        let clean: Vec<Sample> = rows
            .iter()
            .zip(places)
            .filter(|(_, place)| !seen.contains(place))
            .map(|(row, _)| row.sample.clone())
            .collect();
        let value = info.statistic.of(&clean);
        let value = value.is_finite().then_some(value);
        let all = side.values.get(&metric).copied().flatten();
        out.insert(metric, json!({ "all": all, "clean": value, "clean_rows": clean.len() }));
    }
    Ok(Value::Object(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_rows_and_long_runs_are_found_and_short_ones_are_not() {
        let long = "one two three four five six seven eight nine ten eleven twelve thirteen";
        let rows = [
            ("a", format!("Before. {long} after")),
            ("b", "A short row!".to_owned()),
            ("c", "one two three four five six seven".to_owned()),
            ("d", String::new()),
        ]
        .map(|(p, t)| (p.to_owned(), t));
        let mut watch = Watch::new(&rows, 13);
        watch.look("t1", &format!("so {long}, too"));
        watch.look("t2", "a SHORT, row");
        watch.look("t3", "one two three four");
        watch.look("t4", "");
        let found: Vec<_> =
            watch.hits.iter().map(|(i, h)| (*i, h.place.as_str(), h.exact)).collect();
        assert_eq!(found, [(0, "t1", false), (1, "t2", true)]);
        assert_eq!(watch.hits[&0].shared, long);
    }
}

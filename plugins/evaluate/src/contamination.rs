//! `contamination`: which evaluation rows the training has seen, as numbers and rows to look at.
//!
//! The comparison is that of the gate's rule `no_contamination`, without a verdict: it can be run
//! before there is anything to judge.

use lora_flow_core::{ArtifactKind, Error, Ports, Problem, Result, Task, TaskContext};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::gate::contamination::{NoContamination, ngram};

/// The seen rows, in the artifact.
pub const CONTAMINATION_FILE: &str = "contamination.json";

/// Rows shown in the task's report; the artifact has all.
const SHOWN: usize = 10;

/// Parameters of `contamination`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Contamination {
    /// Text columns of the training rows; all if left out.
    #[serde(default)]
    pub train_columns: Vec<String>,
    /// Text columns of the evaluation rows; all if left out.
    #[serde(default)]
    pub eval_columns: Vec<String>,
    /// Words in a row that count as copied.
    #[serde(default = "ngram")]
    pub ngram: usize,
}

impl Contamination {
    fn rule(&self) -> NoContamination {
        NoContamination {
            train: "train".into(),
            eval: "eval".into(),
            train_columns: self.train_columns.clone(),
            eval_columns: self.eval_columns.clone(),
            ngram: self.ngram,
            max_share: 0.0,
        }
    }
}

impl Task for Contamination {
    fn inputs(&self) -> Ports {
        use ArtifactKind::{Dataset, Metrics};
        Ports::none().required("train", Dataset, "the training rows").one_of(
            "eval",
            &[Dataset, Metrics],
            true,
            "the evaluation rows, or the results of `evaluate-tasks` on them",
        )
    }

    fn outputs(&self) -> Ports {
        Ports::none().required(
            "metrics",
            ArtifactKind::Metrics,
            "counts and share; `contamination.json` has every seen row, and the metrics on all rows \
             and on the clean ones",
        )
    }

    fn validate(&self) -> Vec<Problem> {
        self.rule().check("")
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let input = |name: &str| {
            let found = cx.many(name).first();
            found.ok_or_else(|| Error::new(format!("there is no input `{name}`")))
        };
        let found = self.rule().compare(input("train")?, input("eval")?)?.ok_or_else(|| {
            Error::new("there are no evaluation rows or no training rows, so nothing was compared")
                .with_hint("check `limit`, `where` and `split` of what made them")
        })?;
        cx.report(found.headline());
        for seen in found.seen.iter().take(SHOWN) {
            let how = if seen.exact { "whole" } else { "in part" };
            cx.report(format!("{} {how} in {}: {}", seen.row, seen.train_row, seen.shared));
        }
        cx.summary("seen", format!("{} of {} rows", found.seen.len(), found.eval_rows));
        let out = cx.output("metrics")?;
        out.write_json("metrics.json", &found.counts())?;
        out.write_json(CONTAMINATION_FILE, &json!({ "rows": found.seen, "scores": found.scores }))?;
        Ok(())
    }
}

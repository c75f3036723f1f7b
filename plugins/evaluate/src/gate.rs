//! `gate`: a verdict on metrics.
//!
//! Rules are expressions over metrics (`require`, `warn`) and named rules on top: paired tests of two
//! evaluations, budgets, contamination, parity of a merge. If one that must hold does not, what
//! depends on the gate does not run and the run exits with 3. A rule never passes on a metric that is
//! missing, not a finite number, or counted over nothing, and results that are not comparable are
//! refused with the reason.

use std::collections::BTreeMap;

use lora_flow_core::{
    ArtifactKind, Error, FileRef, NamedArtifact, Ports, Problem, Result, ResultExt, Task,
    TaskContext, nearest,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(crate) mod accepted;
mod budget;
pub(crate) mod contamination;
mod equivalent;
mod named;
mod paired;
pub(crate) mod side;

use crate::gate::accepted::{MaxRegression, accepted_name};
use crate::gate::budget::Budget;
use crate::gate::contamination::NoContamination;
use crate::gate::equivalent::MergeEquivalent;
use crate::gate::named::{Named, Outcome};
use crate::gate::paired::{Claim, Comparison, Question};
use crate::gate::side::Side;
use crate::rule::{self, Finding, Metrics};
use crate::short;

/// Parameters of `gate`. Every rule given must hold.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// Rules that must hold: expressions over `input.metric` that are true or false, such as
    /// `candidate.perplexity < 0.97 * baseline.perplexity`.
    #[serde(default)]
    pub require: Vec<String>,
    /// Rules that are reported when they do not hold, and stop nothing.
    #[serde(default)]
    pub warn: Vec<String>,
    /// The candidate is better than the baseline by more than the margin, by a paired test.
    #[serde(default)]
    pub improves: Vec<Comparison>,
    /// The candidate is worse than the baseline by less than the margin, by a paired test.
    #[serde(default)]
    pub not_worse: Vec<Comparison>,
    /// The same, of a general set: training on one thing has not cost another.
    #[serde(default)]
    pub no_forgetting: Vec<Comparison>,
    /// The candidate is worse than the accepted run by less than the margin, by a paired test.
    #[serde(default)]
    pub max_regression: Vec<MaxRegression>,
    /// File of the accepted run for `max_regression`, written by `lora-flow accept`.
    #[serde(default)]
    pub accepted: Option<String>,
    /// Limits on sizes, memory and speed.
    #[serde(default)]
    pub budget: Vec<Budget>,
    /// No evaluation row was seen in training.
    #[serde(default)]
    pub no_contamination: Vec<NoContamination>,
    /// The merged model answers as base and adapter do.
    #[serde(default)]
    pub merge_equivalent: Vec<MergeEquivalent>,
    /// What a rule does that has too few samples to tell.
    #[serde(default)]
    pub inconclusive: Inconclusive,
    /// Let an expression compare metrics that were measured on different data.
    #[serde(default)]
    pub allow_different_data: bool,
}

/// What too few samples lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Inconclusive {
    /// The gate says no.
    #[default]
    Block,
    /// A warning, and the gate goes by the other rules.
    Warn,
}

impl Task for Gate {
    fn inputs(&self) -> Ports {
        use ArtifactKind::{Adapter, Dataset, Files, Metrics, Model};
        Ports::none().any_name(&[Metrics, Adapter, Model, Dataset, Files])
    }

    fn outputs(&self) -> Ports {
        Ports::none().required(
            "verdict",
            ArtifactKind::Verdict,
            "`verdict.json`: each rule with every number, interval, test and row that decided",
        )
    }

    fn files(&self) -> Vec<FileRef> {
        let file = self.accepted.iter();
        file.map(|f| FileRef { pointer: "/accepted".into(), pattern: f.clone() }).collect()
    }

    fn validate(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.require.is_empty() && self.named() == 0 {
            let field = if self.warn.is_empty() { "" } else { "/warn" };
            problems.push(
                Problem::at(field, "the gate has no rule that must hold, so it checks nothing")
                    .with_hint("add one, such as `require: [ \"candidate.perplexity < baseline.perplexity\" ]`"),
            );
        }
        for (field, rules) in [("require", &self.require), ("warn", &self.warn)] {
            for (i, rule) in rules.iter().enumerate() {
                if let Err(message) = rule::check(rule) {
                    problems.push(Problem::at(format!("/{field}/{i}"), message));
                }
            }
        }
        for (field, rules) in self.comparisons() {
            for (i, rule) in rules.iter().enumerate() {
                problems.extend(paired::check(
                    &format!("/{field}/{i}"),
                    rule.margin,
                    rule.confidence,
                ));
            }
        }
        let each = |field: &str, i: usize| format!("/{field}/{i}");
        problems.extend(indexed(&self.max_regression, |i, r| r.check(&each("max_regression", i))));
        problems.extend(indexed(&self.budget, |i, r| r.check(&each("budget", i))));
        problems
            .extend(indexed(&self.no_contamination, |i, r| r.check(&each("no_contamination", i))));
        problems
            .extend(indexed(&self.merge_equivalent, |i, r| r.check(&each("merge_equivalent", i))));
        if !self.max_regression.is_empty() && self.accepted.is_none() {
            problems.push(
                Problem::at(
                    "/max_regression",
                    "`max_regression` needs `accepted`, the file to compare with",
                )
                .with_hint("`lora-flow accept RUN --file baselines/NAME.json` writes it"),
            );
        }
        problems
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let (mut inputs, mut sides) = (BTreeMap::new(), BTreeMap::new());
        let mut sources = serde_json::Map::new();
        for (name, artifacts) in cx.inputs() {
            let artifact = single(name, artifacts)?;
            let mut source = json!({
                "digest": artifact.artifact.digest,
                "kind": artifact.artifact.kind,
                "reference": artifact.reference,
            });
            if artifact.artifact.kind == ArtifactKind::Metrics {
                let side = Side::open(name, &artifact.artifact);
                let side = side.with_context(|| format!("input `{name}`"))?;
                source["data"] = json!(side.data());
                source["metrics"] = json!(side.values);
                let data = side.data().map(str::to_owned);
                inputs.insert(name.clone(), Metrics { values: side.values.clone(), data });
                sides.insert(name.clone(), side);
            }
            sources.insert(name.clone(), source);
        }
        if sources.is_empty() {
            return Err(Error::new("the gate has no inputs")
                .with_hint("name them as its rules do: `inputs: { candidate: scores }`"));
        }
        let judge = |rules: &[String]| -> Result<Vec<Finding>> {
            rules.iter().map(|r| rule::evaluate(r, &inputs, self.allow_different_data)).collect()
        };
        let (required, warned) = (judge(&self.require)?, judge(&self.warn)?);
        let named = self.judge_named(cx, &sides)?;
        self.tell(cx, &required, &warned, &named);

        let lines = |findings: &[Finding], field: &str, no: &str| -> Vec<Value> {
            let line = |(i, f): (usize, &Finding)| {
                json!({
                    "pointer": format!("/{field}/{i}"),
                    "kind": field,
                    "rule": f.rule,
                    "outcome": if f.passed { "pass" } else { no },
                    "found": found(f),
                    "details": { "left": f.left, "right": f.right, "values": f.values },
                })
            };
            findings.iter().enumerate().map(line).collect()
        };
        let mut rules = lines(&required, "require", "fail");
        rules.extend(lines(&warned, "warn", "warn"));
        for n in &named {
            let mut line = serde_json::to_value(n)?;
            line["kind"] = json!(n.pointer.split('/').nth(1));
            rules.push(line);
        }
        let failed: Vec<String> = required
            .iter()
            .filter(|f| !f.passed)
            .map(describe)
            .chain(
                named
                    .iter()
                    .filter(|n| self.blocks(n))
                    .map(|n| format!("{} ({})", n.rule, n.headline)),
            )
            .collect();
        let open = named.iter().any(|n| n.outcome == Outcome::Inconclusive);
        let refuted =
            required.iter().any(|f| !f.passed) || named.iter().any(|n| n.outcome == Outcome::Fail);
        let outcome = match (refuted, open) {
            (true, _) => "fail",
            (false, true) => "inconclusive",
            _ => "pass",
        };
        cx.output("verdict")?.write_json(
            "verdict.json",
            &json!({
                "passed": failed.is_empty(),
                "outcome": outcome,
                "inconclusive": self.inconclusive,
                "rules": rules,
                "require": required,
                "warn": warned,
                "inputs": sources,
            }),
        )?;
        if !failed.is_empty() {
            cx.deny(failed.join("; "));
        }
        Ok(())
    }
}

fn indexed<T>(rules: &[T], check: impl Fn(usize, &T) -> Vec<Problem>) -> Vec<Problem> {
    rules.iter().enumerate().flat_map(|(i, r)| check(i, r)).collect()
}

fn single<'a>(name: &str, artifacts: &'a [NamedArtifact]) -> Result<&'a NamedArtifact> {
    match artifacts {
        [one] => Ok(one),
        many => Err(Error::new(format!("input `{name}` has {} artifacts", many.len()))
            .with_hint("give each its own name")),
    }
}

impl Gate {
    fn comparisons(&self) -> [(&'static str, &Vec<Comparison>); 3] {
        [
            ("improves", &self.improves),
            ("not_worse", &self.not_worse),
            ("no_forgetting", &self.no_forgetting),
        ]
    }

    /// Number of named rules.
    fn named(&self) -> usize {
        self.comparisons().iter().map(|(_, rules)| rules.len()).sum::<usize>()
            + self.max_regression.len()
            + self.budget.len()
            + self.no_contamination.len()
            + self.merge_equivalent.len()
    }

    fn blocks(&self, named: &Named) -> bool {
        match named.outcome {
            Outcome::Pass => false,
            Outcome::Fail => true,
            Outcome::Inconclusive => self.inconclusive == Inconclusive::Block,
        }
    }

    fn judge_named(&self, cx: &TaskContext, sides: &BTreeMap<String, Side>) -> Result<Vec<Named>> {
        let unknown = |name: &str, what: &str, known: Vec<&str>| {
            let error = Error::new(format!("`{name}` is no input of the gate with {what}"));
            match nearest(name, known.iter().copied()) {
                Some(near) => error.with_hint(format!("did you mean `{near}`?")),
                None => error.with_hint(format!("there are {}", known.join(", "))),
            }
        };
        let side = |name: &str| {
            let known = || sides.keys().map(String::as_str).collect();
            sides.get(name).ok_or_else(|| unknown(name, "metrics", known()))
        };
        let input = |name: &str| {
            let known = || cx.input_names().collect();
            cx.many(name).first().ok_or_else(|| unknown(name, "anything to judge", known()))
        };
        let mut out = Vec::new();
        for (field, rules) in self.comparisons() {
            let claim = if field == "improves" { Claim::Improves } else { Claim::NotWorse };
            for (i, rule) in rules.iter().enumerate() {
                let question = Question {
                    claim,
                    metric: &rule.metric,
                    margin: rule.margin,
                    confidence: rule.confidence,
                    test: rule.test,
                    different_prompts: rule.different_prompts,
                };
                let found =
                    paired::judge(&question, side(&rule.candidate)?, side(&rule.baseline)?)?;
                let words = match claim {
                    Claim::Improves => "improves on",
                    Claim::NotWorse => "is not worse than",
                };
                let (c, b, m) = (&rule.candidate, &rule.baseline, short(rule.margin));
                let rule = format!("{field}: {c} {words} {b} in {}, margin {m}", rule.metric);
                out.push(found.at(format!("/{field}/{i}"), rule));
            }
        }
        for (i, rule) in self.max_regression.iter().enumerate() {
            let candidate = side(&rule.candidate)?;
            let reference = &input(&rule.candidate)?.reference;
            let name = rule.accepted_as.as_deref().unwrap_or(accepted_name(reference));
            let path = cx
                .files("/accepted")
                .first()
                .ok_or_else(|| Error::new("`accepted` names no file"))?;
            let accepted = accepted::read(path, name)?;
            let question = Question {
                claim: Claim::NotWorse,
                metric: &rule.metric,
                margin: rule.margin,
                confidence: rule.confidence,
                test: paired::Test::Auto,
                different_prompts: false,
            };
            let found = paired::judge(&question, candidate, &accepted)?;
            let (c, m) = (&rule.candidate, short(rule.margin));
            let rule = format!(
                "max_regression: {c} against the accepted run in {}, margin {m}",
                rule.metric
            );
            out.push(found.at(format!("/max_regression/{i}"), rule));
        }
        for (i, rule) in self.budget.iter().enumerate() {
            let found = rule.judge(input(&rule.of)?)?;
            out.push(found.at(format!("/budget/{i}"), format!("budget: {}", rule.rule())));
        }
        for (i, rule) in self.no_contamination.iter().enumerate() {
            let found = rule.judge(input(&rule.train)?, input(&rule.eval)?)?;
            let words = format!("no_contamination: {} holds no row of {}", rule.train, rule.eval);
            out.push(found.at(format!("/no_contamination/{i}"), words));
        }
        for (i, rule) in self.merge_equivalent.iter().enumerate() {
            let found = rule.judge(side(&rule.merged)?, side(&rule.adapted)?)?;
            let words =
                format!("merge_equivalent: {} says what {} says", rule.merged, rule.adapted);
            out.push(found.at(format!("/merge_equivalent/{i}"), words));
        }
        Ok(out)
    }

    /// Report, headlines and warnings.
    fn tell(
        &self,
        cx: &mut TaskContext,
        required: &[Finding],
        warned: &[Finding],
        named: &[Named],
    ) {
        let mut rows = vec![["result", "rule", "found"].map(str::to_owned)];
        for (findings, no) in [(required, "FAIL"), (warned, "warn")] {
            for f in findings {
                let result = if f.passed { "pass" } else { no };
                rows.push([result.to_owned(), f.rule.clone(), found(f)]);
            }
        }
        for n in named {
            let result = match (n.outcome, self.blocks(n)) {
                (Outcome::Pass, _) => "pass",
                (Outcome::Fail, _) => "FAIL",
                (Outcome::Inconclusive, true) => "OPEN",
                (Outcome::Inconclusive, false) => "open",
            };
            rows.push([result.to_owned(), n.rule.clone(), n.headline.clone()]);
        }
        cx.report(crate::text_table(&rows));
        let total = required.len() + named.len();
        let passed = required.iter().filter(|f| f.passed).count()
            + named.iter().filter(|n| n.outcome == Outcome::Pass).count();
        cx.summary("rules", format!("{passed} of {total} hold"));
        for (name, change) in required.iter().chain(warned).filter_map(change) {
            cx.summary(name, change);
        }
        for finding in warned.iter().filter(|f| !f.passed) {
            cx.warn(format!("does not hold: {}", describe(finding)));
        }
        for n in named.iter().filter(|n| n.outcome == Outcome::Inconclusive && !self.blocks(n)) {
            cx.warn(format!("not enough samples to tell: {} ({})", n.rule, n.headline));
        }
    }
}

/// What was found, by the sides of the comparison or by the metrics.
fn found(finding: &Finding) -> String {
    if let Some(reason) = &finding.reason {
        return reason.clone();
    }
    if let (Some(left), Some(right)) = (finding.left, finding.right) {
        return format!("{} against {}", short(left), short(right));
    }
    let values = finding.values.iter();
    let values = values.map(|(k, v)| format!("{k} = {}", v.map_or("null".to_owned(), short)));
    values.collect::<Vec<_>>().join(", ")
}

/// For a rule over one metric of two inputs, the one it names second being the standard: the name
/// of the first and `12.95 → 9.79 (−24.4 %)`.
fn change(finding: &Finding) -> Option<(String, String)> {
    let mut values: Vec<(&str, f64)> = Vec::new();
    for (reference, value) in &finding.values {
        values.push((reference, (*value)?));
    }
    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
    let words: Vec<&str> = finding.rule.split(|c| !is_part(c)).collect();
    values.sort_by_key(|(reference, _)| words.iter().position(|word| word == reference));
    let [(name, after), (standard, before)] = values[..] else { return None };
    let metric = |reference: &str| reference.rsplit_once('.').map(|(_, m)| m.to_owned());
    if metric(name) != metric(standard) || before == 0.0 {
        return None;
    }
    let percent = 100.0 * (after / before - 1.0);
    Some((name.to_owned(), format!("{} → {} ({percent:+.1} %)", short(before), short(after))))
}

fn describe(finding: &Finding) -> String {
    format!("`{}` ({})", finding.rule, found(finding))
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;

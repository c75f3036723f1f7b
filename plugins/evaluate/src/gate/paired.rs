//! Paired tests: is the candidate better, or not worse, than the baseline on the same rows?
//!
//! A metric that is right or wrong per row is tested by the exact McNemar test where the margin is
//! zero; everything else by the paired bootstrap with BCa bounds. Which one is fixed by the metric
//! and the margin, not by what it finds. A rule has three outcomes: the data show that it holds,
//! they show that it does not, or there are too few rows to tell.

use lora_flow_core::{Problem, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::gate::named::{Named, Outcome};
use crate::gate::side::{Row, Side, pair};
use crate::metric::{Sample, Statistic};
use crate::short;
use crate::stats::{bootstrap, mcnemar, normal};

/// Replicates of the paired bootstrap.
const REPLICATES: usize = 10_000;
/// Seed of its generator.
const SEED: u32 = 20_240_229;
/// Fewer rows than this are never enough for the bootstrap.
const FEWEST: usize = 10;
/// Chance of settling the question with the number of rows that is named.
const POWER: f64 = 0.8;
/// Rows listed in the verdict.
const SHOWN_ROWS: usize = 20;

/// A comparison of two evaluations on the same rows.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// The metric, as it stands in `metrics.json` (`faq.acc`, `perplexity`).
    pub metric: String,
    /// Input that is judged.
    #[serde(default = "candidate")]
    pub candidate: String,
    /// Input that it is compared with.
    #[serde(default = "baseline")]
    pub baseline: String,
    /// Difference that matters, in units of the metric: to be exceeded by `improves`, to be
    /// tolerated by the others.
    #[serde(default)]
    pub margin: f64,
    /// Confidence of the one-sided bound.
    #[serde(default = "confidence")]
    pub confidence: f64,
    /// Let the two be asked with different prompts, such as a base with examples and an adapter
    /// without; the rows must be the same nevertheless.
    #[serde(default)]
    pub different_prompts: bool,
    /// The test; `auto` takes McNemar's where the metric is right or wrong and the margin is 0.
    #[serde(default)]
    pub test: Test,
}

/// A paired test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Test {
    /// By metric and margin.
    #[default]
    Auto,
    /// The exact McNemar test, for a metric that is right or wrong and a margin of 0.
    Mcnemar,
    /// The paired bootstrap over rows.
    Bootstrap,
}

pub(crate) fn candidate() -> String {
    "candidate".into()
}

pub(crate) fn baseline() -> String {
    "baseline".into()
}

pub(crate) fn confidence() -> f64 {
    0.95
}

/// What has to be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// Better by more than the margin.
    Improves,
    /// Worse by less than the margin.
    NotWorse,
}

/// Problems of a margin and a confidence.
pub(crate) fn check(pointer: &str, margin: f64, confidence: f64) -> Vec<Problem> {
    let mut problems = Vec::new();
    if !(margin >= 0.0 && margin.is_finite()) {
        let message = format!("`margin` is {margin}, it must not be negative");
        let problem = Problem::at(format!("{pointer}/margin"), message);
        problems.push(problem.with_hint("the direction is that of the metric"));
    }
    if !(0.5..1.0).contains(&confidence) {
        let message = format!("`confidence` is {confidence}, it must be at least 0.5 and below 1");
        problems.push(Problem::at(format!("{pointer}/confidence"), message));
    }
    problems
}

/// The question asked of two sides.
pub(crate) struct Question<'a> {
    pub(crate) claim: Claim,
    pub(crate) metric: &'a str,
    pub(crate) margin: f64,
    pub(crate) confidence: f64,
    pub(crate) test: Test,
    pub(crate) different_prompts: bool,
}

/// Answers a question about two sides.
///
/// # Errors
/// When they cannot be compared.
pub(crate) fn judge(question: &Question<'_>, candidate: &Side, baseline: &Side) -> Result<Named> {
    let (info, rows, others) =
        pair(question.metric, candidate, baseline, question.different_prompts)?;
    let of = |rows: &[Row]| -> Vec<Sample> { rows.iter().map(|r| r.sample.clone()).collect() };
    let (a, b) = (of(&rows), of(&others));
    let statistic = info.statistic;
    let (after, before) = (statistic.of(&a), statistic.of(&b));
    // Both what the evaluation says and what its rows add up to: neither may be missing.
    for (side, value) in [(candidate, after), (baseline, before)] {
        let told = side.values.get(question.metric).copied().flatten();
        if told.is_none() || !value.is_finite() {
            let what = format!("`{}` of `{}` is not a finite number", question.metric, side.name);
            return Ok(Named::settled(false, what, json!({ "metric": question.metric })));
        }
    }
    let sign = if info.higher_is_better { 1.0 } else { -1.0 };
    let mut found = weigh(question, statistic, sign, &a, &b);
    found.headline =
        format!("{} {} → {}: {}", question.metric, short(before), short(after), found.headline);
    let details = &mut found.details;
    details["candidate"] = json!({ "input": candidate.name, "value": after });
    details["baseline"] = json!({ "input": baseline.name, "value": before });
    details["rows"] = deciding(statistic, sign, &rows, &others);
    Ok(found)
}

/// The test itself, on samples that are paired by their place.
fn weigh(
    question: &Question<'_>,
    statistic: Statistic,
    sign: f64,
    candidate: &[Sample],
    baseline: &[Sample],
) -> Named {
    let n = candidate.len();
    let (margin, confidence) = (question.margin, question.confidence);
    // What the oriented difference has to exceed.
    let threshold = if question.claim == Claim::Improves { margin } else { -margin };
    let mut details = json!({
        "metric": question.metric,
        "higher_is_better": sign > 0.0,
        "n": n,
        "margin": margin,
        "confidence": confidence,
    });
    let right_or_wrong = statistic == Statistic::Mean
        && candidate.iter().chain(baseline).all(|s| s[0] == 0.0 || s[0] == 1.0);
    let exact = match question.test {
        Test::Auto => right_or_wrong && margin == 0.0,
        Test::Mcnemar if !right_or_wrong || margin != 0.0 => {
            let reason = "McNemar's test needs a metric that is right or wrong and a margin of 0";
            return Named::unsure(reason.into(), details);
        }
        test => test == Test::Mcnemar,
    };
    let found = bootstrap::paired(statistic, candidate, baseline, REPLICATES, SEED);
    let Some(found) = found.filter(|_| n >= FEWEST || exact) else {
        return Named::unsure(format!("{n} rows are too few to tell"), details);
    };
    let alpha = 1.0 - confidence;
    let (lower, upper) = (found.bound(alpha), found.bound(confidence));
    // Oriented so that more is better.
    let (low, high) = if sign > 0.0 { (lower, upper) } else { (-upper, -lower) };
    let difference = sign * found.difference;
    details["difference"] = json!(found.difference);
    details["interval"] = json!([lower, upper]);
    details["stderr"] = json!(found.stderr);
    let mut shown = String::new();
    let (holds, fails) = if exact {
        let count = |want: (f64, f64)| {
            let pairs = candidate.iter().zip(baseline);
            pairs
                .filter(|(c, b)| (sign * c[0], sign * b[0]) == (sign * want.0, sign * want.1))
                .count()
        };
        let (up, down) = (count((1.0, 0.0)), count((0.0, 1.0)));
        let (gained, lost) = if sign > 0.0 { (up, down) } else { (down, up) };
        let p = mcnemar::p_greater(gained, lost);
        let p_worse = mcnemar::p_greater(lost, gained);
        details["test"] = json!("mcnemar_exact");
        details["gained"] = json!(gained);
        details["lost"] = json!(lost);
        details["p"] = json!(p);
        details["p_two_sided"] = json!(mcnemar::p_two_sided(gained, lost));
        shown = format!("gained {gained}, lost {lost}, McNemar p {p:.2e}");
        let same = gained + lost == 0 && question.claim == Claim::NotWorse;
        (p <= alpha || same, p_worse <= alpha)
    } else {
        details["test"] = json!("paired_bootstrap");
        details["replicates"] = json!(REPLICATES);
        details["seed"] = json!(SEED);
        details["p"] = json!(if sign > 0.0 {
            found.p_at_most(threshold)
        } else {
            1.0 - found.p_at_most(-threshold)
        });
        let holds = match question.claim {
            Claim::Improves => low > threshold,
            // A difference of exactly the margin is tolerated.
            Claim::NotWorse => low >= threshold,
        };
        (holds, high < threshold || (question.claim == Claim::Improves && high <= threshold))
    };
    let bounds = format!(
        "Δ {} [{}, {}] at {} %",
        signed(found.difference),
        signed(lower),
        signed(upper),
        (1e4 * confidence).round() / 100.0
    );
    let mut headline = if shown.is_empty() { bounds } else { format!("{bounds}; {shown}") };
    let z = normal::quantile(confidence) + normal::quantile(POWER);
    details["detectable_difference"] = json!(z * found.stderr);
    let outcome = match (holds, fails) {
        (true, _) => Outcome::Pass,
        (_, true) => Outcome::Fail,
        _ => {
            let needed = needed(n, z * found.stderr, (difference - threshold).abs());
            details["needed_samples"] = json!(needed);
            let much = match needed {
                Some(needed) => format!("about {needed} rows like these would settle it"),
                None => "no number of rows would settle a difference this small".to_owned(),
            };
            headline = format!("{headline}; {n} rows do not tell, {much}");
            Outcome::Inconclusive
        }
    };
    Named::new(outcome, headline, details)
}

/// Rows with which a difference of this distance from the threshold would be shown with a chance of
/// [`POWER`], by the normal approximation: n · ((z_confidence + z_power) · stderr / distance)².
fn needed(n: usize, reach: f64, distance: f64) -> Option<u64> {
    let factor = (reach / distance).powi(2);
    let rows = (n as f64 * factor).ceil();
    (rows.is_finite() && rows < 1e9).then(|| (rows as u64).max(n as u64 + 1))
}

fn signed(x: f64) -> String {
    let text = short(x);
    if x > 0.0 { format!("+{text}") } else { text }
}

/// The rows that count most against the candidate, and how many count for and against it.
fn deciding(statistic: Statistic, sign: f64, rows: &[Row], others: &[Row]) -> Value {
    // What a row adds: its own value, its loss per unit, or whether the class is right.
    let worth = |s: &Sample| match statistic {
        Statistic::Mean => sign * s[0],
        Statistic::F1 | Statistic::F1Macro | Statistic::Mcc => f64::from(u8::from(s[0] == s[1])),
        Statistic::Bleu | Statistic::Chrf => statistic.of(std::slice::from_ref(s)),
        _ => s[0],
    };
    let mut changed: Vec<(f64, &Row)> = rows
        .iter()
        .zip(others)
        .map(|(row, other)| (worth(&row.sample) - worth(&other.sample), row))
        .filter(|(change, _)| *change != 0.0)
        .collect();
    changed.sort_by(|a, b| a.0.total_cmp(&b.0));
    let worse = changed.iter().filter(|(change, _)| *change < 0.0).count();
    let list = changed.iter().take(worse.min(SHOWN_ROWS));
    let list: Vec<Value> = list
        .map(|(change, row)| json!({ "row": row.key, "change": change, "shown": row.shown }))
        .collect();
    json!({ "better": changed.len() - worse, "worse": worse, "worst": list })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(claim: Claim, margin: f64) -> Question<'static> {
        Question {
            claim,
            metric: "acc",
            margin,
            confidence: 0.95,
            test: Test::Auto,
            different_prompts: false,
        }
    }

    /// `gained` rows right only now, `lost` only before, `both` always.
    fn answers(gained: usize, lost: usize, both: usize) -> (Vec<Sample>, Vec<Sample>) {
        let mut pairs = vec![(1.0, 0.0); gained];
        pairs.extend(vec![(0.0, 1.0); lost]);
        pairs.extend(vec![(1.0, 1.0); both]);
        pairs.into_iter().map(|(a, b)| (vec![a], vec![b])).unzip()
    }

    fn outcome(claim: Claim, margin: f64, (a, b): (Vec<Sample>, Vec<Sample>)) -> Named {
        weigh(&question(claim, margin), Statistic::Mean, 1.0, &a, &b)
    }

    #[test]
    fn a_gain_is_shown_refuted_or_left_open() {
        let shown = outcome(Claim::Improves, 0.0, answers(20, 4, 76));
        assert_eq!(shown.outcome, Outcome::Pass);
        assert_eq!((&shown.details["gained"], &shown.details["lost"]), (&json!(20), &json!(4)));
        assert!((shown.details["p"].as_f64().unwrap() - 7.72e-4).abs() < 1e-5);
        assert_eq!(outcome(Claim::Improves, 0.0, answers(4, 20, 76)).outcome, Outcome::Fail);
        let open = outcome(Claim::Improves, 0.0, answers(6, 3, 91));
        assert_eq!(open.outcome, Outcome::Inconclusive);
        let needed = open.details["needed_samples"].as_u64().unwrap();
        assert!((400..800).contains(&needed), "{needed}");
        // The number holds its word: at that size the same shares are shown.
        let scale = needed as usize / 100 + 1;
        let more = outcome(Claim::Improves, 0.0, answers(6 * scale, 3 * scale, 91 * scale));
        assert_eq!(more.outcome, Outcome::Pass);
    }

    #[test]
    fn margins_go_by_the_bootstrap() {
        let near = || answers(10, 12, 378);
        let found = outcome(Claim::NotWorse, 0.05, near());
        assert_eq!(found.outcome, Outcome::Pass, "{}", found.headline);
        assert_eq!(found.details["test"], "paired_bootstrap");
        assert_eq!(outcome(Claim::NotWorse, 0.006, near()).outcome, Outcome::Inconclusive);
        assert_eq!(outcome(Claim::NotWorse, 0.05, answers(0, 60, 340)).outcome, Outcome::Fail);
        assert_eq!(outcome(Claim::Improves, 0.05, answers(60, 2, 338)).outcome, Outcome::Pass);
        assert_eq!(outcome(Claim::Improves, 0.05, answers(8, 2, 390)).outcome, Outcome::Fail);
        let equal = outcome(Claim::NotWorse, 0.0, answers(0, 0, 50));
        assert_eq!(equal.outcome, Outcome::Pass);
        assert_ne!(outcome(Claim::Improves, 0.0, answers(0, 0, 50)).outcome, Outcome::Pass);
        assert_ne!(outcome(Claim::NotWorse, 0.1, answers(0, 0, 5)).outcome, Outcome::Pass);
        assert_ne!(outcome(Claim::NotWorse, 0.1, (vec![], vec![])).outcome, Outcome::Pass);
    }

    #[test]
    fn lower_is_better_turns_the_signs() {
        // A loss that falls by about 0.2 a row.
        let before: Vec<Sample> =
            (0..60).map(|i| vec![-3.0 - 0.1 * f64::from(i % 7), 1.0]).collect();
        let after: Vec<Sample> = before
            .iter()
            .enumerate()
            .map(|(i, s)| vec![s[0] + 0.2 + 0.01 * (i % 5) as f64, 1.0])
            .collect();
        let judge = |claim, margin, a: &[Sample], b: &[Sample]| {
            weigh(&question(claim, margin), Statistic::WeightedLoss, -1.0, a, b)
        };
        let found = judge(Claim::Improves, 0.1, &after, &before);
        assert_eq!(found.outcome, Outcome::Pass, "{}", found.headline);
        assert!(found.details["difference"].as_f64().unwrap() < 0.0);
        assert!(found.details["p"].as_f64().unwrap() < 0.01);
        assert_eq!(judge(Claim::Improves, 0.0, &before, &after).outcome, Outcome::Fail);
        assert_eq!(judge(Claim::NotWorse, 0.3, &before, &after).outcome, Outcome::Pass);
        assert_eq!(judge(Claim::NotWorse, 0.1, &before, &after).outcome, Outcome::Fail);
    }
}

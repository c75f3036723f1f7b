//! The page itself: what [`super::data`] read, with its plots, put into the template.

use std::collections::BTreeMap;
use std::time::Duration;

use lora_flow_core::{ArtifactKind, Result, ResultExt};
use lora_flow_data::Example;
use lora_flow_evaluate::short;
use minijinja::value::{Serde, ValueKind};
use minijinja::{AutoEscape, Environment, Value as Shown};
use serde::Serialize;
use serde_json::Value;

use super::data::{DataView, EvaluationView, RunView, TaskView, TrainingView};
use super::plot::{Interval, Series, bars, intervals, lines};

const TEMPLATE: &str = include_str!("report.html");

/// Half the width of a 95 % interval in standard errors, for the normal distribution.
const Z95: f64 = 1.959_963_984_540_054;

/// Curves that training draws: name in the log, label, and the one that is drawn beside it.
const CURVES: [(&str, &str, Option<&str>); 5] = [
    ("loss", "loss", Some("eval_loss")),
    ("learning_rate", "learning rate", None),
    ("grad_norm", "gradient norm", None),
    ("tokens_per_second", "tokens/s", None),
    ("peak_rss_bytes", "peak memory, GB", None),
];

/// Rows of a contamination that the page lists; its JSON has all.
const OVERLAPS: usize = 50;

/// What the template is filled with.
#[derive(Debug, Serialize)]
struct Page<'a> {
    title: String,
    version: &'static str,
    /// Whether there are several runs, to be compared: then `params`, `metrics`, `overlays` show.
    many: bool,
    ids: Vec<&'a str>,
    params: Vec<Compared>,
    metrics: Vec<Compared>,
    overlays: Vec<Picture>,
    runs: Vec<PageRun<'a>>,
    overlaps: usize,
    json: String,
}

#[derive(Debug, Serialize)]
struct PageRun<'a> {
    run: &'a RunView,
    /// The DAG as a `data:` address: as an image its style stays its own.
    dag: String,
    /// Pixels that the DAG needs to be read; a narrower page scrolls it.
    dag_least: f64,
    verdicts: Vec<super::verdict::Shown>,
    evaluations: Vec<EvaluationTable>,
    training: Vec<PageTraining<'a>>,
    data: Vec<DataTable<'a>>,
    histograms: Vec<Picture>,
    examples: Vec<(&'a str, &'a Example)>,
    reports: Vec<&'a TaskView>,
}

#[derive(Debug, Serialize)]
struct PageTraining<'a> {
    task: &'a str,
    metrics: &'a serde_json::Map<String, Value>,
    pictures: Vec<Picture>,
}

impl<'a> PageRun<'a> {
    fn of(run: &'a RunView) -> Self {
        let training = run.training.iter().map(|t| PageTraining {
            task: &t.task,
            metrics: &t.metrics,
            pictures: curves(t),
        });
        Self {
            run,
            dag: data_address(&run.graph),
            dag_least: 0.7 * width(&run.graph),
            verdicts: run.verdicts.iter().map(super::verdict::view).collect(),
            evaluations: evaluation_tables(&run.evaluations),
            training: training.collect(),
            data: data_tables(&run.data),
            histograms: run.data.iter().filter_map(histogram).collect(),
            examples: run
                .data
                .iter()
                .filter_map(|d| Some((d.name.as_str(), &d.statistics.as_ref()?.example)))
                .collect(),
            reports: run.tasks.iter().filter(|t| !t.report.trim().is_empty()).collect(),
        }
    }
}

/// Data of one kind side by side: a row for each fact.
#[derive(Debug, Serialize)]
struct DataTable<'a> {
    kind: ArtifactKind,
    names: Vec<&'a str>,
    rows: Vec<Compared>,
}

/// A picture with its title.
#[derive(Debug, Serialize)]
struct Picture {
    title: String,
    svg: String,
}

/// Evaluations on the same data, side by side.
#[derive(Debug, Serialize)]
struct EvaluationTable {
    tasks: Vec<String>,
    rows: Vec<EvaluationRow>,
    pictures: Vec<Picture>,
}

#[derive(Debug, Serialize)]
struct EvaluationRow {
    metric: String,
    cells: Vec<Option<Cell>>,
    /// From the first to the last in per cent, where both are there, differ, and the first is not 0.
    change: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Cell {
    value: f64,
    /// Half the width of the 95 % interval.
    half: Option<f64>,
}

/// A row of the comparison of runs.
#[derive(Debug, Serialize)]
struct Compared {
    name: String,
    values: Vec<Option<Value>>,
}

/// The page for runs, in the order given.
///
/// # Errors
/// When the template fails, which is a mistake of this program.
pub fn render(runs: &[RunView]) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_filter("number", |v: f64| short(v));
    environment.add_filter("value", |v: Shown| shown(&v));
    environment.add_filter("percent", |v: f64| format!("{v:+.2} %"));
    environment.add_filter("bytes", |v: u64| crate::table::bytes(v));
    environment.add_filter("duration", |v: f64| {
        crate::table::duration(Duration::try_from_secs_f64(v).unwrap_or_default())
    });
    environment.add_template("report", TEMPLATE).context("the report's template")?;

    let many = runs.len() > 1;
    // Nothing in the JSON may look like markup to the element that it stands in.
    let json = serde_json::to_string(runs)?.replace('<', "\\u003c");
    let page = Page {
        title: runs.iter().map(|r| r.pipeline.as_str()).collect::<Vec<_>>().join(", "),
        version: env!("CARGO_PKG_VERSION"),
        many,
        ids: runs.iter().map(|r| r.id.as_str()).collect(),
        params: compared(runs, |r| r.params.clone(), false),
        metrics: compared(runs, metrics_of, true),
        overlays: overlays(runs),
        runs: runs.iter().map(PageRun::of).collect(),
        overlaps: OVERLAPS,
        json,
    };
    let template = environment.get_template("report").context("the report's template")?;
    template.render(Serde(&page)).context("the report's template")
}

/// The width that an SVG gives itself, in pixels.
fn width(svg: &str) -> f64 {
    let value = svg.split_once("width=\"").and_then(|(_, rest)| rest.split_once('"'));
    value.and_then(|(number, _)| number.parse().ok()).unwrap_or(0.0)
}

/// An SVG as the address of an image.
fn data_address(svg: &str) -> String {
    let mut out = String::from("data:image/svg+xml,");
    for byte in svg.bytes() {
        match byte {
            b'a'..=b'z'
            | b'A'..=b'Z'
            | b'0'..=b'9'
            | b'-'
            | b'.'
            | b'/'
            | b':'
            | b';'
            | b'='
            | b'('
            | b')'
            | b',' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

fn point(row: &serde_json::Map<String, Value>, name: &str) -> Option<(f64, f64)> {
    let value = row.get(name)?.as_f64()?;
    let value = if name == "peak_rss_bytes" { value / 1e9 } else { value };
    Some((row.get("step")?.as_f64()?, value))
}

fn series(training: &TrainingView, name: &str, label: &str) -> Series {
    let points = training.log.iter().filter_map(|row| point(row, name)).collect();
    Series { name: label.to_owned(), points }
}

/// The curves of one training run; those without points are left out.
fn curves(training: &TrainingView) -> Vec<Picture> {
    let picture = |&(name, label, beside): &(&str, &str, Option<&str>)| {
        let mut drawn = vec![series(training, name, name)];
        drawn.extend(beside.map(|b| series(training, b, b)).filter(|s| !s.points.is_empty()));
        let svg = lines("step", label, &drawn).ok()?;
        Some(Picture { title: label.to_owned(), svg })
    };
    CURVES.iter().filter_map(picture).collect()
}

/// The losses of all runs in one picture for each training task.
fn overlays(runs: &[RunView]) -> Vec<Picture> {
    let mut by_task: BTreeMap<&str, Vec<Series>> = BTreeMap::new();
    for run in runs {
        for training in &run.training {
            by_task.entry(&training.task).or_default().push(series(training, "loss", &run.id));
        }
    }
    let picture = |(task, drawn): (&str, Vec<Series>)| {
        let svg = lines("step", "loss", &drawn).ok()?;
        Some(Picture { title: format!("{task}: loss"), svg })
    };
    by_task.into_iter().filter_map(picture).collect()
}

/// One table for each data set that was evaluated on; evaluations that name none share one.
fn evaluation_tables(evaluations: &[EvaluationView]) -> Vec<EvaluationTable> {
    let mut groups: Vec<(Option<&str>, Vec<&EvaluationView>)> = Vec::new();
    for evaluation in evaluations {
        let data = evaluation.data.as_deref();
        match groups.iter_mut().find(|(d, _)| *d == data) {
            Some((_, group)) => group.push(evaluation),
            None => groups.push((data, vec![evaluation])),
        }
    }
    groups.into_iter().map(|(_, group)| evaluation_table(&group)).collect()
}

fn evaluation_table(group: &[&EvaluationView]) -> EvaluationTable {
    let mut names: Vec<&String> = group.iter().flat_map(|e| e.metrics.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let row = |name: &&String| {
        let cells: Vec<Option<Cell>> = group
            .iter()
            .map(|e| e.metrics.get(*name))
            .map(|m| m.map(|m| Cell { value: m.value, half: m.stderr.map(|s| s * Z95) }))
            .collect();
        let change = match (cells.first(), cells.last()) {
            (Some(Some(a)), Some(Some(b)))
                if cells.len() > 1 && a.value != 0.0 && a.value != b.value =>
            {
                Some((b.value - a.value) / a.value.abs() * 100.0)
            }
            _ => None,
        };
        EvaluationRow { metric: (*name).clone(), cells, change }
    };
    let rows: Vec<EvaluationRow> = names.iter().map(row).collect();
    let picture = |row: &EvaluationRow| {
        if !row.cells.iter().flatten().any(|cell| cell.half.is_some()) {
            return None;
        }
        let drawn: Vec<Interval> = group
            .iter()
            .zip(&row.cells)
            .filter_map(|(e, cell)| {
                let cell = cell.as_ref()?;
                Some(Interval { name: e.task.clone(), value: cell.value, half: cell.half })
            })
            .collect();
        let svg = intervals(&row.metric, &drawn).ok()?;
        Some(Picture { title: format!("{}, with 95 % intervals", row.metric), svg })
    };
    EvaluationTable {
        tasks: group.iter().map(|e| e.task.clone()).collect(),
        pictures: rows.iter().filter_map(picture).collect(),
        rows,
    }
}

/// Digests and the types of columns are left out: lineage and the tasks' reports have them.
fn data_tables(data: &[DataView]) -> Vec<DataTable<'_>> {
    [ArtifactKind::Dataset, ArtifactKind::Tokens]
        .into_iter()
        .filter_map(|kind| {
            let group: Vec<&DataView> = data.iter().filter(|d| d.kind == kind).collect();
            let simple = |name: &&String| {
                let value = group.iter().find_map(|d| d.facts.get(*name));
                !name.ends_with("_digest") && value.is_some_and(|v| !v.is_object() && !v.is_array())
            };
            let length = |d: &DataView, i: usize| {
                let (name, length) = d.statistics.as_ref()?.lengths.get(i)?;
                Some((format!("length, {name}"), Value::from(*length)))
            };
            let mut facts: Vec<&String> = group.iter().flat_map(|d| d.facts.keys()).collect();
            facts.sort_unstable();
            facts.dedup();
            let row = |name: &String| Compared {
                name: name.clone(),
                values: group.iter().map(|d| d.facts.get(name).cloned()).collect(),
            };
            let mut rows: Vec<Compared> = facts.into_iter().filter(simple).map(row).collect();
            rows.extend((0..).map_while(|i| {
                let (name, _) = group.iter().find_map(|d| length(d, i))?;
                let values = group.iter().map(|d| length(d, i).map(|(_, v)| v)).collect();
                Some(Compared { name, values })
            }));
            let names = group.iter().map(|d| d.name.as_str()).collect();
            (!rows.is_empty()).then_some(DataTable { kind, names, rows })
        })
        .collect()
}

/// How long the documents of tokens are.
fn histogram(data: &DataView) -> Option<Picture> {
    let drawn = &data.statistics.as_ref()?.histogram;
    let drawn: Vec<_> = drawn.iter().map(|b| (b.from, b.to, b.documents)).collect();
    let svg = bars("tokens of a document", "documents", &drawn).ok()?;
    Some(Picture { title: format!("{}: lengths", data.name), svg })
}

fn metrics_of(run: &RunView) -> BTreeMap<String, Value> {
    let evaluated = run.evaluations.iter().flat_map(|e| {
        e.metrics.iter().map(|(name, m)| (format!("{}.{name}", e.task), Value::from(m.value)))
    });
    let trained = run.training.iter().flat_map(|t| {
        let numbers = t.metrics.iter().filter(|(_, v)| v.is_number());
        numbers.map(|(name, v)| (format!("{}.{name}", t.task), v.clone()))
    });
    let overlapping = run
        .contamination
        .iter()
        .flat_map(|c| c.metrics.iter().map(|(name, v)| (format!("{}.{name}", c.task), v.clone())));
    evaluated.chain(trained).chain(overlapping).collect()
}

/// What the runs have under each name; without `all`, only where they differ.
fn compared(
    runs: &[RunView],
    of: impl Fn(&RunView) -> BTreeMap<String, Value>,
    all: bool,
) -> Vec<Compared> {
    let sides: Vec<_> = runs.iter().map(of).collect();
    let mut names: Vec<&String> = sides.iter().flat_map(BTreeMap::keys).collect();
    names.sort_unstable();
    names.dedup();
    let row = |name: &&String| Compared {
        name: (*name).clone(),
        values: sides.iter().map(|side| side.get(*name).cloned()).collect(),
    };
    let differs = |row: &Compared| row.values.windows(2).any(|pair| pair[0] != pair[1]);
    names.iter().map(row).filter(|row| all || differs(row)).collect()
}

/// Any value of a JSON file as a cell of a table.
fn shown(value: &Shown) -> String {
    match f64::try_from(value.clone()) {
        Ok(v) if value.is_number() => short(v),
        _ if value.is_none() || value.is_undefined() => "–".to_owned(),
        _ if value.kind() == ValueKind::Bool => {
            if value.is_true() { "yes" } else { "no" }.to_owned()
        }
        _ => value.to_string(),
    }
}

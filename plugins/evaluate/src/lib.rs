//! Task kinds evaluate, evaluate-tasks and gate.

mod contamination;
mod evaluate;
mod gate;
mod metric;
mod rule;
mod stats;
mod tasks;

use lora_flow_core::{TaskKind, kind};

pub use contamination::{CONTAMINATION_FILE, Contamination};
pub use evaluate::Evaluate;
pub use gate::Gate;
pub use gate::accepted::{accepted_entry, accepted_file, accepted_name};
pub use tasks::{AnsweredSample, EvaluateTasks, answered_samples};

/// The task kinds of this crate.
pub const TASKS: &[TaskKind] = &[
    kind::<Evaluate>("evaluate", 3, "perplexity of a model, with or without an adapter, on tokens"),
    kind::<EvaluateTasks>(
        "evaluate-tasks",
        2,
        "task files of lm-evaluation-harness on one or more models: metrics, errors, samples",
    ),
    kind::<Contamination>(
        "contamination",
        1,
        "which evaluation rows the training rows hold, whole or in long runs of words",
    ),
    kind::<Gate>(
        "gate",
        3,
        "a verdict by rules and paired tests; what depends on it runs only if it passes",
    ),
];

/// Rows of cells in columns as wide as needed, the last one ragged.
pub(crate) fn text_table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |i: usize| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// A number with as many digits as people compare by: whole ones as they are, others with five.
pub fn short(x: f64) -> String {
    let size = x.abs();
    if x == x.trunc() && size < 1e15 {
        format!("{x}")
    } else if (1e-3..1e6).contains(&size) {
        let decimals = (4 - size.log10().floor() as i32).clamp(0, 7) as usize;
        format!("{x:.decimals$}")
    } else {
        format!("{x:.4e}")
    }
}

//! Task kinds merge, combine and compare.

mod combine;
mod compare;
mod merge;
mod proof;
#[cfg(test)]
mod tests;

use lora_flow_core::{TaskKind, kind};

pub use combine::Combine;
pub use compare::Compare;
pub use merge::Merge;

/// The task kinds of this crate.
pub const TASKS: &[TaskKind] = &[
    kind::<Merge>("merge", 1, "the adapter merged into the model's weights, with proof"),
    kind::<Combine>("combine", 1, "several adapters of one base as one, defined on what they do"),
    kind::<Compare>("compare", 1, "metrics of several runs side by side"),
];

//! Task kind merge.

mod merge;
mod proof;
#[cfg(test)]
mod tests;

use lora_flow_core::{TaskKind, kind};

pub use merge::Merge;

/// The task kinds of this crate.
pub const TASKS: &[TaskKind] =
    &[kind::<Merge>("merge", 1, "the adapter merged into the model's weights, with proof")];

//! Task kinds evaluate and gate.

mod evaluate;
mod gate;
mod rule;

use lora_flow_core::{TaskKind, kind};

pub use evaluate::Evaluate;
pub use gate::Gate;

/// The task kinds of this crate.
pub const TASKS: &[TaskKind] = &[
    kind::<Evaluate>("evaluate", 2, "perplexity of a model, with or without an adapter, on tokens"),
    kind::<Gate>(
        "gate",
        1,
        "a verdict on metrics by rules; what depends on it runs only if it passes",
    ),
];

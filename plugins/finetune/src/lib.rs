//! Task kinds model, lora-inject and train.

mod lora_inject;
mod model;
#[cfg(test)]
mod tests;
mod train;

use lora_flow_core::{TaskKind, kind};

pub use lora_inject::LoraInject;
pub use model::Model;
pub use train::Train;

/// The task kinds of this crate.
pub const TASKS: &[TaskKind] = &[
    kind::<Model>("model", 1, "a base model from a GGUF file or a Hugging Face folder, checked"),
    kind::<LoraInject>("lora-inject", 1, "a fresh LoRA adapter for a model"),
    kind::<Train>("train", 4, "an adapter, or a whole model, trained on tokens"),
];

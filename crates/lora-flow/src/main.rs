//! lora-flow: LoRA fine-tuning as a declarative pipeline.
//!
//! This crate is the binary alone: arguments, commands, and how errors and progress look. What
//! runs lives in `lora-flow-pipeline` (the engine) and `plugins/*` (the task kinds), and the two
//! meet in [`BUILTIN`].

#[macro_use]
mod out;

mod args;
mod commands;
mod memory;
mod progress;
mod report;
mod table;
mod ui;

use clap::Parser;
use lora_flow_core::TaskKind;

/// The one list of built-in task kinds.
pub static BUILTIN: &[&[TaskKind]] = &[
    lora_flow_dataset::TASKS,
    lora_flow_finetune::TASKS,
    lora_flow_evaluate::TASKS,
    lora_flow_export::TASKS,
];

fn main() {
    memory::keep_freed_blocks();
    let args = args::Args::parse();
    ui::init(&args.global);
    let code = commands::dispatch(args).unwrap_or_else(|failure| failure.render());
    std::process::exit(code);
}

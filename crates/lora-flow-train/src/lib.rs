//! Training of LoRA adapters, or of all weights: the loop, the schedule, AdamW, checkpoints, and the loss over a set
//! of sequences.
//!
//! Everything is typed and knows nothing of YAML or of the engine; a caller gives a decoder, an
//! adapter, sequences, a [`TrainConfig`] in Hugging Face's words, a folder for checkpoints, and a
//! reporter. On the CPU the same seed gives the same bytes, whatever the number of threads, and a
//! run that was killed and resumed gives those of an uninterrupted one.

mod checkpoint;
mod config;
mod device;
mod evaluate;
mod learner;
mod log;
mod lr_range;
mod memory;
mod optimizer;
mod order;
pub mod preflight;
mod schedule;
mod sequences;
mod tensorboard;
mod trainer;
mod watchdog;

pub use config::{
    AUTO, LrSchedulerKwargs, LrSchedulerType, Method, OnSpike, ReportTo, TrainConfig, WsdDecay,
};
pub use device::{open_device, with_threads};
pub use evaluate::{Budget, DocumentLoss, MeanLoss, document_losses, mean_loss};
pub use learner::Learner;
pub use log::cpu_seconds;
pub use lr_range::RangePoint;
pub use memory::{available_bytes, peak_rss_bytes, reset_peak_rss, rss_bytes};
pub use optimizer::{AdamW, AdamWSettings, clip_grad_norm};
pub use order::{DataOrder, Steps};
pub use schedule::Schedule;
pub use sequences::{Sequence, Sequences};
pub use tensorboard::{EventFile, FOLDER as TENSORBOARD_FOLDER};
pub use trainer::{Outcome, Run, train};

/// Name of the log of a training run in its checkpoint folder.
pub const LOG_FILE: &str = "log.jsonl";
/// Name of the curve of `learning_rate: auto` there.
pub const LR_RANGE_FILE: &str = "lr_range.json";

//! Training of LoRA adapters: the loop, the schedule, AdamW, checkpoints, and the loss over a set
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
mod optimizer;
mod order;
mod schedule;
mod sequences;
mod trainer;

pub use config::{LrSchedulerKwargs, LrSchedulerType, TrainConfig, WsdDecay};
pub use device::{open_device, with_threads};
pub use evaluate::{Budget, DocumentLoss, MeanLoss, document_losses, mean_loss};
pub use learner::Learner;
pub use log::{cpu_seconds, peak_rss_bytes};
pub use optimizer::{AdamW, AdamWSettings, clip_grad_norm};
pub use order::{DataOrder, Steps};
pub use schedule::Schedule;
pub use sequences::{Sequence, Sequences};
pub use trainer::{Outcome, Run, train};

/// Name of the log of a training run in its checkpoint folder.
pub const LOG_FILE: &str = "log.jsonl";

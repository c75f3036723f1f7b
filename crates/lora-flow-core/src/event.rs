//! What a running task tells the outside: progress, log lines, metrics.

use serde::{Deserialize, Serialize};

/// Severity of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Detail for `--verbose`.
    Debug,
    /// What a user wants to know.
    Info,
    /// Something that may be a mistake.
    Warn,
    /// Something that failed.
    Error,
}

/// How far a task is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Units done.
    pub done: u64,
    /// Units in all, when known.
    pub total: Option<u64>,
    /// Name of the unit: `step`, `row`, `byte`, …
    pub unit: String,
    /// A short text beside the bar (`loss 2.31 · 240 tok/s`).
    pub message: String,
}

/// One event of a running task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// How far the task is.
    Progress(Progress),
    /// A line for the log.
    Log {
        /// Severity.
        level: LogLevel,
        /// One line of text.
        message: String,
    },
    /// A number over time.
    Metric {
        /// Name, such as `train/loss`.
        name: String,
        /// Step it belongs to.
        step: u64,
        /// Its value.
        value: f64,
    },
}

/// Where a task's events go; one per running task.
pub trait Reporter: Send + Sync {
    /// Takes one event.
    fn event(&self, event: Event);
}

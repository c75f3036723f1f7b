//! What the engine is told: one JSON object per line on standard output.

use std::fmt::Display;
use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::PluginError;

/// Progress is sent at most this often: a loop may report each row without cost.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Severity of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Detail, shown with `--verbose`.
    Debug,
    /// What a user wants to know.
    Info,
    /// Something that may be a mistake.
    Warn,
    /// Something that failed.
    Error,
}

/// The stream of events to the engine.
pub struct Events {
    out: Box<dyn Write + Send>,
    closed: bool,
    last_progress: Option<Instant>,
}

impl Events {
    pub(crate) fn new(out: impl Write + Send + 'static) -> Self {
        Self { out: Box::new(out), closed: false, last_progress: None }
    }

    /// Says how far the task is: `done` of `total` (when known) of a `unit` (`file`, `row`,
    /// `byte`), with a short text beside the bar.
    pub fn progress(&mut self, done: u64, total: Option<u64>, unit: &str, message: impl Display) {
        let due = self.last_progress.is_none_or(|last| last.elapsed() >= PROGRESS_INTERVAL);
        if due || Some(done) == total {
            self.last_progress = Some(Instant::now());
            let message = message.to_string();
            self.send(&json!({ "event": "progress", "done": done, "total": total, "unit": unit, "message": message }));
        }
    }

    /// Writes a line to the task's log.
    pub fn log(&mut self, level: Level, message: impl Display) {
        let level = match level {
            Level::Debug => "debug",
            Level::Info => "info",
            Level::Warn => "warn",
            Level::Error => "error",
        };
        self.send(&json!({ "event": "log", "level": level, "message": message.to_string() }));
    }

    /// Writes a line to the task's log.
    pub fn info(&mut self, message: impl Display) {
        self.log(Level::Info, message);
    }

    /// Writes a warning to the task's log and the console.
    pub fn warn(&mut self, message: impl Display) {
        self.log(Level::Warn, message);
    }

    /// Reports a number over time. JSON has no NaN and no infinity: such a value becomes a
    /// warning instead.
    pub fn metric(&mut self, name: &str, step: u64, value: f64) {
        if value.is_finite() {
            self.send(&json!({ "event": "metric", "name": name, "step": step, "value": value }));
        } else {
            self.warn(format_args!("metric `{name}` is {value} at step {step}"));
        }
    }

    /// Adds a headline to the final table of a run.
    pub fn summary(&mut self, name: &str, value: impl Display) {
        self.send(&json!({ "event": "summary", "name": name, "value": value.to_string() }));
    }

    /// Adds text (a table, an example) that is printed when the task ends and kept with it.
    pub fn report(&mut self, text: impl Display) {
        self.send(&json!({ "event": "report", "text": text.to_string() }));
    }

    /// Attaches small facts to an output artifact; they enter its digest.
    pub fn meta(&mut self, output: &str, value: Value) {
        self.send(&json!({ "event": "meta", "output": output, "value": value }));
    }

    /// Whether the engine no longer listens. A long task may stop then.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    pub(crate) fn done(&mut self) {
        self.send(&json!({ "event": "done" }));
    }

    pub(crate) fn error(&mut self, error: &PluginError) {
        let mut event = json!({ "event": "error", "message": error.message() });
        if let Some(hint) = error.hint() {
            event["hint"] = json!(hint);
        }
        self.send(&event);
    }

    fn send(&mut self, event: &Value) {
        // One write per line: lines of several threads' events cannot interleave.
        let line = format!("{event}\n");
        let written = self.out.write_all(line.as_bytes()).and_then(|()| self.out.flush());
        self.closed |= written.is_err();
    }
}

//! A task's events: to its log and its metrics file, and on to the observer.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use lora_flow_core::{Event, LogLevel, Reporter};
use serde_json::json;

use super::Observer;
use crate::record::RunFolder;

/// Takes the events of one executing task. Its files are made when there is something to write;
/// that they cannot be written stops no task.
pub(super) struct TaskReporter {
    id: String,
    observer: Arc<dyn Observer>,
    log: Mutex<LazyFile>,
    metrics: Mutex<LazyFile>,
}

impl TaskReporter {
    pub(super) fn new(id: &str, observer: Arc<dyn Observer>, folder: &RunFolder) -> Self {
        Self {
            id: id.to_owned(),
            observer,
            log: Mutex::new(LazyFile::new(folder.log(id))),
            metrics: Mutex::new(LazyFile::new(folder.metrics(id))),
        }
    }

    /// A line for the log alone.
    pub(super) fn note(&self, level: LogLevel, message: &str) {
        let level = match level {
            LogLevel::Debug => "DEBUG",
            LogLevel::Info => "INFO ",
            LogLevel::Warn => "WARN ",
            LogLevel::Error => "ERROR",
        };
        let time = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string();
        let mut text = String::new();
        for line in message.lines() {
            text.push_str(&format!("{time} {level} {line}\n"));
        }
        self.log.lock().unwrap_or_else(PoisonError::into_inner).append(&text);
    }

    /// A line for the log and the observer.
    pub(super) fn tell(&self, level: LogLevel, message: impl Into<String>) {
        self.event(Event::Log { level, message: message.into() });
    }
}

impl Reporter for TaskReporter {
    fn event(&self, event: Event) {
        match &event {
            Event::Progress(_) => {}
            Event::Log { level, message } => self.note(*level, message),
            Event::Metric { name, step, value } => {
                // JSON has no NaN; it becomes `null`.
                let line = format!("{}\n", json!({ "name": name, "step": step, "value": value }));
                self.metrics.lock().unwrap_or_else(PoisonError::into_inner).append(&line);
            }
        }
        self.observer.task_event(&self.id, &event);
    }
}

/// A file that is made with its first line.
struct LazyFile {
    path: PathBuf,
    file: Option<File>,
    failed: bool,
}

impl LazyFile {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None, failed: false }
    }

    /// Appends whole lines, in one write, so that they can be followed while the task runs.
    fn append(&mut self, text: &str) {
        if self.failed {
            return;
        }
        let opened = match &mut self.file {
            Some(file) => Ok(file),
            None => create(&self.path).map(|file| self.file.insert(file)),
        };
        if let Err(e) = opened.and_then(|file| file.write_all(text.as_bytes())) {
            self.failed = true;
            tracing::warn!("cannot write `{}`: {e}", self.path.display());
        }
    }
}

fn create(path: &Path) -> std::io::Result<File> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    File::options().append(true).create(true).open(path)
}

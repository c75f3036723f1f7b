//! A task's events: to its log and its metrics file, and on to the observer.

use std::borrow::Cow;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lora_flow_core::{Event, LogLevel, Progress, Reporter};
use serde_json::json;

use super::Observer;
use crate::record::RunFolder;

/// Bytes that a task's log, or its metrics, may have. A task that writes without end must not fill
/// the disk.
const LONGEST_FILE: usize = 256 << 20;

/// Progress is told at most this often; nobody sees more.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(20);

/// Takes the events of one executing task. Its files are made when there is something to write;
/// that they cannot be written stops no task.
pub(super) struct TaskReporter {
    id: String,
    observer: Arc<dyn Observer>,
    log: Mutex<LazyFile>,
    metrics: Mutex<LazyFile>,
    /// When progress was last told, and whether that was the end of it.
    told: Mutex<Option<(Instant, bool)>>,
}

impl TaskReporter {
    pub(super) fn new(id: &str, observer: Arc<dyn Observer>, folder: &RunFolder) -> Self {
        Self {
            id: id.to_owned(),
            observer,
            log: Mutex::new(LazyFile::new(folder.log(id), LONGEST_FILE)),
            metrics: Mutex::new(LazyFile::new(folder.metrics(id), LONGEST_FILE)),
            told: Mutex::default(),
        }
    }

    /// Whether progress is worth telling: it is the end, or long enough after the last.
    fn is_due(&self, progress: &Progress) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let is_end = progress.total == Some(progress.done);
        let due = told.is_none_or(|(when, was_end)| {
            when.elapsed() >= PROGRESS_INTERVAL || (is_end && !was_end)
        });
        if due {
            *told = Some((Instant::now(), is_end));
        }
        due
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
        for line in printable(message).lines() {
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
    fn event(&self, mut event: Event) {
        match &mut event {
            Event::Progress(progress) => {
                if !self.is_due(progress) {
                    return;
                }
                for text in [&mut progress.unit, &mut progress.message] {
                    if let Cow::Owned(safe) = printable(text) {
                        *text = safe;
                    }
                }
            }
            Event::Log { level, message } => {
                if let Cow::Owned(safe) = printable(message) {
                    *message = safe;
                }
                self.note(*level, message);
            }
            Event::Metric { name, step, value } => {
                // JSON has no NaN; it becomes `null`.
                let line = format!("{}\n", json!({ "name": name, "step": step, "value": value }));
                self.metrics.lock().unwrap_or_else(PoisonError::into_inner).append(&line);
            }
        }
        self.observer.task_event(&self.id, &event);
    }
}

/// Text that a terminal only shows. What it would obey (escape sequences, and characters that turn
/// the direction of writing) is spelt out: a task's words may be a stranger's.
pub(super) fn printable(text: &str) -> Cow<'_, str> {
    let obeyed = |c: char| {
        (c.is_control() && !matches!(c, '\n' | '\t'))
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(obeyed) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match obeyed(c) {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out.into()
}

/// A file that is made with its first line.
struct LazyFile {
    path: PathBuf,
    file: Option<File>,
    failed: bool,
    /// Bytes that it may still get.
    room: usize,
}

impl LazyFile {
    fn new(path: PathBuf, room: usize) -> Self {
        Self { path, file: None, failed: false, room }
    }

    /// Appends whole lines, in one write, so that they can be followed while the task runs.
    fn append(&mut self, text: &str) {
        if self.failed {
            return;
        }
        let Some(room) = self.room.checked_sub(text.len()) else {
            self.failed = true;
            tracing::warn!("`{}` is full: what follows is not kept", self.path.display());
            return;
        };
        self.room = room;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_spelt_out() {
        assert_eq!(printable("50 % é\t日本\n"), "50 % é\t日本\n");
        assert!(matches!(printable("plain"), Cow::Borrowed(_)));
        assert_eq!(
            printable("\u{1b}]0;title\u{7} a\rb \u{9b}2J \u{202e}txt.exe"),
            "\\u{1b}]0;title\\u{7} a\\rb \\u{9b}2J \\u{202e}txt.exe"
        );
    }

    #[test]
    fn a_file_takes_no_more_than_it_may() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = LazyFile::new(dir.path().join("logs/a"), 10);
        for _ in 0..5 {
            file.append("1234\n");
        }
        assert_eq!(std::fs::read_to_string(dir.path().join("logs/a")).unwrap(), "1234\n1234\n");
    }
}

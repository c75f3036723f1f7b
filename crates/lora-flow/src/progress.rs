//! A run as a person watches it: bars on a terminal, plain lines elsewhere, JSON for machines.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use lora_flow_core::{Event, LogLevel, Progress};
use lora_flow_pipeline::{Observer, Status, TaskOutcome};
use serde_json::json;

use crate::args::LogFormat;
use crate::table::duration;
use crate::ui;

/// Plain output repeats a task's progress at most this often.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// The observer for the output format the user chose. `plain` has no bars even on a terminal.
pub fn observer(plain: bool) -> Arc<dyn Observer> {
    let global = ui::global();
    match global.log_format {
        LogFormat::Json => Arc::new(Json),
        LogFormat::Text => Arc::new(Text::new(global.quiet, global.verbose, plain)),
    }
}

/// One JSON object per line on stderr.
struct Json;

impl Observer for Json {
    fn task_started(&self, id: &str) {
        eprintln!("{}", json!({ "event": "started", "task": id }));
    }

    fn task_event(&self, id: &str, event: &Event) {
        let mut line = serde_json::to_value(event).unwrap_or_default();
        if let Some(object) = line.as_object_mut() {
            object.insert("task".to_owned(), id.into());
        }
        eprintln!("{line}");
    }

    fn task_finished(&self, _id: &str, outcome: &TaskOutcome) {
        let mut line = serde_json::to_value(outcome).unwrap_or_default();
        if let Some(object) = line.as_object_mut() {
            object.insert("event".to_owned(), "finished".into());
        }
        eprintln!("{line}");
    }
}

/// Bars where stderr is a terminal, lines where it is not.
struct Text {
    quiet: bool,
    verbose: bool,
    bars: MultiProgress,
    is_terminal: bool,
    running: Mutex<HashMap<String, Running>>,
}

struct Running {
    bar: ProgressBar,
    has_total: bool,
    started: Instant,
    last_line: Instant,
}

impl Text {
    fn new(quiet: bool, verbose: bool, plain: bool) -> Self {
        let is_terminal = console::Term::stderr().is_term() && !quiet && !plain;
        let target =
            if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self {
            quiet,
            verbose,
            bars: MultiProgress::with_draw_target(target),
            is_terminal,
            running: Mutex::default(),
        }
    }

    fn running(&self) -> MutexGuard<'_, HashMap<String, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line above the bars.
    fn line(&self, text: &str) {
        if self.is_terminal {
            let _ = self.bars.println(text);
        } else {
            eprintln!("{text}");
        }
    }

    fn progress(&self, id: &str, progress: &Progress) {
        let mut running = self.running();
        let Some(task) = running.get_mut(id) else { return };
        if self.is_terminal {
            if let Some(total) = progress.total {
                if !task.has_total {
                    task.bar.set_style(bar_style());
                    task.bar.reset_eta();
                    task.has_total = true;
                }
                task.bar.set_length(total);
            }
            task.bar.set_position(progress.done);
            task.bar.set_message(format!("{} {}", plural(&progress.unit), progress.message));
        } else if !self.quiet && task.last_line.elapsed() >= PLAIN_INTERVAL {
            task.last_line = Instant::now();
            eprintln!("{id}: {}", plain_progress(progress, task.started.elapsed()));
        }
    }
}

impl Observer for Text {
    fn task_started(&self, id: &str) {
        let bar = self.bars.add(ProgressBar::new_spinner().with_style(spinner_style()));
        bar.set_prefix(id.to_owned());
        if self.is_terminal {
            bar.enable_steady_tick(Duration::from_millis(120));
        } else if !self.quiet {
            eprintln!("{id}: started");
        }
        let now = Instant::now();
        self.running()
            .insert(id.to_owned(), Running { bar, has_total: false, started: now, last_line: now });
    }

    fn task_event(&self, id: &str, event: &Event) {
        match event {
            Event::Progress(progress) => self.progress(id, progress),
            Event::Log { level, message } => match level {
                LogLevel::Error | LogLevel::Warn => {
                    let style = console::style("warning").yellow().bold().for_stderr();
                    self.line(&format!("{style}: {id}: {message}"));
                }
                LogLevel::Info if !self.quiet => self.line(&format!("{id}: {message}")),
                LogLevel::Debug if self.verbose => self.line(&format!("{id}: {message}")),
                _ => {}
            },
            Event::Metric { .. } => {}
        }
    }

    fn task_finished(&self, id: &str, outcome: &TaskOutcome) {
        if let Some(task) = self.running().remove(id) {
            task.bar.finish_and_clear();
            self.bars.remove(&task.bar);
        }
        if self.quiet {
            return;
        }
        match &outcome.status {
            Status::Ran => {
                self.line(&format!("{id}: done in {}", duration(outcome.wall)));
                for line in outcome.report.lines() {
                    self.line(&format!("  {line}"));
                }
            }
            // The failed task's error and the gate's table come at the end, where they are seen.
            Status::Failed => self.line(&format!("{id}: failed after {}", duration(outcome.wall))),
            Status::Cancelled => self.line(&format!("{id}: cancelled")),
            Status::Denied { .. } | Status::Cached | Status::Skipped(_) => {}
        }
    }
}

fn spinner_style() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {prefix:.bold} {elapsed} {pos} {wide_msg}")
        .expect("the template is valid")
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template(
        "{spinner} {prefix:.bold} [{bar:24}] {pos}/{len} {msg} · {elapsed}, {eta} left",
    )
    .expect("the template is valid")
    .progress_chars("█▉▊▋▌▍▎▏ ")
}

fn plural(unit: &str) -> String {
    if unit.is_empty() { String::new() } else { format!("{unit}s") }
}

/// `23/60 steps, loss 2.31 · 240 tok/s, 1 m 02 s left`.
fn plain_progress(progress: &Progress, elapsed: Duration) -> String {
    let unit = plural(&progress.unit);
    let mut parts = vec![match progress.total {
        Some(total) => format!("{}/{total} {unit}", progress.done),
        None => format!("{} {unit}", progress.done),
    }];
    if !progress.message.is_empty() {
        parts.push(progress.message.clone());
    }
    if let Some(total) = progress.total.filter(|t| progress.done > 0 && *t > progress.done) {
        let left = elapsed.mul_f64((total - progress.done) as f64 / progress.done as f64);
        parts.push(format!("{} left", duration(left)));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_progress_tells_what_is_left() {
        let mut progress = Progress {
            done: 20,
            total: Some(60),
            unit: "step".to_owned(),
            message: "loss 2.31".to_owned(),
        };
        let text = plain_progress(&progress, Duration::from_secs(30));
        assert_eq!(text, "20/60 steps, loss 2.31, 1 m 00 s left");
        progress.total = None;
        assert_eq!(plain_progress(&progress, Duration::from_secs(30)), "20 steps, loss 2.31");
    }
}

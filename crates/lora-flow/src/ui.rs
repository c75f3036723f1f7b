//! How things look: the global options every writer obeys, and the rendering of errors.
//!
//! Data goes to stdout; errors, logs and progress go to stderr.

use std::fmt::Write as _;
use std::sync::OnceLock;

use lora_flow_core::{Error, nearest};
use lora_flow_pipeline::{Diagnostic, Diagnostics};
use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteDiagnostic, NamedSource};
use tracing_subscriber::EnvFilter;

use crate::args::{Global, LogFormat};

static GLOBAL: OnceLock<Global> = OnceLock::new();

/// Remembers the global options and installs the subscriber for library diagnostics.
pub fn init(global: &Global) {
    let default = if global.verbose { "debug" } else { "warn" };
    let filter = EnvFilter::try_from_env("LORA_FLOW_LOG").unwrap_or_else(|_| {
        EnvFilter::new(format!(
            "lora_flow={default},lora_flow_pipeline={default},lora_flow_remote={default}"
        ))
    });
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .log_internal_errors(false);
    match global.log_format {
        LogFormat::Text => builder.without_time().with_ansi(color_stderr()).init(),
        LogFormat::Json => builder.json().init(),
    }
    let _ = GLOBAL.set(global.clone());
}

/// The global options.
pub fn global() -> &'static Global {
    GLOBAL.get().expect("ui::init runs first")
}

/// Whether stderr is a terminal that wants colour (`NO_COLOR`, `CLICOLOR_FORCE` are obeyed).
pub fn color_stderr() -> bool {
    console::colors_enabled_stderr()
}

/// Why a command ends with a code other than 0.
pub enum Failure {
    /// Problems of a pipeline file: exit code 2.
    Pipeline(Diagnostics),
    /// Wrong use of a command: exit code 2.
    Usage(Error),
    /// Anything else: exit code 1.
    Error(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Error(error.into())
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::Error(error.into())
    }
}

impl From<Diagnostics> for Failure {
    fn from(diagnostics: Diagnostics) -> Self {
        Self::Pipeline(diagnostics)
    }
}

impl Failure {
    /// Wrong use of a command that named a task which is not there: hints at the one meant, or
    /// lists those there are.
    pub fn unknown_task<'a>(
        message: String,
        name: &str,
        tasks: impl Iterator<Item = &'a str> + Clone,
    ) -> Self {
        let error = Error::new(message);
        Self::Usage(match nearest(name, tasks.clone()) {
            Some(near) => error.with_hint(format!("did you mean `{near}`?")),
            None => error.with_hint(format!("tasks: {}", tasks.collect::<Vec<_>>().join(", "))),
        })
    }

    /// Writes the failure to stderr and gives the exit code.
    pub fn render(self) -> i32 {
        match self {
            Self::Pipeline(diagnostics) => {
                render_diagnostics("error", &diagnostics.0);
                let n = diagnostics.0.len();
                eprintln!("{} in the pipeline, nothing was run", count(n, "problem"));
                2
            }
            Self::Usage(error) => {
                eprint!("{}", error_text(&error.chain(), error.hint()));
                2
            }
            Self::Error(error) => {
                eprint!("{}", error_text(&error.chain(), error.hint()));
                1
            }
        }
    }
}

/// `1 problem`, `2 problems`.
pub fn count(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// `error: …` and, below it, `hint: …`.
pub fn error_text(message: &str, hint: Option<&str>) -> String {
    let mut out = format!("{}: {message}\n", console::style("error").red().bold().for_stderr());
    if let Some(hint) = hint {
        let _ = writeln!(out, "{}: {hint}", console::style("hint").cyan().bold().for_stderr());
    }
    out
}

/// Draws each diagnostic with its place in the file, in file order.
pub fn render_diagnostics(severity: &str, diagnostics: &[Diagnostic]) {
    let theme =
        if color_stderr() { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    let handler = GraphicalReportHandler::new_themed(theme).with_width(100).with_links(false);
    for diagnostic in diagnostics {
        let path = diagnostic.source.path.display();
        let place = match diagnostic.line_column() {
            Some((line, column)) => format!("{path}:{line}:{column}"),
            None => path.to_string(),
        };
        let style = console::style(severity).bold().for_stderr();
        let style = if severity == "error" { style.red() } else { style.yellow() };
        eprintln!("{style}: {} ({place})", diagnostic.message);
        // An excerpt helps a reader only where its line can be read.
        let span = diagnostic.span.filter(|span| line_length(diagnostic, span.start) <= 300);
        let Some(span) = span else {
            if let Some(hint) = &diagnostic.hint {
                eprintln!("  hint: {hint}");
            }
            eprintln!();
            continue;
        };
        // The headline above carries the message; miette draws the excerpt.
        let mut excerpt = MietteDiagnostic::new("").with_label(LabeledSpan::new(
            diagnostic.label.clone(),
            span.start,
            span.end.saturating_sub(span.start).max(1),
        ));
        excerpt.help = diagnostic.hint.clone();
        let report = miette::Report::new(excerpt).with_source_code(NamedSource::new(
            path.to_string(),
            diagnostic.source.text.to_string(),
        ));
        let mut drawn = String::new();
        if handler.render_report(&mut drawn, report.as_ref()).is_ok() {
            let body: Vec<&str> = drawn
                .lines()
                .skip_while(|line| !line.contains('╭') && !line.contains("help"))
                .collect();
            eprintln!("{}\n", body.join("\n"));
        }
    }
}

/// Length in bytes of the line that holds a byte of the source.
fn line_length(diagnostic: &Diagnostic, offset: usize) -> usize {
    let bytes = diagnostic.source.text.as_bytes();
    let offset = offset.min(bytes.len());
    let start = bytes[..offset].iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
    let end = bytes[offset..].iter().position(|b| *b == b'\n').map_or(bytes.len(), |i| offset + i);
    end - start
}

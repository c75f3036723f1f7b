//! One error type for the project: what went wrong, why (the source chain), and what to do.
//!
//! Messages are lower case, quote names in backticks, and have no final period. The hint is kept
//! apart so that the binary can render it on its own line.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

/// Result with the project's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the engine has to do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The task failed.
    Failed,
    /// The task stopped because the run was cancelled.
    Cancelled,
}

/// What went wrong, why, and what to do about it.
#[derive(Debug)]
pub struct Error {
    message: String,
    hint: Option<String>,
    kind: ErrorKind,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with a message: lower case, no final period.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, kind: ErrorKind::Failed, source: None }
    }

    /// The error of a task that found its [`crate::CancelToken`] set.
    pub fn cancelled() -> Self {
        Self { kind: ErrorKind::Cancelled, ..Self::new("cancelled") }
    }

    /// Adds what the user can do.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the cause.
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What the user can do: this error's hint or, failing that, the nearest one among its causes.
    pub fn hint(&self) -> Option<&str> {
        if self.hint.is_some() {
            return self.hint.as_deref();
        }
        self.source.as_deref()?.downcast_ref::<Error>()?.hint()
    }

    /// Whether the task failed or was cancelled.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The message and those of all its causes, joined by `: `.
    pub fn chain(&self) -> String {
        let mut out = self.message.clone();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            let text = cause.to_string();
            // Many libraries repeat their cause in their own message.
            if !out.ends_with(&text) {
                out.push_str(": ");
                out.push_str(&text);
            }
            source = cause.source();
        }
        out
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        // fs-err names the file in its message; a bare io::Error says only what.
        Self::new(e.to_string()).with_source(e)
    }
}

impl From<serde_json::Error> for Error {
    fn from(e: serde_json::Error) -> Self {
        Self::new("invalid JSON").with_source(e)
    }
}

/// Context for errors of any type.
pub trait ResultExt<T> {
    /// Wraps the error as the cause of `message`.
    fn context(self, message: impl Into<String>) -> Result<T>;
    /// Wraps the error as the cause of a message made only when it is needed.
    fn with_context<S: Into<String>>(self, message: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> ResultExt<T> for Result<T, E> {
    fn context(self, message: impl Into<String>) -> Result<T> {
        self.with_context(|| message)
    }

    fn with_context<S: Into<String>>(self, message: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| {
            let source = e.into();
            let kind = source.downcast_ref::<Error>().map_or(ErrorKind::Failed, Error::kind);
            Error { kind, ..Error::new(message()).with_source(source) }
        })
    }
}

/// A problem of a task's parameters, found before anything runs.
///
/// The engine turns `pointer` into file:line:column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// JSON pointer into the task's `with` (`/split/train`); empty for the whole of it.
    pub pointer: String,
    /// What is wrong: lower case, no final period.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl Problem {
    /// A problem at a JSON pointer into `with`.
    pub fn at(pointer: impl Into<String>, message: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), message: message.into(), hint: None }
    }

    /// Adds what to do.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// A problem inside an outside file, found before anything runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileProblem {
    /// The file.
    pub path: PathBuf,
    /// The bytes that are wrong; none for the file as a whole.
    pub bytes: Option<Range<usize>>,
    /// What is wrong: lower case, no final period.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// The candidate that `name` most likely meant, for "did you mean" hints: at most a third of its
/// characters away by edit distance, transpositions counted once.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let fold = |s: &str| s.to_lowercase().replace('-', "_");
    let wanted = fold(name);
    candidates
        .into_iter()
        .map(|c| (edit_distance(&wanted, &fold(c)), c))
        .filter(|(d, c)| *d <= (wanted.chars().count().max(c.chars().count()) / 3).max(1))
        .min_by_key(|(d, _)| *d)
        .map(|(_, c)| c)
}

/// Optimal string alignment distance (Damerau–Levenshtein without repeated edits).
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut d = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    (0..=a.len()).for_each(|i| d[i][0] = i);
    (0..=b.len()).for_each(|j| d[0][j] = j);
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let cost = usize::from(a[i - 1] != b[j - 1]);
            d[i][j] = (d[i - 1][j] + 1).min(d[i][j - 1] + 1).min(d[i - 1][j - 1] + cost);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                d[i][j] = d[i][j].min(d[i - 2][j - 2] + 1);
            }
        }
    }
    d[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_joins_causes_and_hint_comes_from_the_nearest() {
        let inner = Error::new("inner").with_hint("do this");
        let outer = Err::<(), _>(inner).context("outer").unwrap_err();
        assert_eq!(outer.chain(), "outer: inner");
        assert_eq!(outer.hint(), Some("do this"));
    }

    #[test]
    fn context_keeps_cancellation() {
        let e = Err::<(), _>(Error::cancelled()).context("while training").unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Cancelled);
    }

    #[test]
    fn nearest_finds_typos_and_refuses_strangers() {
        let names = ["learning_rate", "max_steps", "r"];
        assert_eq!(nearest("learnign_rate", names), Some("learning_rate"));
        assert_eq!(nearest("max-steps", names), Some("max_steps"));
        assert_eq!(nearest("banana", names), None);
    }
}

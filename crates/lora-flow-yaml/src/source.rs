//! A file as written, places in it, and the problems found there.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A text file that problems point into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// The path as the user gave it (or as it follows from that), for messages.
    pub path: PathBuf,
    /// The whole text.
    pub text: Arc<str>,
}

impl SourceFile {
    /// A source from its parts.
    pub fn new(path: impl Into<PathBuf>, text: impl Into<Arc<str>>) -> Arc<Self> {
        Arc::new(Self { path: path.into(), text: text.into() })
    }

    /// Reads a file, which must be UTF-8.
    ///
    /// # Errors
    /// One [`Diagnostic`] when the file cannot be read or is not UTF-8; in the latter case it
    /// points at the first bad byte.
    pub fn read(path: &Path) -> Result<Arc<Self>, Box<Diagnostic>> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) => {
                let source = Self::new(path, "");
                let message = if path.is_dir() {
                    "is a folder, not a file".to_owned()
                } else {
                    format!("cannot be read: {}", plain_io_message(&e))
                };
                return Err(Box::new(Diagnostic::new(&source, None, message)));
            }
        };
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Self::new(path, text)),
            Err(e) => {
                let valid = e.utf8_error().valid_up_to();
                let text = String::from_utf8_lossy(e.as_bytes());
                let source = Self::new(path, text.as_ref());
                let span = Span::new(valid, valid);
                Err(Box::new(
                    Diagnostic::new(&source, Some(span), "this is not UTF-8 text")
                        .with_hint("save the file with the encoding UTF-8"),
                ))
            }
        }
    }

    /// Line and column of a byte offset, both from 1, the column in characters.
    pub fn line_column(&self, offset: usize) -> (usize, usize) {
        let mut offset = offset.min(self.text.len());
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        let before = &self.text[..offset];
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        let line = before.bytes().filter(|b| *b == b'\n').count() + 1;
        let line_text = before[line_start..].trim_start_matches('\u{feff}');
        (line, line_text.chars().count() + 1)
    }

    /// The text under a span.
    pub fn snippet(&self, span: Span) -> &str {
        self.text.get(span.start..span.end).unwrap_or("")
    }
}

/// `No such file or directory (os error 2)` without the number.
fn plain_io_message(e: &std::io::Error) -> String {
    let text = e.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_lowercase().chain(chars).collect())
}

/// A range of bytes of a [`SourceFile`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Span {
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

impl Span {
    /// The range `start..end`.
    pub fn new(start: usize, end: usize) -> Self {
        Self { start, end: end.max(start) }
    }
}

/// One problem, with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// The file it is in.
    pub source: Arc<SourceFile>,
    /// The place; none for problems of the file as a whole.
    pub span: Option<Span>,
    /// What is wrong: lower case, names in backticks, no final period.
    pub message: String,
    /// A short text for the underlined place.
    pub label: Option<String>,
    /// What to do.
    pub hint: Option<String>,
}

impl Diagnostic {
    /// A problem at a place.
    pub fn new(
        source: &Arc<SourceFile>,
        span: impl Into<Option<Span>>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            source: source.clone(),
            span: span.into(),
            message: message.into(),
            label: None,
            hint: None,
        }
    }

    /// Adds what to do.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds what to do, if there is something.
    pub fn with_hint_opt(mut self, hint: Option<String>) -> Self {
        self.hint = hint;
        self
    }

    /// Adds a short text for the underlined place.
    pub fn with_label(mut self, label: impl Into<String>) -> Self {
        self.label = Some(label.into());
        self
    }

    /// Line and column, both from 1, the column in characters.
    pub fn line_column(&self) -> Option<(usize, usize)> {
        self.span.map(|span| self.source.line_column(span.start))
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.source.path.display())?;
        if let Some((line, column)) = self.line_column() {
            write!(f, "{line}:{column}:")?;
        }
        write!(f, " {}", self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

/// A pipeline file and the fragments it includes, as one text.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The texts one after the other, under the path of the pipeline file.
    pub whole: Arc<SourceFile>,
    /// The files and where each starts in the whole.
    parts: Vec<(usize, Arc<SourceFile>)>,
}

impl Sources {
    /// A file that includes nothing.
    pub fn new(source: &Arc<SourceFile>) -> Self {
        Self { whole: source.clone(), parts: vec![(0, source.clone())] }
    }

    /// Path and text of each file; joined by line feeds the texts are the whole.
    pub fn texts(&self) -> impl Iterator<Item = (&Path, &str)> {
        self.parts.iter().map(|(_, source)| (source.path.as_path(), &*source.text))
    }

    /// Adds a file and returns where it starts.
    pub fn append(&mut self, source: &Arc<SourceFile>) -> usize {
        let start = self.whole.text.len() + 1;
        let text = format!("{}\n{}", self.whole.text, source.text);
        self.whole = SourceFile::new(&self.whole.path, text);
        self.parts.push((start, source.clone()));
        start
    }

    /// The file that a place of the whole is in, and the place there.
    pub fn local(&self, span: Span) -> (&Arc<SourceFile>, Span) {
        let at = self.parts.partition_point(|(start, _)| *start <= span.start).max(1) - 1;
        let (start, source) = &self.parts[at];
        (source, Span::new(span.start - start, span.end.saturating_sub(*start)))
    }

    /// Makes a problem that points into the whole point into the file.
    pub fn localise(&self, problem: &mut Diagnostic) {
        if Arc::ptr_eq(&problem.source, &self.whole) {
            let (source, span) = self.local(problem.span.unwrap_or_default());
            problem.source = source.clone();
            problem.span = problem.span.map(|_| span);
        }
    }
}

/// Collects the problems of one file, or of a pipeline file and its fragments.
#[derive(Debug)]
pub struct Problems {
    /// The file, or the whole of several.
    pub source: Arc<SourceFile>,
    /// The problems so far.
    pub found: Vec<Diagnostic>,
    sources: Sources,
}

impl Problems {
    /// Problems of one file.
    pub fn new(source: &Arc<SourceFile>) -> Self {
        Self::over(&Sources::new(source))
    }

    /// Problems whose places are in the whole of several files, until they are localised.
    pub fn over(sources: &Sources) -> Self {
        Self { source: sources.whole.clone(), found: Vec::new(), sources: sources.clone() }
    }

    /// Line and column of a place, with the file where there are several.
    pub fn place(&self, span: Span) -> String {
        let (source, span) = self.sources.local(span);
        let (line, column) = source.line_column(span.start);
        if self.sources.parts.len() == 1 {
            return format!("{line}:{column}");
        }
        format!("{}:{line}:{column}", source.path.display())
    }

    /// Adds a problem and what to do about it.
    pub fn report(
        &mut self,
        span: Span,
        message: impl Into<String>,
        hint: impl Into<Option<String>>,
    ) {
        let diagnostic = Diagnostic::new(&self.source, span, message);
        self.found.push(diagnostic.with_hint_opt(hint.into()));
    }

    /// Number of problems.
    pub fn len(&self) -> usize {
        self.found.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }
}

/// All problems of a file and of what it refers to, in the order of their places.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Diagnostics(pub Vec<Diagnostic>);

impl Diagnostics {
    /// Adds a problem.
    pub fn push(&mut self, diagnostic: Diagnostic) {
        self.0.push(diagnostic);
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of problems.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The problems in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Diagnostic> {
        self.0.iter()
    }

    /// Orders the problems by file and place and drops repetitions. The file named by `first`
    /// comes first.
    pub fn sort(&mut self, first: &Path) {
        self.0.sort_by(|a, b| {
            let key = |d: &Diagnostic| {
                (d.source.path != first, d.source.path.clone(), d.span.unwrap_or_default())
            };
            key(a).cmp(&key(b))
        });
        self.0.dedup();
    }
}

impl From<Diagnostic> for Diagnostics {
    fn from(diagnostic: Diagnostic) -> Self {
        Self(vec![diagnostic])
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, diagnostic) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{diagnostic}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostics {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_count_characters_not_bytes() {
        let source = SourceFile::new("p.yaml", "a: é\nβγ: x\n");
        let offset = source.text.find('x').unwrap();
        assert_eq!(source.line_column(offset), (2, 5));
        assert_eq!(source.line_column(usize::MAX), (3, 1));
        // Inside a character: its start.
        assert_eq!(source.line_column(4), (1, 4));
    }

    #[test]
    fn display_has_place_and_hint() {
        let source = SourceFile::new("p.yaml", "a\nbc");
        let d = Diagnostic::new(&source, Span::new(3, 4), "no").with_hint("yes");
        assert_eq!(d.to_string(), "p.yaml:2:2: no\n  hint: yes");
        assert_eq!(Diagnostic::new(&source, None, "no").to_string(), "p.yaml: no");
    }

    #[test]
    fn missing_file_and_bad_encoding_are_problems_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.yaml");
        let e = SourceFile::read(&path).unwrap_err();
        assert_eq!(e.message, "cannot be read: no such file or directory");
        std::fs::write(&path, b"a: \xff\n").unwrap();
        let e = SourceFile::read(&path).unwrap_err();
        assert_eq!(e.line_column(), Some((1, 4)));
        assert_eq!(e.message, "this is not UTF-8 text");
        assert_eq!(SourceFile::read(dir.path()).unwrap_err().message, "is a folder, not a file");
    }
}

//! What a task fails with.

use std::any::Any;
use std::fmt;

/// Why a task failed and what the user can do about it.
///
/// Like `anyhow::Error` it is no `std::error::Error` itself, so that `?` turns any error into it.
#[derive(Debug)]
pub struct PluginError {
    message: String,
    hint: Option<String>,
}

impl PluginError {
    /// An error with a message: lower case, names in backticks, no final period.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None }
    }

    /// Adds what the user can do.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Says what was being done: `context: message`.
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// The message with its causes.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What the user can do.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    pub(crate) fn from_panic(panic: &(dyn Any + Send)) -> Self {
        let text = panic
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        Self::new(match text {
            Some(text) => format!("the plugin panicked: {text}"),
            None => "the plugin panicked".to_owned(),
        })
    }
}

impl fmt::Display for PluginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl<E: std::error::Error> From<E> for PluginError {
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            // Many libraries repeat their cause in their own message.
            if !message.ends_with(&text) {
                message = format!("{message}: {text}");
            }
            source = cause.source();
        }
        Self::new(message)
    }
}

/// Adds to a `Result` what was being done.
pub trait Context<T> {
    /// Turns the error into `context: error`.
    ///
    /// # Errors
    /// Those of the result.
    fn context(self, context: impl fmt::Display) -> Result<T, PluginError>;
}

impl<T, E: Into<PluginError>> Context<T> for Result<T, E> {
    fn context(self, context: impl fmt::Display) -> Result<T, PluginError> {
        self.map_err(|error| error.into().context(context))
    }
}

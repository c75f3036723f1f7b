//! Write an external task of lora-flow in Rust: the plugin protocol, version 1.
//!
//! A plugin is an executable beside a `plugin.yaml`. For each task the engine starts it once,
//! writes one JSON request to its standard input, and reads one JSON event per line from its
//! standard output. This crate does that part; the author writes a function:
//!
//! ```no_run
//! use lora_flow_plugin_sdk::{Events, PluginError, Request};
//!
//! #[derive(serde::Deserialize)]
//! #[serde(deny_unknown_fields)]
//! struct Shout {
//!     suffix: String,
//! }
//!
//! fn shout(task: Request<Shout>, events: &mut Events) -> Result<(), PluginError> {
//!     let text = std::fs::read_to_string(task.input("files")?.file("words.txt"))?;
//!     let loud = text.to_uppercase() + &task.params.suffix;
//!     std::fs::write(task.output("files")?.file("loud.txt")?, &loud)?;
//!     events.summary("bytes", loud.len());
//!     Ok(())
//! }
//!
//! fn main() -> std::process::ExitCode {
//!     lora_flow_plugin_sdk::run(shout)
//! }
//! ```
//!
//! Standard error is free for anything: the engine keeps it in the task's log. Standard output
//! belongs to the protocol; a stray `println!` there is a protocol error.

mod error;
mod events;
mod request;

use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use serde::de::DeserializeOwned;

pub use error::{Context, PluginError};
pub use events::{Events, Level};
pub use request::{Input, Output, Request};

/// The version of the protocol this crate speaks.
pub const PROTOCOL: u32 = 1;

/// Runs a plugin: reads the request from standard input, calls `task`, and tells the engine how
/// it ended. The exit code is 0 after `done` and 1 after `error`.
pub fn run<P, F>(task: F) -> ExitCode
where
    P: DeserializeOwned,
    F: FnOnce(Request<P>, &mut Events) -> Result<(), PluginError>,
{
    match run_with(std::io::stdin().lock(), std::io::stdout(), task) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// [`run`] on any pair of streams, for tests. Whether the task ended well and the engine was told.
pub fn run_with<P, F>(mut requests: impl Read, events: impl Write + Send + 'static, task: F) -> bool
where
    P: DeserializeOwned,
    F: FnOnce(Request<P>, &mut Events) -> Result<(), PluginError>,
{
    let mut events = Events::new(events);
    let mut text = String::new();
    let result = requests
        .read_to_string(&mut text)
        .context("cannot read the request from standard input")
        .and_then(|_| Request::parse(&text))
        .and_then(|request| {
            // A panic must reach the user as an error, not as a plugin that fell silent.
            catch_unwind(AssertUnwindSafe(|| task(request, &mut events)))
                .unwrap_or_else(|panic| Err(PluginError::from_panic(&*panic)))
        });
    let succeeded = result.is_ok();
    match result {
        Ok(()) => events.done(),
        Err(error) => events.error(&error),
    }
    succeeded && !events.is_closed()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde::Deserialize;
    use serde_json::{Value, json};

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Params {
        words: Vec<String>,
    }

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn events_of(
        request: &str,
        task: impl FnOnce(Request<Params>, &mut Events) -> Result<(), PluginError>,
    ) -> (bool, Vec<Value>) {
        let buffer = Buffer::default();
        let succeeded = run_with(request.as_bytes(), buffer.clone(), task);
        let bytes = buffer.0.lock().unwrap().clone();
        let lines = String::from_utf8(bytes).unwrap();
        (succeeded, lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect())
    }

    fn request(change: impl FnOnce(&mut Value)) -> String {
        let mut request = json!({
            "protocol": 1, "task": "shout", "params": { "words": ["a", "b"] },
            "inputs": { "files": [{ "reference": "raw.files", "kind": "Files", "path": "/in", "meta": { "rows": 3 } }] },
            "outputs": { "files": { "kind": "Files", "path": "/out" } },
            "scratch": "/scratch", "state": "/state", "threads": 2, "network": true,
            "a_field_of_a_later_minor_version": 1
        });
        change(&mut request);
        request.to_string()
    }

    #[test]
    fn a_task_sees_its_request_and_the_engine_sees_its_events() {
        let (succeeded, events) = events_of(&request(|_| ()), |task, events| {
            assert_eq!((task.task.as_str(), task.threads, task.network), ("shout", 2, true));
            assert_eq!(task.params.words, ["a", "b"]);
            let input = task.input("files")?;
            assert_eq!(
                (input.reference.as_str(), &input.meta),
                ("raw.files", &json!({ "rows": 3 }))
            );
            assert_eq!(input.file("x.txt"), std::path::Path::new("/in/x.txt"));
            assert!(task.optional("other").is_none());
            events.progress(2, Some(2), "word", "b");
            events.warn("two\nlines");
            events.metric("loss", 3, 0.5);
            events.summary("words", 2);
            events.report("table");
            events.meta("files", json!({ "words": 2 }));
            Ok(())
        });
        assert!(succeeded);
        assert_eq!(
            events,
            [
                json!({ "event": "progress", "done": 2, "total": 2, "unit": "word", "message": "b" }),
                json!({ "event": "log", "level": "warn", "message": "two\nlines" }),
                json!({ "event": "metric", "name": "loss", "step": 3, "value": 0.5 }),
                json!({ "event": "summary", "name": "words", "value": "2" }),
                json!({ "event": "report", "text": "table" }),
                json!({ "event": "meta", "output": "files", "value": { "words": 2 } }),
                json!({ "event": "done" }),
            ]
        );
    }

    #[test]
    fn an_error_carries_its_causes_and_its_hint() {
        let (succeeded, events) = events_of(&request(|_| ()), |_, _| {
            let cause = std::io::Error::other("disk is full");
            Err(PluginError::from(cause).context("cannot write `x`").with_hint("make room"))
        });
        assert!(!succeeded);
        let error = json!({ "event": "error", "message": "cannot write `x`: disk is full", "hint": "make room" });
        assert_eq!(events, [error]);
    }

    #[test]
    fn a_panic_is_an_error() {
        let (succeeded, events) = events_of(&request(|_| ()), |_, _| panic!("index {}", 7));
        assert!(!succeeded);
        assert_eq!(
            events,
            [json!({ "event": "error", "message": "the plugin panicked: index 7" })]
        );
    }

    #[test]
    fn broken_requests_are_refused_before_the_task_runs() {
        let cases = [
            (String::new(), "empty"),
            ("{".to_owned(), "not JSON"),
            (request(|r| r["protocol"] = json!(2)), "protocol 2"),
            (request(|r| drop(r.as_object_mut().unwrap().remove("protocol"))), "no `protocol`"),
            (request(|r| r["params"] = json!({ "wrods": [] })), "unknown field `wrods`"),
            (request(|r| r["outputs"] = json!([])), "invalid request"),
        ];
        for (text, expected) in cases {
            let (succeeded, events) = events_of(&text, |_, _| panic!("ran on {expected}"));
            assert!(!succeeded);
            let message = events[0]["message"].as_str().unwrap();
            assert!(message.contains(expected), "{expected}: {message}");
        }
    }

    #[test]
    fn an_unknown_port_names_those_there_are() {
        let (_, events) = events_of(&request(|_| ()), |task, _| task.output("filse").map(drop));
        let message = events[0]["message"].as_str().unwrap();
        assert_eq!(message, "there is no output `filse`; there is `files`");
    }

    #[test]
    fn numbers_that_json_lacks_do_not_break_the_stream() {
        let (succeeded, events) = events_of(&request(|_| ()), |_, events| {
            events.metric("loss", 1, f64::NAN);
            Ok(())
        });
        assert!(succeeded);
        assert_eq!(events[0]["event"], "log");
        assert_eq!(events[0]["message"], "metric `loss` is NaN at step 1");
    }

    #[test]
    fn an_engine_that_is_gone_is_not_success() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut seen = false;
        let succeeded =
            run_with(request(|_| ()).as_bytes(), Closed, |_: Request<Params>, events| {
                events.info("hello");
                seen = events.is_closed();
                Ok(())
            });
        assert!(seen && !succeeded);
    }
}

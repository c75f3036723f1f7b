//! What a plugin may say.

use lora_flow_core::{Event, LogLevel, Progress, nearest};
use serde_json::{Map, Value};

const EVENTS: [&str; 8] =
    ["progress", "log", "metric", "summary", "report", "meta", "done", "error"];

/// One line of a plugin's standard output.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum PluginEvent {
    /// What built-in tasks say too.
    Plain(Event),
    /// A headline.
    Summary { name: String, value: String },
    /// Text for the reader.
    Report { text: String },
    /// Facts about an output.
    Meta { output: String, value: Value },
    /// The task ended well. The last event.
    Done,
    /// The task failed. The last event.
    Error { message: String, hint: Option<String> },
}

impl PluginEvent {
    /// Reads a line. Unknown fields are left alone: a later plugin may send more.
    ///
    /// # Errors
    /// Why it is not an event.
    pub(super) fn parse(line: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(line).map_err(|_| "it is not JSON".to_owned())?;
        let Value::Object(map) = value else { return Err("it is not a JSON object".to_owned()) };
        let fields = Fields(map);
        Ok(match fields.text("event")?.as_str() {
            "progress" => Self::Plain(Event::Progress(Progress {
                done: fields.count("done")?.ok_or_else(|| missing("done"))?,
                total: fields.count("total")?,
                unit: fields.optional_text("unit")?.unwrap_or_default(),
                message: fields.optional_text("message")?.unwrap_or_default(),
            })),
            "log" => {
                let level = match fields.optional_text("level")?.as_deref().unwrap_or("info") {
                    "debug" => LogLevel::Debug,
                    "info" => LogLevel::Info,
                    "warn" | "warning" => LogLevel::Warn,
                    "error" => LogLevel::Error,
                    other => return Err(format!("`{other}` is not a level")),
                };
                Self::Plain(Event::Log { level, message: fields.text("message")? })
            }
            "metric" => Self::Plain(Event::Metric {
                name: fields.text("name")?,
                step: fields.count("step")?.unwrap_or(0),
                value: match fields.0.get("value") {
                    Some(Value::Null) => f64::NAN,
                    Some(value) => value.as_f64().ok_or("its `value` is not a number")?,
                    None => return Err(missing("value")),
                },
            }),
            "summary" => Self::Summary {
                name: fields.text("name")?,
                value: match fields.0.get("value") {
                    Some(Value::String(text)) => text.clone(),
                    Some(value) => value.to_string(),
                    None => return Err(missing("value")),
                },
            },
            "report" => Self::Report { text: fields.text("text")? },
            "meta" => Self::Meta {
                output: fields.text("output")?,
                value: fields.0.get("value").cloned().ok_or_else(|| missing("value"))?,
            },
            "done" => Self::Done,
            "error" => Self::Error {
                message: fields.text("message")?,
                hint: fields.optional_text("hint")?,
            },
            other => {
                let known = nearest(other, EVENTS);
                let hint = known.map_or_else(String::new, |k| format!(", did it mean `{k}`?"));
                return Err(format!("there is no event `{other}`{hint}"));
            }
        })
    }
}

struct Fields(Map<String, Value>);

impl Fields {
    fn text(&self, name: &str) -> Result<String, String> {
        self.optional_text(name)?.ok_or_else(|| missing(name))
    }

    fn optional_text(&self, name: &str) -> Result<Option<String>, String> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(format!("its `{name}` is not a text")),
        }
    }

    fn count(&self, name: &str) -> Result<Option<u64>, String> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value
                .as_u64()
                .map(Some)
                .ok_or_else(|| format!("its `{name}` is not a whole number")),
        }
    }
}

fn missing(name: &str) -> String {
    format!("it has no `{name}`")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_events_of_the_protocol_are_understood() {
        let parse = |v: Value| PluginEvent::parse(&v.to_string());
        assert_eq!(
            parse(
                json!({"event": "progress", "done": 3, "total": 10, "unit": "file", "message": "m"})
            ),
            Ok(PluginEvent::Plain(Event::Progress(Progress {
                done: 3,
                total: Some(10),
                unit: "file".into(),
                message: "m".into()
            })))
        );
        assert!(parse(json!({"event": "progress", "done": 3, "total": null})).is_ok());
        assert_eq!(
            parse(json!({"event": "log", "level": "warn", "message": "m"})),
            Ok(PluginEvent::Plain(Event::Log { level: LogLevel::Warn, message: "m".into() }))
        );
        assert_eq!(
            parse(json!({"event": "metric", "name": "n", "step": 1, "value": 0.5})),
            Ok(PluginEvent::Plain(Event::Metric { name: "n".into(), step: 1, value: 0.5 }))
        );
        assert_eq!(
            parse(json!({"event": "summary", "name": "n", "value": 5})),
            Ok(PluginEvent::Summary { name: "n".into(), value: "5".into() })
        );
        assert_eq!(parse(json!({"event": "done", "later": true})), Ok(PluginEvent::Done));
        assert_eq!(
            parse(json!({"event": "error", "message": "m"})),
            Ok(PluginEvent::Error { message: "m".into(), hint: None })
        );
    }

    #[test]
    fn what_is_wrong_with_a_line_is_said() {
        for (line, why) in [
            ("hello", "it is not JSON"),
            ("", "it is not JSON"),
            ("[1]", "it is not a JSON object"),
            ("{}", "it has no `event`"),
            (
                r#"{"event":"progres","done":1}"#,
                "there is no event `progres`, did it mean `progress`?",
            ),
            (r#"{"event":"progress"}"#, "it has no `done`"),
            (r#"{"event":"progress","done":-1}"#, "its `done` is not a whole number"),
            (r#"{"event":"metric","name":"x","value":"y"}"#, "its `value` is not a number"),
            (r#"{"event":"log","level":"loud","message":"m"}"#, "`loud` is not a level"),
            (r#"{"event":"error","message":7}"#, "its `message` is not a text"),
        ] {
            assert_eq!(PluginEvent::parse(line), Err(why.to_owned()), "{line}");
        }
    }
}

//! Filters of generated text, by the harness's names.

use regex::Regex;
use serde_json::Value;

use crate::metric::text::is_space;

/// One step of a filter chain.
#[derive(Debug, Clone)]
pub(crate) enum Filter {
    /// A match of a regular expression, or the fallback.
    Regex {
        /// The expression.
        regex: Regex,
        /// Which match; from the end if negative.
        group_select: i64,
        /// What stands for no match.
        fallback: String,
    },
    /// Without whitespace at the ends.
    RemoveWhitespace,
    /// In lower case.
    Lowercase,
    /// In upper case.
    Uppercase,
}

const NAMES: [&str; 5] = ["regex", "remove_whitespace", "lowercase", "uppercase", "take_first"];

impl Filter {
    /// A filter as written; none for `take_first`, which does nothing where there is one answer.
    pub(crate) fn parse(json: &Value) -> Result<Option<Self>, (String, Option<String>)> {
        let name = json["function"].as_str().unwrap_or_default();
        let keys: &[&str] = match name {
            "regex" => &["function", "regex_pattern", "group_select", "fallback"],
            _ => &["function"],
        };
        if let Some(key) =
            json.as_object().into_iter().flatten().find(|(k, _)| !keys.contains(&k.as_str()))
        {
            return Err((format!("unknown key `{}` in the filter `{name}`", key.0), None));
        }
        Ok(Some(match name {
            "regex" => {
                let pattern = json["regex_pattern"].as_str().unwrap_or(r"#### (\-?[0-9\.\,]+)");
                let regex = Regex::new(pattern).map_err(|e| {
                    let hint = "look-around and back-references are not supported".to_owned();
                    (format!("this is no regular expression: {e}"), Some(hint))
                })?;
                let fallback = json["fallback"].as_str().unwrap_or("[invalid]").to_owned();
                Self::Regex {
                    regex,
                    group_select: json["group_select"].as_i64().unwrap_or(0),
                    fallback,
                }
            }
            "remove_whitespace" => Self::RemoveWhitespace,
            "lowercase" => Self::Lowercase,
            "uppercase" => Self::Uppercase,
            "take_first" => return Ok(None),
            _ => {
                let hint = lora_flow_yaml::reader::suggest(name, NAMES, "filters");
                return Err((format!("there is no filter `{name}`"), hint));
            }
        }))
    }

    /// The filtered text.
    pub(crate) fn apply(&self, text: &str) -> String {
        match self {
            Self::RemoveWhitespace => text.trim_matches(is_space).to_owned(),
            Self::Lowercase => text.to_lowercase(),
            Self::Uppercase => text.to_uppercase(),
            Self::Regex { regex, group_select, fallback } => {
                let found: Vec<_> = regex.captures_iter(text).collect();
                let at = if *group_select < 0 {
                    found.len() as i64 + group_select
                } else {
                    *group_select
                };
                let Some(captures) = usize::try_from(at).ok().and_then(|i| found.get(i)) else {
                    return fallback.clone();
                };
                // As Python's `findall`: the whole match, or the first group that holds something.
                let text = if captures.len() == 1 {
                    captures.get(0).map(|m| m.as_str())
                } else {
                    captures.iter().skip(1).flatten().map(|m| m.as_str()).find(|m| !m.is_empty())
                };
                // A single group may be empty; of several, an empty one stands for no match.
                match text {
                    Some(text) => text.trim_matches(is_space).to_owned(),
                    None if captures.len() == 2 => String::new(),
                    None => fallback.clone(),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn regex(pattern: &str, select: i64) -> Filter {
        let json = json!({ "function": "regex", "regex_pattern": pattern, "group_select": select });
        Filter::parse(&json).unwrap().unwrap()
    }

    #[test]
    fn a_regex_takes_the_chosen_match_or_the_fallback() {
        let text = "first 12, then 34.";
        assert_eq!(regex(r"\d+", 0).apply(text), "12");
        assert_eq!(regex(r"\d+", -1).apply(text), "34");
        assert_eq!(regex(r"(x)|(\d+)", 0).apply(text), "12");
        assert_eq!(regex(r"#(\d+)", 0).apply(text), "[invalid]");
        assert!(
            Filter::parse(&json!({ "function": "regx" }))
                .unwrap_err()
                .1
                .unwrap()
                .contains("`regex`")
        );
        assert!(Filter::parse(&json!({ "function": "regex", "regex_pattern": "(" })).is_err());
    }
}

//! Errors of a JSON Schema in words: where, what is accepted, what was found, what was meant.

use jsonschema::ValidationError;
use jsonschema::error::{TypeKind, ValidationErrorKind};
use lora_flow_core::nearest;
use serde_json::Value;

use crate::kinds::follow_ref;
use crate::reader::{list, suggest};
use crate::yaml::{describe_json, escape_pointer};

/// One problem of a value under a schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    /// JSON pointer of the value, or of the key if `at_key`.
    pub pointer: String,
    pub at_key: bool,
    pub message: String,
    pub hint: Option<String>,
    /// Whether it is about which keys there are, and holds whatever their values.
    pub about_keys: bool,
    /// The key that is missing.
    pub missing: Option<String>,
    /// For an unknown key, the known one that was likely meant.
    pub meant: Option<String>,
}

/// What the words are about.
pub(crate) struct Subject<'a> {
    /// The task kind, in messages about the whole of its parameters.
    pub kind: &'a str,
    pub schema: &'a Value,
    /// Names of other tools for parameters: (theirs, ours).
    pub aliases: &'a [(&'a str, &'a str)],
}

impl Subject<'_> {
    /// The findings of one error. An error of alternatives becomes those of the alternative that
    /// was most likely meant.
    pub fn explain(&self, error: &ValidationError<'_>, out: &mut Vec<Finding>) {
        use ValidationErrorKind as K;
        let pointer = error.instance_path().as_str().to_owned();
        let name = self.name(&pointer);
        let value = error.instance().as_ref();
        let found = describe_json(value);
        let say = |message: String, hint: Option<String>| Finding {
            pointer: pointer.clone(),
            at_key: false,
            message,
            hint,
            about_keys: false,
            missing: None,
            meant: None,
        };
        let node = self.schema_of(error);
        match error.kind() {
            K::AdditionalProperties { unexpected } | K::UnevaluatedProperties { unexpected } => {
                out.extend(unexpected.iter().map(|key| self.unknown_key(&pointer, key, node)));
            }
            K::Required { property } => out.push(self.missing(&pointer, property, node)),
            K::Type { kind } => {
                let accepted = match accepted(node, self.schema) {
                    text if text.is_empty() => type_names(kind),
                    text => text,
                };
                let hint = match value {
                    Value::Number(_) | Value::Bool(_) if accepted == "a string" => {
                        Some("put quotes around it".to_owned())
                    }
                    Value::String(s)
                        if accepted == type_name("boolean")
                            && matches!(s.as_str(), "yes" | "no" | "on" | "off") =>
                    {
                        Some("YAML 1.2 knows only these two".to_owned())
                    }
                    Value::String(s) if serde_json::from_str::<Value>(s).is_ok() => {
                        Some("remove the quotes".to_owned())
                    }
                    _ => None,
                };
                out.push(say(format!("{name} must be {accepted}, found {found}"), hint));
            }
            K::Enum { .. } | K::Constant { .. } => {
                let consts = constants(node, self.schema);
                let hint = value
                    .as_str()
                    .and_then(|s| nearest(s, consts.iter().map(String::as_str)))
                    .map(|near| format!("did you mean `{near}`?"));
                let accepted = accepted(node, self.schema);
                out.push(say(format!("{name} must be {accepted}, found {found}"), hint));
            }
            K::AnyOf { context } | K::OneOfNotValid { context } => {
                self.alternatives(error, context, node, out);
            }
            K::OneOfMultipleValid { .. } => {
                let message = format!("{name} fits more than one form: {found}");
                out.push(say(message, None));
            }
            K::Minimum { limit } => {
                out.push(say(format!("{name} must be at least {limit}, found {value}"), None));
            }
            K::Maximum { limit } => {
                out.push(say(format!("{name} must be at most {limit}, found {value}"), None));
            }
            K::ExclusiveMinimum { limit } => {
                out.push(say(format!("{name} must be greater than {limit}, found {value}"), None));
            }
            K::ExclusiveMaximum { limit } => {
                out.push(say(format!("{name} must be less than {limit}, found {value}"), None));
            }
            K::MultipleOf { multiple_of } => {
                let message = format!("{name} must be a multiple of {multiple_of}, found {value}");
                out.push(say(message, None));
            }
            K::MinItems { limit: 1 }
            | K::MinLength { limit: 1 }
            | K::MinProperties { limit: 1 } => {
                out.push(say(format!("{name} must not be empty"), None));
            }
            K::MinItems { limit } => {
                out.push(say(format!("{name} must have at least {limit} items"), None));
            }
            K::MaxItems { limit } => {
                out.push(say(format!("{name} must have at most {limit} items"), None));
            }
            K::AdditionalItems { limit } => {
                out.push(say(format!("{name} must have at most {limit} items"), None));
            }
            K::MinLength { limit } => {
                let message = format!("{name} must have at least {limit} characters");
                out.push(say(message, None));
            }
            K::MaxLength { limit } => {
                out.push(say(format!("{name} must have at most {limit} characters"), None));
            }
            K::MinProperties { limit } => {
                out.push(say(format!("{name} must have at least {limit} keys"), None));
            }
            K::MaxProperties { limit } => {
                out.push(say(format!("{name} must have at most {limit} keys"), None));
            }
            K::Pattern { pattern } => {
                let doc = node.get("description").and_then(Value::as_str);
                let message = format!("{name} must match `{pattern}`, found {found}");
                out.push(say(message, doc.map(first_line)));
            }
            K::UniqueItems => out.push(say(format!("{name} has an item twice"), None)),
            K::PropertyNames { error } => {
                out.push(say(format!("{name} has a key that is not allowed: {error}"), None));
            }
            K::FalseSchema => out.push(say(format!("{name} is not allowed here"), None)),
            _ => out.push(say(format!("{name} is not valid: {error}"), None)),
        }
    }

    /// The name of a place: `` `learning_rate` ``, `` `split.train` ``, `` `files[0]` ``.
    fn name(&self, pointer: &str) -> String {
        if pointer.is_empty() {
            return format!("the parameters of `{}`", self.kind);
        }
        format!("`{}`", dotted(pointer))
    }

    fn unknown_key(&self, pointer: &str, key: &str, node: &Value) -> Finding {
        let known: Vec<&str> = node
            .get("properties")
            .and_then(Value::as_object)
            .map(|p| p.keys().map(String::as_str).collect())
            .unwrap_or_default();
        let alias = self
            .aliases
            .iter()
            .filter(|_| pointer.is_empty())
            .find(|(theirs, ours)| *theirs == key && known.contains(ours));
        let top = pointer.is_empty();
        let meant = alias.map(|(_, ours)| *ours).or_else(|| nearest(key, known.iter().copied()));
        let meant = meant.map(str::to_owned);
        let hint = match alias {
            Some((_, ours)) => Some(format!("here it is called `{ours}`")),
            None if known.is_empty() => Some("it takes none".to_owned()),
            None => suggest(key, known, if top { "known parameters" } else { "known keys" }),
        };
        let message = if top {
            format!("unknown parameter `{key}` of `{}`", self.kind)
        } else {
            format!("unknown key `{key}` in {}", self.name(pointer))
        };
        let pointer = format!("{pointer}/{}", escape_pointer(key));
        Finding { pointer, at_key: true, message, hint, about_keys: true, missing: None, meant }
    }

    fn missing(&self, pointer: &str, property: &Value, node: &Value) -> Finding {
        let key = property.as_str().unwrap_or_default();
        let message = if pointer.is_empty() {
            format!("`{}` needs the parameter `{key}`", self.kind)
        } else {
            format!("{} needs the key `{key}`", self.name(pointer))
        };
        let schema = node.get("properties").and_then(|p| p.get(key));
        let hint = schema.map(|schema| {
            let accepted = accepted(schema, self.schema);
            let doc = schema
                .get("description")
                .and_then(Value::as_str)
                .map_or_else(String::new, first_line);
            match (accepted.is_empty(), doc.is_empty()) {
                (true, true) => format!("add `{key}: …`"),
                (false, true) => format!("add `{key}: …`, {accepted}"),
                (true, false) => format!("add `{key}: …` ({doc})"),
                (false, false) => format!("add `{key}: …`, {accepted} ({doc})"),
            }
        });
        Finding {
            pointer: pointer.to_owned(),
            at_key: false,
            message,
            hint,
            about_keys: true,
            missing: Some(key.to_owned()),
            meant: None,
        }
    }

    /// Explains a value that fits none of several alternatives.
    fn alternatives(
        &self,
        error: &ValidationError<'_>,
        context: &[Vec<ValidationError<'static>>],
        node: &Value,
        out: &mut Vec<Finding>,
    ) {
        let here = error.instance_path().as_str();
        let value = error.instance().as_ref();
        // Alternatives of the right type, whose problems lie deeper.
        let mut close: Vec<&Vec<ValidationError<'static>>> = context
            .iter()
            .filter(|errors| !errors.iter().any(|e| is_mismatch(e) && path(e) == here))
            .collect();
        // Alternatives told apart by a tag inside are out if the tag differs.
        let tagged: Vec<_> =
            close.iter().copied().filter(|errors| !errors.iter().any(is_constant)).collect();
        if tagged.is_empty() && close.len() > 1 {
            if let Some(finding) = self.unknown_tag(here, value, &close) {
                out.push(finding);
                return;
            }
        } else if !tagged.is_empty() {
            close = tagged;
        }
        let deeper =
            |errors: &&Vec<ValidationError<'static>>| errors.iter().all(|e| path(e) != here);
        let chosen = match close.as_slice() {
            [only] => Some(*only),
            several => several.iter().copied().filter(|e| deeper(e)).min_by_key(|e| e.len()),
        };
        if let Some(errors) = chosen {
            errors.iter().for_each(|e| self.explain(e, out));
            return;
        }
        let consts = constants(node, self.schema);
        let near = value.as_str().and_then(|s| nearest(s, consts.iter().map(String::as_str)));
        let hint = near.map(|near| format!("did you mean `{near}`?"));
        let message = format!(
            "{} must be {}, found {}",
            self.name(here),
            accepted(node, self.schema),
            describe_json(value)
        );
        out.push(Finding {
            pointer: here.to_owned(),
            at_key: false,
            message,
            hint,
            about_keys: false,
            missing: None,
            meant: None,
        });
    }

    /// Alternatives told apart by one constant (`by: steps`), none of which is the one given.
    fn unknown_tag(
        &self,
        here: &str,
        value: &Value,
        close: &[&Vec<ValidationError<'static>>],
    ) -> Option<Finding> {
        let tag = |errors: &&Vec<ValidationError<'static>>| {
            errors.iter().find(|e| is_constant(e)).map(|e| path(e).to_owned())
        };
        let pointer = tag(close.first()?)?;
        if close.iter().any(|errors| tag(errors).as_deref() != Some(pointer.as_str())) {
            return None;
        }
        let tags: Vec<String> = close
            .iter()
            .flat_map(|errors| errors.iter().filter(|e| is_constant(e) && path(e) == pointer))
            .flat_map(|e| constants(self.schema_of(e), self.schema))
            .collect();
        let found = value.pointer(pointer.strip_prefix(here)?)?;
        let near = found.as_str().and_then(|s| nearest(s, tags.iter().map(String::as_str)));
        let one_of = if tags.len() > 2 { "one of " } else { "" };
        let message = format!(
            "{} must be {one_of}{}, found {}",
            self.name(&pointer),
            list(&tags, "or"),
            describe_json(found)
        );
        let hint = near.map(|near| format!("did you mean `{near}`?"));
        Some(Finding {
            pointer,
            at_key: false,
            message,
            hint,
            about_keys: false,
            missing: None,
            meant: None,
        })
    }

    /// The schema that has the keyword an error is about.
    fn schema_of(&self, error: &ValidationError<'_>) -> &Value {
        let path = error.schema_path().as_str();
        let path = &path[..path.rfind('/').unwrap_or(0)];
        let mut node = self.schema;
        for segment in path.split('/').skip(1) {
            let segment = segment.replace("~1", "/").replace("~0", "~");
            let next = step(node, &segment).or_else(|| {
                if segment == "$ref" { Some(follow_ref(node, self.schema)) } else { None }
            });
            match next.or_else(|| step(follow_ref(node, self.schema), &segment)) {
                Some(next) => node = next,
                None => return &Value::Null,
            }
        }
        follow_ref(node, self.schema)
    }
}

fn step<'a>(node: &'a Value, segment: &str) -> Option<&'a Value> {
    match node {
        Value::Object(map) if segment == "$ref" => map.get(segment).filter(|v| !v.is_string()),
        Value::Object(map) => map.get(segment),
        Value::Array(items) => items.get(segment.parse::<usize>().ok()?),
        _ => None,
    }
}

/// The first line of a doc comment, without its period.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or("").trim_end_matches('.').to_owned()
}

fn path<'a>(error: &'a ValidationError<'_>) -> &'a str {
    error.instance_path().as_str()
}

fn is_constant(error: &ValidationError<'_>) -> bool {
    matches!(error.kind(), ValidationErrorKind::Constant { .. } | ValidationErrorKind::Enum { .. })
}

fn is_mismatch(error: &ValidationError<'_>) -> bool {
    is_constant(error) || matches!(error.kind(), ValidationErrorKind::Type { .. })
}

/// `/split/train` → `split.train`, `/files/0` → `files[0]`.
pub(crate) fn dotted(pointer: &str) -> String {
    let mut out = String::new();
    for segment in pointer.split('/').skip(1) {
        let segment = segment.replace("~1", "/").replace("~0", "~");
        if !segment.is_empty() && segment.bytes().all(|b| b.is_ascii_digit()) {
            out.push_str(&format!("[{segment}]"));
        } else {
            if !out.is_empty() {
                out.push('.');
            }
            out.push_str(&segment);
        }
    }
    out
}

fn type_names(kind: &TypeKind) -> String {
    match kind {
        TypeKind::Single(t) => type_name(t.as_str()).to_owned(),
        TypeKind::Multiple(set) => {
            let names: Vec<&str> =
                set.iter().map(|t| type_name(t.as_str())).filter(|n| *n != "nothing").collect();
            names.join(" or ")
        }
    }
}

fn type_name(name: &str) -> &str {
    match name {
        "string" => "a string",
        "integer" => "an integer",
        "number" => "a number",
        "boolean" => "`true` or `false`",
        "array" => "a list",
        "object" => "a mapping",
        "null" => "nothing",
        other => other,
    }
}

/// What a schema accepts, in words: `a number`, `` `linear`, `cosine` or `constant` ``,
/// `a string or a list of strings`. Empty if it says nothing.
pub(crate) fn accepted(schema: &Value, root: &Value) -> String {
    let mut forms = Vec::new();
    let mut consts = Vec::new();
    collect(schema, root, 0, &mut forms, &mut consts);
    if !consts.is_empty() {
        let choice = list(&consts, "or");
        let choice = if consts.len() > 2 { format!("one of {choice}") } else { choice };
        forms.insert(0, choice);
    }
    forms.join(" or ")
}

/// The constants a schema accepts.
fn constants(schema: &Value, root: &Value) -> Vec<String> {
    let (mut forms, mut consts) = (Vec::new(), Vec::new());
    collect(schema, root, 0, &mut forms, &mut consts);
    consts
}

fn collect(
    schema: &Value,
    root: &Value,
    depth: usize,
    forms: &mut Vec<String>,
    consts: &mut Vec<String>,
) {
    if depth > 8 {
        return;
    }
    let schema = follow_ref(schema, root);
    let mut constant = |value: &Value| {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        if !value.is_null() && !consts.contains(&text) {
            consts.push(text);
        }
    };
    if let Some(value) = schema.get("const") {
        return constant(value);
    }
    if let Some(values) = schema.get("enum").and_then(Value::as_array) {
        return values.iter().for_each(constant);
    }
    for key in ["anyOf", "oneOf", "allOf"] {
        if let Some(parts) = schema.get(key).and_then(Value::as_array) {
            parts.iter().for_each(|part| collect(part, root, depth + 1, forms, consts));
            return;
        }
    }
    let types: Vec<&str> = match schema.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    for name in types {
        let form = match name {
            "null" => continue,
            "array" => match schema.get("items").map(|i| accepted(i, root)) {
                Some(item) => match plural(&item) {
                    Some(items) => format!("a list of {items}"),
                    None => "a list".to_owned(),
                },
                None => "a list".to_owned(),
            },
            "object" => match single_key(schema) {
                Some(key) => format!("`{{ {key}: … }}`"),
                None => "a mapping".to_owned(),
            },
            name => type_name(name).to_owned(),
        };
        if !forms.contains(&form) {
            forms.push(form);
        }
    }
}

fn plural(item: &str) -> Option<&'static str> {
    Some(match item {
        "a string" => "strings",
        "a number" => "numbers",
        "an integer" => "integers",
        "a mapping" => "mappings",
        "a list" => "lists",
        _ => return None,
    })
}

/// The one key that an object must and may have.
fn single_key(schema: &Value) -> Option<&str> {
    let closed = schema.get("additionalProperties") == Some(&Value::Bool(false));
    match schema.get("required")?.as_array()?.as_slice() {
        [only] if closed && schema.get("properties")?.as_object()?.len() == 1 => only.as_str(),
        _ => None,
    }
}

//! YAML text → a tree in which every key and every value has its place.
//!
//! The only file that knows the YAML parser. It reads YAML 1.2 by the core schema (`yes` and `on`
//! are strings), and is stricter where YAML surprises: a key stands once in a mapping, a number
//! with a leading zero is a string, tags other than the core ones are refused, and so are files
//! that blow up through aliases or nest without end.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use granit_parser::{ErrorKind, Event, Parser, ScalarStyle, ScanError, StructureStyle, Tag};
use serde_json::{Number, Value};

use crate::scalar::resolve_plain;
use crate::source::{Diagnostic, SourceFile, Span};

/// Most values a file may have once its aliases are followed.
const MAX_NODES: usize = 1_000_000;
/// Deepest nesting of lists and mappings.
const MAX_DEPTH: usize = 64;
/// Largest file in bytes.
const MAX_BYTES: usize = 8 << 20;

/// A value and its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The value.
    pub value: NodeValue,
    /// Where it stands.
    pub span: Span,
}

/// What a [`Node`] holds.
#[derive(Debug, Clone, PartialEq)]
pub enum NodeValue {
    /// Nothing, `~` or `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number that is finite and fits in 64 bits.
    Number(Number),
    /// Text.
    String(String),
    /// A list.
    Seq(Vec<Node>),
    /// A mapping in the order written.
    Map(Vec<(Key, Node)>),
}

/// A key of a mapping and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The key.
    pub name: String,
    /// Where it stands.
    pub span: Span,
}

impl Node {
    /// The value as JSON.
    pub fn to_json(&self) -> Value {
        match &self.value {
            NodeValue::Null => Value::Null,
            NodeValue::Bool(b) => Value::Bool(*b),
            NodeValue::Number(n) => Value::Number(n.clone()),
            NodeValue::String(s) => Value::String(s.clone()),
            NodeValue::Seq(items) => items.iter().map(Node::to_json).collect(),
            NodeValue::Map(entries) => {
                let entries = entries.iter().map(|(k, v)| (k.name.clone(), v.to_json()));
                Value::Object(entries.collect())
            }
        }
    }

    /// A tree of the same value whose parts all stand at one place.
    pub fn from_json(value: &Value, span: Span) -> Self {
        let value = match value {
            Value::Null => NodeValue::Null,
            Value::Bool(b) => NodeValue::Bool(*b),
            Value::Number(n) => NodeValue::Number(n.clone()),
            Value::String(s) => NodeValue::String(s.clone()),
            Value::Array(items) => {
                NodeValue::Seq(items.iter().map(|v| Self::from_json(v, span)).collect())
            }
            Value::Object(map) => NodeValue::Map(
                map.iter()
                    .map(|(k, v)| (Key { name: k.clone(), span }, Self::from_json(v, span)))
                    .collect(),
            ),
        };
        Self { value, span }
    }

    /// The string, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        if let NodeValue::String(s) = &self.value { Some(s) } else { None }
    }

    /// The value of a key, if this is a mapping that has it.
    pub fn get(&self, name: &str) -> Option<&Node> {
        let NodeValue::Map(entries) = &self.value else { return None };
        entries.iter().find(|(k, _)| k.name == name).map(|(_, v)| v)
    }

    /// Moves all places by a number of bytes.
    pub fn shift(&mut self, by: usize) {
        let moved = |span: Span| Span::new(span.start + by, span.end + by);
        self.span = moved(self.span);
        match &mut self.value {
            NodeValue::Seq(items) => items.iter_mut().for_each(|item| item.shift(by)),
            NodeValue::Map(entries) => {
                for (key, node) in entries {
                    key.span = moved(key.span);
                    node.shift(by);
                }
            }
            _ => {}
        }
    }

    /// What it is, for messages: `the string `x``, `a list`, ….
    pub fn describe(&self) -> String {
        describe_json(&self.to_json())
    }

    /// Places of all keys and values below, by JSON pointer.
    pub fn places(&self) -> Places {
        fn walk(node: &Node, pointer: &str, places: &mut Places) {
            places.values.insert(pointer.to_owned(), node.span);
            match &node.value {
                NodeValue::Seq(items) => {
                    for (i, item) in items.iter().enumerate() {
                        walk(item, &format!("{pointer}/{i}"), places);
                    }
                }
                NodeValue::Map(entries) => {
                    for (key, value) in entries {
                        let pointer = format!("{pointer}/{}", escape_pointer(&key.name));
                        places.keys.insert(pointer.clone(), key.span);
                        walk(value, &pointer, places);
                    }
                }
                _ => {}
            }
        }
        let mut places = Places::default();
        walk(self, "", &mut places);
        places
    }

    fn depth(&self) -> usize {
        match &self.value {
            NodeValue::Seq(items) => 1 + items.iter().map(Node::depth).max().unwrap_or(0),
            NodeValue::Map(entries) => {
                1 + entries.iter().map(|(_, v)| v.depth()).max().unwrap_or(0)
            }
            _ => 0,
        }
    }

    fn size(&self) -> usize {
        match &self.value {
            NodeValue::Seq(items) => 1 + items.iter().map(Node::size).sum::<usize>(),
            NodeValue::Map(entries) => 1 + entries.iter().map(|(_, v)| v.size()).sum::<usize>(),
            _ => 1,
        }
    }
}

/// Places by JSON pointer.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// Of the keys.
    pub keys: BTreeMap<String, Span>,
    /// Of the values.
    pub values: BTreeMap<String, Span>,
}

/// A key as a segment of a JSON pointer.
pub fn escape_pointer(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

/// What a value is, for messages: `the string `x``, `a list`, ….
pub fn describe_json(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(b) => format!("`{b}`"),
        Value::Number(n) => format!("the number `{n}`"),
        Value::String(s) if s.is_empty() => "an empty string".to_owned(),
        Value::String(s) => format!("the string `{}`", shorten(s)),
        Value::Array(items) if items.is_empty() => "an empty list".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a mapping".to_owned(),
    }
}

/// One line of at most forty characters.
pub fn shorten(text: &str) -> String {
    let line = text.lines().next().unwrap_or("");
    if line.chars().count() <= 40 && line.len() == text.len() {
        return text.to_owned();
    }
    line.chars().take(40).chain(['…']).collect()
}

/// Parses a whole file.
///
/// # Errors
/// The first syntax error, or all duplicate keys and other problems of a well-formed file.
pub fn parse(source: &Arc<SourceFile>) -> Result<Node, Vec<Diagnostic>> {
    parse_range(source, 0)
}

/// Parses what stands from a byte offset to the end; places count from the start of the file.
pub fn parse_range(source: &Arc<SourceFile>, start: usize) -> Result<Node, Vec<Diagnostic>> {
    let Some(text) = source.text.get(start..) else {
        return Err(vec![Diagnostic::new(source, None, "this is not UTF-8 text")]);
    };
    if text.len() > MAX_BYTES {
        let message = format!("the file is larger than {} MiB", MAX_BYTES >> 20);
        return Err(vec![Diagnostic::new(source, None, message)]);
    }
    let options = granit_parser::options! {
        flow_nesting_limit: 4 * MAX_DEPTH,
        block_nesting_limit: 4 * MAX_DEPTH,
        emit_comments: false,
    };
    let mut tree = Tree::new(source, start);
    for event in Parser::new_from_str_with_options(text, options) {
        let step = match event {
            Ok((event, span)) => {
                let span = Span::new(
                    start + byte_offset(text, span.start),
                    start + byte_offset(text, span.end),
                );
                tree.event(event, span)
            }
            Err(e) => Err(syntax_error(source, start + byte_offset(text, *e.marker()), &e)),
        };
        if let Err(fatal) = step {
            tree.problems.push(fatal);
            return Err(tree.problems);
        }
    }
    if !tree.problems.is_empty() {
        return Err(tree.problems);
    }
    let end = Span::new(start, start);
    Ok(tree.root.unwrap_or(Node { value: NodeValue::Null, span: end }))
}

fn byte_offset(text: &str, marker: granit_parser::Marker) -> usize {
    let offset = marker
        .byte_offset()
        .unwrap_or_else(|| text.char_indices().nth(marker.index()).map_or(text.len(), |(i, _)| i));
    let mut offset = offset.min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    offset
}

fn syntax_error(source: &Arc<SourceFile>, offset: usize, e: &ScanError) -> Diagnostic {
    let message = match e.kind() {
        ErrorKind::UnknownAnchor => "this alias refers to no anchor before it".to_owned(),
        ErrorKind::RecursionLimitExceeded => {
            format!("lists and mappings are nested deeper than {MAX_DEPTH} levels")
        }
        kind => {
            let text = kind.to_string();
            let text = text.replace(" EOF ", " end of the file ").replace("eof", "end of the file");
            format!("this is not valid YAML: {text}")
        }
    };
    let text = &source.text;
    let line_start = text[..offset].rfind('\n').map_or(0, |i| i + 1);
    let line = text[line_start..].lines().next().unwrap_or("");
    let hint = match e.kind() {
        ErrorKind::TabNotAllowed
        | ErrorKind::TabInBlockIndentation
        | ErrorKind::TabInIndentation
        | ErrorKind::TabInPlainScalar => Some("indent with spaces, never with tabs"),
        _ if line.contains("${{") => Some("put quotes around expressions: `\"${{ … }}\"`"),
        ErrorKind::MappingValueNotAllowed | ErrorKind::InvalidColonPlacement => {
            Some("put quotes around a value that contains `: `, and check the indentation")
        }
        ErrorKind::UnclosedQuotedScalar => Some("add the closing quote"),
        ErrorKind::UnclosedFlowCollection { open } if *open == '{' => Some("add the closing `}`"),
        ErrorKind::UnclosedFlowCollection { .. } => Some("add the closing `]`"),
        ErrorKind::InvalidIndentation
        | ErrorKind::ExpectedBlockMappingKey
        | ErrorKind::SimpleKeyExpected => {
            Some("check that keys of one mapping start in the same column and end in `: `")
        }
        _ => None,
    };
    Diagnostic::new(source, Span::new(offset, offset), message)
        .with_hint_opt(hint.map(str::to_owned))
}

/// The tree while the parser's events come in.
struct Tree<'a> {
    source: &'a Arc<SourceFile>,
    /// Lists and mappings that are still open, outermost first.
    open: Vec<Open>,
    /// Anchored nodes by the parser's number; none while the node is still open.
    anchors: HashMap<usize, Option<Node>>,
    root: Option<Node>,
    documents: usize,
    nodes: usize,
    end: usize,
    problems: Vec<Diagnostic>,
}

struct Open {
    start: usize,
    anchor: usize,
    flow: bool,
    content: Content,
}

enum Content {
    Seq(Vec<Node>),
    Map(MapContent),
}

#[derive(Default)]
struct MapContent {
    entries: Vec<(Key, Node)>,
    /// Places of all keys so far, once there are too many to look through.
    places: HashMap<String, Span>,
    /// The key whose value comes next.
    key: Option<PendingKey>,
    /// Mappings under `<<`, the earlier ones winning.
    merged: Vec<(Key, Node)>,
}

impl MapContent {
    /// Where a key stands already.
    fn place(&mut self, name: &str) -> Option<Span> {
        const FEW: usize = 16;
        if self.entries.len() <= FEW {
            return self.entries.iter().find(|(k, _)| k.name == name).map(|(k, _)| k.span);
        }
        let known = self.places.len();
        self.places.extend(self.entries[known..].iter().map(|(k, _)| (k.name.clone(), k.span)));
        self.places.get(name).copied()
    }
}

enum PendingKey {
    Entry(Key),
    Merge(Span),
    /// A repeated key, whose value is dropped.
    Dropped,
}

impl<'a> Tree<'a> {
    fn new(source: &'a Arc<SourceFile>, start: usize) -> Self {
        Self {
            source,
            open: Vec::new(),
            anchors: HashMap::new(),
            root: None,
            documents: 0,
            nodes: 0,
            end: start,
            problems: Vec::new(),
        }
    }

    fn problem(&self, span: Span, message: impl Into<String>) -> Diagnostic {
        Diagnostic::new(self.source, span, message)
    }

    /// Takes one event. An error is one that makes going on pointless.
    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), Diagnostic> {
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err(self
                        .problem(span, "a second YAML document starts here")
                        .with_hint("a file holds one document: remove the `---`"));
                }
                Ok(())
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.count(1, span)?;
                self.end = span.end;
                if self.expects_key().is_some() {
                    let merge = text == "<<" && style == ScalarStyle::Plain;
                    let key = Key { name: text.into_owned(), span };
                    if anchor != 0 {
                        let node = Node { value: NodeValue::String(key.name.clone()), span };
                        self.anchors.insert(anchor, Some(node));
                    }
                    return self.key(key, merge);
                }
                let value = match resolve(&text, style, tag.as_deref()) {
                    Ok(value) => value,
                    Err((message, hint)) => {
                        let problem = self.problem(span, message).with_hint(hint);
                        self.problems.push(problem);
                        NodeValue::Null
                    }
                };
                self.complete(Node { value, span }, anchor)
            }
            Event::SequenceStart(style, anchor, tag) => {
                self.start(Content::Seq(Vec::new()), "seq", style, anchor, tag.as_deref(), span)
            }
            Event::MappingStart(style, anchor, tag) => {
                let content = Content::Map(MapContent::default());
                self.start(content, "map", style, anchor, tag.as_deref(), span)
            }
            Event::SequenceEnd | Event::MappingEnd => self.finish(span),
            Event::Alias(id) => {
                let node = match self.anchors.get(&id) {
                    Some(Some(node)) => node.clone(),
                    _ => return Err(self.problem(span, "this alias refers to itself")),
                };
                self.end = span.end;
                self.count(node.size(), span)?;
                if self.open.len() + node.depth() > MAX_DEPTH {
                    return Err(self.too_deep(span));
                }
                if self.expects_key().is_some() {
                    return match node.value {
                        NodeValue::String(name) => self.key(Key { name, span }, false),
                        _ => Err(self.problem(span, "a key must be a plain word")),
                    };
                }
                self.complete(node, 0)
            }
            _ => Ok(()),
        }
    }

    fn count(&mut self, n: usize, span: Span) -> Result<(), Diagnostic> {
        self.nodes += n;
        if self.nodes > MAX_NODES {
            return Err(self
                .problem(span, format!("the file holds more than {MAX_NODES} values"))
                .with_hint("aliases count with everything they stand for"));
        }
        Ok(())
    }

    fn too_deep(&self, span: Span) -> Diagnostic {
        let message = format!("lists and mappings are nested deeper than {MAX_DEPTH} levels");
        self.problem(span, message)
    }

    /// The innermost mapping, if its next node is a key.
    fn expects_key(&mut self) -> Option<&mut MapContent> {
        match self.open.last_mut() {
            Some(Open { content: Content::Map(map), .. }) if map.key.is_none() => Some(map),
            _ => None,
        }
    }

    fn key(&mut self, key: Key, merge: bool) -> Result<(), Diagnostic> {
        let source = self.source;
        let Some(map) = self.expects_key() else { return Ok(()) };
        if merge {
            map.key = Some(PendingKey::Merge(key.span));
            return Ok(());
        }
        let Some(first) = map.place(&key.name) else {
            map.key = Some(PendingKey::Entry(key));
            return Ok(());
        };
        map.key = Some(PendingKey::Dropped);
        let (line, column) = source.line_column(first.start);
        let problem = self
            .problem(key.span, format!("`{}` is already given at {line}:{column}", key.name))
            .with_label("second time");
        self.problems.push(problem);
        Ok(())
    }

    fn start(
        &mut self,
        content: Content,
        core_tag: &str,
        style: StructureStyle,
        anchor: usize,
        tag: Option<&Tag>,
        span: Span,
    ) -> Result<(), Diagnostic> {
        self.count(1, span)?;
        if self.expects_key().is_some() {
            return Err(self
                .problem(span, "a key must be a plain word, not a list or a mapping")
                .with_hint("put quotes around text that starts with `{` or `[`"));
        }
        if self.open.len() >= MAX_DEPTH {
            return Err(self.too_deep(span));
        }
        if let Some(tag) = tag.filter(|t| t.core_suffix() != Some(core_tag)) {
            let problem =
                self.problem(span, format!("the tag `{}` is not supported", tag.original()));
            self.problems.push(problem);
        }
        if anchor != 0 {
            self.anchors.insert(anchor, None);
        }
        self.end = span.end;
        let flow = style == StructureStyle::Flow;
        self.open.push(Open { start: span.start, anchor, flow, content });
        Ok(())
    }

    fn finish(&mut self, span: Span) -> Result<(), Diagnostic> {
        let Some(open) = self.open.pop() else { return Ok(()) };
        // The end of a block collection is only seen at the next token, maybe lines below.
        if open.flow {
            self.end = span.end;
        }
        let value = match open.content {
            Content::Seq(items) => NodeValue::Seq(items),
            Content::Map(map) => {
                let mut entries = map.entries;
                for (key, value) in map.merged {
                    if !entries.iter().any(|(k, _)| k.name == key.name) {
                        entries.push((key, value));
                    }
                }
                NodeValue::Map(entries)
            }
        };
        self.complete(Node { value, span: Span::new(open.start, self.end) }, open.anchor)
    }

    /// Puts a whole node where it belongs.
    fn complete(&mut self, node: Node, anchor: usize) -> Result<(), Diagnostic> {
        if anchor != 0 {
            self.anchors.insert(anchor, Some(node.clone()));
        }
        match self.open.last_mut().map(|o| &mut o.content) {
            None => self.root = Some(node),
            Some(Content::Seq(items)) => items.push(node),
            Some(Content::Map(map)) => match map.key.take() {
                Some(PendingKey::Entry(key)) => map.entries.push((key, node)),
                Some(PendingKey::Merge(span)) => return self.merge(node, span),
                Some(PendingKey::Dropped) | None => {}
            },
        }
        Ok(())
    }

    /// `<<: *defaults` or `<<: [*a, *b]`.
    fn merge(&mut self, node: Node, key: Span) -> Result<(), Diagnostic> {
        let maps = match node.value {
            NodeValue::Seq(items) => items,
            _ => vec![node],
        };
        for map in maps {
            let NodeValue::Map(entries) = map.value else {
                let problem = self
                    .problem(key, "`<<` takes a mapping or a list of mappings")
                    .with_hint("put quotes around `\"<<\"` if it is a key of its own");
                self.problems.push(problem);
                continue;
            };
            if let Some(Open { content: Content::Map(into), .. }) = self.open.last_mut() {
                for (key, value) in entries {
                    if !into.merged.iter().any(|(k, _)| k.name == key.name) {
                        into.merged.push((key, value));
                    }
                }
            }
        }
        Ok(())
    }
}

/// The value of a scalar by the core schema; an error is a message and a hint.
fn resolve(
    text: &str,
    style: ScalarStyle,
    tag: Option<&Tag>,
) -> Result<NodeValue, (String, String)> {
    let string = || Ok(NodeValue::String(text.to_owned()));
    let Some(tag) = tag else {
        return if style == ScalarStyle::Plain { resolve_plain(text) } else { string() };
    };
    let wanted = tag.core_suffix().unwrap_or("");
    let fits = |value: &NodeValue| match (wanted, value) {
        ("null", NodeValue::Null) | ("bool", NodeValue::Bool(_)) => true,
        ("int", NodeValue::Number(n)) => !n.is_f64(),
        ("float", NodeValue::Number(_)) => true,
        _ => false,
    };
    match wanted {
        "str" => string(),
        "null" | "bool" | "int" | "float" => match resolve_plain(text)? {
            value if fits(&value) => Ok(value),
            _ => Err((
                format!("`{text}` is not what the tag `{}` says", tag.original()),
                "remove the tag".to_owned(),
            )),
        },
        _ => Err((
            format!("the tag `{}` is not supported", tag.original()),
            "put quotes around text that starts with `!`".to_owned(),
        )),
    }
}

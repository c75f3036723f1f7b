//! Where the assistant speaks in a rendered chat.
//!
//! Two ways. Templates with `{% generation %}` blocks (transformers' extension) say it
//! themselves: the block becomes a filter block that puts a mark before and after its text, so
//! white space control works as for any block. For other templates the conversation is rendered
//! up to each assistant turn and after it; what the turn added is what the assistant said. That
//! holds only if each shorter rendering is a prefix of the whole, which is checked.

use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;

/// Marks around generated text; both are noncharacters that no text should hold.
const START: char = '\u{fdd0}';
const END: char = '\u{fdd1}';

/// Name of the filter that stands for a generation block.
pub(crate) const FILTER: &str = "__assistant";

static GENERATION: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("pattern is valid")
});

/// The template with its generation blocks as filter blocks; none if it has no such block.
pub(crate) fn with_filter_blocks(template: &str) -> Option<String> {
    GENERATION.is_match(template).then(|| {
        GENERATION
            .replace_all(template, |found: &regex::Captures| {
                let (left, right) = (&found[1], &found[3]);
                match found.get(2) {
                    None => format!("{{%{left} filter {FILTER} {right}%}}"),
                    Some(_) => format!("{{%{left} endfilter {right}%}}"),
                }
            })
            .into_owned()
    })
}

/// The filter: marks a text.
pub(crate) fn mark(text: &str) -> String {
    format!("{START}{text}{END}")
}

/// Whether a text holds a mark, which would be taken for one of ours.
pub(crate) fn holds_mark(text: &str) -> bool {
    text.contains([START, END])
}

/// Takes the marks out of a rendered text and gives the ranges that stood between them.
pub(crate) fn unmark(marked: &str) -> (String, Vec<Range<usize>>) {
    let mut text = String::with_capacity(marked.len());
    let mut spans = Vec::new();
    let mut start = None;
    for piece in marked.split_inclusive([START, END]) {
        let body = piece.trim_end_matches([START, END]);
        text.push_str(body);
        if piece.ends_with(START) {
            start.get_or_insert(text.len());
        } else if piece.ends_with(END)
            && let Some(start) = start.take()
            && start < text.len()
        {
            spans.push(start..text.len());
        }
    }
    (text, spans)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_keep_their_white_space_control() {
        let template = "{%- generation -%} x {%+ endgeneration %}";
        assert_eq!(
            with_filter_blocks(template).unwrap(),
            "{%- filter __assistant -%} x {%+ endfilter %}"
        );
        assert_eq!(with_filter_blocks("{% set generation = 1 %}"), None);
    }

    #[test]
    fn marks_are_taken_out() {
        let marked = format!("a{}b{}", mark("hé"), mark(""));
        let (text, spans) = unmark(&marked);
        assert_eq!(text, "ahéb");
        assert_eq!(spans, vec![1..4]);
    }
}

//! HTML of a book's page → Markdown blocks.
//!
//! Knows the markup that mdBook writes: hidden playground lines, footnotes, the Reference's rule
//! anchors, grammars and railroad drawings. Unknown elements are passed through for their text.

use scraper::{ElementRef, Html, Node};

/// A piece of a page, in reading order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Block {
    /// A heading of level 1 to 6, without the `#`.
    Heading(usize, String),
    /// A paragraph, list, quotation or definition.
    Prose(String),
    /// A fenced code block or a table.
    Verbatim(String),
}

impl Block {
    /// The Markdown text.
    pub fn text(&self) -> String {
        match self {
            Self::Heading(level, text) => format!("{} {text}", "#".repeat(*level)),
            Self::Prose(text) | Self::Verbatim(text) => text.clone(),
        }
    }
}

/// Converts the inside of a page's `<main>`.
pub fn blocks(html: &str) -> Vec<Block> {
    let document = Html::parse_fragment(html);
    let mut out = Blocks::default();
    out.children(document.root_element());
    out.blocks
}

/// Elements that are part of the site, not of the text.
fn is_furniture(element: ElementRef) -> bool {
    const TAGS: &[&str] = &[
        "script", "style", "svg", "button", "input", "nav", "noscript", "template", "img", "iframe",
    ];
    const CLASSES: &[&str] = &[
        "boring",
        "rule",
        "test-link",
        "tests-popup",
        "popup-container",
        "grammar-railroad",
        "buttons",
        "footnote-backlink",
    ];
    TAGS.contains(&element.value().name())
        || element.value().classes().any(|class| CLASSES.contains(&class))
        // The way back from a footnote.
        || element.value().name() == "a" && element.text().next().is_some_and(|t| t.starts_with('↩'))
}

fn has_class(element: ElementRef, class: &str) -> bool {
    element.value().classes().any(|c| c == class)
}

fn is_block(name: &str) -> bool {
    matches!(
        name,
        "p" | "div"
            | "section"
            | "article"
            | "main"
            | "header"
            | "footer"
            | "h1"
            | "h2"
            | "h3"
            | "h4"
            | "h5"
            | "h6"
            | "pre"
            | "ul"
            | "ol"
            | "li"
            | "dl"
            | "dt"
            | "dd"
            | "table"
            | "blockquote"
            | "figure"
            | "figcaption"
            | "hr"
            | "details"
            | "summary"
            | "center"
    )
}

/// Collects blocks; inline content between block elements becomes a paragraph.
#[derive(Default)]
struct Blocks {
    blocks: Vec<Block>,
    inline: Inline,
}

impl Blocks {
    fn children(&mut self, parent: ElementRef) {
        for child in parent.children() {
            match (child.value(), ElementRef::wrap(child)) {
                (Node::Text(text), _) => self.inline.text(text),
                (_, Some(element)) if is_furniture(element) => {}
                (_, Some(element)) if is_block(element.value().name()) => self.block(element),
                (_, Some(element)) => self.inline.element(element),
                _ => {}
            }
        }
        self.flush();
    }

    /// Ends the paragraph under way.
    fn flush(&mut self) {
        let text = std::mem::take(&mut self.inline).finish();
        if !text.is_empty() {
            self.blocks.push(Block::Prose(text));
        }
    }

    fn block(&mut self, element: ElementRef) {
        self.flush();
        match element.value().name() {
            "hr" => {}
            "pre" => self.blocks.extend(code(element).map(Block::Verbatim)),
            "table" => self.blocks.extend(table(element).map(Block::Verbatim)),
            "ul" | "ol" => self.blocks.extend(list(element).map(Block::Prose)),
            "dl" => self.blocks.extend(definitions(element).into_iter().map(Block::Prose)),
            "blockquote" => {
                let text = inner(element);
                if !text.is_empty() {
                    self.blocks.push(Block::Prose(prefix_lines(&text, "> ", "> ")));
                }
            }
            "div" if has_class(element, "grammar-container") => {
                self.blocks.extend(grammar(element).map(Block::Verbatim));
            }
            name @ ("h1" | "h2" | "h3" | "h4" | "h5" | "h6") => {
                let mut inline = Inline::default();
                inline.children(element);
                let text = inline.finish();
                if !text.is_empty() {
                    let level = usize::from(name.as_bytes()[1] - b'0');
                    self.blocks.push(Block::Heading(level, text));
                }
            }
            _ => self.children(element),
        }
    }
}

/// The blocks inside an element, as one text.
fn inner(element: ElementRef) -> String {
    let mut inside = Blocks::default();
    inside.children(element);
    let texts: Vec<String> = inside.blocks.iter().map(Block::text).collect();
    texts.join("\n\n")
}

fn prefix_lines(text: &str, first: &str, rest: &str) -> String {
    let mut out = String::new();
    for (i, line) in text.lines().enumerate() {
        let prefix = if i == 0 { first } else { rest };
        out.push_str(if line.is_empty() { prefix.trim_end() } else { prefix });
        out.push_str(line);
        out.push('\n');
    }
    out.truncate(out.trim_end().len());
    out
}

/// A fenced code block, without the lines that the page hides.
fn code(pre: ElementRef) -> Option<String> {
    fn collect(element: ElementRef, out: &mut String) {
        for child in element.children() {
            match (child.value(), ElementRef::wrap(child)) {
                (Node::Text(text), _) => out.push_str(text),
                (_, Some(e)) if e.value().name() == "br" => out.push('\n'),
                (_, Some(e)) if !is_furniture(e) => collect(e, out),
                _ => {}
            }
        }
    }
    let code = pre.descendent_elements().find(|e| e.value().name() == "code");
    let mut text = String::new();
    collect(code.unwrap_or(pre), &mut text);
    let text = text.trim_end().trim_start_matches('\n');
    if text.trim().is_empty() {
        return None;
    }
    let language = code.and_then(|c| c.value().classes().find_map(|c| c.strip_prefix("language-")));
    Some(fence(language.map_or("", language_name), text))
}

/// Names of mdBook's code blocks, with the flags of doc tests taken as Rust.
fn language_name(class: &str) -> &str {
    match class {
        "Rust" | "rs" | "ignore" | "no_run" | "compile_fail" | "should_panic" => "rust",
        "txt" | "notrust" | "plain" | "plaintext" => "text",
        "C" => "c",
        "yml" => "yaml",
        "sh" | "shell" | "terminal" | "cmd" => "console",
        other => other,
    }
}

fn fence(language: &str, text: &str) -> String {
    // A fence must be longer than any run of backticks inside.
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let ticks = "`".repeat(longest.max(2) + 1);
    format!("{ticks}{language}\n{text}\n{ticks}")
}

/// A production of the Reference's grammar: plain lines, indented as shown.
fn grammar(container: ElementRef) -> Option<String> {
    let mut lines = Vec::new();
    for paragraph in container.descendent_elements().filter(|e| e.value().name() == "p") {
        let mut inline = Inline { plain: true, ..Inline::default() };
        inline.children(paragraph);
        lines.extend(inline.finish().lines().map(|l| l.trim_end().to_owned()));
    }
    let text = lines.join("\n");
    (!text.trim().is_empty()).then(|| fence("grammar", text.trim_end()))
}

fn table(table: ElementRef) -> Option<String> {
    let rows: Vec<String> = table
        .descendent_elements()
        .filter(|e| e.value().name() == "tr")
        .map(|row| {
            let cells: Vec<String> = row
                .child_elements()
                .map(|cell| inner(cell).split_whitespace().collect::<Vec<_>>().join(" "))
                .collect();
            format!("| {} |", cells.join(" | "))
        })
        .collect();
    (!rows.is_empty()).then(|| rows.join("\n"))
}

fn list(list: ElementRef) -> Option<String> {
    let ordered = list.value().name() == "ol";
    let footnotes = has_class(list, "footnote-definition");
    let first: usize = list.attr("start").and_then(|s| s.parse().ok()).unwrap_or(1);
    let items: Vec<String> = list
        .child_elements()
        .filter(|e| e.value().name() == "li")
        .map(inner)
        .filter(|text| !text.is_empty())
        .enumerate()
        .map(|(i, text)| {
            let number = first.saturating_add(i);
            let marker = match (footnotes, ordered) {
                (true, _) => format!("[^{number}]: "),
                (false, true) => format!("{number}. "),
                (false, false) => "- ".to_owned(),
            };
            prefix_lines(&text, &marker, &" ".repeat(marker.len().min(4)))
        })
        .collect();
    (!items.is_empty()).then(|| items.join("\n"))
}

/// The items of a definition list: all terms of one definition, then the definition.
fn definitions(list: ElementRef) -> Vec<String> {
    let mut items = Vec::new();
    let mut terms: Vec<String> = Vec::new();
    for element in list.child_elements() {
        let text = inner(element);
        match element.value().name() {
            "dt" => terms.push(text),
            "dd" => {
                let item = format!("{}:\n\n{text}", terms.join(", "));
                items.push(prefix_lines(item.trim_end(), "- ", "  "));
                terms.clear();
            }
            _ => {}
        }
    }
    if !terms.is_empty() {
        items.push(format!("- {}", terms.join(", ")));
    }
    items
}

/// Collects a line of text as a browser would show it: runs of white space are one space.
#[derive(Default)]
struct Inline {
    out: String,
    space: bool,
    /// No Markdown marks, non-breaking spaces kept as spaces (grammars).
    plain: bool,
}

impl Inline {
    fn text(&mut self, text: &str) {
        for c in text.chars() {
            match c {
                ' ' | '\n' | '\t' | '\r' => self.space = true,
                // Zero-width characters only tell browsers where a line may break.
                '\u{200b}' | '\u{feff}' | '\u{2060}' => {}
                '\u{a0}' => {
                    self.pending_space();
                    self.out.push(' ');
                }
                c => {
                    self.pending_space();
                    self.out.push(c);
                }
            }
        }
    }

    fn pending_space(&mut self) {
        if std::mem::take(&mut self.space) && !self.out.is_empty() && !self.out.ends_with('\n') {
            self.out.push(' ');
        }
    }

    fn children(&mut self, parent: ElementRef) {
        for child in parent.children() {
            match (child.value(), ElementRef::wrap(child)) {
                (Node::Text(text), _) => self.text(text),
                (_, Some(element)) if !is_furniture(element) => self.element(element),
                _ => {}
            }
        }
    }

    fn element(&mut self, element: ElementRef) {
        match element.value().name() {
            "br" => {
                self.space = false;
                self.out.truncate(self.out.trim_end_matches(' ').len());
                self.out.push('\n');
            }
            "sup" if has_class(element, "footnote-reference") => {
                if !self.plain {
                    self.marked(element, "[^", "]");
                }
            }
            _ if self.plain => self.children(element),
            "code" => {
                let ticks = if element.text().any(|t| t.contains('`')) { "``" } else { "`" };
                self.marked(element, ticks, ticks);
            }
            "em" | "i" => self.marked(element, "*", "*"),
            "strong" | "b" => self.marked(element, "**", "**"),
            "sup" => {
                // Powers, but not ordinals: 2^64, 1st.
                let text: String = element.text().collect();
                let power = text.trim_start_matches('-').chars().all(|c| c.is_ascii_digit())
                    || matches!(text.as_str(), "n" | "N");
                self.marked(element, if power { "^" } else { "" }, "");
            }
            _ => self.children(element),
        }
    }

    /// The element's text between marks; the space around it stays outside of them.
    fn marked(&mut self, element: ElementRef, open: &str, close: &str) {
        // Inside code there are no further marks.
        let mut inside = Inline { plain: self.plain || open.starts_with('`'), ..Inline::default() };
        inside.children(element);
        let leading = element.text().next().is_some_and(|t| t.starts_with([' ', '\n']));
        let trailing = inside.space;
        let text = inside.finish();
        if text.is_empty() {
            self.space |= leading || trailing;
            return;
        }
        self.space |= leading;
        self.pending_space();
        self.out.push_str(open);
        if open == "``" {
            self.out.push(' ');
        }
        self.out.push_str(&text);
        if open == "``" {
            self.out.push(' ');
        }
        self.out.push_str(close);
        self.space |= trailing;
    }

    fn finish(self) -> String {
        let text =
            if self.plain { self.out.trim_matches('\n').trim_end() } else { self.out.trim() };
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markdown(html: &str) -> String {
        blocks(html).iter().map(Block::text).collect::<Vec<_>>().join("\n\n")
    }

    #[test]
    fn headings_paragraphs_and_inline_marks() {
        let html = r##"<h2 id="x"><a class="header" href="#x">The <code>Box</code> Type</a></h2>
            <p>A <em>box</em> owns
            its <a href="y.html">value</a>, see <strong> here </strong>and <code>Box::new</code>.<br>Next
            line: 2<sup>64</sup>, 1<sup>st</sup>.</p>"##;
        assert_eq!(
            markdown(html),
            "## The `Box` Type\n\nA *box* owns its value, see **here** and `Box::new`.\nNext line: 2^64, 1st."
        );
    }

    #[test]
    fn hidden_lines_of_the_playground_are_left_out() {
        let html = r#"<pre class="playground"><code class="language-rust ignore edition2024"><span class="boring">#![allow(unused)]
</span><span class="boring">fn main() {
</span>let x = 1 &lt; 2;

    let y = x;
<span class="boring">}</span></code></pre>"#;
        assert_eq!(markdown(html), "```rust\nlet x = 1 < 2;\n\n    let y = x;\n```");
    }

    #[test]
    fn a_fence_is_longer_than_the_backticks_inside() {
        let html = "<pre><code class=\"language-markdown\">```rust\nfn f() {}\n```\n</code></pre>";
        assert_eq!(markdown(html), "````markdown\n```rust\nfn f() {}\n```\n````");
        assert_eq!(markdown("<p>a <code>`</code> b</p>"), "a `` ` `` b");
    }

    #[test]
    fn nested_lists_keep_their_shape() {
        let html = "<ol><li>one<ul><li>a</li><li><p>b</p><pre><code>x\n\ny</code></pre></li></ul></li><li>two</li></ol>";
        assert_eq!(
            markdown(html),
            "1. one\n\n   - a\n   - b\n\n     ```\n     x\n\n     y\n     ```\n2. two"
        );
    }

    #[test]
    fn definitions_quotations_and_tables() {
        let html = "<dl><dt><code>-p</code> <em>spec</em></dt><dt><code>--package</code></dt><dd><p>Only these.</p></dd></dl>
            <blockquote><p>Note</p><p>Be careful.</p></blockquote>
            <table><thead><tr><th>Type</th><th>Size</th></tr></thead><tbody><tr><td><code>u8</code></td><td>1
            byte</td></tr></tbody></table>";
        assert_eq!(
            markdown(html),
            "- `-p` *spec*, `--package`:\n\n  Only these.\n\n> Note\n>\n> Be careful.\n\n| Type | Size |\n| `u8` | 1 byte |"
        );
    }

    #[test]
    fn footnotes_become_markdown_footnotes() {
        let html = r##"<p>Text.<sup class="footnote-reference" id="fr-a-1"><a href="#footnote-a">1</a></sup> More.</p>
            <ol class="footnote-definition"><li id="footnote-a"><p>The note. <a href="#fr-a-1">↩</a> <a href="#fr-a-2">↩<sup>2</sup></a></p></li></ol>"##;
        assert_eq!(markdown(html), "Text.[^1] More.\n\n[^1]: The note.");
    }

    #[test]
    fn furniture_of_the_site_is_left_out() {
        let html = r##"<div class="rule" id="r-a"><a class="rule-link" href="#r-a"><span>[a<wbr>.b]</span></a></div>
            <p>Kept.</p><svg><text>drawn</text></svg><p><button>Show Railroad</button></p>
            <div class="grammar-railroad grammar-hidden"><p>railroad</p></div><script>var x;</script>
            <div class="popup-container"><p>hidden</p></div><!-- a comment --><hr><img alt="picture">"##;
        assert_eq!(markdown(html), "Kept.");
    }

    #[test]
    fn grammars_keep_their_lines() {
        let html = "<div class=\"grammar-container\"><p><strong><sup>Syntax</sup></strong><br>
            <span><a href=\"x\">Function</a></span> → <br>\u{a0}\u{a0}<span class=\"grammar-literal\">fn</span> <a>IDENT</a><sup>?</sup>\u{200b}<sup class=\"footnote-reference\">1</sup></p></div>";
        assert_eq!(markdown(html), "```grammar\nSyntax\nFunction →\n  fn IDENT?\n```");
    }

    #[test]
    fn malformed_html_gives_what_text_there_is() {
        assert_eq!(markdown("<p>open <em>and <code>on"), "open *and `on`*");
        assert_eq!(markdown("</div></p>text"), "text");
        assert_eq!(markdown(""), "");
    }
}

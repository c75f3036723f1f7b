//! Pages → rows: duplicates out, empty sections out, long pages cut where asked.

use std::collections::HashSet;

use crate::contents::Page;
use crate::markdown::Block;

/// A row of the data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// `book/page`, with `#2`, `#3` … for the further pieces of a page that was cut.
    pub id: String,
    /// Name of the book.
    pub book: String,
    /// `book/page` of the chapter it belongs to: what to split by.
    pub chapter: String,
    /// Title of the page.
    pub title: String,
    /// Markdown.
    pub text: String,
}

/// What was left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Pages whose whole text stood on a page before.
    pub duplicate_pages: usize,
    /// Paragraphs and list items that stood on a page before.
    pub duplicate_paragraphs: usize,
    /// Pages, or pieces of pages, shorter than the minimum.
    pub short: usize,
}

/// A paragraph shorter than this may well occur twice: "Erroneous code example:".
const MIN_DUPLICATE_CHARS: usize = 60;

/// Makes rows of converted pages, taken in order.
pub struct RowMaker {
    min_chars: usize,
    max_chars: Option<usize>,
    seen_pages: HashSet<blake3::Hash>,
    seen_paragraphs: HashSet<blake3::Hash>,
    /// What was left out so far.
    pub dropped: Dropped,
}

impl RowMaker {
    /// With bounds in characters; pages above `max_chars` are cut between blocks.
    pub fn new(min_chars: usize, max_chars: Option<usize>) -> Self {
        Self {
            min_chars,
            max_chars,
            seen_pages: HashSet::new(),
            seen_paragraphs: HashSet::new(),
            dropped: Dropped::default(),
        }
    }

    /// The rows of one page.
    pub fn rows(&mut self, page: &Page, blocks: Vec<Block>) -> Vec<Row> {
        let texts: Vec<String> = blocks.iter().map(Block::text).collect();
        if !self.seen_pages.insert(blake3::hash(texts.join("\n\n").as_bytes())) {
            self.dropped.duplicate_pages += 1;
            return Vec::new();
        }
        let blocks = without_empty_sections(self.without_duplicates(blocks));
        let mut rows = Vec::new();
        for text in pieces(&blocks, self.max_chars) {
            if text.chars().count() < self.min_chars {
                self.dropped.short += 1;
                continue;
            }
            let id = format!("{}/{}", page.book, page.name);
            rows.push(Row {
                id: if rows.is_empty() { id } else { format!("{id}#{}", rows.len() + 1) },
                book: page.book.clone(),
                chapter: page.chapter.clone(),
                title: page.title.clone(),
                text,
            });
        }
        rows
    }

    fn without_duplicates(&mut self, blocks: Vec<Block>) -> Vec<Block> {
        let before = blocks.len();
        let kept: Vec<Block> = blocks
            .into_iter()
            .filter(|block| match block {
                Block::Prose(text) if text.chars().count() >= MIN_DUPLICATE_CHARS => {
                    self.seen_paragraphs.insert(blake3::hash(text.as_bytes()))
                }
                _ => true,
            })
            .collect();
        self.dropped.duplicate_paragraphs += before - kept.len();
        kept
    }
}

/// Leaves out headings that nothing follows before the next heading of their level or above.
fn without_empty_sections(blocks: Vec<Block>) -> Vec<Block> {
    let mut kept: Vec<Block> = Vec::with_capacity(blocks.len());
    for block in blocks.into_iter().rev() {
        let empty = match (&block, kept.last()) {
            (Block::Heading(..), None) => true,
            (Block::Heading(level, _), Some(Block::Heading(next, _))) => next <= level,
            _ => false,
        };
        if !empty {
            kept.push(block);
        }
    }
    kept.reverse();
    kept
}

/// Joins blocks into texts of at most `max` characters each; a single longer block stays whole,
/// and a heading stays with what follows it.
fn pieces(blocks: &[Block], max: Option<usize>) -> Vec<String> {
    let mut out = Vec::new();
    let mut current = String::new();
    let mut length = 0;
    let mut rest = blocks;
    while !rest.is_empty() {
        let headings = rest.iter().take_while(|b| matches!(b, Block::Heading(..))).count();
        let (unit, after) = rest.split_at((headings + 1).min(rest.len()));
        rest = after;
        let text = unit.iter().map(Block::text).collect::<Vec<_>>().join("\n\n");
        let chars = text.chars().count();
        if !current.is_empty() && max.is_some_and(|max| length + 2 + chars > max) {
            out.push(std::mem::take(&mut current));
            length = 0;
        }
        if !current.is_empty() {
            current.push_str("\n\n");
            length += 2;
        }
        current.push_str(&text);
        length += chars;
    }
    if !current.is_empty() {
        out.push(current);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(name: &str) -> Page {
        Page {
            book: "b".into(),
            name: name.into(),
            chapter: "b/c".into(),
            title: "T".into(),
            file: "f".into(),
        }
    }

    fn prose(text: &str) -> Block {
        Block::Prose(text.into())
    }

    fn heading(level: usize, text: &str) -> Block {
        Block::Heading(level, text.into())
    }

    const LONG: &str =
        "This paragraph is long enough that it will not stand in two places by chance.";

    #[test]
    fn a_paragraph_stands_once_and_its_empty_section_goes() {
        let mut maker = RowMaker::new(1, None);
        let first = maker.rows(&page("1"), vec![heading(1, "A"), prose(LONG), prose("Example:")]);
        assert_eq!(first[0].text, format!("# A\n\n{LONG}\n\nExample:"));
        let second = maker.rows(
            &page("2"),
            vec![
                heading(1, "B"),
                heading(2, "Same"),
                prose(LONG),
                heading(2, "Other"),
                prose("Example:"),
            ],
        );
        assert_eq!(second[0].text, "# B\n\n## Other\n\nExample:");
        assert_eq!(maker.dropped, Dropped { duplicate_paragraphs: 1, ..Dropped::default() });
    }

    #[test]
    fn a_page_stands_once_also_when_it_has_no_prose() {
        let mut maker = RowMaker::new(1, None);
        let code = vec![Block::Verbatim("```\nx\n```".into())];
        assert_eq!(maker.rows(&page("1"), code.clone()).len(), 1);
        assert_eq!(maker.rows(&page("2"), code).len(), 0);
        assert_eq!(maker.dropped.duplicate_pages, 1);
    }

    #[test]
    fn short_pages_are_left_out_by_characters() {
        let mut maker = RowMaker::new(4, None);
        assert_eq!(maker.rows(&page("1"), vec![prose("äöü")]).len(), 0);
        assert_eq!(maker.rows(&page("2"), vec![prose("äöüß")]).len(), 1);
        assert_eq!(maker.dropped.short, 1);
    }

    #[test]
    fn long_pages_are_cut_between_blocks_and_lose_nothing() {
        let blocks = vec![
            heading(1, "A"),
            prose("aaaa"),
            prose("bb"),
            heading(2, "C"),
            prose("cccccccccccc"),
        ];
        let mut maker = RowMaker::new(1, Some(13));
        let rows = maker.rows(&page("p"), blocks);
        let got: Vec<_> = rows.iter().map(|r| (r.id.as_str(), r.text.as_str())).collect();
        assert_eq!(got, [("b/p", "# A\n\naaaa\n\nbb"), ("b/p#2", "## C\n\ncccccccccccc")][..]);
    }
}

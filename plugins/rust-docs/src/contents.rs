//! A book's table of contents: which pages are chapters, in order, and how they belong together.

use std::path::{Path, PathBuf};

use lora_flow_plugin_sdk::{Context, PluginError};
use scraper::{ElementRef, Html, Selector};

/// A chapter's page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Name of the book (its folder).
    pub book: String,
    /// The page's path in the book, without `.html`.
    pub name: String,
    /// `book/page` of the chapter that this page is a part of; itself where it is one.
    pub chapter: String,
    /// Title as it stands in the table of contents.
    pub title: String,
    /// The file.
    pub file: PathBuf,
}

/// A book is divided at the lowest level of its table of contents that gives so many chapters.
/// Only whole chapters can be held out fairly, but a handful of them could not be split.
const MIN_CHAPTERS: usize = 16;

/// Reads the table of contents of the book in `docs/book`.
///
/// # Errors
/// When there is no such book; the hint lists those there are.
pub fn read(docs: &Path, book: &str) -> Result<Vec<Page>, PluginError> {
    let folder = docs.join(book);
    // mdBook writes the contents to a page of its own; older versions put them on every page.
    let file =
        ["toc.html", "index.html"].map(|name| folder.join(name)).into_iter().find(|f| f.is_file());
    let Some(file) = file else {
        return Err(PluginError::new(format!("there is no book `{book}` in `{}`", docs.display()))
            .with_hint(format!("there are: {}", books(docs).join(", "))));
    };
    let html =
        std::fs::read_to_string(&file).context(format!("cannot read `{}`", file.display()))?;
    let pages = parse(&html, book, &folder);
    if pages.is_empty() {
        return Err(PluginError::new(format!(
            "`{}` has no table of contents: it is no book of mdBook",
            file.display()
        ))
        .with_hint(format!("books are: {}", books(docs).join(", "))));
    }
    Ok(pages)
}

/// Names of the folders that look like books.
fn books(docs: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(docs).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|e| e.path().join("toc.html").is_file())
        .map(|e| format!("`{}`", e.file_name().to_string_lossy()))
        .collect();
    names.sort();
    names
}

fn parse(html: &str, book: &str, folder: &Path) -> Vec<Page> {
    let document = Html::parse_document(html);
    let Ok(links) = Selector::parse("ol.chapter a[href]") else { return Vec::new() };
    let mut pages: Vec<(usize, Page)> = Vec::new();
    for link in document.select(&links) {
        let href = link.attr("href").unwrap_or_default();
        let Some(name) = href.strip_suffix(".html").filter(|n| is_inside(n)) else { continue };
        if pages.iter().any(|(_, page)| page.name == name) {
            continue;
        }
        let level = link
            .ancestors()
            .filter_map(ElementRef::wrap)
            .filter(|e| e.value().name() == "ol")
            .count();
        pages.push((
            level,
            Page {
                book: book.to_owned(),
                name: name.to_owned(),
                chapter: String::new(),
                title: title(link),
                file: folder.join(href),
            },
        ));
    }
    let deepest = pages.iter().map(|(level, _)| *level).max().unwrap_or(0);
    let level = (1..=deepest)
        .find(|level| pages.iter().filter(|(l, _)| l <= level).count() >= MIN_CHAPTERS)
        .unwrap_or(deepest);
    let mut chapter = String::new();
    for (page_level, page) in &mut pages {
        if *page_level <= level || chapter.is_empty() {
            chapter = format!("{book}/{}", page.name);
        }
        page.chapter.clone_from(&chapter);
    }
    pages.into_iter().map(|(_, page)| page).collect()
}

/// Whether a link stays in the book's folder.
fn is_inside(name: &str) -> bool {
    !name.starts_with('/')
        && !name.contains([':', '#', '?', '\\'])
        && !name.split('/').any(|part| part == "..")
}

/// The link's text without the chapter's number.
fn title(link: ElementRef) -> String {
    let text: String = link
        .children()
        .filter(|child| ElementRef::wrap(*child).is_none_or(|e| e.value().name() != "strong"))
        .map(|child| match ElementRef::wrap(child) {
            Some(element) => element.text().collect::<String>(),
            None => child.value().as_text().map(|t| t.to_string()).unwrap_or_default(),
        })
        .collect();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(href: &str, number: &str, title: &str) -> String {
        format!(
            r#"<span><a href="{href}" target="_parent"><strong aria-hidden="true">{number}</strong> {title}</a><a class="chapter-fold-toggle"><div>❱</div></a></span>"#
        )
    }

    fn chapters(html: &str) -> Vec<(String, String, String)> {
        parse(html, "b", Path::new("b")).into_iter().map(|p| (p.name, p.chapter, p.title)).collect()
    }

    #[test]
    fn a_book_of_few_chapters_is_divided_below_them() {
        let html = format!(
            r##"<ol class="chapter"><li>{}</li><li>{}<ol class="section"><li>{}</li><li>{}</li></ol></li><li><a href="#top">x</a><a href="../other.html">y</a></li></ol>"##,
            link("intro.html", "", "Intro &amp; <code>use</code>"),
            link("a/index.html", "1.", "A"),
            link("a/b.html", "1.1.", "B"),
            link("intro.html", "1.2.", "Again"),
        );
        let expected = [
            ("intro", "b/intro", "Intro & use"),
            ("a/index", "b/a/index", "A"),
            ("a/b", "b/a/b", "B"),
        ];
        assert_eq!(
            chapters(&html),
            expected.map(|(a, b, c)| (a.to_owned(), b.to_owned(), c.to_owned()))
        );
    }

    #[test]
    fn a_book_of_many_chapters_keeps_their_sections_together() {
        let items: String = (0..20)
            .map(|i| {
                format!(
                    r#"<li>{}<ol class="section"><li>{}</li></ol></li>"#,
                    link(&format!("c{i}.html"), "1.", "C"),
                    link(&format!("c{i}/s.html"), "1.1.", "S"),
                )
            })
            .collect();
        let pages = parse(&format!(r#"<ol class="chapter">{items}</ol>"#), "b", Path::new("b"));
        assert_eq!(pages.len(), 40);
        assert_eq!((pages[7].name.as_str(), pages[7].chapter.as_str()), ("c3/s", "b/c3"));
    }

    #[test]
    fn an_unknown_book_names_those_there_are() {
        let docs = tempfile::tempdir().unwrap();
        std::fs::create_dir(docs.path().join("nomicon")).unwrap();
        std::fs::write(docs.path().join("nomicon/toc.html"), "<p>").unwrap();
        let error = read(docs.path(), "nomicorn").unwrap_err();
        assert!(error.message().starts_with("there is no book `nomicorn`"), "{error}");
        assert_eq!(error.hint(), Some("there are: `nomicon`"));
        let error = read(docs.path(), "nomicon").unwrap_err();
        assert!(error.message().contains("no table of contents"), "{error}");
    }
}

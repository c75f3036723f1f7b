//! The Rust books of the installed toolchain as a data set: HTML → Markdown → Parquet.
//!
//! The toolchain is an input that stands outside of the pipeline: its documentation is neither a
//! file of the project nor an artifact, so a cached result stays valid when the toolchain
//! changes. Name the release in `toolchain` where that matters: it enters the key, and another
//! toolchain is an error instead of other data.

mod contents;
mod dataset;
mod markdown;
mod rows;
#[cfg(test)]
mod tests;
mod toolchain;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};

use lora_flow_plugin_sdk::{Context, Events, PluginError, Request};
use serde::Deserialize;
use serde_json::json;

use contents::Page;
use markdown::Block;
use rows::{Row, RowMaker};

/// What stands under `with`; `plugin.yaml` describes it and holds the defaults.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    books: Vec<String>,
    min_chars: usize,
    #[serde(default)]
    max_chars: Option<usize>,
    #[serde(default)]
    shuffle: bool,
    #[serde(default)]
    toolchain: Option<String>,
    #[serde(default)]
    docs: Option<PathBuf>,
}

fn main() -> ExitCode {
    lora_flow_plugin_sdk::run(rust_docs)
}

fn rust_docs(task: Request<Params>, events: &mut Events) -> Result<(), PluginError> {
    let version = toolchain::version()?;
    if let Some(wanted) = task.params.toolchain.as_ref().filter(|w| **w != version.release) {
        return Err(PluginError::new(format!(
            "the toolchain is {}, `toolchain` asks for {wanted}",
            version.release
        ))
        .with_hint(format!(
            "install it (`rustup toolchain install {wanted}`), or leave `toolchain` out"
        )));
    }
    let docs = match &task.params.docs {
        Some(folder) => folder.clone(),
        None => toolchain::docs()?,
    };
    events.info(format_args!("documentation of {}", version.line));

    let mut pages = Vec::new();
    for book in &task.params.books {
        pages.extend(contents::read(&docs, book)?);
    }
    let converted = convert(&pages, task.threads, events)?;

    let mut maker = RowMaker::new(task.params.min_chars, task.params.max_chars);
    let mut rows = Vec::new();
    for (page, blocks) in pages.iter().zip(converted) {
        rows.extend(maker.rows(page, blocks));
    }
    if task.params.shuffle {
        // By the hash of the id: a row's place does not depend on which other rows there are.
        rows.sort_by_cached_key(|row| *blake3::hash(row.id.as_bytes()).as_bytes());
    }
    if rows.is_empty() {
        return Err(PluginError::new(format!(
            "none of the {} pages has {} characters of text",
            pages.len(),
            task.params.min_chars
        )));
    }
    dataset::write(task.output("dataset")?, &rows)?;

    let dropped = maker.dropped;
    events.report(table(&pages, &rows));
    events.info(format_args!(
        "left out: {} duplicate pages, {} duplicate paragraphs, {} short texts",
        dropped.duplicate_pages, dropped.duplicate_paragraphs, dropped.short
    ));
    events.summary("rows", rows.len());
    events.meta("dataset", json!({ "toolchain": version.line, "rows": rows.len() }));
    Ok(())
}

/// Converts the pages on several threads; the result is in the order of `pages`.
fn convert(
    pages: &[Page],
    threads: usize,
    events: &mut Events,
) -> Result<Vec<Vec<Block>>, PluginError> {
    let next = AtomicUsize::new(0);
    let (sender, receiver) = std::sync::mpsc::channel();
    let mut blocks: Vec<Vec<Block>> = vec![Vec::new(); pages.len()];
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                while let Some((i, page)) = take(next, pages) {
                    if sender.send((i, convert_page(page))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        for (done, (i, result)) in receiver.into_iter().enumerate() {
            blocks[i] = result?;
            events.progress(done as u64 + 1, Some(pages.len() as u64), "page", &pages[i].book);
        }
        Ok(blocks)
    })
}

fn take<'a>(next: &AtomicUsize, pages: &'a [Page]) -> Option<(usize, &'a Page)> {
    let i = next.fetch_add(1, Ordering::Relaxed);
    pages.get(i).map(|page| (i, page))
}

fn convert_page(page: &Page) -> Result<Vec<Block>, PluginError> {
    let shown = || format!("cannot read `{}`", page.file.display());
    let html = std::fs::read_to_string(&page.file).context(shown())?;
    let main = html.split_once("<main>").and_then(|(_, rest)| rest.rsplit_once("</main>"));
    let (main, _) = main.ok_or_else(|| {
        PluginError::new("the page has no `<main>`: it was not made by mdBook").context(shown())
    })?;
    Ok(markdown::blocks(main))
}

/// Rows and text by book, for the report.
fn table(pages: &[Page], rows: &[Row]) -> String {
    let mut books: BTreeMap<&str, (usize, usize, usize)> = BTreeMap::new();
    for page in pages {
        books.entry(&page.book).or_default().0 += 1;
    }
    for row in rows {
        let (_, n, bytes) = books.entry(&row.book).or_default();
        *n += 1;
        *bytes += row.text.len();
    }
    let mut out = format!("{:<18} {:>7} {:>7} {:>10}\n", "book", "pages", "rows", "text, KB");
    for (book, (pages, rows, bytes)) in books {
        let _ = writeln!(out, "{book:<18} {pages:>7} {rows:>7} {:>10.1}", bytes as f64 / 1e3);
    }
    out
}

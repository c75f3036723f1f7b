//! The whole plugin on a small book, through the protocol.

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

use arrow_array::RecordBatch;
use arrow_array::cast::AsArray;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};

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

/// A book with a navigation, a page that says nothing, and one that is not in the contents.
fn write_book(docs: &Path) {
    let page = |body: &str| {
        format!("<html><body><nav>Navigation</nav><main>{body}</main><nav>Next</nav></body></html>")
    };
    let book = docs.join("guide");
    std::fs::create_dir_all(book.join("part")).unwrap();
    let contents: String = (0..20)
        .map(|i| {
            format!(r#"<li><a href="part/c{i}.html"><strong>{i}.</strong> Chapter {i}</a></li>"#)
        })
        .collect();
    let files = [
        (
            "toc.html",
            format!(
                r#"<ol class="chapter">{contents}<li><a href="empty.html">Empty</a></li></ol>"#
            ),
        ),
        ("empty.html", page("<h1>Empty</h1>")),
        ("print.html", page("<h1>Everything</h1><p>All chapters once more.</p>")),
    ];
    for (name, html) in files {
        std::fs::write(book.join(name), html).unwrap();
    }
    for i in 0..20 {
        let body = format!(
            "<h1>Chapter {i}</h1><p>The text of chapter {i} — <code>Vec&lt;u{i}&gt;</code>.</p>"
        );
        std::fs::write(book.join(format!("part/c{i}.html")), page(&body)).unwrap();
    }
}

/// Runs the plugin and returns whether it succeeded, its last event, and the output folder.
fn run(params: Value, threads: usize) -> (bool, Value, tempfile::TempDir) {
    let output = tempfile::tempdir().unwrap();
    let request = json!({
        "protocol": 1, "task": "rust-docs", "params": params, "inputs": {},
        "outputs": { "dataset": { "kind": "Dataset", "path": output.path() } },
        "scratch": output.path(), "state": output.path(), "threads": threads, "network": false,
    });
    let events = Buffer::default();
    let succeeded = lora_flow_plugin_sdk::run_with(
        request.to_string().as_bytes(),
        events.clone(),
        crate::rust_docs,
    );
    let text = String::from_utf8(events.0.lock().unwrap().clone()).unwrap();
    (succeeded, serde_json::from_str(text.lines().last().unwrap()).unwrap(), output)
}

fn read(folder: &Path) -> RecordBatch {
    let file = std::fs::File::open(folder.join("part-00000.parquet")).unwrap();
    ParquetRecordBatchReaderBuilder::try_new(file)
        .unwrap()
        .build()
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
}

#[test]
fn a_book_becomes_a_data_set_with_the_same_bytes_on_any_number_of_threads() {
    let docs = tempfile::tempdir().unwrap();
    write_book(docs.path());
    let params = json!({ "books": ["guide"], "min_chars": 20, "docs": docs.path() });
    let (succeeded, last, one) = run(params.clone(), 1);
    assert!(succeeded, "{last}");
    let (_, _, many) = run(params, 7);
    for name in ["part-00000.parquet", "dataset.json"] {
        let bytes = |dir: &tempfile::TempDir| std::fs::read(dir.path().join(name)).unwrap();
        assert!(bytes(&one) == bytes(&many), "{name} differs");
    }

    let table = read(one.path());
    let about: Value =
        serde_json::from_slice(&std::fs::read(one.path().join("dataset.json")).unwrap()).unwrap();
    assert_eq!((table.num_rows(), &about["rows"]), (20, &json!(20)));
    let cell = |column: &str, row: usize| {
        table.column_by_name(column).unwrap().as_string::<i32>().value(row).to_owned()
    };
    assert_eq!(cell("id", 3), "guide/part/c3");
    assert_eq!(cell("chapter", 3), "guide/part/c3");
    assert_eq!(cell("title", 3), "Chapter 3");
    assert_eq!(cell("text", 3), "# Chapter 3\n\nThe text of chapter 3 — `Vec<u3>`.");
}

#[test]
fn shuffled_rows_are_the_same_rows_in_another_order_that_holds() {
    let docs = tempfile::tempdir().unwrap();
    write_book(docs.path());
    let ids = |min_chars: usize| -> Vec<String> {
        let params = json!({
            "books": ["guide"], "min_chars": min_chars, "shuffle": true, "docs": docs.path(),
        });
        let (succeeded, last, output) = run(params, 3);
        assert!(succeeded, "{last}");
        let table = read(output.path());
        let column = table.column_by_name("id").unwrap().as_string::<i32>();
        column.iter().map(|id| id.unwrap().to_owned()).collect()
    };
    let all = ids(1);
    assert_eq!(all.len(), 20);
    assert!(!all.is_sorted());
    // Pages of one digit are shorter; without them the others keep their order.
    let some = ids("# Chapter 10\n\nThe text of chapter 10 — `Vec<u10>`.".chars().count());
    assert_eq!(some.len(), 10);
    let rest: Vec<&String> = all.iter().filter(|id| some.contains(id)).collect();
    assert_eq!(rest, some.iter().collect::<Vec<_>>());
}

#[test]
fn another_toolchain_than_the_pinned_one_is_an_error() {
    let (succeeded, last, _output) =
        run(json!({ "books": ["guide"], "min_chars": 1, "toolchain": "0.9.0" }), 1);
    assert!(!succeeded);
    let message = last["message"].as_str().unwrap();
    assert!(message.ends_with("`toolchain` asks for 0.9.0"), "{message}");
    assert!(last["hint"].as_str().unwrap().contains("0.9.0"));
}

#[test]
fn a_bound_that_leaves_nothing_is_an_error() {
    let docs = tempfile::tempdir().unwrap();
    write_book(docs.path());
    let params = json!({ "books": ["guide"], "min_chars": 10_000, "docs": docs.path() });
    let (succeeded, last, _output) = run(params, 2);
    assert!(!succeeded);
    assert_eq!(last["message"], "none of the 21 pages has 10000 characters of text");
}

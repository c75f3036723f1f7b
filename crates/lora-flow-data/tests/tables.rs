//! Reading files of rows: what is read, and what is said about files that cannot be.

use std::path::Path;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{
    Array, ArrayRef, DictionaryArray, Int32Array, Int64Array, LargeStringArray, RecordBatch,
    StringArray,
};
use lora_flow_core::{Artifact, ArtifactKind, Error, Result};
use lora_flow_data::{DataFile, DatasetWriter, Table, dataset_files};
use parquet::arrow::ArrowWriter;

fn file(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> DataFile {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    DataFile::new(name, path, None).unwrap()
}

fn parquet(columns: Vec<(&str, ArrayRef)>) -> Vec<u8> {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    bytes
}

fn texts(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

/// All rows of the chosen columns, as text.
fn read(files: Vec<DataFile>, columns: &[&str]) -> Result<Vec<Vec<String>>> {
    let columns: Vec<String> = columns.iter().map(|c| (*c).to_owned()).collect();
    let table = Table::open(files, &[])?;
    let mut rows = Vec::new();
    for batch in table.scan(&columns)? {
        let batch = batch?;
        for row in 0..batch.rows.num_rows() {
            let cell = |c: &ArrayRef| lora_flow_data::cell(c.as_ref(), row).to_string();
            rows.push(batch.rows.columns().iter().map(cell).collect());
        }
    }
    assert_eq!(rows.len() as u64, table.rows());
    Ok(rows)
}

fn failure(name: &str, content: impl AsRef<[u8]>) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let file = file(dir.path(), name, content);
    let table = match Table::open(vec![file], &[]) {
        Ok(table) => table,
        Err(e) => return e,
    };
    let columns: Vec<String> = table.columns().iter().map(|c| (*c).to_owned()).collect();
    let result = table.scan(&columns).and_then(|scan| scan.collect::<Result<Vec<_>>>());
    result.expect_err("the file should not be readable")
}

#[test]
fn the_same_rows_come_out_of_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let ids: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
    let files = [
        file(d, "a.parquet", parquet(vec![("id", ids), ("text", texts(&["x, y", "é\n"]))])),
        file(
            d,
            "a.jsonl",
            "\u{feff}{\"id\": 1, \"text\": \"x, y\"}\n\n{\"text\": \"é\\n\", \"id\": 2}",
        ),
        file(d, "a.csv", "\u{feff}id,text\n1,\"x, y\"\n2,\"é\n\"\n"),
    ];
    for file in &files {
        let name = &file.name;
        let rows = read(vec![file.clone()], &["text", "id"]).unwrap();
        assert_eq!(rows, [["x, y", "1"], ["é\n", "2"]], "{name}");
    }
    let all = read(files.to_vec(), &["id"]).unwrap();
    assert_eq!(all.concat(), ["1", "2", "1", "2", "1", "2"]);
}

#[test]
fn storage_types_are_made_plain() {
    let dir = tempfile::tempdir().unwrap();
    let dictionary: DictionaryArray<arrow_array::types::Int32Type> =
        vec!["b", "b", "c"].into_iter().collect();
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("large", Arc::new(LargeStringArray::from(vec!["x", "y", "z"]))),
        ("book", Arc::new(dictionary)),
        ("n", Arc::new(Int32Array::from(vec![1, 2, 3]))),
    ];
    let a = file(dir.path(), "a.parquet", parquet(columns));
    let b = file(dir.path(), "b.jsonl", "{\"large\": \"w\", \"book\": \"d\", \"n\": 4000000000}\n");
    let table = Table::open(vec![a, b], &[]).unwrap();
    let names = ["large", "book", "n"].map(str::to_owned);
    let types: Vec<String> =
        table.schema(&names).unwrap().fields().iter().map(|f| f.data_type().to_string()).collect();
    assert_eq!(types, ["Utf8", "Utf8", "Int64"]);
    let batches: Vec<_> = table.scan(&names).unwrap().map(|b| b.unwrap().rows).collect();
    assert_eq!(batches[0].column(1).as_string::<i32>().value(2), "c");
    assert_eq!(batches[1].column(2).as_primitive::<Int64Type>().value(0), 4_000_000_000);
}

#[test]
fn more_rows_than_a_batch_and_nulls() {
    let dir = tempfile::tempdir().unwrap();
    let mut jsonl = String::new();
    let mut csv = "k,v\n".to_owned();
    for i in 0..2500 {
        let null = i % 3 == 0;
        jsonl += &if null {
            format!("{{\"k\": {i}}}\n")
        } else {
            format!("{{\"k\": {i}, \"v\": \"t{i}\"}}\n")
        };
        csv += &if null { format!("{i},\n") } else { format!("{i},t{i}\n") };
    }
    for file in [file(dir.path(), "a.jsonl", jsonl), file(dir.path(), "a.csv", csv)] {
        let rows = read(vec![file], &["k", "v"]).unwrap();
        assert_eq!(rows.len(), 2500);
        assert_eq!(rows[2499], ["2499", "None"]);
        assert_eq!(rows[2498], ["2498", "t2498"]);
    }
}

#[test]
fn csv_text_columns_stay_text() {
    let dir = tempfile::tempdir().unwrap();
    let file = file(dir.path(), "a.csv", "text,n\n1,1\n2,2\n");
    let table = Table::open(vec![file], &["text"]).unwrap();
    let schema = table.schema(&["text".into(), "n".into()]).unwrap();
    assert_eq!(schema.field(0).data_type().to_string(), "Utf8");
    assert_eq!(schema.field(1).data_type().to_string(), "Int64");
}

#[test]
fn a_parquet_file_cut_anywhere_is_an_error() {
    let values: Vec<String> = (0..3000).map(|i| format!("row {i} of the table")).collect();
    let bytes = parquet(vec![("text", Arc::new(StringArray::from(values)))]);
    let mut cuts: Vec<usize> = (1..24).map(|i| bytes.len() * i / 24).collect();
    cuts.extend([1, 3, 4, 5, 8, 11, 12, bytes.len() - 1, bytes.len() - 4, bytes.len() - 8]);
    for cut in cuts {
        let error = failure("a.parquet", &bytes[..cut]);
        let text = error.to_string();
        assert!(
            text.contains("`a.parquet` is damaged") || text.contains("not a Parquet"),
            "{text}"
        );
        assert!(error.hint().is_some());
    }
}

#[test]
fn a_spoilt_parquet_page_is_an_error_and_no_panic() {
    let values: Vec<String> = (0..3000).map(|i| format!("row {i} of the table")).collect();
    let bytes = parquet(vec![("text", Arc::new(StringArray::from(values)))]);
    let mut failures = 0;
    for start in (4..bytes.len() - 8).step_by(bytes.len() / 60) {
        let mut spoilt = bytes.clone();
        let end = (start + 16).min(bytes.len() - 8);
        spoilt[start..end].fill(0xff);
        let dir = tempfile::tempdir().unwrap();
        let file = file(dir.path(), "a.parquet", spoilt);
        if read(vec![file], &["text"]).is_err() {
            failures += 1;
        }
    }
    assert!(failures > 10, "only {failures} of the spoilt files were refused");
}

#[test]
fn what_is_said_about_broken_files() {
    for (name, content, message) in [
        ("a.parquet", &b"id,text\n1,a\n"[..], "`a.parquet` is not a Parquet file"),
        ("a.parquet", b"", "`a.parquet` is empty"),
        ("a.jsonl", b"", "`a.jsonl` is empty"),
        ("a.jsonl", b"\n \n", "`a.jsonl` has no rows"),
        ("a.csv", b"id,text\n", "`a.csv` has a header but no rows"),
        ("a.jsonl", b"{\"a\": 1}\n{\"a\": \n", "`a.jsonl:2`"),
        (
            "a.jsonl",
            b"{\"a\": 1} {\"a\": 2}\n",
            "`a.jsonl:1:10` is not a JSON object: trailing characters",
        ),
        (
            "a.jsonl",
            b"{\"a\": 1}\n5\n",
            "`a.jsonl:2:1` is not a JSON object: invalid type: integer",
        ),
        ("a.jsonl", b"[{\"a\": 1}]\n", "`a.jsonl` line 1 starts a JSON array"),
        (
            "a.jsonl",
            b"{\"a\": \"x\"}\n{\"a\": \"\xff\"}\n",
            "`a.jsonl` line 2 is not UTF-8 at byte 8",
        ),
        (
            "a.jsonl",
            b"{\"a\": {\"b\": 1}}\n{\"a\": {\"b\": \"x\"}}\n",
            "column `a.b` holds a number in `a.jsonl` line 1 and text in `a.jsonl` line 2",
        ),
        ("a.csv", b"id,text\n1,a\n2,b,c\n", "`a.csv:3` has 3 fields where the header has 2"),
        ("a.csv", b"id,text\n1,\"a\nb\"\n2\n", "`a.csv:4` has 1 fields where the header has 2"),
        ("a.csv", b"id,text\n1,a\n1,\xff\n", "`a.csv:3` is not UTF-8 in column `text`"),
        ("a.csv", b"id,id\n1,2\n", "`a.csv` has two columns `id`"),
        ("a.csv", b"id,\n1,2\n", "column 2 of `a.csv` has no name"),
    ] {
        let error = failure(name, content);
        let text = error.to_string();
        assert!(text.starts_with(message), "{text}\nwanted: {message}");
    }
}

#[test]
fn a_deeply_nested_line_is_an_error() {
    let line = format!("{{\"a\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(failure("a.jsonl", line).to_string().contains("recursion limit"));
}

#[test]
fn files_must_agree() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1]));
    let a = file(d, "a.parquet", parquet(vec![("text", texts(&["x"])), ("n", numbers.clone())]));
    let b = file(d, "b.parquet", parquet(vec![("text", numbers)]));
    let c = file(d, "c.jsonl", "{\"text\": \"x\"}\n");
    let error = read(vec![a.clone(), b], &["text"]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "column `text` holds text in `a.parquet` and numbers (Int64) in `b.parquet`"
    );
    let error = read(vec![a.clone(), c.clone()], &["n"]).unwrap_err();
    assert_eq!(error.to_string(), "`c.jsonl` has no column `n`, which `a.parquet` has");
    assert_eq!(read(vec![a.clone(), c.clone()], &["text"]).unwrap().len(), 2);
    let error = read(vec![a.clone()], &["txt"]).unwrap_err();
    assert_eq!(error.to_string(), "`a.parquet` has no column `txt`");
    assert_eq!(error.hint(), Some("did you mean `text`? its columns are `text`, `n`"));
    let e = file(d, "e.jsonl", "{\"text\": 5}\n");
    let error = read(vec![c, e], &["text"]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "column `text` holds text in `c.jsonl` line 1 and a number in `e.jsonl` line 1"
    );
    assert!(
        Table::open(vec![a.clone(), a], &[]).err().unwrap().to_string().contains("listed twice")
    );
}

/// Bytes of a dataset written in batches of some size.
fn write(rows: usize, batch: usize) -> (tempfile::TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let values: Vec<String> = (0..rows).map(|i| format!("text {}", i * 7919 % 1000)).collect();
    let all =
        RecordBatch::try_from_iter([("text", Arc::new(StringArray::from(values)) as ArrayRef)]);
    let all = all.unwrap();
    let mut writer = DatasetWriter::new(dir.path(), all.schema());
    let mut start = 0;
    while start < rows {
        let len = batch.min(rows - start);
        writer.write(&all.slice(start, len)).unwrap();
        start += len;
    }
    let info = writer.finish().unwrap();
    assert_eq!(info.rows, rows as u64);
    let bytes = std::fs::read(dir.path().join("part-00000.parquet")).unwrap();
    (dir, bytes)
}

#[test]
fn a_dataset_round_trips_and_its_bytes_depend_on_rows_alone() {
    let (dir, bytes) = write(5000, 5000);
    for batch in [1, 7, 1024, 2048, 4999] {
        assert_eq!(write(5000, batch).1, bytes, "batches of {batch}");
    }
    let artifact = Artifact::from_dir(ArtifactKind::Dataset, dir.path()).unwrap();
    let files = dataset_files(&artifact, "corpus.train").unwrap();
    assert_eq!(files[0].name, "corpus.train/part-00000.parquet");
    let rows = read(files, &["text"]).unwrap();
    assert_eq!(rows.len(), 5000);
    assert_eq!(rows[4999], [format!("text {}", 4999 * 7919 % 1000)]);
}

#[test]
fn nested_and_empty_columns_survive_the_dataset() {
    let dir = tempfile::tempdir().unwrap();
    let source = file(
        dir.path(),
        "a.jsonl",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"none\": null, \"e\": []}\n\
         {\"messages\": [{\"role\": \"user\", \"content\": \"b\", \"name\": \"n\"}], \"o\": {}}\n",
    );
    let table = Table::open(vec![source], &[]).unwrap();
    let columns: Vec<String> = table.columns().iter().map(|c| (*c).to_owned()).collect();
    assert_eq!(columns, ["messages", "none", "e"], "an object without keys is no column");
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let mut writer = DatasetWriter::new(&out, table.schema(&columns).unwrap());
    for batch in table.scan(&columns).unwrap() {
        writer.write(&batch.unwrap().rows).unwrap();
    }
    let info = writer.finish().unwrap();
    assert_eq!((info.rows, info.bytes), (2, 11));
    let artifact = Artifact::from_dir(ArtifactKind::Dataset, &out).unwrap();
    let again = Table::open(dataset_files(&artifact, "d").unwrap(), &[]).unwrap();
    let batch = again.scan(&columns).unwrap().next().unwrap().unwrap();
    let second = lora_flow_data::cell(batch.rows.column(0).as_ref(), 1).to_string();
    assert!(second.contains("'name': 'n'"), "{second}");
    assert_eq!(batch.rows.column(1).logical_null_count(), 2);
}

#[test]
fn a_dataset_of_no_rows_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let text: ArrayRef = Arc::new(StringArray::from(Vec::<&str>::new()));
    let none = RecordBatch::try_from_iter([("text", text)]).unwrap();
    let mut writer = DatasetWriter::new(dir.path(), none.schema());
    writer.write(&none).unwrap();
    let error = writer.finish().unwrap_err();
    assert_eq!(error.to_string(), "there are no rows to write");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

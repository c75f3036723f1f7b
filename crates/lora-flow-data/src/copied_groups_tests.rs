use std::path::Path;
use std::sync::{Arc, LazyLock};

use arrow_array::{
    ArrayRef, BooleanArray, Float64Array, Int64Array, ListArray, RecordBatch, StringArray,
    types::Int32Type,
};
use arrow_select::concat::concat_batches;
use parquet::arrow::ArrowWriter;
use parquet::basic::ZstdLevel;
use parquet::file::metadata::ParquetMetaDataReader;
use parquet::file::properties::WriterProperties;

use super::*;
use crate::{DatasetInfo, DatasetWriter, Table};

static ZSTD: LazyLock<Compression> =
    LazyLock::new(|| Compression::ZSTD(ZstdLevel::try_new(3).unwrap()));

/// Rows with gaps in all columns; `kind` has few values, so that it is kept by a dictionary.
fn rows(from: usize, to: usize) -> RecordBatch {
    let some = |i: usize| (!i.is_multiple_of(11)).then_some(i);
    let text = (from..to).map(|i| some(i).map(|i| format!("row {i}, é {}", "na ".repeat(i % 50))));
    let kind = (from..to).map(|i| some(i + 1).map(|i| ["book", "letter", "note"][i % 3]));
    let number = (from..to).map(|i| some(i + 2).map(|i| i as i64));
    let float = (from..to).map(|i| some(i + 3).map(|i| i as f64 / 8.0));
    let flag = (from..to).map(|i| some(i + 4).map(|i| i.is_multiple_of(2)));
    let list = (from..to).map(|i| Some((0..i as i32 % 4).map(Some).collect::<Vec<_>>()));
    RecordBatch::try_from_iter_with_nullable([
        ("text", Arc::new(StringArray::from_iter(text)) as ArrayRef, true),
        ("kind", Arc::new(StringArray::from_iter(kind)), true),
        ("number", Arc::new(Int64Array::from_iter(number)), true),
        ("float", Arc::new(Float64Array::from_iter(float)), true),
        ("flag", Arc::new(BooleanArray::from_iter(flag)), true),
        ("list", Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(list)), true),
    ])
    .unwrap()
}

/// A file as another program may write it, with all that the crate writes unless told otherwise.
fn source(
    dir: &Path,
    name: &str,
    rows: &RecordBatch,
    group: usize,
    codec: Compression,
) -> DataFile {
    let properties = WriterProperties::builder()
        .set_compression(codec)
        .set_max_row_group_row_count(Some(group))
        .set_bloom_filter_enabled(true)
        .set_created_by("another program".to_owned())
        .build();
    let path = dir.join(name);
    let file = File::create(&path).unwrap();
    let mut writer = ArrowWriter::try_new(file, rows.schema(), Some(properties)).unwrap();
    writer.write(rows).unwrap();
    writer.close().unwrap();
    DataFile::new(name, path, None).unwrap()
}

fn written(files: &[DataFile], out: &Path, threads: usize) -> Result<DatasetInfo> {
    let table = Table::open(files.to_vec(), &[])?;
    let columns: Vec<String> = table.columns().iter().map(|c| (*c).to_owned()).collect();
    let mut writer = DatasetWriter::new(out, table.schema(&columns)?);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let mut told = 0;
    let info = pool.install(|| {
        writer.write_table(&table, &mut |done| {
            assert!(done > told);
            told = done;
            Ok(())
        })?;
        writer.finish()
    })?;
    assert_eq!((told, info.rows), (table.rows(), table.rows()));
    Ok(info)
}

/// The rows of a data set, and the rows of each of its row groups with their codec.
fn read(out: &Path) -> (RecordBatch, Vec<(i64, Compression)>) {
    let (mut files, mut groups) = (Vec::new(), Vec::new());
    while let path = out.join(format!("part-{:05}.parquet", files.len()))
        && path.exists()
    {
        let bytes = std::fs::read(&path).unwrap();
        assert!(!bytes.windows(15).any(|w| w == b"another program"));
        let file = File::open(&path).unwrap();
        let metadata = ParquetMetaDataReader::new().parse_and_finish(&file).unwrap();
        for group in metadata.row_groups() {
            groups.push((group.num_rows(), group.column(0).compression()));
            for column in group.columns() {
                assert!(column.statistics().is_none() && column.page_encoding_stats().is_none());
                assert!(column.bloom_filter_offset().is_none());
                assert!(column.offset_index_offset().is_none());
                assert!(column.column_index_offset().is_none());
            }
        }
        files.push(
            DataFile::new(format!("part {}", files.len()), path, Some(FileFormat::Parquet))
                .unwrap(),
        );
    }
    let table = Table::open(files, &[]).unwrap();
    let columns: Vec<String> = table.columns().iter().map(|c| (*c).to_owned()).collect();
    let scan = table.scan(&columns).unwrap();
    let schema = scan.schema().clone();
    let batches: Vec<RecordBatch> = scan.map(|batch| batch.unwrap().rows).collect();
    (concat_batches(&schema, &batches).unwrap(), groups)
}

#[test]
fn groups_are_copied_from_every_codec_and_mixed_with_rows_that_are_encoded() {
    let dir = tempfile::tempdir().unwrap();
    let all = rows(0, 6000);
    let files = [
        // Its last group is small.
        source(dir.path(), "a.parquet", &all.slice(0, 1100), 500, Compression::SNAPPY),
        source(dir.path(), "b.parquet", &all.slice(1100, 400), 500, Compression::UNCOMPRESSED),
        // Groups that are too small: gathered, and those of the next file with them.
        source(dir.path(), "c.parquet", &all.slice(1500, 900), 100, *ZSTD),
        source(dir.path(), "d.parquet", &all.slice(2400, 100), 500, Compression::SNAPPY),
        source(dir.path(), "e.parquet", &all.slice(2500, 3500), 2048, *ZSTD),
    ];
    let one = tempfile::tempdir().unwrap();
    let info = written(&files, one.path(), 1).unwrap();
    let (found, groups) = read(one.path());
    assert_eq!(found.columns(), all.columns());
    assert_eq!(info.bytes, all.columns().iter().map(|c| text_bytes(c.as_ref())).sum::<u64>());
    let sizes: Vec<i64> = groups.iter().map(|(rows, _)| *rows).collect();
    assert_eq!(sizes, [500, 500, 100, 400, 1000, 2048, 1452]);
    assert_eq!(groups[0].1, Compression::SNAPPY);
    assert_eq!(groups[3].1, Compression::UNCOMPRESSED);
    assert!(groups[4..].iter().all(|(_, codec)| matches!(codec, Compression::ZSTD(_))));
    for threads in [1, 2, 5] {
        let again = tempfile::tempdir().unwrap();
        assert_eq!(written(&files, again.path(), threads).unwrap(), info);
        let bytes = |dir: &Path| std::fs::read(dir.join("part-00000.parquet")).unwrap();
        assert!(bytes(again.path()) == bytes(one.path()), "{threads} threads");
    }
}

#[test]
fn files_that_do_not_qualify_are_encoded() {
    let dir = tempfile::tempdir().unwrap();
    let all = rows(0, 9000);
    let usual = source(dir.path(), "usual.parquet", &all, 1000, *ZSTD);
    let groups = source_groups(&usual, &all.schema()).unwrap().unwrap();
    assert_eq!(groups.iter().map(SourceGroup::rows).collect::<Vec<_>>(), [1000; 9]);
    assert_eq!(groups[3].first_row, 3000);
    for (what, schema) in [
        ("fewer columns", all.project(&[0, 1]).unwrap().schema()),
        ("another order", all.project(&[1, 0, 2, 3, 4, 5]).unwrap().schema()),
    ] {
        assert!(source_groups(&usual, &schema).unwrap().is_none(), "{what}");
    }
    let large = source(dir.path(), "large.parquet", &all, 9000, *ZSTD);
    let no_nulls = RecordBatch::try_from_iter_with_nullable([(
        "number",
        Arc::new(Int64Array::from_iter_values(0..600)) as ArrayRef,
        false,
    )]);
    let no_nulls: RecordBatch = no_nulls.unwrap();
    let required = source(dir.path(), "required.parquet", &no_nulls, 1000, *ZSTD);
    for (file, rows) in [(large, all), (required, no_nulls)] {
        let out = tempfile::tempdir().unwrap();
        written(std::slice::from_ref(&file), out.path(), 2).unwrap();
        let (found, groups) = read(out.path());
        assert_eq!(found.columns(), rows.columns());
        assert_eq!(groups[0].0, 2048.min(rows.num_rows() as i64), "{}", file.name);
    }
}

#[test]
fn a_part_ends_after_so_many_groups() {
    let dir = tempfile::tempdir().unwrap();
    let all = rows(0, 300 * 130);
    let file = source(dir.path(), "a.parquet", &all, 300, Compression::SNAPPY);
    let out = tempfile::tempdir().unwrap();
    written(&[file], out.path(), 2).unwrap();
    assert!(out.path().join("part-00001.parquet").exists());
    let (found, groups) = read(out.path());
    assert_eq!((found.columns(), groups.len()), (all.columns(), 130));
}

#[test]
fn the_first_damaged_place_is_the_error_and_nothing_is_left_that_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let all = rows(0, 6000);
    let good = source(dir.path(), "good.parquet", &all, 1000, *ZSTD);
    let bad = source(dir.path(), "bad.parquet", &all, 1000, *ZSTD);
    let mut bytes = std::fs::read(&bad.path).unwrap();
    let footer = parquet_file::metadata(&bad).unwrap();
    let (start, length) = footer.metadata().row_group(3).column(0).byte_range();
    let chunk = &mut bytes[start as usize..(start + length) as usize];
    let frame = chunk.windows(4).rposition(|w| w == [0x28, 0xb5, 0x2f, 0xfd]).unwrap();
    chunk[frame..frame + 4].fill(0);
    std::fs::write(&bad.path, bytes).unwrap();
    let later = source(dir.path(), "later.parquet", &all, 1000, *ZSTD);
    for threads in [1, 2, 5] {
        let out = tempfile::tempdir().unwrap();
        let error = written(&[good.clone(), bad.clone()], out.path(), threads).unwrap_err();
        assert_eq!(error.to_string(), "`bad.parquet` is damaged after row 3000");
        assert!(error.hint().is_some());
        assert!(!out.path().join("dataset.json").exists());
        let part = out.path().join("part-00000.parquet");
        assert!(
            Table::open(vec![DataFile::new("part", part, Some(FileFormat::Parquet)).unwrap()], &[])
                .is_err()
        );

        // The last file is spoilt after a first look at it.
        std::fs::copy(&good.path, &later.path).unwrap();
        let table = Table::open(vec![bad.clone(), later.clone()], &[]).unwrap();
        std::fs::write(&later.path, b"PAR1 and no more").unwrap();
        let out = tempfile::tempdir().unwrap();
        let mut writer = DatasetWriter::new(out.path(), all.schema());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let error = pool.install(|| writer.write_table(&table, &mut |_| Ok(()))).unwrap_err();
        assert_eq!(error.to_string(), "`bad.parquet` is damaged after row 3000");
    }
}

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use arrow_array::{Array, ArrayRef, Int64Array, ListArray, StringArray, types::Int32Type};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::*;
use crate::dataset::parquet_properties;

/// Rows of texts, numbers with gaps, and lists.
fn rows(from: usize, to: usize) -> RecordBatch {
    let text = (from..to).map(|i| format!("row {i} says {}", "na ".repeat(i % 50)));
    let number = (from..to).map(|i| (i % 7 > 0).then_some(i as i64));
    let list = (from..to).map(|i| Some((0..i as i32 % 4).map(Some).collect::<Vec<_>>()));
    RecordBatch::try_from_iter_with_nullable([
        ("text", Arc::new(StringArray::from_iter_values(text)) as ArrayRef, true),
        ("number", Arc::new(Int64Array::from_iter(number)), true),
        ("list", Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(list)), true),
    ])
    .unwrap()
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

fn create(path: &Path, schema: SchemaRef) -> Result<RowGroups> {
    RowGroups::create(path, schema, parquet_properties(2048, 1)?)
}

/// The bytes of a file of groups, each given as slices of `piece` rows.
fn written(groups: &[RecordBatch], piece: usize) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("a.parquet");
    let mut file = create(&path, groups[0].schema())?;
    for group in groups {
        let rows = group.num_rows();
        let pieces = (0..rows).step_by(piece).map(|i| group.slice(i, piece.min(rows - i)));
        file.write(pieces.collect())?;
    }
    assert_eq!(file.groups(), groups.len());
    file.finish()?;
    Ok(std::fs::read(&path)?)
}

fn read(bytes: Vec<u8>) -> (usize, Vec<RecordBatch>) {
    let file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut &file, &bytes).unwrap();
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
    let groups = reader.metadata().num_row_groups();
    (groups, reader.build().unwrap().map(|batch| batch.unwrap()).collect())
}

#[test]
fn bytes_depend_on_the_rows_of_each_group_alone() {
    let groups: Vec<_> = (0..40).map(|i| rows(i * 700, (i + 1) * 700)).collect();
    let once = pool(1).install(|| written(&groups, 700)).unwrap();
    for threads in [1, 2, 5] {
        for piece in [100, 256, 699] {
            let again = pool(threads).install(|| written(&groups, piece)).unwrap();
            assert!(again == once, "{threads} threads, pieces of {piece}");
        }
    }
    assert!(written(&groups, 700).unwrap() == once, "outside of a pool");
    let (found, batches) = read(once);
    assert_eq!(found, 40);
    let all = concat_batches(&batches[0].schema(), &batches).unwrap();
    assert_eq!(all.columns(), rows(0, 40 * 700).columns());
}

#[test]
fn a_row_larger_than_all_that_may_wait_is_written() {
    let huge = "all of it ".repeat(WAITING_BYTES / 10 + 1);
    let row = |text: &str| {
        let text: ArrayRef = Arc::new(StringArray::from(vec![text]));
        RecordBatch::try_from_iter_with_nullable([("text", text, true)]).unwrap()
    };
    let groups = [row("before"), row(&huge), row("after"), row(&huge)];
    let one = pool(1).install(|| written(&groups, 1)).unwrap();
    assert!(pool(3).install(|| written(&groups, 1)).unwrap() == one);
    let (_, batches) = read(one);
    let texts: Vec<&str> = batches
        .iter()
        .flat_map(|b| b.column(0).as_any().downcast_ref::<StringArray>().unwrap().iter())
        .flatten()
        .collect();
    assert_eq!(texts, ["before", &huge, "after", &huge]);
}

#[test]
fn what_cannot_be_encoded_is_an_error_of_a_later_call() {
    let schema = rows(0, 1).schema();
    let wrong = RecordBatch::try_from_iter([("text", Arc::new(Int64Array::from(vec![1])) as _)]);
    let wrong: RecordBatch = wrong.unwrap();
    for threads in [1, 2] {
        let dir = tempfile::tempdir().unwrap();
        let error = pool(threads).install(|| {
            let mut file = create(&dir.path().join("a.parquet"), schema.clone())?;
            file.write(vec![rows(0, 9)])?;
            file.write(vec![wrong.clone()])?;
            file.write(vec![rows(9, 20)])?;
            file.finish()
        });
        assert_eq!(
            error.unwrap_err().to_string(),
            "cannot write rows: their columns are not those of the file"
        );
    }
}

#[test]
fn an_abandoned_file_leaves_no_thread_at_work() {
    let ended = Arc::new(AtomicUsize::new(0));
    let count = ended.clone();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(2)
        .exit_handler(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
        })
        .build()
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let many = rows(0, 50_000);
    let abandoned = pool.install(|| {
        let mut file = create(&dir.path().join("a.parquet"), many.schema()).unwrap();
        for _ in 0..4 {
            file.write(vec![many.clone()]).unwrap();
        }
        let abandoned = file.abandoned.clone();
        drop(file);
        abandoned
    });
    assert!(abandoned.load(Ordering::SeqCst));
    drop(pool);
    let start = Instant::now();
    while ended.load(Ordering::SeqCst) < 2 || Arc::strong_count(&abandoned) > 1 {
        assert!(start.elapsed() < Duration::from_secs(60), "a thread goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

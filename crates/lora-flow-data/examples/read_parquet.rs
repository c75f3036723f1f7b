//! Reads Parquet files to the end and does nothing with them, for `benches/data_cpu.py`: `cargo run --release
//! -p lora-flow-data --example read_parquet -- crate FILE…` by the parquet crate's Arrow reader as its
//! documentation shows it, `-- table FILE…` as the tasks read them; `-- copy-LEVEL FILE…` writes what the crate reads to
//! `copy.parquet`, in row groups as those of our data sets, by zstd of that level. Prints the number of rows.

use std::error::Error;
use std::fs::File;

use lora_flow_data::{DataFile, Table};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let reader = args.next().unwrap_or_default();
    let files: Vec<String> = args.collect();
    let level = reader.strip_prefix("copy-").map(str::parse).transpose()?;
    let mut rows = 0;
    match reader.as_str() {
        _ if reader == "crate" || level.is_some() => {
            let mut writer = None;
            for file in &files {
                for batch in ParquetRecordBatchReaderBuilder::try_new(File::open(file)?)?.build()? {
                    let batch = batch?;
                    rows += batch.num_rows();
                    if let Some(level) = level {
                        let writer = match &mut writer {
                            Some(writer) => writer,
                            none => none.insert(ArrowWriter::try_new(
                                File::create("copy.parquet")?,
                                batch.schema(),
                                Some(properties(level)?),
                            )?),
                        };
                        writer.write(&batch)?;
                    }
                }
            }
            if let Some(writer) = writer {
                writer.close()?;
            }
        }
        "table" => {
            let files = files.iter().map(|file| DataFile::new(file, file, None));
            let table = Table::open(files.collect::<Result<_, _>>()?, &[])?;
            let columns: Vec<String> = table.columns().into_iter().map(str::to_owned).collect();
            for batch in table.scan(&columns)? {
                rows += batch?.rows.num_rows();
            }
        }
        _ => return Err("usage: read_parquet crate|table|copy-LEVEL FILE…".into()),
    }
    println!("{rows}");
    Ok(())
}

fn properties(level: i32) -> Result<WriterProperties, Box<dyn Error>> {
    Ok(WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(level)?))
        .set_statistics_enabled(EnabledStatistics::None)
        .set_max_row_group_row_count(Some(2048))
        .build())
}

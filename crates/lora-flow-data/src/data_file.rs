//! A file of rows: its name for messages, its place, its kind.

use std::path::{Path, PathBuf};

use lora_flow_core::{Error, Result};

/// Kinds of files that hold rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileFormat {
    /// Apache Parquet.
    Parquet,
    /// One JSON object a line.
    Jsonl,
    /// Comma-separated values with a header line.
    Csv,
}

impl FileFormat {
    /// The format that a file's extension names (`parquet`, `jsonl`, `ndjson`, `json`, `csv`).
    pub fn from_name(name: &str) -> Option<Self> {
        let extension = Path::new(name).extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "parquet" => Some(Self::Parquet),
            "jsonl" | "ndjson" | "json" => Some(Self::Jsonl),
            "csv" => Some(Self::Csv),
            _ => None,
        }
    }
}

/// One file of rows.
#[derive(Debug, Clone)]
pub struct DataFile {
    /// Name used in messages.
    pub name: String,
    /// Where it is; for an artifact's file this says nothing to a person.
    pub path: PathBuf,
    /// How to read it.
    pub format: FileFormat,
}

impl DataFile {
    /// A file whose format is given or, failing that, told by the extension of its name.
    ///
    /// # Errors
    /// When the extension is none of those known.
    pub fn new(
        name: impl Into<String>,
        path: impl Into<PathBuf>,
        format: Option<FileFormat>,
    ) -> Result<Self> {
        let name = name.into();
        let format = format.or_else(|| FileFormat::from_name(&name)).ok_or_else(|| {
            Error::new(format!("cannot tell the format of `{name}` from its extension")).with_hint(
                "use `.parquet`, `.jsonl`, `.ndjson`, `.json` (one object a line) or `.csv`, \
                 or set `format`; compressed files must be unpacked first",
            )
        })?;
        Ok(Self { name, path: path.into(), format })
    }

    /// The file opened for reading; an empty one is an error.
    pub(crate) fn open(&self) -> Result<std::fs::File> {
        let file = std::fs::File::open(&self.path)
            .map_err(|e| Error::new(format!("cannot open `{}`", self.name)).with_source(e))?;
        let length = file
            .metadata()
            .map_err(|e| Error::new(format!("cannot read `{}`", self.name)).with_source(e))?
            .len();
        if length == 0 {
            return Err(Error::new(format!("`{}` is empty", self.name)));
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extension_names_the_format_and_an_explicit_one_wins() {
        assert_eq!(DataFile::new("a.PARQUET", "x", None).unwrap().format, FileFormat::Parquet);
        assert_eq!(DataFile::new("a.ndjson", "x", None).unwrap().format, FileFormat::Jsonl);
        let file = DataFile::new("a.parquet", "x", Some(FileFormat::Csv)).unwrap();
        assert_eq!(file.format, FileFormat::Csv);
        let error = DataFile::new("a.jsonl.gz", "x", None).unwrap_err();
        assert!(error.to_string().contains("`a.jsonl.gz`") && error.hint().is_some());
    }
}

//! Which columns `ingest` reads, under which names they are seen, and which are kept.

use lora_flow_core::{Error, Result};
use lora_flow_data::{Table, no_such_column};

use crate::params::Columns;

/// Columns of a table under the names they will have.
#[derive(Debug)]
pub(crate) struct Selection {
    /// New name and old name of the columns kept.
    pub(crate) kept: Vec<(String, String)>,
    /// Old names of all columns to read; the kept ones come first, in order.
    pub(crate) read: Vec<String>,
}

impl Selection {
    /// Keeps `columns` (all, if none) and the column `text` under the name `text`.
    pub(crate) fn new(
        table: &Table,
        columns: Option<&Columns>,
        text: Option<&str>,
    ) -> Result<Self> {
        let mut kept = match columns {
            Some(columns) => columns.pairs(),
            None => table.columns().iter().map(|n| ((*n).to_owned(), (*n).to_owned())).collect(),
        };
        if let Some(text) = text {
            match kept.iter_mut().find(|(_, old)| old == text) {
                Some((new, _)) if columns.is_none() => "text".clone_into(new),
                Some((new, _)) if new == "text" => {}
                _ => kept.insert(0, ("text".to_owned(), text.to_owned())),
            }
        }
        if let Some((_, old)) = kept.iter().find(|(_, o)| !table.columns().contains(&o.as_str())) {
            return Err(no_such_column(old, &table.name(), table.columns()));
        }
        let mut names: Vec<&str> = kept.iter().map(|(new, _)| new.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::new(format!("two columns would be called `{}`", pair[0]))
                .with_hint("choose what to keep with `columns`"));
        }
        let mut read: Vec<String> = Vec::with_capacity(kept.len());
        for (_, old) in &kept {
            if !read.contains(old) {
                read.push(old.clone());
            }
        }
        Ok(Self { kept, read })
    }

    /// Index in [`Selection::read`] of a column by its new name or, if it is not kept, by its
    /// own; it is read from now on.
    pub(crate) fn find(&mut self, table: &Table, name: &str) -> Result<usize> {
        let old = match self.kept.iter().find(|(new, _)| new == name) {
            Some((_, old)) => old.clone(),
            None if table.columns().contains(&name) => name.to_owned(),
            None => {
                let mut names: Vec<&str> = self.kept.iter().map(|(new, _)| new.as_str()).collect();
                for name in table.columns() {
                    if !names.contains(&name) {
                        names.push(name);
                    }
                }
                return Err(no_such_column(name, &table.name(), names));
            }
        };
        Ok(self.read.iter().position(|n| *n == old).unwrap_or_else(|| {
            self.read.push(old);
            self.read.len() - 1
        }))
    }

    /// Index in [`Selection::read`] of each kept column.
    pub(crate) fn kept_indexes(&self) -> Vec<usize> {
        let index = |old: &String| self.read.iter().position(|n| n == old).unwrap_or(0);
        self.kept.iter().map(|(_, old)| index(old)).collect()
    }
}

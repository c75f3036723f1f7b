//! `lora-flow cache`: look at the store, clean it, check it.

use std::time::Duration;

use serde_json::json;

use crate::args::CacheCommand;
use crate::commands;
use crate::table::{bytes, table};
use crate::ui::{Failure, count};

pub fn cache(command: &CacheCommand) -> Result<i32, Failure> {
    let engine = commands::engine_here()?;
    let store = engine.store();
    match command {
        CacheCommand::Ls { json } => {
            let entries = store.ls()?;
            if *json {
                let entries: Vec<_> = entries
                    .iter()
                    .map(|e| json!({ "key": e.key, "kind": e.kind, "created": e.created, "size": e.size }))
                    .collect();
                println!("{}", serde_json::to_string_pretty(&entries)?);
                return Ok(0);
            }
            let mut rows = table(&["key", "kind", "created", "size"]);
            for entry in &entries {
                rows.add_row([&entry.key.short(), &entry.kind, &entry.created, &bytes(entry.size)]);
            }
            println!("{}", rows.trim_fmt());
            Ok(0)
        }
        CacheCommand::Gc { keep_runs, keep_days, dry_run } => {
            let age = Duration::from_secs(keep_days.saturating_mul(24 * 3600));
            let freed = engine.gc(*keep_runs, age, *dry_run)?;
            let verb = if *dry_run { "would free" } else { "freed" };
            println!(
                "{verb} {} in {} and {}",
                bytes(freed.bytes),
                count(freed.entries, "entry").replace("entrys", "entries"),
                count(freed.blobs, "file")
            );
            Ok(0)
        }
        CacheCommand::Verify => {
            let report = store.verify()?;
            println!("checked {} in {}", bytes(report.bytes), count(report.blobs, "file"));
            for problem in &report.problems {
                eprintln!("{problem}");
            }
            if report.problems.is_empty() {
                println!("the store is sound");
                return Ok(0);
            }
            println!(
                "{} set aside; the next run recomputes what it needs",
                count(report.problems.len(), "corrupt file")
            );
            Ok(1)
        }
    }
}

//! `lora-flow cache`: look at the store, clean it, check it.

use std::time::Duration;

use lora_flow_core::{CancelToken, Error};
use lora_flow_pipeline::{EntryInfo, Keep};
use serde_json::json;

use crate::args::CacheCommand;
use crate::commands;
use crate::table::{bytes, table};
use crate::ui::{self, Failure, count};

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
            println!("{}", list(&entries));
            Ok(0)
        }
        CacheCommand::Gc { keep_runs, keep_days, max_size, dry_run } => {
            let age = Duration::from_secs(keep_days.saturating_mul(24 * 3600));
            let keep = Keep { runs: *keep_runs, age, max_bytes: *max_size };
            let freed = engine.gc(&keep, *dry_run)?;
            if !freed.removed.is_empty() {
                println!("{}\n", list(&freed.removed));
            }
            if freed.beside_runs {
                eprintln!("a pipeline is running here: what it uses stays");
            }
            let verb = if *dry_run { "would free" } else { "freed" };
            println!(
                "{verb} {} in {} and {}",
                bytes(freed.bytes),
                count(freed.entries, "entry").replace("entrys", "entries"),
                count(freed.blobs, "file")
            );
            if let Some(max) = max_size.filter(|max| freed.left > *max) {
                let (left, max) = (bytes(freed.left), bytes(max));
                eprintln!("{left} stay, more than {max}: they are pinned or in use");
            }
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
        CacheCommand::Push => {
            let Some(url) = ui::global().remote.as_deref() else {
                let error = Error::new("`cache push` needs a remote cache");
                return Err(Failure::Usage(error.with_hint("name it with `--remote URL`")));
            };
            let (sent, size) = engine.push_all(&CancelToken::default())?;
            let sent = count(sent, "entry").replace("entrys", "entries");
            println!("sent {sent} to {url} ({} of files)", bytes(size));
            Ok(0)
        }
        CacheCommand::Pin { run: None } => {
            store.pins()?.iter().for_each(|id| println!("{id}"));
            Ok(0)
        }
        CacheCommand::Pin { run: Some(run) } => {
            let id = engine.load_run(run)?.run_id;
            store.pin(&id)?;
            println!("pinned {id}");
            Ok(0)
        }
        CacheCommand::Unpin { run } => {
            let pins = store.pins()?;
            let mut meant = pins.iter().filter(|id| id.starts_with(run.as_str()));
            let (Some(id), None) = (meant.next(), meant.next()) else {
                let error = Error::new(format!("no pinned run, or more than one, is `{run}`"));
                return Err(Failure::Usage(error.with_hint("`cache pin` lists those pinned")));
            };
            store.unpin(id)?;
            println!("unpinned {id}");
            Ok(0)
        }
    }
}

fn list(entries: &[EntryInfo]) -> String {
    let mut rows = table(&["key", "kind", "created", "size"]);
    for entry in entries {
        rows.add_row([&entry.key.short(), &entry.kind, &entry.created, &bytes(entry.size)]);
    }
    rows.trim_fmt()
}

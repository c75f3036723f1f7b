//! `lora-flow report`: one or more runs as an HTML page.

use std::path::Path;

use crate::commands;
use crate::report::{data::RunView, page};
use crate::ui::Failure;

pub fn report(runs: &[String], output: &Path) -> Result<i32, Failure> {
    let engine = commands::engine_here()?;
    let mut views = Vec::new();
    for id in runs {
        let record = engine.load_record(id).map_err(Failure::Usage)?;
        views.push(RunView::read(&engine, &record));
    }
    let html = page::render(&views)?;
    if output == Path::new("-") {
        print!("{html}");
        return Ok(0);
    }
    if let Some(parent) = output.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs_err::create_dir_all(parent)?;
    }
    fs_err::write(output, html)?;
    println!("{}", output.display());
    Ok(0)
}

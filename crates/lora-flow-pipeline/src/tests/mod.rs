//! Tests of the way from the file to the plan.

mod broken;
mod good;
mod include;
mod kinds;
mod robust;
mod yaml;

use std::sync::Arc;

use crate::{CompileOptions, Diagnostics, Plan, SourceFile, compile_source};

/// A folder to resolve files in: `data/a.csv`, `data/b.csv`, `models/m.gguf`.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["data/a.csv", "data/b.csv", "models/m.gguf"] {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, name).unwrap();
    }
    dir
}

fn options() -> CompileOptions {
    CompileOptions { builtin: kinds::KINDS, ..CompileOptions::default() }
}

fn compile_in(
    dir: &std::path::Path,
    text: &str,
    options: &CompileOptions,
) -> Result<Plan, Diagnostics> {
    let source: Arc<SourceFile> = SourceFile::new(dir.join("p.yaml"), text);
    compile_source(source, options)
}

fn compile(text: &str) -> Result<Plan, Diagnostics> {
    compile_in(folder().path(), text, &options())
}

/// The problems, one a line: `3:5: message (hint)`.
fn problems(result: Result<Plan, Diagnostics>) -> String {
    let Err(diagnostics) = result else { return "no problem\n".to_owned() };
    let mut out = String::new();
    for d in diagnostics.iter() {
        let file = d.source.path.file_name().unwrap().to_string_lossy().into_owned();
        let file = if file == "p.yaml" { String::new() } else { format!("{file}:") };
        let place = d.line_column().map_or_else(String::new, |(l, c)| format!("{l}:{c}: "));
        out.push_str(&format!("{file}{place}{}\n", d.message));
        if let Some(hint) = &d.hint {
            out.push_str(&format!("    hint: {hint}\n"));
        }
    }
    out
}

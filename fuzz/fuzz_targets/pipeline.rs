//! A pipeline file of any bytes is compiled or refused: no panic, no place outside of the text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_flow_pipeline::{CompileOptions, GraphFormat, SourceFile, compile_source, graph};

/// The kinds that the compiler's own tests use.
#[path = "../../crates/lora-flow-pipeline/src/tests/kinds.rs"]
#[allow(dead_code)]
mod kinds;

/// What would read files that are not the fuzzer's, or walk through the whole disk.
const OUTSIDE: [&str; 6] = ["include", "plugins", "root", "/*", "**", ".."];

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if OUTSIDE.iter().any(|word| text.contains(word)) {
        return;
    }
    let source = SourceFile::new("/nonexistent/p.yaml", text);
    let options = CompileOptions { builtin: kinds::KINDS, ..CompileOptions::default() };
    match compile_source(source, &options) {
        Ok(plan) => {
            for task in &plan.tasks {
                assert!(task.span.end <= text.len());
            }
            for format in [GraphFormat::Mermaid, GraphFormat::Dot, GraphFormat::Svg] {
                graph(&plan, format, &[]);
            }
        }
        Err(diagnostics) => {
            for d in diagnostics.iter() {
                if let Some(span) = d.span {
                    assert!(span.start <= span.end && span.end <= d.source.text.len());
                    assert!(d.source.text.is_char_boundary(span.start));
                    assert!(d.source.text.is_char_boundary(span.end));
                }
                assert!(!d.to_string().is_empty());
            }
        }
    }
});

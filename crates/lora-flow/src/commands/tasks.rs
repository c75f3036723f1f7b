//! `lora-flow tasks` and `schema`: what can stand in a pipeline file.

use lora_flow_core::{Error, nearest};
use lora_flow_pipeline::{builtin_kinds, kind_reference, pipeline_schema, reference_page};

use crate::BUILTIN;
use crate::table::table;
use crate::ui::Failure;

pub fn tasks(kind: Option<&str>, markdown: bool) -> Result<i32, Failure> {
    if markdown {
        print!("{}", reference_page(&builtin_kinds(BUILTIN)));
        return Ok(0);
    }
    let kinds = builtin_kinds(BUILTIN);
    let Some(name) = kind else {
        let mut rows = table(&["kind", "what it does"]);
        for kind in &kinds {
            rows.add_row([&kind.name, &kind.summary]);
        }
        println!(
            "{}\n\n`lora-flow tasks KIND` describes one; plugins add kinds of their own",
            rows.trim_fmt()
        );
        return Ok(0);
    };
    let Some(kind) = kinds.iter().find(|k| k.name == name) else {
        let error = Error::new(format!("unknown task kind `{name}`"));
        return Err(Failure::Usage(match nearest(name, kinds.iter().map(|k| k.name.as_str())) {
            Some(name) => error.with_hint(format!("did you mean `{name}`?")),
            None => error.with_hint("`lora-flow tasks` lists them"),
        }));
    };
    print!("{}", kind_reference(kind));
    Ok(0)
}

pub fn schema() -> Result<i32, Failure> {
    println!("{}", serde_json::to_string_pretty(&pipeline_schema(&builtin_kinds(BUILTIN)))?);
    Ok(0)
}

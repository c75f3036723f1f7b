//! The generated pages of docs/ are what the program would generate now.

#[path = "support/mod.rs"]
mod support;

use support::Project;

fn check(file: &str, args: &[&str]) {
    let now = Project::empty().expect(0, args).stdout;
    let path = format!("{}/../../docs/{file}", env!("CARGO_MANIFEST_DIR"));
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == now,
        "docs/{file} is stale; make it again with: cargo run -- {} > docs/{file}",
        args.join(" ")
    );
}

#[test]
fn the_reference_of_task_kinds_is_fresh() {
    check("kinds.md", &["tasks", "--markdown"]);
}

#[test]
fn the_schema_of_pipelines_is_fresh() {
    check("lora-flow.schema.json", &["schema"]);
}

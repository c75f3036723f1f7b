//! Pipelines in several files.

use super::{compile_in, folder, options, problems};

/// Compiles `p.yaml` beside further files.
fn compiled(text: &str, files: &[(&str, &str)]) -> Result<crate::Plan, crate::Diagnostics> {
    let dir = folder();
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    compile_in(dir.path(), text, &options())
}

/// The problems, without the folder in which the test ran.
fn found(text: &str, files: &[(&str, &str)]) -> String {
    let mut text = problems(compiled(text, files));
    // `/tmp/.tmpXXXX/name` → `name`.
    while let Some(start) = text.find(std::env::temp_dir().to_str().unwrap()) {
        let end = start + text[start..].find(".tmp").unwrap();
        let end = end + text[end..].find('/').unwrap() + 1;
        text.replace_range(start..end, "");
    }
    text
}

const BASE: &str =
    "params: { size: 1 }\ntasks:\n  base: { uses: model, with: { source: models/m.gguf } }\n";

#[test]
fn fragments_come_first_and_paths_in_them_are_the_pipelines() {
    let files = format!("{BASE}  corpus: {{ uses: ingest, with: {{ files: data }} }}\n");
    let plan = compiled(
        "include: [parts/all.yaml, parts/base.yaml]\nparams: { r: 8 }\n\
         tasks:\n  adapter: { uses: lora-inject, inputs: { model: base }, with: { r: \"${{ params.r }}\", target_modules: all-linear } }\n",
        &[("parts/all.yaml", "include: base.yaml\nx-note: 1\n"), ("parts/base.yaml", &files)],
    );
    let plan = plan.unwrap_or_else(|e| panic!("{e}"));
    let ids: Vec<&str> = plan.tasks.iter().map(|t| t.id.as_str()).collect();
    assert_eq!(ids, ["base", "corpus", "adapter"]);
    assert_eq!(plan.params, serde_json::json!({ "size": 1, "r": 8 }));
    assert_eq!(plan.tasks[1].files.len(), 1);
    let warning = plan.warnings[0].to_string();
    assert!(
        warning.contains("parts/base.yaml:1:11: the parameter `size` is never used"),
        "{warning}"
    );
}

#[test]
fn a_file_may_hold_nothing_but_includes() {
    let plan = compiled("include: base.yaml\n", &[("base.yaml", BASE)]).unwrap();
    assert_eq!(plan.tasks.len(), 1);
}

#[test]
fn problems_point_into_the_fragment() {
    let mut report = String::new();
    for (name, text, files) in [
        (
            "duplicate",
            "include: base.yaml\nparams: { size: 2 }\ntasks:\n  base: { uses: model, with: { source: models/m.gguf } }\n",
            &[("base.yaml", BASE)][..],
        ),
        (
            "duplicate in fragments",
            "include: [base.yaml, b.yaml]\n",
            &[("base.yaml", BASE), ("b.yaml", BASE)],
        ),
        ("missing", "include: [nowhere.yaml, parts]\ntasks: {}\n", &[("parts/x", "")]),
        (
            "circle",
            "include: a.yaml\n",
            &[("a.yaml", "include: b.yaml\n"), ("b.yaml", "include: [a.yaml, p.yaml]\n")],
        ),
        ("itself", "include: p.yaml\n", &[]),
        (
            "keys",
            "include: a.yaml\n",
            &[("a.yaml", "name: x\nroot: ..\nsteps: {}\nversion: 2\ntasks: []\nplugins: x\n")],
        ),
        ("syntax", "include: a.yaml\n", &[("a.yaml", "tasks: [\n")]),
        ("not a path", "include: { a: b }\n", &[]),
        (
            "expressions and parameters",
            "include: a.yaml\ntasks:\n  one: { uses: model, with: { sorce: x } }\n",
            &[(
                "a.yaml",
                "tasks:\n  two: { uses: modle }\n  three: { uses: model, with: { source: \"${{ params.nothing }}\" } }\n  four: { uses: lora-inject, inputs: { model: nobody }, with: { r: x, target_modules: all-linear } }\n",
            )],
        ),
        (
            "waiting",
            "include: a.yaml\ntasks:\n  one: { uses: model, needs: two, with: { source: models/m.gguf } }\n",
            &[(
                "a.yaml",
                "# first line\ntasks:\n  two: { uses: model, needs: one, with: { source: models/m.gguf } }\n",
            )],
        ),
        (
            "plugins",
            "include: a.yaml\ntasks:\n  one: { uses: model, with: { source: models/m.gguf } }\n",
            &[("a.yaml", "plugins: [nowhere]\n")],
        ),
    ] {
        let dir = if text.contains("p.yaml") || name == "circle" {
            [files, &[("p.yaml", text)]].concat()
        } else {
            files.to_vec()
        };
        report.push_str(&format!("## {name}\n\n{text}"));
        for (name, text) in files {
            report.push_str(&format!("--- {name}\n{text}"));
        }
        report.push_str(&format!("\n{}\n", found(text, &dir)));
    }
    insta::assert_snapshot!(report);
}

//! No input makes the compiler panic, and every place lies inside the file.

use proptest::prelude::*;

use super::*;

const SEEDS: &[&str] = &[
    "version: 1\nparams: { r: 8, x: [1, 2.5e-3, ~, \"é\"] }\ntasks:\n  a: &a { uses: model, with: { source: \"${{ params.r }}\" } }\n  b: { <<: *a, needs: [a] }\n",
    "tasks:\n  t:\n    uses: tokenize\n    inputs: { dataset: 'c[r=1].train', model: base }\n    matrix: { r: [1, 2] }\n    with:\n      format: text # x\n      max_length: |\n        12\n",
    "plugins: [x]\nroot: .\nenv: [A]\ntasks: {a: {uses: gate, with: {require: [\"${{ env.A | default('}}') }} {{\"]}, publish: {verdict: out}}}\n",
];

const PIECES: &[&str] = &[
    "${{", "}}", "\n", "  ", ": ", "- ", "{", "}", "[", "]", "&a ", "*a", "!!str ", "\"", "'", "#",
    "|", ">", "\t", "é", "\u{feff}", "---", "? ", "<<: ", "params.r", "matrix.", "\\", "%", "@",
    ",", "0x", "1e999", "\r\n", "tasks", "uses", "with", "train",
];

fn survives(text: &str, dir: &std::path::Path) {
    match compile_in(dir, text, &options()) {
        Ok(plan) => {
            for task in &plan.tasks {
                assert!(task.span.end <= text.len());
            }
        }
        Err(diagnostics) => {
            assert!(!diagnostics.is_empty());
            for d in diagnostics.iter() {
                if let Some(span) = d.span {
                    assert!(span.start <= span.end && span.end <= d.source.text.len(), "{d}");
                    assert!(d.source.text.is_char_boundary(span.start), "{d}");
                    assert!(d.source.text.is_char_boundary(span.end), "{d}");
                }
                assert!(!d.message.is_empty());
                let _ = d.to_string();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn mutated_files(
        seed in 0..SEEDS.len(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0..PIECES.len(), 0..3usize), 1..6),
    ) {
        let mut text: Vec<char> = SEEDS[seed].chars().collect();
        for (at, piece, how) in edits {
            let at = at.index(text.len().max(1)).min(text.len());
            match how {
                0 => drop(text.splice(at..at, PIECES[piece].chars())),
                1 => drop(text.splice(at..(at + 3).min(text.len()), PIECES[piece].chars())),
                _ => drop(text.drain(at..(at + piece).min(text.len()))),
            }
        }
        let text: String = text.into_iter().collect();
        survives(&text, std::path::Path::new("/nonexistent"));
    }

    #[test]
    fn any_text(text in "\\PC{0,80}") {
        survives(&text, std::path::Path::new("/nonexistent"));
    }

    #[test]
    fn pieces_in_any_order(pieces in prop::collection::vec(0..PIECES.len(), 0..40)) {
        let text: String = pieces.into_iter().map(|i| PIECES[i]).collect();
        survives(&text, std::path::Path::new("/nonexistent"));
    }

    #[test]
    fn plain_scalars_read_as_serde_json_writes_them(n in any::<i64>(), f in any::<f64>()) {
        let read = |text: String| {
            crate::yaml::parse(&SourceFile::new("x", text)).map(|n| n.to_json())
        };
        prop_assert_eq!(read(n.to_string()), Ok(serde_json::json!(n)));
        if f.is_finite() {
            prop_assert_eq!(read(serde_json::json!(f).to_string()), Ok(serde_json::json!(f)));
        }
    }
}

/// A matrix of a thousand members behind a chain of a thousand tasks.
#[test]
fn large_pipelines() {
    let mut text = String::from("tasks:\n  t0: { uses: model, with: { source: x } }\n");
    for i in 1..1000 {
        let before = i - 1;
        text.push_str(&format!(
            "  t{i}: {{ uses: lora-inject, inputs: {{ model: t0 }}, needs: [t{before}], \
             with: {{ r: \"${{{{ 1 + {i} }}}}\", target_modules: a }} }}\n"
        ));
    }
    let axis: Vec<String> = (1..=1000).map(|r| r.to_string()).collect();
    text.push_str(&format!(
        "  m: {{ uses: lora-inject, matrix: {{ r: [{}] }}, inputs: {{ model: t0 }}, \
         needs: [t999], with: {{ r: \"${{{{ matrix.r }}}}\", target_modules: a }} }}\n",
        axis.join(", ")
    ));
    let started = std::time::Instant::now();
    let plan = compile(&text).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(plan.tasks.len(), 2000);
    assert_eq!(plan.tasks[1999].id, "m[r=1000]");
    // Quadratic behaviour would take minutes; this leaves room for a busy machine.
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}

#[test]
fn bombs_and_towers_are_refused() {
    let mut bomb = String::from("params:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..12 {
        let refs = vec![format!("*a{}", i - 1); 10].join(", ");
        bomb.push_str(&format!("  a{i}: &a{i} [{refs}]\n"));
    }
    let found = problems(compile(&bomb));
    assert!(found.contains("the file holds more than 1000000 values"), "{found}");

    for tower in ["[".repeat(10_000), "- ".repeat(10_000), "{a: ".repeat(10_000)] {
        let found = problems(compile(&tower));
        assert_ne!(found, "no problem\n");
    }
    let found = problems(compile(&("[".repeat(100) + &"]".repeat(100))));
    assert!(found.contains("nested deeper than 64 levels"), "{found}");

    // A tower of aliases, each a little higher than the last.
    let mut tower = String::from("x-0: &a0 [1]\n");
    for i in 1..100 {
        tower.push_str(&format!("x-{i}: &a{i} [*a{}]\n", i - 1));
    }
    let found = problems(compile(&tower));
    assert!(found.contains("nested deeper than 64 levels"), "{found}");
}

#[test]
fn values_too_large_to_walk_through_are_refused() {
    for expression in ["[1] * 90000000", "[[[1] * 999] * 999] * 999", "{'a': [1] * 90000000}"] {
        let text = "tasks: { a: { uses: model, with: { source: \"${{ X }}\" } } }";
        let found = problems(compile(&text.replace('X', expression)));
        assert!(found.contains("has too large a value"), "{found}");
    }
}

//! `lora-flow init` and `plugin new`: folders to start from.

use std::path::{Component, Path, PathBuf};

use lora_flow_core::Error;
use lora_flow_pipeline::{builtin_kinds, pipeline_schema};

use crate::BUILTIN;
use crate::args::{InitArgs, Language, PluginNewArgs};
use crate::commands;
use crate::ui::Failure;

/// A file to write, and its content.
type NewFile = (&'static str, String);

/// Makes a pipeline that runs, with rows to run it on.
pub fn init(args: &InitArgs) -> Result<i32, Failure> {
    let dir = &plain(&args.dir);
    let full = std::path::absolute(&args.dir)?;
    let name = full.file_name().map_or_else(|| "pipeline".into(), |n| n.to_string_lossy());
    let model = match &args.model {
        // What the user can write from there, if that is where the pipeline stands.
        Some(path) if path.is_relative() && full == std::env::current_dir()? => path.clone(),
        Some(path) => std::path::absolute(path)?,
        None => PathBuf::from("models/base"),
    };
    let pipeline = pipeline(&name, &model, args.model.is_some())?;
    let schema = serde_json::to_string_pretty(&pipeline_schema(&builtin_kinds(BUILTIN)))? + "\n";
    let samples = include_str!("../../templates/init/samples.jsonl");
    let mut files = vec![
        ("pipeline.yaml", pipeline),
        ("data/samples.jsonl", samples.to_owned()),
        ("lora-flow.schema.json", schema),
    ];
    // A repository that is there already has its own.
    if !dir.join(".gitignore").exists() {
        files.push((".gitignore", include_str!("../../templates/init/gitignore").to_owned()));
    }
    write_new(dir, &files)?;
    let cd = if full == std::env::current_dir()? {
        String::new()
    } else {
        format!("  cd {}\n", dir.display())
    };
    println!("\nnext:\n{cd}  lora-flow check pipeline.yaml\n  lora-flow run pipeline.yaml");
    if args.model.is_none() {
        println!(
            "\nIt reads and splits the sample rows, which needs no model. To train: put a Hugging Face\n\
             folder or a GGUF file at `models/base`, or name yours in pipeline.yaml, and remove the\n\
             `# ` from the tasks at its end; or start with `lora-flow init --model PATH`."
        );
    }
    Ok(0)
}

/// The template, with the tasks that need a model in use or as comments. Parameters go with them:
/// one that no task uses is warned of.
fn pipeline(name: &str, model: &Path, with_model: bool) -> Result<String, Failure> {
    const HEAD: &str = "  # From here on a model is needed. Remove the leading `# ` of each line.";
    const PARAMS: &str = "params:                  # change them for one run with `--set steps=100`\n  steps: 20\n  r: 8";
    let template = include_str!("../../templates/init/pipeline.yaml");
    // A JSON string is a YAML string.
    let template = template.replace("{{NAME}}", &serde_json::to_string(name)?);
    let template = template.replace("{{MODEL}}", &serde_json::to_string(model)?);
    let mut lines: Vec<String> = Vec::new();
    for line in template.lines() {
        match (line.strip_prefix("#|"), line) {
            (Some(rest), _) if with_model => {
                lines.push(rest.strip_prefix(' ').unwrap_or(rest).to_owned());
            }
            (Some(rest), _) => lines.push(format!("#{rest}")),
            (None, "{{PARAMS}}") if with_model => lines.push(format!("\n{PARAMS}")),
            (None, "{{HEAD}}") if !with_model => lines.push(HEAD.to_owned()),
            (None, "{{PARAMS}}" | "{{HEAD}}") => {}
            (None, line) => lines.push(line.to_owned()),
        }
    }
    if !with_model {
        lines.push("#".to_owned());
        lines.extend(PARAMS.lines().map(|line| format!("# {line}")));
    }
    Ok(lines.join("\n") + "\n")
}

/// Makes a plugin that works, to be changed into the wanted one.
pub fn plugin_new(args: &PluginNewArgs) -> Result<i32, Failure> {
    let name = &args.name;
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !name.chars().all(good) {
        let error = Error::new(format!("`{name}` is no name for a plugin"))
            .with_hint("it starts with a lower-case letter, then letters, digits and `-`");
        return Err(Failure::Usage(error));
    }
    if BUILTIN.iter().copied().flatten().any(|kind| kind.name == *name) {
        return Err(Failure::Usage(
            Error::new(format!("`{name}` is a built-in task kind"))
                .with_hint("choose another name"),
        ));
    }
    let dir = plain(&args.dir).join(name);
    let filled = |text: &str| text.replace("{{NAME}}", name);
    let files: Vec<NewFile> = match args.lang {
        Language::Python => vec![
            ("plugin.yaml", filled(include_str!("../../templates/plugin-python/plugin.yaml"))),
            ("main.py", filled(include_str!("../../templates/plugin-python/main.py"))),
            (
                "lora_flow_plugin.py",
                include_str!("../../../../plugins/sdk-python/lora_flow_plugin.py").to_owned(),
            ),
        ],
        Language::Rust => {
            let cargo = filled(include_str!("../../templates/plugin-rust/Cargo.toml.in"));
            let sdk = match &args.sdk {
                Some(path) => {
                    format!("{{ path = {} }}", serde_json::to_string(&std::path::absolute(path)?)?)
                }
                None => format!("{{ git = \"{}\" }}", env!("CARGO_PKG_REPOSITORY")),
            };
            vec![
                ("plugin.yaml", filled(include_str!("../../templates/plugin-rust/plugin.yaml"))),
                ("build.sh", filled(include_str!("../../templates/plugin-rust/build.sh"))),
                ("Cargo.toml", cargo.replace("{{SDK}}", &sdk)),
                ("src/main.rs", include_str!("../../templates/plugin-rust/src/main.rs.in").into()),
                (".gitignore", "/target\n".to_owned()),
            ]
        }
    };
    write_new(&dir, &files)?;
    let shown = dir.display();
    println!("\nnext:");
    if args.lang == Language::Rust {
        println!("  (cd {shown} && cargo generate-lockfile)");
    }
    println!(
        "  lora-flow plugin check {shown}\n\nand in a pipeline, with the folder as seen from its \
         root:\n  plugins: [{shown}]\n  tasks:\n    rows: {{ uses: {name} }}"
    );
    Ok(0)
}

/// The path without `.`, which would only be noise in what is printed.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|c| *c != Component::CurDir).collect()
}

/// Writes the files, or none of them if one is there already.
fn write_new(dir: &Path, files: &[NewFile]) -> Result<(), Failure> {
    if let Some((name, _)) = files.iter().find(|(name, _)| dir.join(name).exists()) {
        let path = dir.join(name);
        let error = Error::new(format!("`{}` is there already", path.display()))
            .with_hint("nothing was written; name another folder");
        return Err(Failure::Usage(error));
    }
    for (name, content) in files {
        let path = dir.join(name);
        if let Some(parent) = path.parent() {
            fs_err::create_dir_all(parent)?;
        }
        fs_err::write(&path, content)?;
        println!("made {}", commands::display_path(&path));
    }
    Ok(())
}

//! `lora-flow plugin check`: what the engine thinks of a plugin, before a pipeline uses it.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

use lora_flow_core::{Error, Ports};
use lora_flow_pipeline::{MANIFEST, PluginManifest};

use crate::ui::{self, Failure, count};

pub fn check(dir: &Path) -> Result<i32, Failure> {
    let full = std::path::absolute(dir)?;
    let manifest = match PluginManifest::load(&full) {
        Ok(manifest) => manifest,
        Err(diagnostics) => {
            ui::render_diagnostics("error", &diagnostics.0);
            let problems = count(diagnostics.0.len(), "problem");
            eprintln!("{problems} in {}", dir.join(MANIFEST).display());
            return Ok(2);
        }
    };
    let products =
        std::env::temp_dir().join(format!("lora-flow-plugin-check-{}", std::process::id()));
    fs_err::create_dir_all(&products)?;
    let checked = build(&manifest, &products).and_then(|()| find_program(&manifest, &products));
    fs_err::remove_dir_all(&products)?;
    checked?;
    println!("plugin {} {} is valid", manifest.name, manifest.version);
    for kind in &manifest.kinds {
        println!("  {}: {} → {}", kind.name, ports(&kind.inputs), ports(&kind.outputs));
    }
    Ok(0)
}

/// Builds as a run would, but into a folder that is thrown away.
fn build(manifest: &PluginManifest, products: &Path) -> Result<(), Failure> {
    let Some([program, args @ ..]) = manifest.build.as_deref() else { return Ok(()) };
    let word = |word: &String, first| place(manifest, products, word, first);
    let mut command = Command::new(word(program, true));
    command.args(args.iter().map(|arg| word(arg, false))).current_dir(&manifest.dir).env_clear();
    let always = ["PATH", "HOME", "LANG"];
    for name in always.into_iter().chain(manifest.variables()) {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command.env("TMPDIR", std::env::temp_dir()).env("LORA_FLOW_PLUGIN_BUILD", products);
    // Stdout is for what this command has to say.
    command.stdin(Stdio::null()).stdout(std::io::stderr());
    let failed = |how: String| {
        Error::new(format!("the build of plugin `{}` {how}", manifest.name)).with_hint(
            "it runs in the plugin's folder, with no environment variables but those of `env`",
        )
    };
    let status = command.status().map_err(|e| failed(format!("cannot start `{program}`: {e}")))?;
    if status.success() { Ok(()) } else { Err(failed(format!("ended with {status}")).into()) }
}

/// The program of `command` must be there to be started.
fn find_program(manifest: &PluginManifest, products: &Path) -> Result<(), Failure> {
    let name = manifest.command.first().map(String::as_str).unwrap_or_default();
    let program = place(manifest, products, name, true);
    let path = Path::new(&program);
    let found = if path.components().count() > 1 {
        path.is_file()
    } else {
        let dirs = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&dirs).any(|dir| dir.join(path).is_file())
    };
    if found {
        return Ok(());
    }
    let error = Error::new(format!("the program `{name}` of `command` is not there"));
    Err(Failure::Error(error.with_hint(
        "it is a file of the plugin's folder, `{build}/NAME` for one that `build` makes, or a \
         program on the PATH",
    )))
}

/// A word of a command: what names a file of the plugin becomes that file's path.
fn place(manifest: &PluginManifest, products: &Path, word: &str, is_program: bool) -> OsString {
    let word = word.replace("{build}", &products.to_string_lossy());
    let path = manifest.dir.join(&word);
    if (is_program && word.contains('/')) || (!word.is_empty() && path.is_file()) {
        return path.into_os_string();
    }
    word.into()
}

fn ports(ports: &Ports) -> String {
    let names: Vec<String> = ports
        .ports
        .iter()
        .map(|port| {
            let kinds: Vec<String> = port.kinds.iter().map(ToString::to_string).collect();
            let optional = if port.required { "" } else { "?" };
            format!("{}{optional} ({})", port.name, kinds.join(" or "))
        })
        .collect();
    if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
}

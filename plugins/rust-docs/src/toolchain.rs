//! The installed toolchain: its version and where its documentation stands.

use std::path::{Path, PathBuf};
use std::process::Command;

use lora_flow_plugin_sdk::{Context, PluginError};

/// The version of `rustc`, as it says itself: `1.95.0` and the whole line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// The release: `1.95.0`, `1.97.0-nightly`.
    pub release: String,
    /// The whole line: `rustc 1.95.0 (59807616e 2026-04-14)`.
    pub line: String,
}

/// Asks `rustc` for its version.
///
/// # Errors
/// When there is none on the PATH or it fails.
pub fn version() -> Result<Version, PluginError> {
    let line = rustc(&["--version"])?;
    parse_version(&line).ok_or_else(|| {
        PluginError::new(format!("`rustc --version` printed `{line}`, which names no version"))
    })
}

fn parse_version(line: &str) -> Option<Version> {
    let release = line.strip_prefix("rustc ")?.split_whitespace().next()?.to_owned();
    Some(Version { release, line: line.to_owned() })
}

/// Folder of the HTML documentation of the toolchain that `rustc` on the PATH belongs to.
///
/// # Errors
/// When there is no `rustc`, or its documentation is not installed.
pub fn docs() -> Result<PathBuf, PluginError> {
    let docs = Path::new(&rustc(&["--print", "sysroot"])?).join("share/doc/rust/html");
    if docs.is_dir() {
        return Ok(docs);
    }
    Err(PluginError::new(format!(
        "the toolchain's documentation is not installed: there is no folder `{}`",
        docs.display()
    ))
    .with_hint(
        "run `rustup component add rust-docs`, or name the folder of a system package in `docs`",
    ))
}

fn rustc(args: &[&str]) -> Result<String, PluginError> {
    let shown = format!("`rustc {}`", args.join(" "));
    let output = Command::new("rustc").args(args).output().map_err(|error| {
        PluginError::new(format!("cannot run {shown}: {error}"))
            .with_hint("a Rust toolchain must be on the PATH")
    })?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(PluginError::new(format!("{shown} failed: {}", stderr.trim())));
    }
    let text = String::from_utf8(output.stdout).context(format!("the output of {shown}"))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_is_the_second_word() {
        let line = "rustc 1.97.0-nightly (abc 2026-05-01)";
        assert_eq!(parse_version(line).unwrap().release, "1.97.0-nightly");
        assert_eq!(parse_version("rusty 1.0"), None);
    }
}

//! A plugin's build step: once for each digest of its folder. It is not confined: a compiler reads
//! and writes where it likes.

use std::fs;
use std::path::{Path, PathBuf};

use lora_flow_core::{Digest, Error, Event, LogLevel, Result, ResultExt, TaskContext};

use super::folder_digest;
use super::process::{self, Heard, Program};
use super::sandbox::Confinement;
use crate::plugin_manifest::PluginManifest;
use crate::store::{FileLock, Store, Sync, remove_all, write_file};

/// Name of the environment variable that tells the build where its products go.
const BUILD_DIR: &str = "LORA_FLOW_PLUGIN_BUILD";

/// The folder of a plugin's build products, built now if need be. Of two tasks that need it one
/// builds.
pub(super) fn products(
    manifest: &PluginManifest,
    digest: Digest,
    store: &Store,
    cx: &TaskContext,
) -> Result<PathBuf> {
    let products = store.plugin_dir(&digest);
    let built = products.with_extension("built");
    let lock = store.lock_path(&format!("plugin-{}.lock", digest.short()));
    let lock = FileLock::exclusive(&lock, cx.cancel_token(), || {
        cx.info(format!("waiting: plugin `{}` is being built elsewhere", manifest.name));
    })?;
    if built.exists() && products.is_dir() {
        // Its age says when it was last of use.
        let _ = fs::File::open(&built).and_then(|f| f.set_modified(std::time::SystemTime::now()));
        let _ =
            fs::File::open(&products).and_then(|f| f.set_modified(std::time::SystemTime::now()));
    } else {
        // What an interrupted build left is not to be trusted.
        remove_all(&products)?;
        fs_err::create_dir_all(&products)?;
        build(manifest, digest, &products, cx)
            .with_context(|| format!("cannot build plugin `{}`", manifest.name))?;
        write_file(&built, b"", Sync::File)?;
    }
    lock.remove();
    Ok(products)
}

fn build(
    manifest: &PluginManifest,
    digest: Digest,
    products: &Path,
    cx: &TaskContext,
) -> Result<()> {
    cx.info(format!("building plugin `{}`", manifest.name));
    let mut command = process::build_command(manifest, products, cx.scratch())?;
    command.env(BUILD_DIR, products);
    let program = Program { plugin: &manifest.name };
    let end =
        program.run(&command, &Confinement::default(), Vec::new(), cx.cancel_token(), |heard| {
            let (Heard::Output(message) | Heard::Error(message)) = heard;
            cx.event(Event::Log { level: LogLevel::Debug, message });
            Ok(())
        })?;
    end.judge_build()?;
    if folder_digest(&manifest.dir)? != digest {
        return Err(Error::new("the build changed the plugin's own folder").with_hint(format!(
            "write products to the folder that `{BUILD_DIR}` names; `target/` and names with a \
             leading dot are not counted either"
        )));
    }
    Ok(())
}

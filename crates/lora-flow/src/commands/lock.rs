//! `lora-flow lock` and `run --locked`: inputs from outside, pinned in a file.

use lora_flow_core::{DeviceSpec, Error};
use lora_flow_pipeline::{Engine, LockFile, Pinned, Plan};

use crate::args::{LockArgs, PipelineArgs};
use crate::commands;
use crate::ui::{Failure, count};

pub fn lock(args: &LockArgs) -> Result<i32, Failure> {
    let plan = commands::load(&args.pipeline)?;
    let engine = commands::engine(plan)?;
    write(&engine, plan, &args.pipeline, args.device)?;
    Ok(0)
}

/// Writes the lock of a plan. That of a part of the pipeline leaves the rest as it was.
pub fn write(
    engine: &Engine,
    plan: &Plan,
    args: &PipelineArgs,
    device: DeviceSpec,
) -> Result<(), Failure> {
    let path = LockFile::path_of(&args.pipeline);
    let (now, open) = engine.lock(plan, device)?;
    let old = LockFile::read(&path);
    let partial = !args.targets.is_empty() || !args.until.is_empty();
    let lock = match &old {
        Ok(Some(old)) if partial => {
            let mut lock = old.clone();
            lock.extend(now);
            lock
        }
        _ => now,
    };
    lock.write(&path)?;
    for task in &open {
        eprintln!(
            "what `{task}` downloads is not pinned: its result is not in the store (run the \
             pipeline with `--update-lock`)"
        );
    }
    let files = lock.files.values().map(std::collections::BTreeMap::len).sum();
    let unchanged = old.is_ok_and(|old| old.as_ref() == Some(&lock));
    eprintln!(
        "{} {}: {}, {}, {}, {}",
        commands::display_path(&path),
        if unchanged { "is as it was" } else { "written" },
        count(files, "file"),
        count(lock.plugins.len(), "plugin"),
        count(lock.env.len(), "variable"),
        count(lock.downloads.len(), "download"),
    );
    Ok(())
}

/// Compares what can be compared before anything runs; gives what is pinned for afterwards.
pub fn check(
    engine: &Engine,
    plan: &Plan,
    args: &PipelineArgs,
    device: DeviceSpec,
) -> Result<Pinned, Failure> {
    let path = LockFile::path_of(&args.pipeline);
    let lock = LockFile::read(&path).map_err(Failure::Usage)?.ok_or_else(|| {
        let message = format!("there is no lock file `{}`", path.display());
        let command = format!("lora-flow lock {}", args.pipeline.display());
        Failure::Usage(Error::new(message).with_hint(format!("write it with `{command}`")))
    })?;
    let problems = engine.check_lock(plan, &lock, device)?;
    if problems.is_empty() { Ok(lock.downloads) } else { Err(problems.into()) }
}

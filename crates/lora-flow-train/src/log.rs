//! The log of a run: one JSON object a line.

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use lora_flow_core::{Result, ResultExt};
use serde::Serialize;

/// One line after a training step. Means are over the steps since the line before.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct StepLine {
    pub(crate) step: u64,
    /// Passes over the data so far, as a fraction.
    pub(crate) epoch: f64,
    /// Mean −ln p of a supervised token.
    pub(crate) loss: f64,
    /// Norm of the gradient before clipping, of the last step.
    pub(crate) grad_norm: f64,
    /// Rate that the last step used.
    pub(crate) learning_rate: f64,
    /// Tokens of rows so far.
    pub(crate) tokens_seen: u64,
    pub(crate) tokens_per_second: f64,
    pub(crate) peak_rss_bytes: u64,
}

/// One line after an evaluation.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct EvalLine {
    pub(crate) step: u64,
    pub(crate) epoch: f64,
    pub(crate) eval_loss: f64,
    pub(crate) eval_tokens: u64,
}

/// The file, open at its end.
#[derive(Debug)]
pub(crate) struct Log {
    file: std::fs::File,
    len: u64,
}

impl Log {
    /// Opens the log and drops what stands beyond `len` bytes: lines of steps that a resumed run
    /// does again.
    pub(crate) fn open(path: &Path, len: u64) -> Result<Self> {
        let open = || -> std::io::Result<Self> {
            let mut file =
                OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
            file.set_len(len)?;
            file.seek(SeekFrom::Start(len))?;
            Ok(Self { file, len })
        };
        open().with_context(|| format!("cannot open `{}`", path.display()))
    }

    pub(crate) fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(line)? + "\n";
        self.file.write_all(text.as_bytes()).context("cannot write the log")?;
        self.len += text.len() as u64;
        Ok(())
    }

    /// Makes the lines durable; returns the length so far.
    pub(crate) fn sync(&mut self) -> Result<u64> {
        self.file.sync_data().context("cannot write the log")?;
        Ok(self.len)
    }
}

/// Most memory that the process has ever held, in bytes; 0 where the system does not say.
pub(crate) fn max_rss_bytes() -> u64 {
    #[cfg(unix)]
    {
        // Linux counts in KiB, macOS in bytes.
        let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
        u64::try_from(usage().ru_maxrss).unwrap_or(0) * unit
    }
    #[cfg(not(unix))]
    {
        0
    }
}

/// Processor time of the process so far, all threads, user and system, in seconds; 0 where the
/// system does not say.
pub fn cpu_seconds() -> f64 {
    #[cfg(unix)]
    {
        let usage = usage();
        let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
        seconds(usage.ru_utime) + seconds(usage.ru_stime)
    }
    #[cfg(not(unix))]
    {
        0.0
    }
}

#[cfg(unix)]
fn usage() -> libc::rusage {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // Safety: the pointer is valid for a write; zeroed memory is a valid `rusage`.
    unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    }
}

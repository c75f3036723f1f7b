//! `print!` and its kin for a program in a pipe. The standard ones panic when the reader has gone
//! (`lora-flow run … | head -1`); a run must neither die of that nor change its exit code.
//!
//! These shadow the standard macros in the whole crate: `main.rs` names this module first.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write as _};

/// Writes results. Whoever stopped reading has read enough; a disk that is full is a failure.
pub fn stdout(text: Arguments<'_>) {
    let mut out = io::stdout().lock();
    match out.write_fmt(text).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            stderr(format_args!("error: cannot write to standard output: {e}\n"));
            std::process::exit(1);
        }
        _ => {}
    }
}

/// Writes what is only to be seen. That nobody can see it stops nothing.
pub fn stderr(text: Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(text);
}

macro_rules! print {
    ($($arg:tt)*) => { $crate::out::stdout(format_args!($($arg)*)) };
}
macro_rules! println {
    () => { $crate::out::stdout(format_args!("\n")) };
    ($($arg:tt)*) => { $crate::out::stdout(format_args!("{}\n", format_args!($($arg)*))) };
}
macro_rules! eprint {
    ($($arg:tt)*) => { $crate::out::stderr(format_args!($($arg)*)) };
}
macro_rules! eprintln {
    () => { $crate::out::stderr(format_args!("\n")) };
    ($($arg:tt)*) => { $crate::out::stderr(format_args!("{}\n", format_args!($($arg)*))) };
}

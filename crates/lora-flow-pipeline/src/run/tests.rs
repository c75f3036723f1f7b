//! Tests of the engine with small tasks that are closures.

mod bench;
mod cache;
mod clean;
mod crash;
mod ends;
mod key;
mod limits;
mod pinned;

pub(crate) use bench::{Bench, files_below, out, text};

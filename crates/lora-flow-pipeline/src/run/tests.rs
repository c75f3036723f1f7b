//! Tests of the engine with small tasks that are closures.

mod bench;
mod cache;
mod crash;
mod ends;
mod key;
mod limits;

pub(crate) use bench::{Bench, files_below, out, text};

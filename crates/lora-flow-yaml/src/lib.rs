//! YAML files as trees in which every key and value has its place, and the problems found there.
//!
//! The pipeline file, plugin manifests and the task files of `evaluate-tasks` are read with it, so
//! that every mistake in any of them is reported with file, line and column.

pub mod reader;
mod scalar;
pub mod source;
pub mod yaml;

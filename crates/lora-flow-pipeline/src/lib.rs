//! Pipeline file to checked DAG to run: spec, plan, cache, scheduler, run records.
//!
//! A file goes through these steps, each of which reports everything it finds wrong before the
//! next one starts from what is sound:
//!
//! 1. `lora_flow_yaml`, `include`: text → a tree in which every key and value has its place.
//! 2. `spec`: tree → the pipeline as written, its keys and their types.
//! 3. `expr`, `matrix`: expressions replaced, tasks fanned out into members.
//! 4. `params`, `kinds`, `explain`: each member's parameters checked, the task made.
//! 5. `wiring`, `order`, `files`, `publish`: edges, order, outside files → [`Plan`].

// The file: YAML with places → spec → plan.
mod compile;
mod explain;
mod expr;
mod files;
mod graph;
mod include;
mod kinds;
mod matrix;
mod member;
mod order;
mod overrides;
mod params;
mod plan;
mod plugin_manifest;
mod publish;
mod reference;
mod schema;
mod spec;
mod wiring;

pub use compile::{compile, compile_source};
pub use graph::{GraphFormat, graph};
pub use kinds::{KindInfo, builtin_kinds, plugin_kinds};
pub use lora_flow_yaml::source::{Diagnostic, Diagnostics, SourceFile, Sources, Span};
use lora_flow_yaml::{reader, source, yaml};
pub use plan::{CompileOptions, InputEdge, Plan, PlannedTask, ResolvedFiles, Resources};
pub use plugin_manifest::{MANIFEST, PROTOCOL, PluginKind, PluginManifest, ReadPath};
pub use reference::{kind_reference, reference_page};
pub use schema::pipeline_schema;

// The run: store, keys, scheduler, records, plugin processes.
mod external;
mod key;
mod reason;
mod record;
mod run;
mod stat_cache;
mod store;

pub use external::ExternalTask;
pub use key::{Explained, KEY_FORMAT, TaskKey};
pub use reason::{FileChange, Reason};
pub use record::{RunEnvironment, RunRecord};
pub use run::{
    Engine, ErrorRecord, Observer, OutputRecord, RunOptions, RunReport, State, Status, TaskOutcome,
    TaskStatus,
};
pub use store::{
    Entry, EntryInfo, Freed, Manifest, ManifestFile, STORE_FORMAT, Store, StoredArtifact,
    VerifyReport,
};

#[cfg(test)]
mod tests;

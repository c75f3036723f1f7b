//! Pipeline file to checked DAG to run: spec, plan, cache, scheduler, run records.
//!
//! A file goes through these steps, each of which reports everything it finds wrong before the
//! next one starts from what is sound:
//!
//! 1. `lora_flow_yaml`, `include`: text → a tree in which every key and value has its place.
//! 2. `spec`: tree → the pipeline as written, its keys and their types.
//! 3. `expr`, `matrix`: expressions replaced, tasks fanned out into members.
//! 4. `params`, `kinds`, `fits`, `explain`: each member's parameters checked, the task made.
//! 5. `wiring`, `order`, `files`, `publish`: edges, order, outside files → [`Plan`].

// The file: YAML with places → spec → plan.
mod compile;
mod explain;
mod expr;
mod files;
mod fits;
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
pub use graph::{GraphFormat, graph, run_svg};
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
mod pinned;
mod reason;
mod record;
mod run;
mod stat_cache;
mod store;

pub use external::ExternalTask;
#[doc(hidden)]
pub use external::read_plugin_output;
pub use key::{Explained, KEY_FORMAT, TaskKey};
pub use pinned::{LockFile, Pinned};
pub use reason::{FileChange, Reason};
pub use record::{RunEdge, RunEnvironment, RunInfo, RunRecord, RunState};
pub use run::{
    Engine, ErrorRecord, Gpu, Observer, OutputRecord, Request, RunOptions, RunReport, State,
    Status, TaskOutcome, TaskStatus, store_of,
};
pub use store::{
    Entry, EntryInfo, Freed, Keep, Manifest, ManifestFile, Objects, Remote, RemoteError,
    STORE_FORMAT, Store, StoredArtifact, VerifyReport,
};

#[cfg(test)]
mod tests;

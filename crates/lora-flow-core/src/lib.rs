//! What the author of a task imports: the [`Task`] trait, its [`Ports`], [`Artifact`]s, the
//! [`TaskContext`] a task runs in, and the one [`Error`] type of the project.
//!
//! This crate knows nothing of YAML, of the scheduler, or of tensors; the engine
//! (`lora-flow-pipeline`) and the task kinds (`plugins/*`) meet here.

mod artifact;
mod context;
mod digest;
mod error;
mod event;
mod size;
mod task;

pub use artifact::{Artifact, ArtifactFile, ArtifactKind, OutputDir};
pub use context::{
    CancelToken, DeviceSpec, Finished, NamedArtifact, TaskContext, TaskContextParts,
};
pub use digest::{Digest, canonical_json};
pub use error::{Error, ErrorKind, FileProblem, Problem, Result, ResultExt, nearest};
pub use event::{Event, LogLevel, Progress, Reporter};
pub use size::parse_size;
pub use task::{FileRef, Port, Ports, Task, TaskKind, kind};

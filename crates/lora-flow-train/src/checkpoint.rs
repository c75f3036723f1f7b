//! Checkpoints: everything that a resumed run needs to go on as if it had never stopped.
//!
//! A checkpoint is a folder `step-NNNNNNNN` with `state.json` and `tensors.safetensors`. It is
//! written under another name, made durable, and renamed, so that a folder with the final name is
//! whole. The last two are kept.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::DType;
use lora_flow_core::{Digest, Error, Result, ResultExt};
use lora_flow_model::safetensors_file::{SafetensorsWriter, encode};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

/// Version of the layout; others are ignored.
const VERSION: u32 = 2;
/// Checkpoints that are kept.
const KEEP: usize = 2;
const PREFIX: &str = "step-";
const STATE: &str = "state.json";
const TENSORS: &str = "tensors.safetensors";

/// Where a run stands. Floats are stored by their bits: a round trip through decimal digits need
/// not be exact.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    version: u32,
    /// What decides the result: settings, model, adapter, data.
    identity: Option<Digest>,
    /// Steps done. The data cursor and every random stream are functions of it and of the seed.
    pub(crate) step: u64,
    pub(crate) tokens_seen: u64,
    /// Seconds spent in steps.
    pub(crate) seconds_bits: u64,
    /// Σ −ln p and tokens since the last line of the log.
    pub(crate) window_nll_bits: u64,
    pub(crate) window_tokens: u64,
    /// Length of the log in bytes.
    pub(crate) log_bytes: u64,
    /// Loss of the last step.
    pub(crate) last_loss_bits: u64,
    /// Step and loss of the last evaluation.
    pub(crate) last_eval: Option<(u64, u64)>,
    /// Step and loss of the best evaluation.
    pub(crate) best: Option<(u64, u64)>,
    /// Evaluations in a row that did not lower the loss.
    pub(crate) stale: u64,
    /// Whether early stopping has ended the run.
    pub(crate) stopped: bool,
    /// Losses and gradient norms of the last steps.
    pub(crate) history: Vec<(u64, u64)>,
    /// The rate that `learning_rate: auto` found.
    pub(crate) found_rate: Option<u64>,
}

/// A checkpoint in memory.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Checkpoint {
    pub(crate) state: State,
    /// Values, moments, and the best values so far (empty if there are none).
    pub(crate) params: Vec<Vec<f32>>,
    pub(crate) m: Vec<Vec<f32>>,
    pub(crate) v: Vec<Vec<f32>>,
    pub(crate) best: Vec<Vec<f32>>,
}

/// What a checkpoint is written from; nothing is copied, for it may be as large as the model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tensors<'a> {
    pub(crate) params: &'a [Vec<f32>],
    pub(crate) m: &'a [Vec<f32>],
    pub(crate) v: &'a [Vec<f32>],
    pub(crate) best: &'a [Vec<f32>],
}

/// Writes the checkpoint of `identity` into `dir` and removes all but the last two.
pub(crate) fn save(
    dir: &Path,
    identity: Digest,
    state: &State,
    tensors: Tensors<'_>,
) -> Result<()> {
    let state = State { version: VERSION, identity: Some(identity), ..state.clone() };
    let name = format!("{PREFIX}{:08}", state.step);
    let (target, temporary) = (dir.join(&name), dir.join(format!(".{name}.tmp")));
    for old in [&temporary, &target] {
        if old.exists() {
            fs_err::remove_dir_all(old)?;
        }
    }
    fs_err::create_dir_all(&temporary)?;
    write_tensors(&temporary.join(TENSORS), tensors)?;
    write_durable(&temporary.join(STATE), &serde_json::to_vec_pretty(&state)?)?;
    sync_dir(&temporary)?;
    fs_err::rename(&temporary, &target)?;
    sync_dir(dir)?;
    let found = list(dir)?;
    for old in &found[..found.len().saturating_sub(KEEP)] {
        fs_err::remove_dir_all(old)?;
    }
    Ok(())
}

impl Checkpoint {
    /// The newest whole checkpoint of `identity` in `dir`. Those of other runs and damaged ones
    /// are passed over.
    pub(crate) fn load_last(
        dir: &Path,
        identity: Digest,
        lengths: &[usize],
    ) -> Result<Option<Self>> {
        if !dir.exists() {
            return Ok(None);
        }
        let read = |path: &PathBuf| Self::load(path, identity, lengths).ok().flatten();
        Ok(list(dir)?.iter().rev().find_map(read))
    }

    fn load(path: &Path, identity: Digest, lengths: &[usize]) -> Result<Option<Self>> {
        let state: State = serde_json::from_slice(&fs_err::read(path.join(STATE))?)?;
        if state.version != VERSION || state.identity != Some(identity) {
            return Ok(None);
        }
        let bytes = fs_err::read(path.join(TENSORS))?;
        let tensors = SafeTensors::deserialize(&bytes).context("damaged checkpoint")?;
        let group = |name: &str| -> Result<Vec<Vec<f32>>> {
            let one = |(i, len): (usize, &usize)| -> Result<Vec<f32>> {
                let view = tensors.tensor(&format!("{name}.{i}")).context("damaged checkpoint")?;
                let values = view.data().chunks_exact(4);
                let values: Vec<_> =
                    values.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                if view.dtype() != Dtype::F32 || values.len() != *len {
                    return Err(Error::new("damaged checkpoint"));
                }
                Ok(values)
            };
            lengths.iter().enumerate().map(one).collect()
        };
        let best = if state.best.is_some() { group("best")? } else { Vec::new() };
        let (params, m, v) = (group("param")?, group("m")?, group("v")?);
        Ok(Some(Self { state, params, m, v, best }))
    }
}

fn write_tensors(path: &Path, tensors: Tensors<'_>) -> Result<()> {
    let Tensors { params, m, v, best } = tensors;
    let groups = [("param", params), ("m", m), ("v", v), ("best", best)];
    // By name, as the format's header has them.
    let named: BTreeMap<String, &Vec<f32>> = groups
        .iter()
        .flat_map(|(name, tensors)| {
            tensors.iter().enumerate().map(move |(i, t)| (format!("{name}.{i}"), t))
        })
        .collect();
    let announced: Vec<_> =
        named.iter().map(|(name, t)| (name.clone(), DType::F32, vec![t.len()])).collect();
    let mut writer = SafetensorsWriter::create(path, &announced)?;
    for (name, values) in named {
        writer.write(&name, &encode(values, DType::F32))?;
    }
    writer.finish()?;
    fs_err::File::open(path)?.sync_all()?;
    Ok(())
}

/// Checkpoint folders by step.
fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs_err::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name.strip_prefix(PREFIX).is_some_and(|n| n.parse::<u64>().is_ok()) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn write_durable(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let mut file = fs_err::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    Ok(())
}

fn sync_dir(dir: &Path) -> Result<()> {
    // Folders can be opened and made durable on Unix alone.
    if cfg!(unix) {
        fs_err::File::open(dir)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(step: u64) -> Checkpoint {
        let t = |x: f32| vec![vec![x, -x], vec![f32::MIN_POSITIVE]];
        Checkpoint {
            state: State { step, best: Some((1, 2)), ..State::default() },
            params: t(0.1),
            m: t(0.2),
            v: t(step as f32),
            best: t(0.3),
        }
    }

    #[test]
    fn the_last_two_are_kept_and_damaged_or_foreign_ones_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, other) = (Digest::of_bytes(b"a"), Digest::of_bytes(b"b"));
        let load = |identity| Checkpoint::load_last(dir.path(), identity, &[2, 1]).unwrap();
        assert!(load(ours).is_none());
        for step in [5, 10, 15] {
            let Checkpoint { state, params, m, v, best } = sample(step);
            let tensors = Tensors { params: &params, m: &m, v: &v, best: &best };
            save(dir.path(), ours, &state, tensors).unwrap();
        }
        assert_eq!(list(dir.path()).unwrap().len(), 2);
        let mut expected = sample(15);
        expected.state.version = VERSION;
        expected.state.identity = Some(ours);
        assert_eq!(load(ours), Some(expected));
        assert_eq!(load(other), None);
        fs_err::write(dir.path().join("step-00000015").join(TENSORS), b"cut").unwrap();
        assert_eq!(load(ours).unwrap().state.step, 10);
        assert!(Checkpoint::load_last(dir.path(), ours, &[2, 2]).unwrap().is_none());
    }
}

//! A batch on the device: one upload of whole numbers.
//!
//! Tokens are padded to a multiple of [`ROUND`] by a document without targets, and the supervised
//! positions by entries without one: products of few different shapes, and their algorithms are
//! chosen once.

use std::sync::Arc;

use lora_flow_kernels::cuda::{Buffer, CudaError, DevicePtr, Gpu};

use crate::batch::Batch;
use crate::config::ModelConfig;

/// Tokens and supervised positions are multiples of this on the device.
const ROUND: usize = 64;

/// A batch on the device.
pub(super) struct DeviceBatch {
    numbers: Buffer<i32>,
    /// Length of the longest document.
    pub(super) longest: usize,
    /// Padded number of tokens.
    pub(super) tokens: usize,
    /// Supervised positions, and their padded number.
    pub(super) supervised: usize,
    pub(super) picked: usize,
    /// Blocks of attention: forward, dq, dk and dv.
    tiles: [usize; 3],
    offsets: [usize; 9],
}

impl DeviceBatch {
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        config: &ModelConfig,
        batch: &Batch,
    ) -> Result<Self, CudaError> {
        let tokens = batch.len().next_multiple_of(ROUND);
        let mut docs = batch.doc_starts.clone();
        if tokens > batch.len() {
            docs.push(tokens);
        }
        let spans: Vec<(usize, usize)> =
            docs.windows(2).map(|d| (d[0], d[1])).filter(|(a, b)| b > a).collect();
        let (rows, targets) = batch.supervised_rows();
        let picked = rows.len().next_multiple_of(ROUND);

        let mut parts: [Vec<i32>; 9] = Default::default();
        parts[0] = batch.input_ids.iter().map(|id| *id as i32).collect();
        parts[0].resize(tokens, 0);
        for (start, end) in &spans {
            for i in *start..*end {
                parts[1].push((i - start) as i32);
                parts[2].push(*start as i32);
                parts[3].push(*end as i32);
            }
        }
        // Blocks of queries look back to the document's start, blocks of keys ahead to its end: the
        // longest first, so that short ones fill the gaps at the end.
        let mut tiles = [0; 3];
        for (pass, rows) in gpu.flash_rows(config.head_dim).into_iter().flatten().enumerate() {
            let blocks = |(start, end): &(usize, usize)| {
                let (first, last) = (*start as i32, *end as i32);
                (*start..*end).step_by(rows).map(move |row| [first, last, row as i32, 0])
            };
            let mut all: Vec<[i32; 4]> = spans.iter().flat_map(blocks).collect();
            all.sort_by_key(
                |[first, last, row, _]| if pass < 2 { first - row } else { row - last },
            );
            tiles[pass] = all.len();
            parts[4 + pass] = all.concat();
        }
        parts[7] = rows.iter().map(|r| *r as i32).collect();
        parts[7].resize(picked, -1);
        parts[8] = targets.iter().map(|t| *t as i32).collect();
        parts[8].resize(picked, -1);

        let mut offsets = [0; 9];
        let mut all = Vec::new();
        for (offset, part) in offsets.iter_mut().zip(&parts) {
            *offset = all.len();
            all.extend_from_slice(part);
            all.resize(all.len().next_multiple_of(4), 0);
        }
        Ok(Self {
            numbers: gpu.upload(&all)?,
            longest: spans.iter().map(|(a, b)| b - a).max().unwrap_or(1),
            tokens,
            supervised: rows.len(),
            picked,
            tiles,
            offsets,
        })
    }

    fn part(&self, i: usize) -> DevicePtr {
        self.numbers.ptr() + 4 * self.offsets[i] as u64
    }

    pub(super) fn ids(&self) -> DevicePtr {
        self.part(0)
    }
    pub(super) fn positions(&self) -> DevicePtr {
        self.part(1)
    }
    pub(super) fn first(&self) -> DevicePtr {
        self.part(2)
    }
    pub(super) fn last(&self) -> DevicePtr {
        self.part(3)
    }
    pub(super) fn tiles(&self) -> [(DevicePtr, usize); 3] {
        [0, 1, 2].map(|pass| (self.part(4 + pass), self.tiles[pass]))
    }
    /// Rows of the supervised positions from the `from`-th on.
    pub(super) fn picks(&self, from: usize) -> DevicePtr {
        self.part(7) + 4 * from as u64
    }
    pub(super) fn targets(&self, from: usize) -> DevicePtr {
        self.part(8) + 4 * from as u64
    }
}

/// Cosine and sine of the positions below `len` by the CPU's formula, [len, dim/2] pairs.
pub(super) fn rope_table(config: &ModelConfig, len: usize) -> Vec<f32> {
    let inv_freq = config.inv_freq();
    (0..len)
        .flat_map(|position| {
            inv_freq.iter().flat_map(move |f| {
                let angle = f64::from(position as f32 * f);
                [angle.cos() as f32, angle.sin() as f32]
            })
        })
        .collect()
}

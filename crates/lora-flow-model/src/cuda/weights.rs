//! Frozen weights with room for an adapter.
//!
//! The projections that share an input (q, k, v; o; gate, up; down) are one [`Group`], one matrix
//!
//! ```text
//!            in     r
//!     out [  W   | s·B ]
//!     r   [  A   |  ·  ]
//! ```
//!
//! with the A of its modules below each other and their B in blocks. With the input extended by
//! x·Aᵀ, the first `out` rows give y = W·x + s·B·A·x in one product; with the output's gradient
//! extended by dy·s·B, the first `in` columns give dx in one product.

use std::sync::Arc;

use candle_core::{DType, Tensor, TensorId};
use lora_flow_core::{Error, Result, ResultExt};
use lora_flow_kernels::cuda::ops::{self, AdamWBuffers, Mat, Matrix, PIECE};
use lora_flow_kernels::cuda::{Buffer, Copier, CudaError, DevicePtr, Element, Gpu, HostBuffer};

use super::arena::padded;
use super::report;
use crate::config::ModelConfig;
use crate::layer::Proj;
use crate::lora::Lora;

/// Which projections share an input.
const GROUPS: [&[Proj]; 4] =
    [&[Proj::Q, Proj::K, Proj::V], &[Proj::O], &[Proj::Gate, Proj::Up], &[Proj::Down]];

/// q, k and v.
pub(super) const QKV: usize = 0;
/// o.
pub(super) const O: usize = 1;
/// gate and up.
pub(super) const GATE_UP: usize = 2;
/// down.
pub(super) const DOWN: usize = 3;

/// One module's place in its group.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Place {
    /// Index among the adapter's modules.
    pub(super) module: usize,
    /// Index among all linear layers of the model.
    pub(super) at: usize,
    /// Its first column among the group's r.
    pub(super) column: usize,
    /// Its rank.
    pub(super) rank: usize,
    /// Its first row of the output.
    pub(super) row: usize,
    /// Its rows.
    pub(super) rows: usize,
}

/// Projections that share an input, as one matrix.
pub(super) struct Group {
    pub(super) weight: Buffer<u8>,
    pub(super) input: usize,
    pub(super) output: usize,
    /// Σ ranks of its modules, rounded up to 8; 0 without an adapter.
    pub(super) r: usize,
    pub(super) bias: Option<Buffer<f32>>,
    pub(super) places: Vec<Place>,
    size: usize,
}

impl Group {
    /// Values from one row to the next.
    pub(super) fn ld(&self) -> usize {
        if self.r == 0 { self.input } else { padded(self.input + self.r) }
    }

    /// W, with s·B to its right.
    pub(super) fn w(&self) -> Mat {
        (self.weight.ptr(), self.ld())
    }

    /// A: rows below W.
    pub(super) fn a(&self) -> Mat {
        (self.at(self.output, 0), self.ld())
    }

    /// s·B: columns right of W.
    pub(super) fn b(&self) -> Mat {
        (self.at(0, self.input), self.ld())
    }

    /// Address of an element.
    pub(super) fn at(&self, row: usize, column: usize) -> DevicePtr {
        self.weight.ptr() + ((row * self.ld() + column) * self.size) as u64
    }
}

/// One layer.
pub(super) struct LayerWeights {
    pub(super) input_norm: Buffer<f32>,
    pub(super) mlp_norm: Buffer<f32>,
    pub(super) qk_norm: Option<[Buffer<f32>; 2]>,
    pub(super) groups: [Group; 4],
}

/// The table of embeddings.
enum Embeddings {
    Device(Buffer<u8>),
    Host(HostBuffer),
}

/// All weights of a model.
pub(super) struct Weights {
    embed: Embeddings,
    head: Option<Buffer<u8>>,
    pub(super) norm: Buffer<f32>,
    pub(super) layers: Vec<LayerWeights>,
    /// The tensors whose values stand in the matrices.
    attached: Vec<TensorId>,
    /// Grows when the matrices move: addresses from before are gone.
    pub(super) generation: u64,
}

type Read<'a> = dyn FnMut(&str, &[usize]) -> Result<Tensor> + 'a;

/// Bytes of a tensor on the CPU.
fn bytes(tensor: &Tensor, element: Element) -> Result<Vec<u8>> {
    let flat = tensor.flatten_all().context("cannot read a weight")?;
    let values = match element {
        Element::F32 => flat
            .to_dtype(DType::F32)
            .and_then(|t| t.to_vec1::<f32>())
            .map(|v| v.iter().flat_map(|x| x.to_le_bytes()).collect()),
        Element::Bf16 => flat
            .to_dtype(DType::BF16)
            .and_then(|t| t.to_vec1::<half::bf16>())
            .map(|v| v.iter().flat_map(|x| x.to_le_bytes()).collect()),
    };
    values.context("cannot read a weight")
}

fn vector(gpu: &Arc<Gpu>, tensor: &Tensor) -> Result<Buffer<f32>> {
    let values = tensor.to_dtype(DType::F32).and_then(|t| t.to_vec1::<f32>());
    gpu.upload(&values.context("cannot read a weight")?).map_err(report)
}

/// Where the weights come from.
enum From<'a, 'b> {
    Files(&'a mut Read<'b>),
    Random(u64),
}

impl Weights {
    pub(super) fn load(
        gpu: &Arc<Gpu>,
        config: &ModelConfig,
        e: Element,
        read: &mut Read<'_>,
    ) -> Result<Self> {
        Self::build(gpu, config, e, &mut From::Files(read))
    }

    pub(super) fn random(
        gpu: &Arc<Gpu>,
        config: &ModelConfig,
        e: Element,
    ) -> std::result::Result<Self, CudaError> {
        Self::build(gpu, config, e, &mut From::Random(1)).map_err(|e| CudaError {
            message: e.to_string(),
            hint: e.hint().map(str::to_owned),
            out_of_memory: false,
        })
    }

    fn build(
        gpu: &Arc<Gpu>,
        config: &ModelConfig,
        e: Element,
        from: &mut From<'_, '_>,
    ) -> Result<Self> {
        let names: std::collections::HashSet<String> =
            config.tensors().into_iter().map(|(n, _)| n).collect();
        let mut matrix = |to: Mat, name: &str, rows: usize, cols: usize| -> Result<()> {
            match from {
                From::Files(read) => {
                    let bytes = bytes(&read(name, &[rows, cols])?, e)?;
                    gpu.write_rows((to.0, to.1 * e.size()), &bytes, cols * e.size()).map_err(report)
                }
                From::Random(key) => {
                    *key += 1;
                    // The standard deviation of a model's initial weights, 0.02.
                    ops::fill_uniform(gpu, e, to, rows, cols, *key << 32, 0.0346).map_err(report)
                }
            }
        };
        let (h, vocab) = (config.hidden_size, config.vocab_size);
        let embed = gpu.alloc::<u8>(vocab * h * e.size()).map_err(report)?;
        matrix((embed.ptr(), h), "model.embed_tokens.weight", vocab, h)?;
        let head = if config.tie_word_embeddings {
            None
        } else {
            let head = gpu.alloc::<u8>(vocab * h * e.size()).map_err(report)?;
            matrix((head.ptr(), h), "lm_head.weight", vocab, h)?;
            Some(head)
        };
        let modules = config.linear_modules();
        let mut all_groups = Vec::new();
        for modules in modules.chunks(7) {
            let mut groups = Vec::new();
            for members in GROUPS {
                let input = modules[members[0] as usize].in_features;
                let output = members.iter().map(|p| modules[*p as usize].out_features).sum();
                let weight = gpu.alloc::<u8>(input * output * e.size()).map_err(report)?;
                let mut row = 0;
                for p in members {
                    let module = &modules[*p as usize];
                    let to = weight.ptr() + (row * input * e.size()) as u64;
                    matrix(
                        (to, input),
                        &format!("{}.weight", module.path),
                        module.out_features,
                        input,
                    )?;
                    row += module.out_features;
                }
                groups.push(Group {
                    weight,
                    input,
                    output,
                    r: 0,
                    bias: None,
                    places: Vec::new(),
                    size: e.size(),
                });
            }
            all_groups.push(
                <[Group; 4]>::try_from(groups)
                    .map_err(|_| Error::new("a layer has four groups"))?,
            );
        }
        let mut small = |name: &str, len: usize| -> Result<Buffer<f32>> {
            match from {
                From::Files(read) => vector(gpu, &read(name, &[len])?),
                From::Random(_) => gpu.upload(&vec![1f32; len]).map_err(report),
            }
        };
        let mut layers = Vec::new();
        for (i, mut groups) in all_groups.into_iter().enumerate() {
            let prefix = format!("model.layers.{i}");
            for (group, members) in groups.iter_mut().zip(GROUPS) {
                let name = |p: &Proj| format!("{}.bias", modules[i * 7 + *p as usize].path);
                if !members.iter().any(|p| names.contains(&name(p))) {
                    continue;
                }
                let bias = gpu.zeros::<f32>(group.output).map_err(report)?;
                let mut row = 0;
                for p in members {
                    let rows = modules[i * 7 + *p as usize].out_features;
                    if names.contains(&name(p)) {
                        let part = small(&name(p), rows)?.to_vec().map_err(report)?;
                        gpu.write(bias.ptr() + 4 * row as u64, &part).map_err(report)?;
                    }
                    row += rows;
                }
                group.bias = Some(bias);
            }
            let qk_norm = match config.qk_norm {
                true => Some([
                    small(&format!("{prefix}.self_attn.q_norm.weight"), config.head_dim)?,
                    small(&format!("{prefix}.self_attn.k_norm.weight"), config.head_dim)?,
                ]),
                false => None,
            };
            layers.push(LayerWeights {
                input_norm: small(&format!("{prefix}.input_layernorm.weight"), h)?,
                mlp_norm: small(&format!("{prefix}.post_attention_layernorm.weight"), h)?,
                qk_norm,
                groups,
            });
        }
        let norm = small("model.norm.weight", h)?;
        let embed = Embeddings::Device(embed);
        Ok(Self { embed, head, norm, layers, attached: Vec::new(), generation: 0 })
    }

    /// The embeddings [vocab, hidden].
    pub(super) fn embed(&self) -> DevicePtr {
        match &self.embed {
            Embeddings::Device(table) => table.ptr(),
            Embeddings::Host(table) => table.ptr(),
        }
    }

    /// Whether they are in memory of the host.
    pub(super) fn embeds_from_host(&self) -> bool {
        matches!(self.embed, Embeddings::Host(_))
    }

    /// The head [vocab, hidden].
    pub(super) fn head(&self) -> DevicePtr {
        self.head.as_ref().map_or_else(|| self.embed(), Buffer::ptr)
    }

    /// Moves the embeddings to memory of the host, where a kernel reads the few rows that a batch has
    /// of them. Bytes that this freed on the device: none if the head needs the table too, it is there
    /// already, or the host has no room.
    pub(super) fn embed_on_host(
        &mut self,
        gpu: &Arc<Gpu>,
        host: u64,
    ) -> std::result::Result<u64, CudaError> {
        let (Embeddings::Device(table), Some(_)) = (&self.embed, &self.head) else { return Ok(0) };
        let bytes = table.len();
        if host < bytes as u64 {
            return Ok(0);
        }
        let copier = Copier::new(gpu, 1)?;
        let Some(memory) = copier.host(bytes) else { return Ok(0) };
        gpu.wait()?;
        copier.send(0, &memory, &[(table.ptr(), bytes)])?;
        copier.finish()?;
        self.embed = Embeddings::Host(memory);
        Ok(bytes as u64)
    }

    /// The lowest layer that carries an adapter.
    pub(super) fn lowest(&self) -> Option<usize> {
        self.layers.iter().position(|l| l.groups.iter().any(|g| g.r > 0))
    }

    /// Largest r of a group over the layers.
    pub(super) fn widest(&self, group: usize) -> usize {
        self.layers.iter().map(|l| l.groups[group].r).max().unwrap_or(0)
    }

    /// Puts an adapter's values into the matrices, unless they stand there already.
    pub(super) fn attach(
        &mut self,
        gpu: &Arc<Gpu>,
        config: &ModelConfig,
        e: Element,
        lora: &Lora,
    ) -> Result<()> {
        let ids: Vec<TensorId> = lora.modules.iter().flat_map(|m| [m.a.id(), m.b.id()]).collect();
        if !ids.is_empty() && ids == self.attached {
            return Ok(());
        }
        self.attached.clear();
        self.make_room(gpu, config, e, lora)?;
        let table = Table::new(gpu, self, lora, None)?;
        let params = gpu.upload(&values(lora)?.concat()).map_err(report)?;
        ops::place(gpu, e, &table.buffers(params.ptr(), 0, 0)).map_err(report)?;
        gpu.wait().map_err(report)?;
        self.attached = ids;
        Ok(())
    }

    /// Forgets whose values the matrices hold: the optimiser changes them.
    pub(super) fn detach(&mut self) {
        self.attached.clear();
    }

    /// Gives each module its place, moving the matrices whose r changes.
    pub(super) fn make_room(
        &mut self,
        gpu: &Arc<Gpu>,
        config: &ModelConfig,
        e: Element,
        lora: &Lora,
    ) -> Result<()> {
        // Checks names and shapes as on the CPU.
        crate::adapter::AdapterMap::new(config, Some(lora), None)?;
        let infos = config.linear_modules();
        let index: std::collections::HashMap<&str, usize> =
            infos.iter().enumerate().map(|(i, info)| (info.path.as_str(), i)).collect();
        let mut by_linear: Vec<Option<usize>> = vec![None; infos.len()];
        for (module, m) in lora.modules.iter().enumerate() {
            by_linear[index[m.path.as_str()]] = Some(module);
        }
        let mut moved = false;
        for (i, layer) in self.layers.iter_mut().enumerate() {
            for (group, members) in layer.groups.iter_mut().zip(GROUPS) {
                let (mut row, mut column, mut places) = (0, 0, Vec::new());
                for p in members {
                    let at = i * 7 + *p as usize;
                    let rows = infos[at].out_features;
                    if let Some(module) = by_linear[at] {
                        let rank = lora.modules[module].r;
                        places.push(Place { module, at, column, rank, row, rows });
                        column += rank;
                    }
                    row += rows;
                }
                if places == group.places {
                    continue;
                }
                moved = true;
                let r = column.next_multiple_of(8);
                let (old, size) = (group.w(), e.size());
                let ld = if r == 0 { group.input } else { padded(group.input + r) };
                let weight = gpu.zeros::<u8>((group.output + r) * ld * size).map_err(report)?;
                let (to, from) = ((weight.ptr(), ld * size), (old.0, old.1 * size));
                gpu.copy_rows(to, from, group.input * size, group.output).map_err(report)?;
                gpu.wait().map_err(report)?;
                (group.weight, group.r, group.places) = (weight, r, places);
            }
        }
        if moved {
            self.generation += 1;
        }
        Ok(())
    }
}

/// Values of A and B of each module, f32.
pub(super) fn values(lora: &Lora) -> Result<Vec<Vec<f32>>> {
    let read = |t: &Tensor| t.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>();
    let tensors = lora.modules.iter().flat_map(|m| [&m.a, &m.b]);
    tensors.map(|t| read(t).context("cannot read the adapter")).collect()
}

/// Gradients of one group's modules, f32.
pub(super) struct GroupGrads {
    /// Of A: [r, in].
    pub(super) a: Buffer<f32>,
    /// Of s·B, its blocks in [out, r]; what stands beside the blocks means nothing.
    pub(super) b: Buffer<f32>,
}

/// Where each matrix of an adapter, its copy and its gradient stand, on the device.
pub(super) struct Table {
    matrices: Buffer<Matrix>,
    pieces: Buffer<i32>,
    count: usize,
    sums: Buffer<f64>,
    clip: Buffer<f32>,
}

impl Table {
    /// `grads`: by layer and group, and the ratio of B's learning rate to A's.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        weights: &Weights,
        lora: &Lora,
        grads: Option<(&[[GroupGrads; 4]], f64)>,
    ) -> Result<Self> {
        let mut offsets = Vec::with_capacity(lora.modules.len());
        let mut next = 0u64;
        for m in &lora.modules {
            offsets.push(next);
            next += (m.r * (m.in_features + m.out_features)) as u64;
        }
        let mut matrices = Vec::new();
        for (l, layer) in weights.layers.iter().enumerate() {
            for (g, group) in layer.groups.iter().enumerate() {
                for place in &group.places {
                    let m = &lora.modules[place.module];
                    let (ga, gb, ratio) = match grads {
                        None => (0, 0, 1.0),
                        Some((grads, ratio)) => {
                            let grads = &grads[l][g];
                            let a = grads.a.ptr() + 4 * (place.column * group.input) as u64;
                            let b = grads.b.ptr() + 4 * (place.row * group.r + place.column) as u64;
                            (a, b, ratio)
                        }
                    };
                    matrices.push(Matrix {
                        offset: offsets[place.module],
                        grad: ga,
                        copy: group.at(group.output + place.column, 0),
                        ld_grad: group.input as u64,
                        ld_copy: group.ld() as u64,
                        rows: place.rank as u32,
                        cols: group.input as u32,
                        grad_scale: 1.0,
                        copy_scale: 1.0,
                        lr_scale: 1.0,
                        pad: 0,
                    });
                    matrices.push(Matrix {
                        offset: offsets[place.module] + (place.rank * group.input) as u64,
                        grad: gb,
                        copy: group.at(place.row, group.input + place.column),
                        ld_grad: group.r as u64,
                        ld_copy: group.ld() as u64,
                        rows: place.rows as u32,
                        cols: place.rank as u32,
                        grad_scale: m.scale as f32,
                        copy_scale: m.scale as f32,
                        lr_scale: ratio as f32,
                        pad: 0,
                    });
                }
            }
        }
        let mut pieces = Vec::new();
        for (i, m) in matrices.iter().enumerate() {
            for start in (0..m.rows * m.cols).step_by(PIECE) {
                pieces.extend([i as i32, start as i32]);
            }
        }
        let count = pieces.len() / 2;
        let build = || {
            Ok(Self {
                matrices: gpu.upload(&matrices)?,
                pieces: gpu.upload(&pieces)?,
                count,
                sums: gpu.alloc(count)?,
                clip: gpu.zeros(2)?,
            })
        };
        build().map_err(report)
    }

    pub(super) fn buffers(
        &self,
        params: DevicePtr,
        means: DevicePtr,
        squares: DevicePtr,
    ) -> AdamWBuffers {
        AdamWBuffers {
            params,
            means,
            squares,
            matrices: self.matrices.ptr(),
            pieces: self.pieces.ptr(),
            count: self.count,
            sums: self.sums.ptr(),
            clip: self.clip.ptr(),
        }
    }

    /// Norm of the gradients of the last step. Waits.
    pub(super) fn norm(&self) -> std::result::Result<f32, CudaError> {
        Ok(self.clip.to_vec()?[0])
    }
}

//! Fused operations with hand-written backward, each beside a plain reference.
//!
//! Every module has the same shape: public functions that check their arguments and choose a
//! path, a `reference` module that computes the same with plain candle operations, and the fused
//! CPU path. There is no autograd anywhere: a backward is a function of what the forward kept.
//!
//! - **Fused path**: contiguous `f32` tensors on the CPU. Work is split over rows, heads or blocks
//!   by the shape alone and every sum has a fixed order, so the bits of a result do not depend on
//!   the number of rayon threads. They may differ between machines with other vector units.
//!   A frozen weight may be `bf16`: then the operands of its products, and those of attention, are
//!   rounded to `bf16` as they enter where the processor multiplies such numbers, and the sums are
//!   `f32` ([`linear`], [`loss`], [`attention`]).
//! - **Reference path**: everything else (`bf16`, `f16`, `f64`, other devices). It computes in
//!   `f32` (`f64` for `f64` inputs) and rounds its results to the dtype of the inputs.
//!
//! N is the number of tokens of a padding-free batch: documents one after the other, `docs` their
//! cumulative lengths `[0, …, N]`.

pub mod activation;
pub mod adamw;
pub mod attention;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod elementwise;
pub mod embedding;
pub mod isa;
pub mod linear;
pub mod loss;
pub mod loss_head;
pub mod profile;
pub mod rms_norm;
pub mod rope;

mod common;
mod gemm;
mod simd;
#[cfg(test)]
mod testing;

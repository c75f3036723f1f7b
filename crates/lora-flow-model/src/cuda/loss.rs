//! The head: cross-entropy of the supervised positions in chunks, so that there are never logits of
//! all tokens, and its gradient as the start of the backward.

use lora_flow_kernels::cuda::ops::{self, Mat};
use lora_flow_kernels::cuda::{CudaError, Element, Product};

use super::pass::Run;

type Result<T> = std::result::Result<T, CudaError>;

impl Run<'_> {
    /// The residual stream after the last layer.
    fn top(&self) -> Mat {
        (self.arena.x(self.config.num_hidden_layers).ptr(), self.config.hidden_size)
    }

    fn head_product(
        &self,
        (m, n, k): (usize, usize, usize),
        a: Mat,
        b: Mat,
        b_t: bool,
        c: Mat,
        output: Element,
    ) -> Result<()> {
        self.gpu.product(&Product {
            m,
            n,
            k,
            a,
            a_t: false,
            b,
            b_t,
            c,
            add: c,
            alpha: 1.0,
            beta: 0.0,
            input: self.e,
            output,
        })
    }

    /// −ln p of the supervised positions, queued; with a scale the gradient of the stream as well.
    fn queue_loss(&self, scale: Option<f32>) -> Result<()> {
        let (h, vocab, arena) = (self.config.hidden_size, self.config.vocab_size, self.arena);
        let (x, head) = (self.top(), (self.weights.head(), h));
        let logits = (arena.logits(), vocab.next_multiple_of(8));
        let top = (arena.top.ptr(), h);
        let eps = self.config.rms_norm_eps as f32;
        let (norm, rstd) = (self.weights.norm.ptr(), arena.top_rstd.ptr());
        for from in (0..self.batch.picked).step_by(arena.chunk) {
            let rows = arena.chunk.min(self.batch.picked - from);
            let (pick, targets) = (self.batch.picks(from), self.batch.targets(from));
            let nll = arena.nll.ptr() + 4 * from as u64;
            ops::rms_fwd(self.gpu, self.e, top, rstd, x, norm, pick, rows, h, eps)?;
            self.head_product((rows, vocab, h), top, head, true, logits, self.e)?;
            ops::cross_entropy(self.gpu, self.e, logits, nll, targets, rows, vocab, scale)?;
            if let (Some(_), Some(backward)) = (scale, &arena.backward) {
                self.head_product((rows, h, vocab), logits, head, false, top, self.e)?;
                let d = (backward.d.ptr(), backward.ld);
                ops::rms_bwd(self.gpu, self.e, d, top, x, norm, rstd, pick, rows, h, false)?;
            }
        }
        Ok(())
    }

    /// −ln p of the supervised positions. Waits.
    pub(super) fn loss(&self, scale: Option<f32>) -> Result<Vec<f32>> {
        self.queue_loss(scale)?;
        self.read_loss()
    }

    /// Queues the loss and the gradient of the stream, with which the backward starts.
    pub(super) fn start_loss(&self, scale: f32) -> Result<()> {
        if let Some(backward) = &self.arena.backward {
            // Positions without a target get no gradient from above.
            backward.d.clear()?;
        }
        self.queue_loss(Some(scale))
    }

    /// The losses that were queued. Waits.
    pub(super) fn read_loss(&self) -> Result<Vec<f32>> {
        let mut nll = vec![0f32; self.batch.supervised];
        self.gpu.read(self.arena.nll.ptr(), &mut nll)?;
        Ok(nll)
    }

    /// Logits of one row of the stream, f32. Waits.
    pub(super) fn last_logits(&self, row: usize) -> Result<Vec<f32>> {
        self.logits_of(row, 1)
    }

    /// Logits of the first `rows` rows of the stream, f32. Waits.
    pub(super) fn logits(&self, rows: usize) -> Result<Vec<f32>> {
        self.logits_of(0, rows)
    }

    fn logits_of(&self, first: usize, rows: usize) -> Result<Vec<f32>> {
        let (h, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let mut all = vec![0f32; rows * vocab];
        let chunk = rows.min(self.arena.chunk);
        let logits = self.gpu.alloc::<f32>(chunk * vocab)?;
        let (top, x, norm) = ((self.arena.top.ptr(), h), self.top(), self.weights.norm.ptr());
        let eps = self.config.rms_norm_eps as f32;
        for from in (0..rows).step_by(chunk.max(1)) {
            let count = chunk.min(rows - from);
            let x = (x.0 + ((first + from) * h * self.e.size()) as u64, h);
            ops::rms_fwd(
                self.gpu,
                self.e,
                top,
                self.arena.top_rstd.ptr(),
                x,
                norm,
                0,
                count,
                h,
                eps,
            )?;
            let to = (logits.ptr(), vocab);
            self.head_product(
                (count, vocab, h),
                top,
                (self.weights.head(), h),
                true,
                to,
                Element::F32,
            )?;
            self.gpu.read(logits.ptr(), &mut all[from * vocab..(from + count) * vocab])?;
        }
        Ok(all)
    }
}

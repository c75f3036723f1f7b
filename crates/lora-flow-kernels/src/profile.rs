//! Where the time of a pass goes: wall time by category, behind a switch.
//!
//! The public functions of this crate open a span as they start. Spans never nest, because no
//! public function calls another that opens one, so what no span covers is the rest. Off, a span
//! costs one relaxed load.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// What a span is counted under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Category {
    /// Linear layers with their adapters.
    Gemm,
    /// Attention without its projections.
    Attention,
    /// RMS norms.
    Norm,
    /// The head and the cross-entropy.
    Loss,
    /// Clipping and AdamW.
    Optimizer,
    /// Rotary embedding, gated activation, residual sums, embedding.
    Elementwise,
}

impl Category {
    /// All of them, in the order in which they are reported.
    pub const ALL: [Self; 6] =
        [Self::Gemm, Self::Attention, Self::Norm, Self::Loss, Self::Optimizer, Self::Elementwise];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gemm => "gemm",
            Self::Attention => "attention",
            Self::Norm => "norm",
            Self::Loss => "loss",
            Self::Optimizer => "optimizer",
            Self::Elementwise => "elementwise",
        }
    }
}

static ENABLED: AtomicBool = AtomicBool::new(false);
static NANOSECONDS: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];

/// Sets all sums to zero and starts counting, in the whole process.
pub fn start() {
    NANOSECONDS.iter().for_each(|sum| sum.store(0, Relaxed));
    ENABLED.store(true, Relaxed);
}

/// Stops counting and returns the time of each category, in the order of [`Category::ALL`].
pub fn stop() -> [Duration; 6] {
    ENABLED.store(false, Relaxed);
    std::array::from_fn(|i| Duration::from_nanos(NANOSECONDS[i].load(Relaxed)))
}

/// Counts from its making to its end.
#[must_use]
pub(crate) struct Span(Option<(Category, Instant)>);

/// Opens a span.
#[inline]
pub(crate) fn span(category: Category) -> Span {
    Span(ENABLED.load(Relaxed).then(|| (category, Instant::now())))
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some((category, started)) = self.0 {
            let elapsed = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
            NANOSECONDS[category as usize].fetch_add(elapsed, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_only_between_start_and_stop() {
        // Other tests may run beside this one, but what they count here takes microseconds.
        let nap = || {
            let _span = span(Category::Optimizer);
            std::thread::sleep(Duration::from_millis(40));
        };
        nap();
        start();
        nap();
        let counted = stop()[Category::Optimizer as usize];
        nap();
        assert!(counted >= Duration::from_millis(40), "{counted:?}");
        let later = stop()[Category::Optimizer as usize];
        assert!(later < counted + Duration::from_millis(40), "{later:?}");
    }
}

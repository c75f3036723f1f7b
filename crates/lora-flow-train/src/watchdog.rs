//! Losses and gradient norms that leave what the run has shown so far.

/// Steps that the median is taken over.
const WINDOW: usize = 32;
/// Steps before anything can be a spike.
const LEAST: usize = 8;

/// A value far above those before it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spike {
    /// `loss` or `grad_norm`.
    pub(crate) what: &'static str,
    pub(crate) value: f64,
    /// Median of the steps before.
    pub(crate) median: f64,
}

/// Adds a step's loss and norm to `history` (floats by their bits, so that a checkpoint keeps
/// them exactly) and says whether one is more than `factor` times its median.
pub(crate) fn watch(
    history: &mut Vec<(u64, u64)>,
    loss: f64,
    grad_norm: f64,
    factor: f64,
) -> Option<Spike> {
    let series = [("loss", loss, 0), ("grad_norm", grad_norm, 1)];
    let spike = series.into_iter().find_map(|(what, value, which)| {
        let past = history.iter().map(|h| f64::from_bits(if which == 0 { h.0 } else { h.1 }));
        let mut past: Vec<f64> = past.collect();
        if past.len() < LEAST {
            return None;
        }
        past.sort_by(f64::total_cmp);
        let median = past[past.len() / 2];
        (value > factor * median).then_some(Spike { what, value, median })
    });
    if history.len() == WINDOW {
        history.remove(0);
    }
    history.push((loss.to_bits(), grad_norm.to_bits()));
    spike
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spike_is_far_above_the_median_of_the_steps_before() {
        let mut history = Vec::new();
        assert_eq!(watch(&mut history, 90.0, 1.0, 3.0), None, "nothing to compare with");
        for _ in 0..20 {
            assert_eq!(watch(&mut history, 2.0, 1.0, 3.0), None);
        }
        assert_eq!(watch(&mut history, 5.9, 2.9, 3.0), None);
        let spike = watch(&mut history, 6.1, 1.0, 3.0).unwrap();
        assert_eq!((spike.what, spike.median), ("loss", 2.0));
        assert_eq!(watch(&mut history, 2.0, 3.1, 3.0).unwrap().what, "grad_norm");
        for _ in 0..100 {
            watch(&mut history, 2.0, 1.0, 3.0);
        }
        assert_eq!(history.len(), WINDOW);
    }
}

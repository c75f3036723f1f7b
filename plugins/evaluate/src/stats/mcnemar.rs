//! The exact McNemar test (McNemar 1947): which of two models is right more often on the same rows.
//!
//! Rows on which both are right or both wrong say nothing. Of the others, `gained` are right with
//! the candidate alone and `lost` with the baseline alone; if the models were equally good, each
//! would be gained or lost with probability ½.

/// P(X ≥ gained), X ~ Binomial(gained + lost, ½): how surprising so many gains were if the candidate
/// were no better.
pub(crate) fn p_greater(gained: usize, lost: usize) -> f64 {
    tail(gained, gained + lost)
}

/// The two-sided p: twice the smaller tail, at most 1.
pub(crate) fn p_two_sided(gained: usize, lost: usize) -> f64 {
    (2.0 * tail(gained.max(lost), gained + lost)).min(1.0)
}

/// P(X ≥ k), X ~ Binomial(n, ½), with terms from their logarithms.
fn tail(k: usize, n: usize) -> f64 {
    let ln_half = n as f64 * std::f64::consts::LN_2;
    let mut ln_choose = 0.0;
    let mut sum = 0.0;
    for i in (k..=n).rev() {
        // C(n, i) for falling i, from C(n, n) = 1.
        if i < n {
            ln_choose += ((i + 1) as f64).ln() - ((n - i) as f64).ln();
        }
        sum += (ln_choose - ln_half).exp();
    }
    sum.min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_cases_can_be_counted() {
        assert_eq!(p_greater(0, 0), 1.0);
        assert!((p_greater(3, 0) - 0.125).abs() < 1e-15);
        assert!((p_greater(2, 1) - 0.5).abs() < 1e-15);
        assert!((p_two_sided(5, 1) - 2.0 * 7.0 / 64.0).abs() < 1e-15);
        assert_eq!(p_two_sided(4, 4), 1.0);
        assert!((p_greater(300, 200) - 4.8e-6).abs() < 1e-6);
    }
}

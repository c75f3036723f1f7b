//! Exact duplicate removal: the first of equal rows stays. Only hashes are kept in memory.

use std::collections::HashSet;

use crate::row_hash::RowHash;

/// Remembers which rows it has seen, 16 bytes a row.
#[derive(Debug, Default)]
pub struct Deduplicator {
    seen: HashSet<RowHash>,
}

impl Deduplicator {
    /// Whether this is the first row of its hash.
    pub fn is_new(&mut self, hash: RowHash) -> bool {
        self.seen.insert(hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_of_equal_rows_is_new() {
        let mut dedup = Deduplicator::default();
        let hash = |x| [x; 16];
        let verdicts: Vec<bool> = [1, 2, 1, 2, 3].map(|x| dedup.is_new(hash(x))).into();
        assert_eq!(verdicts, [true, true, false, false, true]);
    }
}

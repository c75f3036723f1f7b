//! Deterministic splits. A row goes where the hash of the seed and its key falls; the key is the
//! row's own content, or the value of the group column. So equal rows and rows of one group never
//! part, the order of rows does not matter, and new rows never move old ones.

use std::collections::{BTreeMap, HashMap};

use lora_flow_core::{Error, Result};

use crate::row_hash::RowHash;

/// Distinct keys remembered, for counting groups and for proposing a seed.
const REMEMBERED: usize = 65_536;
/// Seeds tried for the hint about an empty split.
const SEEDS_TRIED: u64 = 1000;

/// Deals rows to splits.
#[derive(Debug)]
pub struct Splitter {
    names: Vec<String>,
    /// Upper end of each split's share of [0, 1).
    ends: Vec<f64>,
    seed: u64,
    rows: Vec<u64>,
    keys: HashMap<RowHash, u64>,
}

/// What one split got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitCount {
    /// Its name.
    pub name: String,
    /// Rows in it.
    pub rows: u64,
}

impl Splitter {
    /// Splits by name with their fractions; the order of the names is that of the map.
    ///
    /// # Errors
    /// When a fraction is not above zero, or they do not add up to 1 within 1e-9.
    pub fn new(fractions: &BTreeMap<String, f64>, seed: u64) -> Result<Self> {
        Self::check(fractions)?;
        let mut end = 0.0;
        let mut ends: Vec<f64> = fractions
            .values()
            .map(|fraction| {
                end += fraction;
                end
            })
            .collect();
        // Rounding must not leave a gap at the top.
        if let Some(last) = ends.last_mut() {
            *last = 1.0;
        }
        Ok(Self {
            names: fractions.keys().cloned().collect(),
            rows: vec![0; ends.len()],
            ends,
            seed,
            keys: HashMap::new(),
        })
    }

    /// Whether the fractions make a split of the whole.
    ///
    /// # Errors
    /// As [`Splitter::new`].
    pub fn check(fractions: &BTreeMap<String, f64>) -> Result<()> {
        if let Some((name, fraction)) = fractions.iter().find(|(_, f)| !(**f > 0.0 && **f <= 1.0)) {
            return Err(Error::new(format!("the fraction of `{name}` is {fraction}"))
                .with_hint("give each split a fraction above 0 and at most 1"));
        }
        let sum: f64 = fractions.values().sum();
        if (sum - 1.0).abs() > 1e-9 {
            return Err(Error::new(format!("the fractions add up to {sum}, not to 1"))
                .with_hint("name a further split for rows that are not wanted now"));
        }
        Ok(())
    }

    /// Names of the splits.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Index of the split that a row with this key goes to; counts the row.
    pub fn assign(&mut self, key: RowHash) -> usize {
        let split = self.split_of(self.seed, &key);
        self.rows[split] += 1;
        if self.keys.len() < REMEMBERED || self.keys.contains_key(&key) {
            *self.keys.entry(key).or_default() += 1;
        }
        split
    }

    fn split_of(&self, seed: u64, key: &RowHash) -> usize {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"lora-flow split 1").update(&seed.to_le_bytes()).update(key);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        let point = (u64::from_le_bytes(bytes) >> 11) as f64 / (1u64 << 53) as f64;
        self.ends.iter().position(|end| point < *end).unwrap_or(self.ends.len() - 1)
    }

    /// Number of distinct keys; exact up to 65,536, else none.
    pub fn distinct_keys(&self) -> Option<usize> {
        (self.keys.len() < REMEMBERED).then_some(self.keys.len())
    }

    /// Rows of each split.
    ///
    /// # Errors
    /// When a split got no rows; the hint proposes a seed that fills all, if there is one.
    pub fn finish(&self) -> Result<Vec<SplitCount>> {
        let counts: Vec<SplitCount> = self
            .names
            .iter()
            .zip(&self.rows)
            .map(|(name, &rows)| SplitCount { name: name.clone(), rows })
            .collect();
        let Some(empty) = counts.iter().find(|c| c.rows == 0) else { return Ok(counts) };
        let total: u64 = self.rows.iter().sum();
        let keys = self.distinct_keys().unwrap_or(REMEMBERED);
        let error = Error::new(format!(
            "split `{}` got no rows: {total} rows with {keys} distinct keys were dealt out",
            empty.name
        ));
        Err(error.with_hint(match self.better_seed() {
            Some(seed) => format!("`seed: {seed}` gives every split some rows; or use more data"),
            None => "use more rows or groups, or fewer splits".to_owned(),
        }))
    }

    /// The seed, among the first thousand, that fills every split and keeps nearest to the
    /// fractions.
    fn better_seed(&self) -> Option<u64> {
        if self.keys.len() > 10_000 {
            return None;
        }
        let total: u64 = self.keys.values().sum();
        let distance = |seed: u64| -> Option<f64> {
            let mut rows = vec![0u64; self.names.len()];
            for (key, count) in &self.keys {
                rows[self.split_of(seed, key)] += count;
            }
            let mut start = 0.0;
            let mut worst = 0f64;
            for (rows, end) in rows.iter().zip(&self.ends) {
                if *rows == 0 {
                    return None;
                }
                worst = worst.max((*rows as f64 / total as f64 - (end - start)).abs());
                start = *end;
            }
            Some(worst)
        };
        let tried = SEEDS_TRIED.min(10_000_000 / self.keys.len().max(1) as u64);
        (0..tried)
            .filter_map(|seed| Some((distance(seed)?, seed)))
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .map(|(_, seed)| seed)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::row_hash::hash_row;

    fn fractions(parts: &[(&str, f64)]) -> BTreeMap<String, f64> {
        parts.iter().map(|(n, f)| ((*n).to_owned(), *f)).collect()
    }

    fn key(text: &str) -> RowHash {
        let column: arrow_array::ArrayRef =
            std::sync::Arc::new(arrow_array::StringArray::from(vec![text]));
        hash_row(&[column], 0)
    }

    #[test]
    fn shares_are_near_the_fractions_and_repeatable() {
        let parts = fractions(&[("eval", 0.2), ("train", 0.8)]);
        let mut a = Splitter::new(&parts, 7).unwrap();
        let mut b = Splitter::new(&parts, 7).unwrap();
        for i in 0..5000 {
            let key = key(&i.to_string());
            assert_eq!(a.assign(key), b.assign(key));
        }
        let counts = a.finish().unwrap();
        assert_eq!(counts.iter().map(|c| c.rows).sum::<u64>(), 5000);
        assert!((900..1100).contains(&counts[0].rows), "{counts:?}");
        let mut other = Splitter::new(&parts, 8).unwrap();
        let moved = (0..100).filter(|i| {
            let key = key(&i.to_string());
            other.assign(key) != a.assign(key)
        });
        assert!(moved.count() > 10, "the seed changes nothing");
    }

    #[test]
    fn fractions_must_be_a_whole() {
        for parts in [&[("a", 0.5), ("b", 0.6)][..], &[("a", 1.5), ("b", -0.5)], &[("a", f64::NAN)]]
        {
            assert!(Splitter::check(&fractions(parts)).is_err(), "{parts:?}");
        }
        let thirds = [("a", 1.0 / 3.0), ("b", 1.0 / 3.0), ("c", 1.0 / 3.0)];
        Splitter::check(&fractions(&thirds)).unwrap();
    }

    #[test]
    fn an_empty_split_proposes_a_seed_that_works() {
        let parts = fractions(&[("eval", 0.1), ("train", 0.9)]);
        let empty = (0..)
            .find(|&seed| {
                let mut s = Splitter::new(&parts, seed).unwrap();
                ["a", "b", "c"].iter().for_each(|g| {
                    s.assign(key(g));
                });
                s.finish().is_err()
            })
            .unwrap();
        let mut splitter = Splitter::new(&parts, empty).unwrap();
        ["a", "b", "c"].iter().for_each(|g| {
            splitter.assign(key(g));
        });
        let error = splitter.finish().unwrap_err();
        assert!(error.to_string().contains("got no rows"), "{error}");
        let hint = error.hint().unwrap();
        let seed: u64 = hint
            .split(|c: char| !c.is_ascii_digit())
            .find(|s| !s.is_empty())
            .unwrap()
            .parse()
            .unwrap();
        let mut better = Splitter::new(&parts, seed).unwrap();
        ["a", "b", "c"].iter().for_each(|g| {
            better.assign(key(g));
        });
        better.finish().unwrap();
    }

    proptest! {
        #[test]
        fn a_group_never_crosses_splits(
            groups in proptest::collection::vec("[a-d]{1,2}", 1..200),
            seed in any::<u64>(),
            share in 0.05f64..0.95,
        ) {
            let parts = fractions(&[("eval", share), ("train", 1.0 - share)]);
            let mut splitter = Splitter::new(&parts, seed).unwrap();
            let mut homes: HashMap<&str, usize> = HashMap::new();
            for group in &groups {
                let split = splitter.assign(key(group));
                prop_assert_eq!(*homes.entry(group).or_insert(split), split);
            }
        }
    }
}

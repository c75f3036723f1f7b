//! Packing: several short documents in one training sequence. Attention and positions stay within
//! each document, so packing saves room and changes no result.

use std::collections::BTreeMap;

/// Puts documents into sequences of at most `max_length` tokens by best-fit decreasing: longest
/// first, each into the fullest sequence that still has room. Gives the indexes of the documents
/// of each sequence, both in order of first document. Never cuts; a document that is longer than
/// `max_length` gets a sequence to itself.
pub fn best_fit_decreasing(lengths: &[usize], max_length: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(lengths[i]), i));
    let mut sequences: Vec<Vec<usize>> = Vec::new();
    // Room left → sequences with just that room.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for document in order {
        let length = lengths[document];
        let best = open.range_mut(length..).next().map(|(room, with_room)| {
            // Keys are removed when their list runs empty, so there is one to pop.
            (*room, with_room.pop().unwrap_or_default(), with_room.is_empty())
        });
        let (room, sequence) = match best {
            Some((room, sequence, last)) => {
                if last {
                    open.remove(&room);
                }
                sequences[sequence].push(document);
                (room - length, sequence)
            }
            None => {
                sequences.push(vec![document]);
                (max_length.saturating_sub(length), sequences.len() - 1)
            }
        };
        if room > 0 {
            open.entry(room).or_default().push(sequence);
        }
    }
    for sequence in &mut sequences {
        sequence.sort_unstable();
    }
    sequences.sort_unstable_by_key(|sequence| sequence[0]);
    sequences
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fills_sequences_that_fit_exactly() {
        assert_eq!(best_fit_decreasing(&[3, 7, 5, 5, 10], 10), [vec![0, 1], vec![2, 3], vec![4]]);
        assert!(best_fit_decreasing(&[], 10).is_empty());
    }

    proptest! {
        #[test]
        fn every_document_once_and_none_too_long(
            lengths in proptest::collection::vec(1usize..=64, 0..300),
        ) {
            let sequences = best_fit_decreasing(&lengths, 64);
            let mut seen: Vec<usize> = sequences.concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            let total: usize = lengths.iter().sum();
            for sequence in &sequences {
                prop_assert!(sequence.iter().map(|&i| lengths[i]).sum::<usize>() <= 64);
                prop_assert!(sequence.is_sorted());
            }
            // First-fit and best-fit decreasing stay within 11/9 of the best plus one; the sum of
            // the lengths bounds the best from below only by halves, so ask for less here.
            prop_assert!(sequences.len() <= 2 * total.div_ceil(64) + 1);
            prop_assert_eq!(best_fit_decreasing(&lengths, 64), sequences);
        }
    }
}

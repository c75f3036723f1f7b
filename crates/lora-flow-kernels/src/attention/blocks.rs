//! How a padding-free batch is cut into blocks of query rows.

use std::ops::Range;

/// The blocks of a batch and what each row sees. Depends on the lengths alone.
#[derive(Debug)]
pub(super) struct Blocks {
    /// First token that each token sees; never falls. The last one is the token itself.
    pub(super) first_seen: Vec<usize>,
    /// Token ranges of the blocks, in order.
    pub(super) blocks: Vec<Range<usize>>,
    /// Ranges into `blocks` that share no key: one long document, or several short ones that fill
    /// a single block together.
    pub(super) segments: Vec<Range<usize>>,
    /// Most query rows of a block.
    rows: usize,
    /// Of a tree, the first row after those that see each token; empty where documents stand apart.
    pub(super) ends: Vec<usize>,
}

impl Blocks {
    /// Cuts documents with the cumulative lengths `docs` into blocks of at most `rows` rows.
    pub(super) fn new(docs: &[usize], window: Option<usize>, rows: usize) -> Self {
        let window = window.unwrap_or(usize::MAX);
        let tokens = docs.last().copied().unwrap_or(0);
        let mut cut = Self {
            first_seen: Vec::with_capacity(tokens),
            blocks: Vec::new(),
            segments: Vec::new(),
            rows,
            ends: Vec::new(),
        };
        let mut short = 0..0;
        for pair in docs.windows(2) {
            let (start, end) = (pair[0], pair[1]);
            cut.first_seen
                .extend((start..end).map(|token| start.max((token + 1).saturating_sub(window))));
            if end - short.start > rows {
                cut.segment(short);
                short = start..end;
            } else {
                short.end = end;
            }
        }
        cut.segment(short);
        cut
    }

    /// Cuts a tree in depth-first order: token t is seen by the rows from t to `ends[t]`.
    pub(super) fn tree(ends: &[usize], rows: usize) -> Self {
        let mut roots = vec![0];
        while let Some(end) = roots.last().and_then(|root| ends.get(*root)) {
            roots.push(*end);
        }
        Self { ends: ends.to_vec(), ..Self::new(&roots, None, rows) }
    }

    /// Adds the documents of `tokens`, which is one document if it is longer than a block.
    fn segment(&mut self, tokens: Range<usize>) {
        if tokens.is_empty() {
            return;
        }
        let first = self.blocks.len();
        self.blocks.extend(
            tokens.clone().step_by(self.rows).map(|start| start..tokens.end.min(start + self.rows)),
        );
        self.segments.push(first..self.blocks.len());
    }

    /// The tokens of a segment.
    pub(super) fn tokens(&self, segment: &Range<usize>) -> Range<usize> {
        self.blocks[segment.start].start..self.blocks[segment.end - 1].end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_documents_share_a_block_and_long_ones_do_not() {
        let cut = Blocks::new(&[0, 3, 10, 210, 210, 215, 310], None, 48);
        let long = [10..58, 58..106, 106..154, 154..202, 202..210];
        assert_eq!(cut.blocks[0], 0..10);
        assert_eq!(cut.blocks[1..6], long);
        assert_eq!(cut.blocks[6..], [210..215, 215..263, 263..310]);
        assert_eq!(cut.segments, [0..1, 1..6, 6..7, 7..9]);
        assert_eq!(cut.first_seen.len(), 310);
        assert_eq!((cut.first_seen[9], cut.first_seen[209], cut.first_seen[214]), (3, 10, 210));
        assert_eq!(cut.tokens(&cut.segments[1]), 10..210);
    }

    #[test]
    fn trees_begin_anew_at_each_root() {
        let cut = Blocks::tree(&[4, 2, 4, 4, 6, 6], 48);
        assert_eq!(cut.first_seen, [0, 0, 0, 0, 4, 4]);
        assert_eq!(cut.blocks.len(), 1);
        assert_eq!(cut.blocks[0], 0..6);
        assert!(Blocks::tree(&[], 48).blocks.is_empty());
    }

    #[test]
    fn a_window_moves_the_first_seen_token() {
        let cut = Blocks::new(&[0, 4, 6], Some(2), 48);
        assert_eq!(cut.first_seen, [0, 0, 1, 2, 4, 4]);
        assert!(Blocks::new(&[0], None, 48).blocks.is_empty());
    }
}

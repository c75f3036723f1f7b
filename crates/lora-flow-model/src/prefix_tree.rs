//! Documents that share their beginnings, each beginning standing once.
//!
//! The choices of a question share its context, and questions share their worked examples. What a
//! decoder computes of a token depends on the tokens before it alone, so equal beginnings are
//! computed once for all documents that have them.

/// Distinct beginnings of documents, a row each, in depth-first order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PrefixTree {
    /// The last token of each beginning.
    pub ids: Vec<u32>,
    /// Its position.
    pub positions: Vec<u32>,
    /// The first row after those that go on from it.
    pub ends: Vec<usize>,
    /// For each document, in the order given, the row of each of its tokens.
    pub rows: Vec<Vec<u32>>,
}

impl PrefixTree {
    /// The tree of some documents.
    pub fn new<D: AsRef<[u32]>>(documents: &[D]) -> Self {
        let mut tree = Self { rows: vec![Vec::new(); documents.len()], ..Self::default() };
        let ids = |document: usize| documents[document].as_ref();
        let mut order: Vec<usize> = (0..documents.len()).collect();
        order.sort_by_key(|document| ids(*document));
        let mut path: Vec<u32> = Vec::new();
        for document in order {
            let ids = ids(document);
            let shared =
                path.iter().zip(ids).take_while(|(row, id)| tree.ids[**row as usize] == **id);
            let shared = shared.count();
            tree.close(path.split_off(shared));
            for (position, id) in ids.iter().enumerate().skip(shared) {
                path.push(tree.ids.len() as u32);
                tree.ids.push(*id);
                tree.positions.push(position as u32);
            }
            tree.rows[document] = path.clone();
        }
        tree.close(path);
        tree
    }

    /// Nothing goes on from these rows any more.
    fn close(&mut self, rows: Vec<u32>) {
        let end = self.ids.len();
        self.ends.resize(end, end);
        for row in rows {
            self.ends[row as usize] = end;
        }
    }

    /// Tokens that a document has beyond what it shares with the one before it in order.
    pub fn new_tokens(before: &[u32], document: &[u32]) -> usize {
        document.len() - before.iter().zip(document).take_while(|(a, b)| a == b).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_stand_once_and_every_document_finds_its_rows() {
        let documents: [&[u32]; 6] =
            [&[5, 6, 7, 8], &[1, 2], &[5, 6, 9], &[5, 6, 7], &[5, 6, 9], &[5, 6, 9, 1, 2]];
        let tree = PrefixTree::new(&documents);
        assert_eq!(tree.ids, [1, 2, 5, 6, 7, 8, 9, 1, 2]);
        assert_eq!(tree.positions, [0, 1, 0, 1, 2, 3, 2, 3, 4]);
        assert_eq!(tree.ends, [2, 2, 9, 9, 6, 6, 9, 9, 9]);
        for (document, rows) in documents.iter().zip(&tree.rows) {
            let ids: Vec<u32> = rows.iter().map(|row| tree.ids[*row as usize]).collect();
            assert_eq!(ids, *document);
            for (later, row) in rows.iter().enumerate() {
                let last = *rows.last().unwrap() as usize;
                assert!(tree.ends[*row as usize] > last, "row {row} is seen by {last}");
                assert_eq!(tree.positions[*row as usize] as usize, later);
            }
        }
        assert_eq!(PrefixTree::new_tokens(&[5, 6, 7], &[5, 6, 9, 1]), 2);
        assert_eq!(PrefixTree::new::<Vec<u32>>(&[]), PrefixTree::default());
    }
}

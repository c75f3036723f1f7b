//! Fused attention against the reference, and the reference against finite differences.

use super::*;
use crate::testing::{assert_close, check_gradient, f64s, random, same_bits, weighted_sum};

struct Case {
    docs: Vec<usize>,
    heads: usize,
    kv_heads: usize,
    width: usize,
    window: Option<usize>,
    operands: DType,
}

impl Case {
    fn new(lengths: &[usize], heads: usize, kv_heads: usize, width: usize) -> Self {
        let mut docs = vec![0];
        for length in lengths {
            docs.push(docs[docs.len() - 1] + length);
        }
        Self { docs, heads, kv_heads, width, window: None, operands: DType::F32 }
    }

    fn window(self, window: usize) -> Self {
        Self { window: Some(window), ..self }
    }

    fn setting(&self) -> Setting<'_> {
        let Self { docs, window, operands, .. } = self;
        Setting { docs, scale: self.scale(), window: *window, operands: *operands }
    }

    fn tokens(&self) -> usize {
        self.docs[self.docs.len() - 1]
    }

    fn scale(&self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    /// q, k, v and the gradient of o.
    fn inputs(&self) -> [Tensor; 4] {
        let q = random(&[self.tokens(), self.heads, self.width], 1);
        let k = random(&[self.tokens(), self.kv_heads, self.width], 2);
        let v = random(&[self.tokens(), self.kv_heads, self.width], 3);
        // Scores of some size, so that the softmax is not flat and its maximum moves.
        [
            (q * 4.0).unwrap(),
            (k * 2.0).unwrap(),
            v,
            random(&[self.tokens(), self.heads, self.width], 4),
        ]
    }

    /// o, lse, dq, dk, dv.
    fn run(&self, [q, k, v, grad]: &[Tensor; 4]) -> Result<[Tensor; 5]> {
        let (o, lse) = forward(q, k, v, &self.setting())?;
        let (dq, dk, dv) = backward(grad, q, k, v, &o, &lse, &self.setting())?;
        Ok([o, lse, dq, dk, dv])
    }
}

fn cases() -> Vec<Case> {
    vec![
        Case::new(&[1], 1, 1, 16),
        Case::new(&[1, 1, 1, 2], 3, 1, 16),
        Case::new(&[5, 0, 17, 1, 30], 2, 2, 64),
        Case::new(&[96, 97, 48, 49, 1], 3, 1, 16),
        Case::new(&[300, 3, 4, 191], 3, 3, 16),
        Case::new(&[13, 131], 6, 2, 80),
        Case::new(&[40; 9], 2, 1, 5),
        Case::new(&[600], 2, 1, 24),
        Case::new(&[600, 20], 2, 1, 16).window(7),
        Case::new(&[10, 400, 6], 2, 2, 16).window(130),
        Case::new(&[33, 200], 3, 1, 17).window(1),
    ]
}

#[test]
fn fused_equals_reference() -> Result<()> {
    for case in cases() {
        let inputs = case.inputs();
        let got = case.run(&inputs)?;
        let inputs64 = [0, 1, 2, 3].map(|i| f64s(&inputs[i]).unwrap());
        let want = case.run(&inputs64)?;
        for (got, want) in got.iter().zip(&want) {
            assert_close(got, want, 1e-5);
        }
    }
    Ok(())
}

/// With operands in bf16. Where the processor has no such products they are taken as they stand, and the
/// difference is that of the inputs, which are rounded here.
#[test]
fn pairs_are_close_to_the_reference_of_rounded_inputs() -> Result<()> {
    let cases = [
        Case::new(&[1], 1, 1, 32),
        Case::new(&[1, 1, 1, 2], 3, 1, 64),
        Case::new(&[5, 0, 17, 1, 30], 2, 2, 64),
        Case::new(&[96, 97, 48, 49, 1], 3, 1, 32),
        Case::new(&[300, 3, 4, 191], 3, 3, 64),
        Case::new(&[13, 131, 63, 65, 127, 129], 6, 2, 96),
        Case::new(&[40; 9], 2, 1, 128),
        Case::new(&[700, 333], 4, 2, 64),
        Case::new(&[600, 20], 2, 1, 32).window(7),
        Case::new(&[10, 400, 6], 2, 2, 64).window(130),
    ];
    for mut case in cases {
        let rounded = |x: &Tensor| x.to_dtype(DType::BF16)?.to_dtype(DType::F32);
        let inputs = case.inputs();
        let inputs = [0, 1, 2, 3].map(|i| rounded(&inputs[i]).unwrap());
        let inputs64 = [0, 1, 2, 3].map(|i| f64s(&inputs[i]).unwrap());
        let want = case.run(&inputs64)?;
        case.operands = DType::BF16;
        let got = case.run(&inputs)?;
        for (got, (want, close)) in got.iter().zip(want.iter().zip([4e-3, 1e-5, 1e-2, 1e-2, 4e-3]))
        {
            assert_close(got, want, close);
        }
        same_bits(|| Ok(case.run(&inputs)?.to_vec()))?;
    }
    Ok(())
}

#[test]
fn reference_by_finite_differences() -> Result<()> {
    for case in [Case::new(&[3, 1, 4], 4, 2, 3), Case::new(&[6], 2, 1, 2).window(3)] {
        let inputs = [0, 1, 2, 3].map(|i| f64s(&case.inputs()[i]).unwrap());
        let [q, k, v, grad] = &inputs;
        let [_, _, dq, dk, dv] = case.run(&inputs)?;
        let loss = |q: &Tensor, k: &Tensor, v: &Tensor| {
            weighted_sum(&forward(q, k, v, &case.setting())?.0, grad)
        };
        check_gradient(q, &dq, |q| loss(q, k, v))?;
        check_gradient(k, &dk, |k| loss(q, k, v))?;
        check_gradient(v, &dv, |v| loss(q, k, v))?;
    }
    Ok(())
}

#[test]
fn bits_do_not_depend_on_threads() -> Result<()> {
    for case in [Case::new(&[200, 150, 3, 9], 6, 2, 16), Case::new(&[500], 3, 1, 16).window(100)] {
        let inputs = case.inputs();
        same_bits(|| Ok(case.run(&inputs)?.to_vec()))?;
    }
    Ok(())
}

#[test]
fn documents_do_not_see_each_other() -> Result<()> {
    // Packed and alone give the same, to rounding (blocks fall differently).
    let packed = Case::new(&[7, 110, 20], 2, 1, 16);
    let alone = Case::new(&[110], 2, 1, 16);
    let inputs = packed.inputs();
    let cut = [0, 1, 2, 3].map(|i| inputs[i].narrow(0, 7, 110).unwrap());
    let (in_pack, by_itself) = (packed.run(&inputs)?, alone.run(&cut)?);
    for part in [0, 2, 3, 4] {
        assert_close(&in_pack[part].narrow(0, 7, 110)?, &by_itself[part], 2e-6);
    }
    Ok(())
}

/// Ends of the branches of a random tree, and the path of rows that each row sees.
fn random_tree(rows: usize, seed: u64) -> (Vec<usize>, Vec<Vec<usize>>) {
    let mut state = seed;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let (mut ends, mut paths) = (vec![0; rows], Vec::new());
    let mut path: Vec<usize> = Vec::new();
    for row in 0..rows {
        // Long stretches without a branch, then back to any ancestor or to a new root.
        if next(12) == 0 {
            for left in path.split_off(next(path.len() + 1)) {
                ends[left] = row;
            }
        }
        path.push(row);
        paths.push(path.clone());
    }
    for left in path {
        ends[left] = rows;
    }
    (ends, paths)
}

#[test]
fn a_tree_gives_each_row_what_its_path_alone_gives() -> Result<()> {
    for (rows, seed) in [(1, 1), (40, 2), (300, 3), (700, 4)] {
        let (ends, paths) = random_tree(rows, seed);
        let case = Case::new(&[rows], 4, 2, 16);
        let [q, k, v, _] = case.inputs();
        let (o, lse) = forward_tree(&q, &k, &v, &ends, case.scale())?;
        let [q64, k64, v64] = [&q, &k, &v].map(|x| f64s(x).unwrap());
        let (want, want_lse) = forward_tree(&q64, &k64, &v64, &ends, case.scale())?;
        assert_close(&o, &want, 1e-5);
        assert_close(&lse, &want_lse, 1e-5);
        for row in (0..rows).step_by(1 + rows / 20) {
            let path: Vec<u32> = paths[row].iter().map(|r| *r as u32).collect();
            let index = Tensor::new(path.as_slice(), q.device())?;
            let along = |x: &Tensor| x.index_select(&index, 0);
            let alone = Case::new(&[path.len()], 4, 2, 16);
            let (alone, _) = forward(&along(&q)?, &along(&k)?, &along(&v)?, &alone.setting())?;
            assert_close(&o.narrow(0, row, 1)?, &alone.narrow(0, path.len() - 1, 1)?, 1e-5);
        }
        same_bits(|| Ok(vec![forward_tree(&q, &k, &v, &ends, case.scale())?.0]))?;
    }
    Ok(())
}

#[test]
fn branches_must_lie_inside_each_other() {
    let [q, k, v, _] = Case::new(&[3], 2, 1, 16).inputs();
    for ends in [[0, 3, 3], [2, 3, 3], [4, 3, 3], [3, 1, 3]] {
        let error = forward_tree(&q, &k, &v, &ends, 1.0).unwrap_err().to_string();
        assert!(error.contains("cannot end at"), "{ends:?}: {error}");
    }
    assert!(forward_tree(&q, &k, &v, &[3, 2, 3], 1.0).is_ok());
}

#[test]
fn errors_name_the_argument() {
    let case = Case::new(&[4], 2, 1, 16);
    let [q, k, v, _] = case.inputs();
    let error = |docs: &[usize], k: &Tensor, window| {
        let setting = Setting { docs, scale: 1.0, window, operands: DType::F32 };
        forward(&q, k, &v, &setting).unwrap_err().to_string()
    };
    assert!(error(&[0, 3], &k, None).contains("`docs` must run from 0 to the 4 tokens"));
    assert!(error(&[0, 3, 2, 4], &k, None).contains("`docs` must not fall, 3 comes before 2"));
    assert!(error(&[0, 4], &k, Some(0)).contains("window"));
    assert!(error(&[0, 4], &random(&[4, 1, 8], 1), None).contains("`k` must have shape"));
}

#[test]
fn no_tokens() -> Result<()> {
    let case = Case::new(&[], 2, 1, 16);
    let got = case.run(&case.inputs())?;
    assert_eq!(got[0].dims(), [0, 2, 16]);
    Ok(())
}

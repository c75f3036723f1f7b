//! Python's `random.Random`: the Mersenne Twister MT19937 (Matsumoto & Nishimura 1998) with the
//! ways in which CPython draws from it.
//!
//! lm-evaluation-harness picks few-shot examples and bootstrap samples with it, so the same prompts
//! and the same standard errors need the same generator.

const N: usize = 624;
const M: usize = 397;

/// The generator.
pub(crate) struct PythonRandom {
    state: [u32; N],
    at: usize,
}

impl PythonRandom {
    /// `random.Random(seed)` for a seed below 2³².
    pub(crate) fn new(seed: u32) -> Self {
        // The reference's `init_by_array` with the seed as the only key.
        let mut mt = [0u32; N];
        mt[0] = 19_650_218;
        for i in 1..N {
            mt[i] =
                1_812_433_253u32.wrapping_mul(mt[i - 1] ^ (mt[i - 1] >> 30)).wrapping_add(i as u32);
        }
        let mut i = 1;
        let mut step = |mt: &mut [u32; N], factor: u32, plus: u32, minus: bool| {
            let mixed = (mt[i - 1] ^ (mt[i - 1] >> 30)).wrapping_mul(factor);
            mt[i] = (mt[i] ^ mixed).wrapping_add(plus);
            if minus {
                mt[i] = mt[i].wrapping_sub(i as u32);
            }
            i += 1;
            if i >= N {
                mt[0] = mt[N - 1];
                i = 1;
            }
        };
        for _ in 0..N {
            step(&mut mt, 1_664_525, seed, false);
        }
        for _ in 1..N {
            step(&mut mt, 1_566_083_941, 0, true);
        }
        mt[0] = 0x8000_0000;
        Self { state: mt, at: N }
    }

    fn next_u32(&mut self) -> u32 {
        if self.at >= N {
            let mt = &mut self.state;
            for i in 0..N {
                let y = (mt[i] & 0x8000_0000) | (mt[(i + 1) % N] & 0x7fff_ffff);
                let twist = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                mt[i] = mt[(i + M) % N] ^ (y >> 1) ^ twist;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `random()`: 53 bits in [0, 1).
    pub(crate) fn random(&mut self) -> f64 {
        let (a, b) = (self.next_u32() >> 5, self.next_u32() >> 6);
        (f64::from(a) * 67_108_864.0 + f64::from(b)) / 9_007_199_254_740_992.0
    }

    /// An index as `choices` draws it.
    pub(crate) fn choice(&mut self, n: usize) -> usize {
        (self.random() * n as f64) as usize
    }

    /// A number below n, which is at least 1, by rejection.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let r = (self.next_u32() >> (32 - bits)) as usize;
            if r < n {
                return r;
            }
        }
    }

    /// Indices that `sample(range(n), k)` draws; k is at most n.
    pub(crate) fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        let mut set_size = 21;
        if k > 5 {
            // 4 to the power ⌈log₄(3k)⌉.
            set_size += 4usize.pow(((k * 3) as f64).log(4.0).ceil() as u32);
        }
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            return (0..k)
                .map(|i| {
                    let j = self.below(n - i);
                    let last = pool[n - i - 1];
                    std::mem::replace(&mut pool[j], last)
                })
                .collect();
        }
        let mut picked: Vec<usize> = Vec::with_capacity(k);
        while picked.len() < k {
            let j = self.below(n);
            if !picked.contains(&j) {
                picked.push(j);
            }
        }
        picked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that CPython 3.11 gives; `tests/reference/make_statistics.py` has many more.
    #[test]
    fn draws_are_those_of_python() {
        let mut r = PythonRandom::new(1234);
        assert_eq!(r.random(), 0.966_453_535_692_138_8);
        assert_eq!(r.sample(10, 3), [7, 1, 0]);
    }
}

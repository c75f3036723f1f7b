//! Vector registers of the instruction sets.

/// A register of `LEN` floats.
///
/// # Safety
/// All functions need the instruction set of the register; `load` and `store` need `LEN` floats at
/// the pointer, `load_bf16` as many 16-bit values. Pointers need no alignment.
pub(crate) trait Vector: Copy {
    const LEN: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// The exact values of `LEN` numbers in `bf16`.
    unsafe fn load_bf16(from: *const u16) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn max(self, other: Self) -> Self;
    /// self · b + c.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
}

/// Four floats, for processors without wider vectors.
#[derive(Clone, Copy)]
pub(crate) struct Four([f32; 4]);

impl Four {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let ([a, b, c, d], [e, g, h, i]) = (self.0, other.0);
        Four([f(a, e), f(b, g), f(c, h), f(d, i)])
    }
}

impl Vector for Four {
    const LEN: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Four([x; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // Safety: by the caller.
        Four(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // Safety: by the caller.
        let halves = unsafe { from.cast::<[u16; 4]>().read_unaligned() };
        Four(halves.map(|half| f32::from_bits(u32::from(half) << 16)))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // Safety: by the caller.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        if cfg!(target_arch = "aarch64") {
            let ([a0, a1, a2, a3], [b0, b1, b2, b3], [c0, c1, c2, c3]) = (self.0, b.0, c.0);
            Four([a0.mul_add(b0, c0), a1.mul_add(b1, c1), a2.mul_add(b2, c2), a3.mul_add(b3, c3)])
        } else {
            self.zip(b, |a, b| a * b).zip(c, |product, c| product + c)
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Pairs, turn};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Vector;
    use std::arch::x86_64::*;

    // Safety of all bodies: the caller promises the instruction set and the memory.

    impl Vector for __m256 {
        const LEN: usize = 8;
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { _mm256_add_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            unsafe { _mm256_mul_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            unsafe { _mm256_max_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { _mm256_fmadd_ps(self, b, c) }
        }
    }

    impl Vector for __m512 {
        const LEN: usize = 16;
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { _mm512_add_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            unsafe { _mm512_mul_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            unsafe { _mm512_max_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { _mm512_fmadd_ps(self, b, c) }
        }
    }

    /// The transpose of a square.
    #[inline(always)]
    pub(crate) unsafe fn turn(square: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
        unsafe {
            let r = square.map(|row| _mm256_loadu_ps(row.as_ptr()));
            let mut t = r;
            for i in 0..4 {
                t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            let mut u = t;
            for i in 0..2 {
                u[4 * i] = _mm256_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
                u[4 * i + 1] = _mm256_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
                u[4 * i + 2] = _mm256_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
                u[4 * i + 3] = _mm256_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
            }
            let mut out = [[0.0; 8]; 8];
            for i in 0..4 {
                let low = _mm256_permute2f128_ps::<0x20>(u[i], u[i + 4]);
                let high = _mm256_permute2f128_ps::<0x31>(u[i], u[i + 4]);
                _mm256_storeu_ps(out[i].as_mut_ptr(), low);
                _mm256_storeu_ps(out[i + 4].as_mut_ptr(), high);
            }
            out
        }
    }

    /// Sixteen sums, or sixteen pairs of `bf16` numbers.
    #[derive(Clone, Copy)]
    pub(crate) struct Pairs(__m512);

    impl Vector for Pairs {
        const LEN: usize = 16;
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            Pairs(unsafe { _mm512_castsi512_ps(_mm512_set1_epi32(x.to_bits() as i32)) })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Pairs(unsafe { _mm512_loadu_ps(from) })
        }
        #[inline(always)]
        unsafe fn load_bf16(_from: *const u16) -> Self {
            unreachable!("pairs are loaded as they are")
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            Pairs(unsafe { _mm512_add_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            Pairs(unsafe { _mm512_mul_ps(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            Pairs(unsafe { _mm512_max_ps(self.0, other.0) })
        }
        /// c + the dot products of the pairs of self and b.
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            // Safety: a `__m512` and a `__m512bh` are the same 64 bytes.
            unsafe {
                let pairs = |x: Self| std::mem::transmute::<__m512, __m512bh>(x.0);
                Pairs(_mm512_dpbf16_ps(c.0, pairs(self), pairs(b)))
            }
        }
    }
}

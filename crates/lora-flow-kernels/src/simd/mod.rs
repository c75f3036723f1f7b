//! Vectorised loops in a portable binary: a body is written once and compiled for several
//! instruction sets, the widest that the processor has is chosen at run time.
//!
//! Loops that treat each element alone are plain Rust that LLVM vectorises. Reductions, which it
//! may not reorder, are written with registers in [`math`].

mod math;
mod tile;
mod vector;

pub(crate) use math::{dot, dot_bf16, dot3, exp, max, sigmoid, sum};
pub(crate) use tile::{Raw, rows_in_tiles, tile};
pub(crate) use vector::Vector;

#[cfg(target_arch = "x86_64")]
use crate::isa::{InstructionSet, allowed};

/// An instruction set that bodies are compiled for.
pub(crate) trait Isa: Copy {
    /// Its vector register.
    type Vector: Vector;

    /// `a * b + c`: one rounding where the processor has FMA, two elsewhere (calling a software
    /// FMA would be far slower).
    fn mul_add(a: f32, b: f32, c: f32) -> f32;

    /// The transpose of a square.
    #[inline(always)]
    fn turn(square: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
        std::array::from_fn(|i| std::array::from_fn(|j| square[j][i]))
    }
}

/// What every processor of the target has.
#[derive(Clone, Copy)]
pub(crate) struct Baseline;

impl Isa for Baseline {
    type Vector = vector::Four;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        if cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c }
    }
}

/// AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Isa for Avx2 {
    type Vector = std::arch::x86_64::__m256;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    #[inline(always)]
    fn turn(square: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
        // Safety: bodies run only where AVX2 is there.
        unsafe { vector::turn(square) }
    }
}

/// AVX-512 F, VL, DQ and BW.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

#[cfg(target_arch = "x86_64")]
impl Isa for Avx512 {
    type Vector = std::arch::x86_64::__m512;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    #[inline(always)]
    fn turn(square: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
        // Safety: bodies run only where AVX2 is there.
        unsafe { vector::turn(square) }
    }
}

/// [`Avx512`] with dot products of pairs of `bf16` numbers (AVX512_BF16). A "float" of the operands
/// of a product is such a pair; sums are `f32`. For [`tile`] alone.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16;

#[cfg(target_arch = "x86_64")]
impl Isa for Avx512Bf16 {
    type Vector = vector::Pairs;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

/// Whether this processor multiplies pairs of `bf16` numbers, and may.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn has_bf16_pairs() -> bool {
    level() == Level::Avx512
        && is_x86_feature_detected!("avx512bf16")
        && allowed(InstructionSet::Avx512Bf16)
}

/// The instruction sets by name, for the choice at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    /// [`Baseline`].
    Baseline,
    /// [`Avx2`].
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// [`Avx512`].
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The widest level of this processor that is allowed. All that is asked is cached.
#[inline]
pub(crate) fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
            && allowed(InstructionSet::Avx512)
        {
            return Level::Avx512;
        }
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && allowed(InstructionSet::Avx2)
        {
            return Level::Avx2;
        }
    }
    Level::Baseline
}

/// Defines functions that run `body::<M>` compiled for the widest instruction set at hand.
///
/// The body must be `#[inline(always)]` and generic over [`Isa`] alone:
/// `dispatch! { fn scale(x: &mut [f32], by: f32) = scale_body; }`
macro_rules! dispatch {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident;)+) => {
        $(
            $(#[$meta])*
            #[allow(clippy::too_many_arguments)]
            $vis fn $name($($arg: $ty),*) $(-> $ret)? {
                #[cfg(target_arch = "x86_64")]
                {
                    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
                    #[allow(clippy::too_many_arguments)]
                    fn avx512($($arg: $ty),*) $(-> $ret)? {
                        $body::<$crate::simd::Avx512>($($arg),*)
                    }
                    #[target_feature(enable = "avx2,fma")]
                    #[allow(clippy::too_many_arguments)]
                    fn avx2($($arg: $ty),*) $(-> $ret)? {
                        $body::<$crate::simd::Avx2>($($arg),*)
                    }
                    match $crate::simd::level() {
                        // Safety: `level` has found these features.
                        $crate::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                        // Safety: as above.
                        $crate::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                        $crate::simd::Level::Baseline => {}
                    }
                }
                $body::<$crate::simd::Baseline>($($arg),*)
            }
        )+
    };
}
pub(crate) use dispatch;

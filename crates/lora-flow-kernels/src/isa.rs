//! The instruction sets that kernels are chosen from, and a limit on them.
//!
//! A result's last bits depend on the set in use. `LORA_FLOW_MAX_ISA` names the highest one that
//! may be used, to repeat on a new processor what an old one computed or to see what a set is worth.

use std::sync::LazyLock;

/// The variable that limits the instruction sets.
pub const VARIABLE: &str = "LORA_FLOW_MAX_ISA";

/// Sets of instructions on x86-64, each with all before it. Other processors have `Baseline` alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstructionSet {
    /// What every processor of the target has.
    Baseline,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, VL, DQ and BW.
    Avx512,
    /// AVX512_BF16: pairs of `bf16` numbers are multiplied.
    Avx512Bf16,
    /// AMX for `bf16`: tiles of them are.
    Amx,
}

impl InstructionSet {
    const ALL: [Self; 5] = [Self::Baseline, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// Its name, as the variable has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512_bf16",
            Self::Amx => "amx",
        }
    }
}

/// The highest set that the variable allows.
///
/// # Errors
/// When it names none, with the names there are.
pub fn limit() -> Result<InstructionSet, String> {
    let Some(value) = std::env::var_os(VARIABLE) else { return Ok(InstructionSet::Amx) };
    let named = InstructionSet::ALL.into_iter().find(|set| value == set.name());
    named.ok_or_else(|| {
        let names = InstructionSet::ALL.map(InstructionSet::name).join(", ");
        format!("`{VARIABLE}` is {value:?}, which is none of {names}")
    })
}

/// The highest set in use: the processor has it, and the variable allows it.
pub fn in_use() -> InstructionSet {
    #[cfg(target_arch = "x86_64")]
    {
        use crate::simd::{Level, has_bf16_pairs, level};
        #[cfg(target_os = "linux")]
        if crate::gemm::amx::available() {
            return InstructionSet::Amx;
        }
        if has_bf16_pairs() {
            return InstructionSet::Avx512Bf16;
        }
        match level() {
            Level::Avx512 => return InstructionSet::Avx512,
            Level::Avx2 => return InstructionSet::Avx2,
            Level::Baseline => {}
        }
    }
    InstructionSet::Baseline
}

/// Whether kernels may use `set`, if the processor has it. A limit that cannot be read is none: the
/// program refuses it before anything runs.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) fn allowed(set: InstructionSet) -> bool {
    static LIMIT: LazyLock<InstructionSet> =
        LazyLock::new(|| limit().unwrap_or(InstructionSet::Amx));
    set <= *LIMIT
}

//! Products of `bf16` pairs by AMX: eight tile registers of 16 rows × 64 bytes, and an instruction
//! that multiplies two of them and adds to a third.
//!
//! A panel of 32 columns of pairs is two right operands side by side as it stands: 16 rows of it
//! are two tiles. So is a left operand in pairs. What the tiles ask for beyond that is depths in
//! multiples of [`STEP`] pairs and rows in multiples of [`HEIGHT`]; [`super::pack`] fills up with
//! zeros, and rows that are too many are made in a buffer.

/// Pairs that one instruction takes from a row, and rows of a tile.
pub(crate) const STEP: usize = 16;
/// Rows of a tile.
pub(crate) const HEIGHT: usize = 16;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use x86::amx;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use x86::{available, panels};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod x86 {
    use super::{HEIGHT, STEP};
    use crate::isa::{InstructionSet, allowed};
    use crate::simd::{Raw, has_bf16_pairs};
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    use std::sync::LazyLock;

    /// Columns of a panel.
    const WIDTH: usize = 32;

    /// True if the processor has AMX for `bf16` and the system lets this process use it.
    pub(crate) fn available() -> bool {
        static AVAILABLE: LazyLock<bool> = LazyLock::new(ask);
        *AVAILABLE
    }

    /// Looks for the feature, then asks the system for the tiles' state: Linux gives it to a
    /// process on request only.
    fn ask() -> bool {
        // Intel SDM 2A, CPUID leaf 7: EDX bit 22 AMX-BF16, bit 24 AMX-TILE.
        const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
        // XCR0: tile configuration and tile data.
        const STATE: u64 = 1 << 17 | 1 << 18;
        const ARCH_PRCTL: isize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const XTILEDATA: usize = 18;
        if !has_bf16_pairs() || !allowed(InstructionSet::Amx) || __cpuid(0).eax < 7 {
            return false;
        }
        // AVX-512 is in use, so the system has switched XSAVE on.
        #[target_feature(enable = "xsave")]
        fn enabled() -> u64 {
            // Safety: XSAVE is there and switched on.
            unsafe { _xgetbv(0) }
        }
        // Safety: as above.
        if __cpuid_count(7, 0).edx & BF16_AND_TILES != BF16_AND_TILES
            || unsafe { enabled() } & STATE != STATE
        {
            return false;
        }
        let mut answer = ARCH_PRCTL;
        // Safety: a system call that touches no memory.
        unsafe {
            asm!(
                "syscall", inlateout("rax") answer,
                in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XTILEDATA,
                lateout("rcx") _, lateout("r11") _, options(nostack),
            );
        }
        answer == 0
    }

    /// Palette 1 with all tiles whole: bytes a row at 16, rows at 48 (Intel SDM 1, 18.3).
    #[repr(C, align(64))]
    struct Config([u8; 64]);

    static CONFIG: Config = {
        let mut config = [0; 64];
        config[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            config[16 + 2 * tile] = 4 * STEP as u8;
            config[48 + tile] = HEIGHT as u8;
            tile += 1;
        }
        Config(config)
    };

    /// Rows of C = A·B or C += A·B for a panel of 32 columns. `raw.depth` is a multiple of
    /// [`STEP`], `raw.column` 1; the left operand has rows up to the next multiple of [`HEIGHT`].
    pub(in super::super) unsafe fn amx(raw: Raw, rows: usize) {
        // Safety: by the caller.
        unsafe { panels(raw, rows, 1, 0) }
    }

    /// The same for `count` panels, each `size` floats after the one before and for the next 32
    /// columns of C.
    pub(crate) unsafe fn panels(raw: Raw, rows: usize, count: usize, size: usize) {
        debug_assert!(raw.depth.is_multiple_of(STEP) && raw.column == 1);
        // Safety: by the caller; the tiles are configured here and left empty.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly));
            for panel in 0..count {
                let (c, b) = (raw.c.add(panel * WIDTH), raw.b.add(panel * size));
                all_rows(Raw { c, b, ..raw }, rows);
            }
            asm!("tilerelease", options(nomem, nostack));
        }
    }

    /// One panel, the tiles being configured.
    #[inline(always)]
    unsafe fn all_rows(raw: Raw, rows: usize) {
        let (mut raw, mut rows) = (raw, rows);
        // Safety: by the caller.
        unsafe {
            while rows >= 2 * HEIGHT {
                two(raw);
                rows -= 2 * HEIGHT;
                if rows > 0 {
                    raw = raw.skip(2 * HEIGHT);
                }
            }
            if rows >= HEIGHT {
                one(raw);
                rows -= HEIGHT;
                if rows > 0 {
                    raw = raw.skip(HEIGHT);
                }
            }
            if rows > 0 {
                let mut buffer = [0f32; HEIGHT * WIDTH];
                for row in 0..rows {
                    let c = raw.c.add(row * raw.stride);
                    if raw.add {
                        c.copy_to_nonoverlapping(buffer[row * WIDTH..].as_mut_ptr(), WIDTH);
                    }
                }
                one(Raw { c: buffer.as_mut_ptr(), stride: WIDTH, ..raw });
                for row in 0..rows {
                    let c = raw.c.add(row * raw.stride);
                    c.copy_from_nonoverlapping(buffer[row * WIDTH..].as_ptr(), WIDTH);
                }
            }
        }
    }

    /// Two tiles of rows.
    #[inline(always)]
    unsafe fn two(raw: Raw) {
        // Safety: by the caller.
        unsafe {
            asm!(
                "test {add:e}, {add:e}",
                "jnz 2f",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "jmp 3f",
                "2:",
                "tileloadd tmm0, [{c} + {stride}]",
                "tileloadd tmm1, [{c} + {stride} + 64]",
                "tileloadd tmm2, [{low} + {stride}]",
                "tileloadd tmm3, [{low} + {stride} + 64]",
                "3:",
                "test {steps}, {steps}",
                "jz 5f",
                "4:",
                "tileloadd tmm6, [{b} + {width}]",
                "tileloadd tmm4, [{a} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {width} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a_low} + {row}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 64",
                "add {a_low}, 64",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 4b",
                "5:",
                "tilestored [{c} + {stride}], tmm0",
                "tilestored [{c} + {stride} + 64], tmm1",
                "tilestored [{low} + {stride}], tmm2",
                "tilestored [{low} + {stride} + 64], tmm3",
                add = in(reg) u32::from(raw.add),
                c = in(reg) raw.c,
                low = in(reg) raw.c.add(HEIGHT * raw.stride),
                stride = in(reg) 4 * raw.stride,
                a = inout(reg) raw.a => _,
                a_low = inout(reg) raw.a.add(HEIGHT * raw.row) => _,
                row = in(reg) 4 * raw.row,
                b = inout(reg) raw.b => _,
                width = in(reg) 4 * WIDTH,
                steps = inout(reg) raw.depth / STEP => _,
                options(nostack),
            );
        }
    }

    /// One tile of rows.
    #[inline(always)]
    unsafe fn one(raw: Raw) {
        // Safety: by the caller.
        unsafe {
            asm!(
                "test {add:e}, {add:e}",
                "jnz 2f",
                "tilezero tmm0",
                "tilezero tmm1",
                "jmp 3f",
                "2:",
                "tileloadd tmm0, [{c} + {stride}]",
                "tileloadd tmm1, [{c} + {stride} + 64]",
                "3:",
                "test {steps}, {steps}",
                "jz 5f",
                "4:",
                "tileloadd tmm6, [{b} + {width}]",
                "tileloadd tmm4, [{a} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {width} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, 64",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 4b",
                "5:",
                "tilestored [{c} + {stride}], tmm0",
                "tilestored [{c} + {stride} + 64], tmm1",
                add = in(reg) u32::from(raw.add),
                c = in(reg) raw.c,
                stride = in(reg) 4 * raw.stride,
                a = inout(reg) raw.a => _,
                row = in(reg) 4 * raw.row,
                b = inout(reg) raw.b => _,
                width = in(reg) 4 * WIDTH,
                steps = inout(reg) raw.depth / STEP => _,
                options(nostack),
            );
        }
    }
}

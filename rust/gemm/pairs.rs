//! bfloat16 products with single-precision sums.
//!
//! Operands are rounded to bfloat16 while they are packed. Processors with AVX512-BF16 or AMX multiply pairs of them: the
//! left panel is then `[k/2][row]`, the right one `[column][k]`, two consecutive `k` in each 32-bit word. Elsewhere the
//! rounded values are multiplied in single precision, with the same result but for the order of the sums, and for
//! subnormal numbers, which the native instructions take for zero.

#[cfg(target_arch = "x86_64")]
use crate::isa::Isa;
use crate::scalar::{Dtype, Real};
use std::sync::OnceLock;

/// Columns of a tile of pairs.
pub(super) const COLUMNS: usize = 16;

/// A kernel for pairs. `acc[j·ld + i] (+)= Σ_k lhs(i, k)·rhs(j, k)` for 16 columns and `vectors`·16 rows.
#[derive(Clone, Copy)]
pub(crate) struct PairKernel {
    /// The reduction is padded with zeros to a multiple of this.
    pub(super) granule: usize,
    pub(super) tile: unsafe fn(PairTile),
    /// To be called on a thread before its first tile and after its last.
    pub(super) enter: unsafe fn(),
    pub(super) leave: unsafe fn(),
    /// As `orthdion doctor` prints it.
    pub(crate) name: &'static str,
}

/// One tile: `pairs` pairs of reductions; `rhs` columns are `stride` pairs apart.
#[derive(Clone, Copy)]
pub(super) struct PairTile {
    pub(super) vectors: usize,
    pub(super) pairs: usize,
    pub(super) lhs: *const u32,
    pub(super) rhs: *const u32,
    pub(super) stride: usize,
    pub(super) acc: *mut f32,
    pub(super) ld: usize,
    pub(super) first: bool,
}

/// The best kernel of this processor at an instruction-set level; None where pairs are not native.
///
/// `ORTHDION_ISA` other than the processor's best level turns it off, `ORTHDION_BF16` (`amx`, `avx512bf16`, `none`) pins one;
/// names that the processor does not have are ignored.
pub(crate) fn kernel(isa: crate::isa::Isa) -> Option<PairKernel> {
    static KERNELS: OnceLock<Vec<PairKernel>> = OnceLock::new();
    let _ = isa;
    #[cfg(target_arch = "x86_64")]
    {
        if isa != Isa::Avx512 {
            return None;
        }
        let found = KERNELS.get_or_init(|| {
            let mut found = x86::available();
            let pinned = std::env::var("ORTHDION_BF16").unwrap_or_default();
            if pinned == "none" {
                found.clear();
            } else if found.iter().any(|k| k.name == pinned) {
                found.retain(|k| k.name == pinned);
            }
            found
        });
        found.last().copied()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        KERNELS.get_or_init(Vec::new).last().copied()
    }
}

/// Every kernel that this processor has.
#[cfg(test)]
pub(super) fn available() -> Vec<PairKernel> {
    #[cfg(target_arch = "x86_64")]
    return x86::available();
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

/// One tile by `kernel`, bounds checked.
#[cfg(test)]
#[allow(clippy::too_many_arguments)]
pub(super) fn run(
    kernel: PairKernel,
    vectors: usize,
    pairs: usize,
    lhs: &[u32],
    rhs: &[u32],
    stride: usize,
    acc: &mut [f32],
    ld: usize,
    first: bool,
) {
    assert!((pairs * 2).is_multiple_of(kernel.granule) && stride >= pairs && ld >= 16 * vectors);
    assert!(lhs.len() >= pairs * 16 * vectors && rhs.len() >= COLUMNS * stride && acc.len() >= COLUMNS * ld);
    let (lhs, rhs, acc) = (lhs.as_ptr(), rhs.as_ptr(), acc.as_mut_ptr());
    // SAFETY: the assertions are the kernel's contract.
    unsafe {
        (kernel.enter)();
        (kernel.tile)(PairTile { vectors, pairs, lhs, rhs, stride, acc, ld, first });
        (kernel.leave)();
    }
}

/// Rounds to bfloat16, to nearest even; the result's upper half holds the bits.
#[inline(always)]
pub(super) fn round_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    // A NaN whose payload carries over must stay one.
    if x.is_nan() { bits | 0x0040_0000 } else { rounded }
}

/// How a product treats the operands that it packs.
#[derive(Clone, Copy)]
pub(super) enum Rounding {
    /// As they are.
    None,
    /// To bfloat16, multiplied in single precision.
    Rounded,
    /// To pairs of bfloat16.
    Pairs(PairKernel),
}

impl Rounding {
    pub(super) fn of<T: Real>(cx: super::Context) -> Self {
        if !cx.half || T::DTYPE != Dtype::F32 {
            return Rounding::None;
        }
        kernel(cx.isa).map_or(Rounding::Rounded, Rounding::Pairs)
    }

    /// The reduction's padded length.
    #[inline(always)]
    pub(super) fn pad(self, kc: usize) -> usize {
        match self {
            Rounding::Pairs(k) => kc.next_multiple_of(k.granule),
            _ => kc,
        }
    }
}

/// Rounds `len` packed values to bfloat16 in place.
///
/// # Safety
/// `p` is valid for `len` singles.
#[inline(always)]
pub(super) unsafe fn round_in_place(p: *mut f32, len: usize) {
    for i in 0..len {
        // SAFETY: the caller's.
        unsafe { *p.add(i) = f32::from_bits(round_bits(*p.add(i)) & 0xffff_0000) };
    }
}

/// Word of two consecutive reductions, the first in its lower half.
#[inline(always)]
fn word(low: f32, high: f32) -> u32 {
    (round_bits(low) >> 16) | (round_bits(high) & 0xffff_0000)
}

/// A left panel, `kc` lines of `mr`, to `pad/2` lines of `mr` words.
///
/// # Safety
/// `src` holds `kc·mr` singles, `dst` `pad/2·mr` words.
#[inline(always)]
pub(super) unsafe fn lhs_to_pairs(src: *const f32, kc: usize, mr: usize, pad: usize, dst: *mut u32) {
    // SAFETY: the caller's.
    unsafe {
        for k in 0..kc / 2 {
            for i in 0..mr {
                *dst.add(k * mr + i) = word(*src.add(2 * k * mr + i), *src.add((2 * k + 1) * mr + i));
            }
        }
        if kc % 2 == 1 {
            for i in 0..mr {
                *dst.add(kc / 2 * mr + i) = word(*src.add((kc - 1) * mr + i), 0.0);
            }
        }
        for w in kc.div_ceil(2) * mr..pad / 2 * mr {
            *dst.add(w) = 0;
        }
    }
}

/// A right block of `columns` columns, `[column][block]` if `k_major`, else `[k][nr]` in panels, to `[column][block/2]` words.
///
/// # Safety
/// `src` holds `columns·block` singles, `dst` half as many words; `pad ≤ block`.
#[inline(always)]
pub(super) unsafe fn rhs_to_pairs(
    src: *const f32,
    columns: usize,
    (kc, pad, block): (usize, usize, usize),
    nr: usize,
    k_major: bool,
    dst: *mut u32,
) {
    // SAFETY: the caller's.
    unsafe {
        let at = |j: usize, k: usize| match k_major {
            true => *src.add(j * block + k),
            false => *src.add((j / nr * block + k) * nr + j % nr),
        };
        for j in 0..columns {
            let out = dst.add(j * (block / 2));
            if k_major {
                let line = src.add(j * block);
                for k in 0..kc / 2 {
                    *out.add(k) = word(*line.add(2 * k), *line.add(2 * k + 1));
                }
            } else {
                let line = src.add(j / nr * block * nr + j % nr);
                for k in 0..kc / 2 {
                    *out.add(k) = word(*line.add(2 * k * nr), *line.add((2 * k + 1) * nr));
                }
            }
            if kc % 2 == 1 {
                *out.add(kc / 2) = word(at(j, kc - 1), 0.0);
            }
            for w in kc.div_ceil(2)..pad / 2 {
                *out.add(w) = 0;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{COLUMNS, PairKernel, PairTile};
    use std::arch::asm;
    use std::arch::x86_64::*;

    pub(super) fn available() -> Vec<PairKernel> {
        let mut found = Vec::new();
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
            found.push(PairKernel {
                granule: 2,
                tile: dot_tile,
                enter: nothing,
                leave: nothing,
                name: "avx512bf16",
            });
        }
        if amx_available() {
            found.push(PairKernel {
                granule: 32,
                tile: amx_tile,
                enter: amx_enter,
                leave: amx_leave,
                name: "amx",
            });
        }
        found
    }

    unsafe fn nothing() {}

    /// # Safety
    /// The panels hold what `t` says; the processor has AVX512-BF16.
    unsafe fn dot_tile(t: PairTile) {
        // SAFETY: the caller's.
        unsafe {
            match t.vectors {
                1 => dot::<1>(t),
                2 => dot::<2>(t),
                _ => dot::<3>(t),
            }
        }
    }

    /// # Safety
    /// As [`dot_tile`].
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn dot<const MV: usize>(t: PairTile) {
        const HALF: usize = COLUMNS / 2;
        for j0 in [0, HALF] {
            // SAFETY: columns j0..j0+8 of the tile.
            unsafe {
                let mut c = [[_mm512_setzero_ps(); MV]; HALF];
                if !t.first {
                    for (j, cj) in c.iter_mut().enumerate() {
                        for (v, cv) in cj.iter_mut().enumerate() {
                            *cv = _mm512_loadu_ps(t.acc.add((j0 + j) * t.ld + 16 * v));
                        }
                    }
                }
                for k in 0..t.pairs {
                    let mut a = [_mm512_setzero_si512(); MV];
                    for (v, av) in a.iter_mut().enumerate() {
                        *av = _mm512_loadu_si512(t.lhs.add((k * MV + v) * 16).cast());
                    }
                    for (j, cj) in c.iter_mut().enumerate() {
                        let b = _mm512_set1_epi32(*t.rhs.add((j0 + j) * t.stride + k) as i32);
                        let b: __m512bh = std::mem::transmute(b);
                        for (cv, av) in cj.iter_mut().zip(a) {
                            *cv = _mm512_dpbf16_ps(*cv, std::mem::transmute::<__m512i, __m512bh>(av), b);
                        }
                    }
                }
                for (j, cj) in c.iter().enumerate() {
                    for (v, cv) in cj.iter().enumerate() {
                        _mm512_storeu_ps(t.acc.add((j0 + j) * t.ld + 16 * v), *cv);
                    }
                }
            }
        }
    }

    /// AMX with bfloat16, and Linux's leave to use its registers (given to the whole process, once).
    fn amx_available() -> bool {
        if !cfg!(target_os = "linux") || !is_x86_feature_detected!("avx512f") {
            return false;
        }
        // SAFETY: every x86-64 processor has CPUID, and one with AVX-512 has leaf 7. (Safe since Rust 1.94.)
        #[allow(unused_unsafe)]
        let edx = unsafe { __cpuid_count(7, 0).edx };
        let (bf16, tile) = (edx >> 22 & 1, edx >> 24 & 1);
        if bf16 == 0 || tile == 0 {
            return false;
        }
        let result: isize;
        // SAFETY: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) changes nothing but that permission.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") 158isize => result,
                in("rdi") 0x1023,
                in("rsi") 18,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack)
            );
        }
        result == 0
    }

    /// Tiles 0–6: 16 rows of 64 bytes each.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// # Safety
    /// AMX is available.
    unsafe fn amx_enter() {
        let mut config =
            Config { palette: 1, start_row: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
        config.bytes[..7].fill(64);
        config.rows[..7].fill(16);
        // SAFETY: the caller's; the operand is 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) }
    }

    /// # Safety
    /// AMX is available.
    unsafe fn amx_leave() {
        // SAFETY: the caller's.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }

    /// One asm block a height: no tile register lives outside of it.
    macro_rules! amx {
        ($t:ident, $($load:literal, $zero:literal, $b:literal, $dot:literal, $store:literal);+) => {{
            let row = 64 * $t.vectors; // bytes of one line of the left panel
            asm!(
                "test {first}, {first}",
                "jnz 4f",
                $($load,)+
                "jmp 5f",
                "4:",
                $($zero,)+
                "5:",
                "test {n}, {n}",
                "jz 3f",
                "2:",
                "tileloadd tmm3, [{a} + {sa}]",
                $($b, $dot,)+
                "add {a}, 64",
                "add {b}, {sb16}",
                "dec {n}",
                "jnz 2b",
                "3:",
                $($store,)+
                first = in(reg) usize::from($t.first),
                n = inout(reg) $t.pairs / 16 => _,
                a = inout(reg) $t.rhs => _,
                b = inout(reg) $t.lhs => _,
                sa = in(reg) 4 * $t.stride,
                sb = in(reg) row,
                sb16 = in(reg) 16 * row,
                c = in(reg) $t.acc,
                ld = in(reg) 4 * $t.ld,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                options(nostack)
            );
        }};
    }

    /// # Safety
    /// The panels hold what `t` says, `pairs` is a multiple of 16, AMX is available and [`amx_enter`] has run.
    unsafe fn amx_tile(t: PairTile) {
        // SAFETY: the caller's.
        unsafe {
            match t.vectors {
                1 => amx!(
                    t,
                    "tileloadd tmm0, [{c} + {ld}]",
                    "tilezero tmm0",
                    "tileloadd tmm4, [{b} + {sb}]",
                    "tdpbf16ps tmm0, tmm3, tmm4",
                    "tilestored [{c} + {ld}], tmm0"
                ),
                2 => amx!(t,
                    "tileloadd tmm0, [{c} + {ld}]", "tilezero tmm0",
                    "tileloadd tmm4, [{b} + {sb}]", "tdpbf16ps tmm0, tmm3, tmm4", "tilestored [{c} + {ld}], tmm0";
                    "tileloadd tmm1, [{c} + {ld} + 64]", "tilezero tmm1",
                    "tileloadd tmm5, [{b} + {sb} + 64]", "tdpbf16ps tmm1, tmm3, tmm5", "tilestored [{c} + {ld} + 64], tmm1"),
                _ => amx!(t,
                    "tileloadd tmm0, [{c} + {ld}]", "tilezero tmm0",
                    "tileloadd tmm4, [{b} + {sb}]", "tdpbf16ps tmm0, tmm3, tmm4", "tilestored [{c} + {ld}], tmm0";
                    "tileloadd tmm1, [{c} + {ld} + 64]", "tilezero tmm1",
                    "tileloadd tmm5, [{b} + {sb} + 64]", "tdpbf16ps tmm1, tmm3, tmm5", "tilestored [{c} + {ld} + 64], tmm1";
                    "tileloadd tmm2, [{c} + {ld} + 128]", "tilezero tmm2",
                    "tileloadd tmm6, [{b} + {sb} + 128]", "tdpbf16ps tmm2, tmm3, tmm6", "tilestored [{c} + {ld} + 128], tmm2"),
            }
        }
    }
}

//! How the calling thread treats subnormal numbers, which a worker must do alike: else results would depend on which
//! thread has computed them (`torch.set_flush_denormal` sets its own thread only).

/// The control bits of a thread's floating-point unit; its sticky exception flags are left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FloatMode(u64);

#[cfg(target_arch = "x86_64")]
mod unit {
    /// All but the six exception flags.
    const CONTROL: u32 = !0x3f;

    pub(super) fn get() -> u64 {
        let mut bits = 0u32;
        // SAFETY: writes MXCSR to four bytes of ours.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut bits, options(nostack, preserves_flags)) };
        u64::from(bits & CONTROL)
    }

    pub(super) fn set(bits: u64) {
        let bits = bits as u32;
        // SAFETY: the bits come from MXCSR itself, so none that is reserved is set.
        unsafe {
            std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const bits, options(nostack, preserves_flags, readonly))
        };
    }
}

#[cfg(target_arch = "aarch64")]
mod unit {
    pub(super) fn get() -> u64 {
        let bits: u64;
        // SAFETY: reads a register.
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) bits, options(nomem, nostack, preserves_flags)) };
        bits
    }

    pub(super) fn set(bits: u64) {
        // SAFETY: the bits come from FPCR itself.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) bits, options(nomem, nostack, preserves_flags)) };
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod unit {
    pub(super) fn get() -> u64 {
        0
    }

    pub(super) fn set(_: u64) {}
}

impl FloatMode {
    /// The calling thread's.
    pub(crate) fn current() -> Self {
        FloatMode(unit::get())
    }

    /// Makes it the calling thread's.
    pub(crate) fn apply(self) {
        if self != FloatMode::current() {
            unit::set(self.0);
        }
    }
}

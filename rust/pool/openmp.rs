//! The team of threads that OpenMP keeps for the calling thread, where an OpenMP runtime is loaded.
//!
//! Torch's own products run in that team, and its threads go on spinning for some milliseconds afterwards, to be at hand
//! for the next one. Threads of ours would have to share the processors with them, just where a step follows a
//! backward pass. So tasks go to the same team: it starts in a microsecond while it spins, and nobody waits in vain.
//!
//! GNU's runtime is entered by its `GOMP_parallel`, which LLVM's and Intel's have as well.

use super::Job;
use std::ffi::{c_uint, c_void};
use std::sync::OnceLock;

/// `GOMP_parallel(body, data, threads, flags)` runs `body(data)` on each thread of a team, the caller among them.
type Parallel = unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// A runtime's entry, for use by one process.
#[derive(Clone, Copy)]
pub(super) struct Team {
    parallel: Parallel,
    pid: u32,
}

/// The runtime that was loaded when this was first asked; none in a process forked since, as GNU's would wait there for
/// threads that did not come along.
pub(super) fn team() -> Option<Team> {
    static FOUND: OnceLock<Option<Team>> = OnceLock::new();
    let found = *FOUND.get_or_init(|| {
        let parallel = entry().filter(|_| super::pinned() != Some(super::Kind::Own))?;
        Some(Team { parallel, pid: std::process::id() })
    });
    found.filter(|team| team.pid == std::process::id())
}

#[cfg(unix)]
fn entry() -> Option<Parallel> {
    // SAFETY: the name ends with a zero; the search only reads tables of loaded libraries.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr()) };
    // SAFETY: every OpenMP runtime that exports the name gives it this signature, which compiled programs rely on.
    (!address.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Parallel>(address) })
}

#[cfg(not(unix))]
fn entry() -> Option<Parallel> {
    None
}

impl Team {
    /// Helps with `job` on `threads` threads and returns when all have come back.
    ///
    /// Always all of them, however few tasks there are: GNU's runtime ends the threads that a smaller team leaves over,
    /// and would start them anew for torch's next product.
    pub(super) fn run(self, threads: usize, job: &Job<'_>) {
        unsafe extern "C" fn body(job: *mut c_void) {
            // SAFETY: `run` passes a job that outlives the team's work. `help` lets no panic through.
            unsafe { (*job.cast::<Job<'_>>()).help() };
        }
        let threads = c_uint::try_from(threads).unwrap_or(c_uint::MAX);
        // SAFETY: the signature is the runtime's; the job is shared, and outlives the call.
        unsafe { (self.parallel)(body, (&raw const *job).cast_mut().cast(), threads, 0) };
    }
}

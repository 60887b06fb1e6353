//! Threads of our own, asleep on a condition variable between calls: a spinning barrier inside a factorisation costs a
//! hundredfold on a busy machine.

use super::{Job, lock};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Helps with `job` on up to `threads` threads, the caller among them, and returns when all have come back.
pub(super) fn run(threads: usize, job: &Job<'_>) {
    let idle = &pools_of_this_process().idle;
    let mut pool = lock(idle).pop().unwrap_or_default();
    pool.run(threads, job);
    lock(idle).push(pool);
}

/// One pool a caller: each that calls while others do has threads of its own.
struct Pools {
    pid: u32,
    idle: Mutex<Vec<Pool>>,
}

/// Made anew in a forked child, whose parent's threads did not come along; what the parent had is left as it was then,
/// perhaps in the middle of a call.
fn pools_of_this_process() -> &'static Pools {
    static POOLS: AtomicPtr<Pools> = AtomicPtr::new(std::ptr::null_mut());
    let pid = std::process::id();
    loop {
        let known = POOLS.load(Ordering::Acquire);
        // SAFETY: what is stored was leaked below, so it lives as long as the process.
        if let Some(pools) = unsafe { known.as_ref() }.filter(|pools| pools.pid == pid) {
            return pools;
        }
        let made = Box::into_raw(Box::new(Pools { pid, idle: Mutex::default() }));
        if POOLS.compare_exchange(known, made, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: made above, and nobody else has seen it.
            drop(unsafe { Box::from_raw(made) });
        }
    }
}

#[derive(Default)]
struct Pool {
    workers: usize,
    /// The system has refused a further thread.
    full: bool,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
}

#[derive(Default)]
struct State {
    job: Option<Pointer>,
    /// Workers that may still join the current job.
    seats: usize,
    /// Workers inside the current job.
    running: usize,
}

/// A job in its caller's frame, which outlives it: [`Pool::run`] waits until `running` is zero.
#[derive(Clone, Copy)]
struct Pointer(*const Job<'static>);
// SAFETY: a job is `Sync`, and outlives its use.
unsafe impl Send for Pointer {}

impl Pool {
    fn run(&mut self, threads: usize, job: &Job<'_>) {
        while self.workers < threads - 1 && !self.full {
            let shared = Arc::clone(&self.shared);
            let spawned = std::thread::Builder::new()
                .name(format!("orthdion-{}", self.workers + 1))
                .spawn(move || work(&shared));
            match spawned {
                Ok(_) => self.workers += 1,
                Err(_) => self.full = true, // fewer threads, the same result
            }
        }
        let seats = self.workers.min(threads - 1);
        {
            let mut state = lock(&self.shared.state);
            // Only the lifetime is erased: the job is gone from the state before this frame is.
            state.job = Some(Pointer((&raw const *job).cast()));
            state.seats = seats;
        }
        (0..seats).for_each(|_| self.shared.work.notify_one());
        job.help();
        let mut state = lock(&self.shared.state);
        state.job = None;
        state.seats = 0;
        while state.running > 0 {
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn work(shared: &Shared) {
    loop {
        let job = {
            let mut state = lock(&shared.state);
            loop {
                if let (Some(job), true) = (state.job, state.seats > 0) {
                    state.seats -= 1;
                    state.running += 1;
                    break job;
                }
                state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        };
        // SAFETY: the job is valid while this worker counts as running.
        unsafe { (*job.0).help() };
        let mut state = lock(&shared.state);
        state.running -= 1;
        if state.running == 0 {
            shared.done.notify_all();
        }
    }
}

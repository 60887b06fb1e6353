//! A pool of parked threads.
//!
//! Work is a number of independent tasks, handed out by an atomic counter; which thread runs a task never changes what
//! the task computes. Threads sleep on a condition variable between calls: a spinning barrier inside a factorisation
//! costs a hundredfold on a busy machine. A call made from inside a task runs serially.

use crate::float_mode::FloatMode;
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `task(0)` … `task(tasks − 1)` on up to `threads` threads, the caller among them, and returns when all are done.
///
/// A panic in a task is raised again here, after every other task has ended.
pub(crate) fn for_each(threads: usize, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    let threads = threads.min(tasks);
    if threads <= 1 || INSIDE.get() {
        (0..tasks).for_each(task);
        return;
    }
    // Another caller holds the pool: its threads are busy anyway.
    match CALLER.try_lock() {
        Ok(mut pool) => pool_of_this_process(&mut pool).run(threads, tasks, task),
        Err(std::sync::TryLockError::Poisoned(pool)) => {
            pool_of_this_process(&mut pool.into_inner()).run(threads, tasks, task);
        }
        Err(std::sync::TryLockError::WouldBlock) => (0..tasks).for_each(task),
    }
}

/// Runs `task(threads, item)` for every item and returns the results in order; `threads` is what a task may use.
///
/// Threads take whole items, the costliest first; items that would leave threads idle at the end are taken by all
/// threads together before that.
pub(crate) fn map<T: Send, R: Send>(
    threads: usize,
    items: Vec<T>,
    cost: impl Fn(&T) -> f64,
    task: impl Fn(usize, T) -> R + Sync,
) -> Vec<R> {
    let costs: Vec<f64> = items.iter().map(cost).collect();
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by(|&i, &j| costs[j].total_cmp(&costs[i]).then(i.cmp(&j)));
    let together = shared_prefix(&order.iter().map(|&i| costs[i]).collect::<Vec<_>>(), threads);
    // No lock is ever waited for: each slot has one task.
    let slots: Vec<Mutex<(Option<T>, Option<R>)>> =
        items.into_iter().map(|item| Mutex::new((Some(item), None))).collect();
    let run = |t: usize, threads: usize| {
        let mut slot = lock(&slots[order[t]]);
        if let Some(item) = slot.0.take() {
            slot.1 = Some(task(threads, item));
        }
    };
    for t in 0..together {
        run(t, threads);
    }
    for_each(threads, order.len() - together, &|t| run(together + t, 1));
    let results = slots.into_iter().map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner).1);
    results.map(|r| r.expect("every item has been taken")).collect()
}

/// How many of the largest tasks to give to all threads, so that the rest, handed out greedily, ends nearly together.
fn shared_prefix(costs: &[f64], threads: usize) -> usize {
    if threads == 1 {
        return 0;
    }
    (0..=costs.len())
        .find(|&k| {
            let rest = &costs[k..];
            let mut loads = vec![0.0f64; threads];
            for c in rest {
                let least = loads.iter_mut().min_by(|a, b| a.total_cmp(b)).expect("threads ≥ 1");
                *least += c;
            }
            let ideal = rest.iter().sum::<f64>() / threads as f64;
            loads.iter().fold(0.0f64, |m, l| m.max(*l)) <= 1.15 * ideal
        })
        .unwrap_or(costs.len())
}

static CALLER: Mutex<Option<Pool>> = Mutex::new(None);

/// The pool, made anew in a forked child, whose parent's threads did not come along.
fn pool_of_this_process(slot: &mut Option<Pool>) -> &mut Pool {
    let pid = std::process::id();
    if slot.as_ref().is_some_and(|pool| pool.pid != pid) {
        std::mem::forget(slot.take());
    }
    slot.get_or_insert_with(|| Pool { pid, workers: 0, shared: Arc::default() })
}

struct Pool {
    pid: u32,
    workers: usize,
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
    job: Option<Job>,
    /// Workers that may still join the current job.
    seats: usize,
    /// Workers inside the current job.
    running: usize,
    panic: Option<Box<dyn Any + Send>>,
}

/// Pointers into the caller's stack frame, which outlives the job: `run` waits until `running` is zero.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    next: *const AtomicUsize,
    tasks: usize,
    mode: FloatMode,
}
// SAFETY: the pointees are `Sync` and outlive the job.
unsafe impl Send for Job {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    fn run(&mut self, threads: usize, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        while self.workers < threads - 1 {
            let shared = Arc::clone(&self.shared);
            let spawned = std::thread::Builder::new()
                .name(format!("orthdion-{}", self.workers + 1))
                .spawn(move || work(&shared));
            if spawned.is_err() {
                break; // fewer threads, the same result
            }
            self.workers += 1;
        }
        let next = AtomicUsize::new(0);
        // SAFETY: only the lifetime is erased; `job` is gone before this frame is.
        let task: *const (dyn Fn(usize) + Sync + 'static) =
            unsafe { std::mem::transmute(task as *const (dyn Fn(usize) + Sync)) };
        let job = Job { task, next: &raw const next, tasks, mode: FloatMode::current() };
        {
            let mut state = lock(&self.shared.state);
            state.job = Some(job);
            state.seats = threads - 1;
        }
        self.shared.work.notify_all();
        let own = catch_unwind(AssertUnwindSafe(|| help(job)));
        let mut state = lock(&self.shared.state);
        state.job = None;
        state.seats = 0;
        while state.running > 0 {
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let theirs = state.panic.take();
        drop(state);
        if let Err(payload) = own {
            resume_unwind(payload);
        }
        if let Some(payload) = theirs {
            resume_unwind(payload);
        }
    }
}

/// Takes tasks of `job` until none is left.
fn help(job: Job) {
    let outer = INSIDE.replace(true);
    let result = catch_unwind(AssertUnwindSafe(|| {
        loop {
            // SAFETY: the job's pointers are valid while it runs, see `Job`.
            let i = unsafe { (*job.next).fetch_add(1, Ordering::Relaxed) };
            if i >= job.tasks {
                return;
            }
            // SAFETY: as above.
            unsafe { (*job.task)(i) };
        }
    }));
    INSIDE.set(outer);
    if let Err(payload) = result {
        resume_unwind(payload);
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
        job.mode.apply();
        let result = catch_unwind(AssertUnwindSafe(|| help(job)));
        let mut state = lock(&shared.state);
        if let Err(payload) = result {
            state.panic = Some(payload);
        }
        state.running -= 1;
        if state.running == 0 {
            shared.done.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_for_any_number_of_threads() {
        for threads in 1..5 {
            for tasks in [0, 1, 2, 3, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for_each(threads, tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        for _ in 0..3 {
            let result = catch_unwind(|| for_each(3, 8, &|i| assert!(i != 5, "task five")));
            assert!(result.is_err());
            let sum = AtomicUsize::new(0);
            for_each(3, 8, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 28);
        }
    }

    #[test]
    fn results_are_in_order_and_large_items_get_all_threads() {
        for threads in 1..4 {
            let items: Vec<usize> = (0..50).collect();
            let cost = |&i: &usize| if i == 7 { 1e6 } else { i as f64 };
            let results = map(threads, items, cost, |threads, i| (i, threads));
            assert!(results.iter().enumerate().all(|(i, r)| r.0 == i));
            assert!(results.iter().all(|r| r.1 == if r.0 == 7 { threads } else { 1 }));
        }
        assert!(map(3, Vec::<u8>::new(), |_| 1.0, |_, x| x).is_empty());
    }

    #[test]
    fn a_nested_call_runs_serially() {
        let sum = AtomicUsize::new(0);
        for_each(2, 4, &|_| {
            for_each(2, 4, &|j| {
                sum.fetch_add(j, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), 24);
    }
}

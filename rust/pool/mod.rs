//! Who runs the tasks.
//!
//! Work is a number of independent tasks, handed out by an atomic counter; which thread runs a task never changes what
//! the task computes. Tasks go to the OpenMP team that torch uses, where there is one ([`openmp`]), else to threads of
//! our own ([`parked`]). A call made from inside a task runs serially. `ORTHDION_POOL` (`openmp`, `own`) pins one;
//! one that is not there is ignored.

mod float_mode;
mod openmp;
mod parked;

use float_mode::FloatMode;
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Whose threads run tasks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The team of the OpenMP runtime that is loaded, torch's as a rule.
    OpenMp,
    /// Threads of our own.
    Own,
}

impl Kind {
    /// Lower-case name, as `ORTHDION_POOL` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::OpenMp => "openmp",
            Kind::Own => "own",
        }
    }

    /// What serves a call now. An OpenMP runtime is looked for once, at the first call.
    pub fn current() -> Kind {
        if openmp::team().is_some() { Kind::OpenMp } else { Kind::Own }
    }
}

/// What the environment asks for. Read once.
fn pinned() -> Option<Kind> {
    static PINNED: OnceLock<Option<Kind>> = OnceLock::new();
    *PINNED.get_or_init(|| {
        let name = std::env::var("ORTHDION_POOL").unwrap_or_default();
        [Kind::OpenMp, Kind::Own].into_iter().find(|kind| kind.name() == name)
    })
}

/// Runs `task(0)` … `task(tasks − 1)` on up to `threads` threads, the caller among them, and returns when all are done.
///
/// A panic in a task is raised again here, after every other task has ended.
pub(crate) fn for_each(threads: usize, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    if threads.min(tasks) <= 1 || INSIDE.get() {
        (0..tasks).for_each(task);
        return;
    }
    let job =
        Job { task, next: AtomicUsize::new(0), tasks, mode: FloatMode::current(), panic: Mutex::default() };
    match openmp::team() {
        Some(team) => team.run(threads, &job),
        None => parked::run(threads.min(tasks), &job),
    }
    if let Some(payload) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(payload);
    }
}

/// A call of [`for_each`] as its threads see it.
struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    next: AtomicUsize,
    tasks: usize,
    /// The caller's, which every thread takes on while it helps.
    mode: FloatMode,
    /// What the last task that panicked said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job<'_> {
    /// Takes tasks until none is left.
    fn help(&self) {
        let outer = INSIDE.replace(true);
        let mode = FloatMode::current();
        self.mode.apply();
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let i = self.next.fetch_add(1, Ordering::Relaxed);
                if i >= self.tasks {
                    return;
                }
                (self.task)(i);
            }
        }));
        mode.apply();
        INSIDE.set(outer);
        if let Err(payload) = result {
            *lock(&self.panic) = Some(payload);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

    #[test]
    fn callers_at_once_each_have_all_their_tasks_run() {
        std::thread::scope(|scope| {
            for caller in 0..4 {
                scope.spawn(move || {
                    for round in 0..50 {
                        let sum = AtomicUsize::new(0);
                        for_each(3, 20, &|i| {
                            sum.fetch_add(i * caller + round, Ordering::Relaxed);
                        });
                        assert_eq!(sum.into_inner(), 190 * caller + 20 * round);
                    }
                });
            }
        });
    }
}

//! The scheduler: what may start, starts, in the order of the plan.
//!
//! One thread decides; each executing task has a thread of its own. Tasks whose results are in the
//! store never get one: they are looked up here, at the moment their inputs are known.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, Scope};
use std::time::Duration;

use lora_flow_core::{DeviceSpec, Error, Result};

use super::execute::{Control, Finished, Job, Quick};
use super::{Done, Observer, RunOptions, Session, Status, TaskOutcome};
use crate::plan::Resources;
use crate::record::RunFolder;
use crate::store::Entry;

/// How often stops and time limits are passed on to executing tasks.
const TICK: Duration = Duration::from_millis(20);

/// As the main thread's: tasks may recurse as they would there.
const STACK: usize = 8 << 20;

/// Everything that one run shares.
pub(super) struct Run<'a> {
    pub(super) session: &'a Session<'a>,
    pub(super) options: &'a RunOptions,
    pub(super) observer: Arc<dyn Observer>,
    pub(super) folder: &'a RunFolder,
    pub(super) retry_delay: Duration,
    /// Where results go that are to be sent to the remote.
    pub(super) pushes: Option<&'a Sender<Box<Entry>>>,
}

/// Runs all tasks of the plan; the outcomes are in its order.
pub(super) fn run(run: &Run<'_>) -> Result<Vec<TaskOutcome>> {
    let mut scheduler = Scheduler::new(run);
    thread::scope(|scope| scheduler.drive(scope))?;
    Ok(scheduler.close())
}

/// Where a task stands.
enum Stage {
    /// Not looked at yet, or looked at and waiting for room.
    Waiting {
        looked_at: Option<Quick>,
    },
    Executing {
        control: Arc<Control>,
        takes: Load,
        gpus: Vec<usize>,
    },
    /// It has a result.
    Done,
    /// It has none, and will not get one in this run; `because` is what dependents are told.
    Ended {
        because: String,
    },
}

struct Scheduler<'a> {
    run: &'a Run<'a>,
    stages: Vec<Stage>,
    upstream: Vec<Vec<usize>>,
    results: Vec<Option<Arc<Done>>>,
    outcomes: Vec<Option<TaskOutcome>>,
    machine: Machine,
    /// The first task that failed, in a run that stops there.
    stopped_by: Option<String>,
}

impl<'a> Scheduler<'a> {
    fn new(run: &'a Run<'a>) -> Self {
        let tasks = &run.session.plan.tasks;
        Self {
            run,
            stages: tasks.iter().map(|_| Stage::Waiting { looked_at: None }).collect(),
            upstream: tasks.iter().map(|t| t.upstream()).collect(),
            results: vec![None; tasks.len()],
            outcomes: vec![None; tasks.len()],
            machine: Machine::new(run.options.jobs, run.options.gpus.len()),
            stopped_by: None,
        }
    }

    fn drive<'scope>(&mut self, scope: &'scope Scope<'scope, '_>) -> Result<()>
    where
        'a: 'scope,
    {
        let (sender, receiver) = mpsc::channel::<Finished>();
        loop {
            let stop = self.run.options.cancel.is_cancelled();
            if !stop && self.stopped_by.is_none() {
                self.advance(scope, &sender)?;
            }
            if self.machine.executing == 0 {
                return Ok(());
            }
            match receiver.recv_timeout(TICK) {
                Ok(finished) => self.end(finished),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            let stop = self.run.options.cancel.is_cancelled();
            for stage in &self.stages {
                if let Stage::Executing { control, .. } = stage {
                    control.tick(stop);
                }
            }
        }
    }

    /// Goes through the plan once: every task that can be settled or started is. What a task
    /// waits for stands before it, so that one pass sees whole chains of stored results through.
    fn advance<'scope>(
        &mut self,
        scope: &'scope Scope<'scope, '_>,
        sender: &Sender<Finished>,
    ) -> Result<()>
    where
        'a: 'scope,
    {
        for index in 0..self.stages.len() {
            if !matches!(self.stages[index], Stage::Waiting { .. }) {
                continue;
            }
            if let Some(because) = self.blocked(index) {
                self.skip(index, because);
                continue;
            }
            let ready = self.upstream[index].iter().all(|i| matches!(self.stages[*i], Stage::Done));
            if !ready || self.run.options.cancel.is_cancelled() || self.stopped_by.is_some() {
                continue;
            }
            let task = &self.run.session.plan.tasks[index];
            let inputs = self.run.session.inputs(task, &self.results);
            let Stage::Waiting { looked_at } = &mut self.stages[index] else { continue };
            let corrupt = match looked_at.take().unwrap_or_else(|| self.run.quick(index, &inputs)) {
                Quick::Finished(finished) => {
                    self.end(*finished);
                    continue;
                }
                Quick::Work { corrupt } => corrupt,
            };
            let on_gpu = task.task.uses_device() && self.run.options.device != DeviceSpec::Cpu;
            let takes = self.machine.load(&task.resources, on_gpu);
            if !self.machine.has_room(&takes) {
                self.stages[index] = Stage::Waiting { looked_at: Some(Quick::Work { corrupt }) };
                continue;
            }
            let gpus = self.machine.take(&takes);
            let control = Arc::new(Control::default());
            let threads = takes.threads;
            let given = self.run.options.gpus.iter().enumerate();
            let given = given.filter(|(i, _)| gpus.contains(i)).map(|(_, gpu)| gpu.clone());
            let job = Job {
                index,
                inputs,
                threads,
                gpus: given.collect(),
                corrupt,
                control: control.clone(),
            };
            self.stages[index] = Stage::Executing { control, takes, gpus };
            let (run, sender) = (self.run, sender.clone());
            thread::Builder::new()
                .name(task.id.clone())
                .stack_size(STACK)
                .spawn_scoped(scope, move || {
                    // The receiver is gone only if the scheduler itself failed.
                    let _ = sender.send(run.work(job));
                })
                .map_err(|e| Error::new("cannot start a thread").with_source(e))?;
        }
        Ok(())
    }

    /// Why a task cannot run any more, if it cannot.
    fn blocked(&self, index: usize) -> Option<String> {
        self.upstream[index].iter().find_map(|i| match &self.stages[*i] {
            Stage::Ended { because } => Some(because.clone()),
            _ => None,
        })
    }

    fn end(&mut self, finished: Finished) {
        let Finished { index, outcome, done } = finished;
        let id = &self.run.session.plan.tasks[index].id;
        if let Stage::Executing { takes, gpus, .. } = &self.stages[index] {
            self.machine.give_back(takes, gpus);
        }
        let ended = |because: String| Stage::Ended { because };
        self.stages[index] = match &outcome.status {
            Status::Ran | Status::Cached => Stage::Done,
            Status::Denied { .. } => ended(format!("gate `{id}` said no")),
            Status::Cancelled => ended("the run was cancelled".to_owned()),
            Status::Skipped(because) => ended(because.clone()),
            Status::Failed => {
                if !self.run.options.keep_going {
                    self.stopped_by.get_or_insert_with(|| id.clone());
                }
                ended(format!("upstream `{id}` failed"))
            }
        };
        self.results[index] = done;
        self.run.folder.note_end(&outcome);
        self.run.observer.task_finished(id, &outcome);
        self.outcomes[index] = Some(outcome);
    }

    fn skip(&mut self, index: usize, because: String) {
        let task = &self.run.session.plan.tasks[index];
        let outcome = TaskOutcome::new(task, Status::Skipped(because));
        self.end(Finished { index, outcome, done: None });
    }

    /// Accounts for the tasks that never started.
    fn close(mut self) -> Vec<TaskOutcome> {
        let cancelled = self.run.options.cancel.is_cancelled();
        for index in 0..self.stages.len() {
            if self.outcomes[index].is_some() {
                continue;
            }
            if cancelled {
                let task = &self.run.session.plan.tasks[index];
                let outcome = TaskOutcome::new(task, Status::Cancelled);
                self.end(Finished { index, outcome, done: None });
            } else {
                let stopped =
                    || self.stopped_by.as_ref().map(|id| format!("the run stopped: `{id}` failed"));
                let because = self.blocked(index).or_else(stopped);
                self.skip(index, because.unwrap_or_else(|| "it was not reached".to_owned()));
            }
        }
        self.outcomes.into_iter().flatten().collect()
    }
}

/// What an executing task takes of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Load {
    threads: usize,
    gpus: usize,
    memory: u64,
}

/// What there is, and what is taken.
struct Machine {
    jobs: usize,
    cpus: usize,
    memory: u64,
    /// Places for tasks on GPUs: one for each, and one where none is known.
    gpus: usize,
    room: Load,
    free_gpus: BTreeSet<usize>,
    executing: usize,
}

impl Machine {
    fn new(jobs: usize, gpus: usize) -> Self {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        Self::with(jobs, cpus, gpus, total_memory().unwrap_or(u64::MAX))
    }

    fn with(jobs: usize, cpus: usize, gpus: usize, memory: u64) -> Self {
        let (jobs, gpus) = (jobs.max(1), gpus.max(1));
        // Whoever asks for more jobs than processors gets them.
        let room = Load { threads: cpus.max(jobs), gpus, memory };
        Self { jobs, cpus, memory, gpus, room, free_gpus: (0..gpus).collect(), executing: 0 }
    }

    /// What a task takes. A task that asks for more than there is gets all there is.
    fn load(&self, wanted: &Resources, on_gpu: bool) -> Load {
        let threads = match wanted.cpu {
            0 => (self.cpus / self.jobs).max(1),
            cpu => cpu.min(self.cpus),
        };
        let memory = wanted.memory.unwrap_or(0).min(self.memory);
        let gpus = wanted.gpu.unwrap_or(usize::from(on_gpu)).min(self.gpus);
        Load { threads, gpus, memory }
    }

    fn has_room(&self, load: &Load) -> bool {
        self.executing < self.jobs
            && load.threads <= self.room.threads
            && load.gpus <= self.room.gpus
            && load.memory <= self.room.memory
    }

    /// The numbers of the GPUs that the task is given.
    fn take(&mut self, load: &Load) -> Vec<usize> {
        self.executing += 1;
        self.room.threads -= load.threads;
        self.room.gpus -= load.gpus;
        self.room.memory -= load.memory;
        let given: Vec<usize> = self.free_gpus.iter().copied().take(load.gpus).collect();
        self.free_gpus.retain(|gpu| !given.contains(gpu));
        given
    }

    fn give_back(&mut self, load: &Load, gpus: &[usize]) {
        self.free_gpus.extend(gpus);
        self.executing -= 1;
        self.room.threads += load.threads;
        self.room.gpus += load.gpus;
        self.room.memory += load.memory;
    }
}

/// Memory of the machine in bytes, where the system says so.
pub(super) fn total_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_gets_what_it_asks_for_as_far_as_it_is_there() {
        let machine = Machine::with(2, 8, 2, 1000);
        let ask =
            |cpu, gpu, on_gpu| machine.load(&Resources { cpu, gpu, memory: Some(10) }, on_gpu);
        let takes = |threads, gpus| Load { threads, gpus, memory: 10 };
        assert_eq!(ask(0, None, false), takes(4, 0), "a share of the machine");
        assert_eq!(ask(6, None, true), takes(6, 1), "one that computes on a GPU has one");
        assert_eq!(ask(6, Some(0), true), takes(6, 0), "unless it says otherwise");
        assert_eq!(ask(6, Some(2), false), takes(6, 2));
        assert_eq!(ask(99, Some(9), true), takes(8, 2));
    }

    #[test]
    fn room_is_limited_by_jobs_threads_gpus_and_memory() {
        let mut machine = Machine::with(3, 4, 0, 1000);
        let gpu = Load { threads: 1, gpus: 1, memory: 0 };
        let taken = machine.take(&gpu);
        assert!(!machine.has_room(&gpu), "one device");
        assert!(!machine.has_room(&Load { threads: 4, gpus: 0, memory: 0 }));
        assert!(!machine.has_room(&Load { threads: 1, gpus: 0, memory: 1001 }));
        let small = Load { threads: 1, gpus: 0, memory: 600 };
        assert!(machine.has_room(&small));
        machine.take(&small);
        assert!(!machine.has_room(&small), "memory");
        machine.take(&Load { memory: 0, ..small });
        assert!(!machine.has_room(&Load { memory: 0, ..small }), "jobs");
        machine.give_back(&gpu, &taken);
        assert!(machine.has_room(&gpu));
    }

    #[test]
    fn more_jobs_than_processors_do_run() {
        let mut machine = Machine::with(4, 2, 0, 1000);
        for _ in 0..4 {
            let load = machine.load(&Resources::default(), false);
            assert!(machine.has_room(&load));
            machine.take(&load);
        }
        assert!(!machine.has_room(&machine.load(&Resources::default(), false)));
    }
}

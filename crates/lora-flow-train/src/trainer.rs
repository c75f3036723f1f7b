//! The training loop.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use lora_flow_core::{
    CancelToken, Digest, Error, ErrorKind, Event, LogLevel, Progress, Reporter, Result, ResultExt,
};
use lora_flow_model::adapter::DropoutKey;
use lora_flow_model::decoder::{self, Decoder, PassOptions};
use lora_flow_model::lora::Lora;
use rand_chacha::rand_core::RngCore;

use crate::checkpoint::{self, Checkpoint, State, Tensors};
use crate::config::{OnSpike, ReportTo, TrainConfig};
use crate::evaluate::{Budget, MeanLoss, document_losses, mean_loss};
use crate::learner::{Learner, Values};
use crate::log::{EvalLine, Log, StepLine};
use crate::lr_range::{self, RangeTest};
use crate::memory::peak_rss_bytes;
use crate::optimizer::{self, AdamWSettings};
use crate::order::{DataOrder, Steps, stream};
use crate::schedule::Schedule;
use crate::sequences::{Loaded, Sequences, load, supervised};
use crate::tensorboard::{self, EventFile};
use crate::watchdog::watch;
use crate::{LOG_FILE, LR_RANGE_FILE};

/// Everything a run is made of.
pub struct Run<'a> {
    /// The frozen base.
    pub decoder: &'a Decoder,
    /// The adapter to start from.
    pub lora: Lora,
    /// Rows to train on.
    pub train: &'a dyn Sequences,
    /// Rows to evaluate on.
    pub eval: Option<&'a dyn Sequences>,
    /// Settings.
    pub config: &'a TrainConfig,
    /// Folder for checkpoints and the log ([`LOG_FILE`]); a run with the same `identity` that
    /// finds its checkpoint here goes on from it.
    pub state_dir: &'a Path,
    /// Digest of what decides the result besides the settings: model, adapter, data.
    pub identity: Digest,
    /// Where progress and metrics go.
    pub reporter: Arc<dyn Reporter>,
    /// Stops the run after the step at hand, with a checkpoint.
    pub cancel: CancelToken,
}

/// What a run gave.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The trained adapter: the last one, or the best with `load_best_model_at_end`.
    pub lora: Lora,
    /// Steps of the whole run.
    pub steps: u64,
    /// Whether early stopping ended it before its last step.
    pub stopped_early: bool,
    /// Highest learning rate: the one given, or the one that `auto` found.
    pub learning_rate: f64,
    /// Step that a checkpoint gave, 0 for a run from the start.
    pub resumed_from: u64,
    /// Loss of the last step.
    pub train_loss: f64,
    /// Loss at the end on the evaluation rows, if there are any.
    pub eval_loss: Option<f64>,
    /// Step and loss of the best evaluation.
    pub best: Option<(u64, f64)>,
    /// Tokens of the rows seen, in the whole run.
    pub tokens_seen: u64,
    /// Seconds spent in steps, in the whole run.
    pub seconds: f64,
}

impl Outcome {
    /// Tokens of rows per second of training, evaluations and checkpoints left out.
    pub fn tokens_per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens_seen as f64 / self.seconds } else { 0.0 }
    }
}

/// Trains to the end, from the last checkpoint if there is one.
///
/// # Errors
/// When the settings or the data make no sense, a loss or gradient is not finite (the message has
/// the step and the rows), the run is cancelled (after a checkpoint), or files cannot be written.
pub fn train(run: Run<'_>) -> Result<Outcome> {
    if let Some(problem) = run.config.problems().into_iter().next() {
        return Err(Error::new(problem.message).with_hint(problem.hint.unwrap_or_default()));
    }
    Trainer::start(run)?.run()
}

/// A run under way.
struct Trainer<'a> {
    run: Run<'a>,
    /// Settings and `Run::identity` together.
    identity: Digest,
    order: DataOrder,
    steps: Steps,
    schedule: Schedule,
    learner: Learner<'a>,
    log: Log,
    events: Option<EventFile>,
    state: State,
    best: Vec<Vec<f32>>,
    resumed_from: u64,
    /// Tokens and seconds since the last line of the log, of this process.
    window_rate: (u64, f64),
}

/// One optimiser step.
struct StepResult {
    nll: f64,
    supervised: usize,
    tokens: usize,
    grad_norm: f64,
    learning_rate: f64,
    /// What about it is no number, and where.
    bad: Option<String>,
}

impl StepResult {
    fn loss(&self) -> f64 {
        self.nll / self.supervised as f64
    }
}

impl<'a> Trainer<'a> {
    fn start(mut run: Run<'a>) -> Result<Self> {
        let config = run.config;
        let order = DataOrder::new(usable_rows(&run)?, config);
        let steps = order.steps(config);
        let mut learner = Learner::new(run.decoder, &run.lora, AdamWSettings::new(config))?;
        let lengths: Vec<_> = learner.params()?.iter().map(Vec::len).collect();
        let identity = Digest::of_json(&serde_json::json!({
            "run": run.identity,
            "settings": config,
        }));
        fs_err::create_dir_all(run.state_dir)?;
        let (mut state, mut best) = (State::default(), Vec::new());
        if let Some(found) = Checkpoint::load_last(run.state_dir, identity, &lengths)? {
            (state, best) = (found.state, found.best);
            learner.restore(Values { params: found.params, m: found.m, v: found.v })?;
            learner.write_to(&mut run.lora)?;
            info(&run, format!("resuming after step {} of {}", state.step, steps.total));
        }
        let log = Log::open(&run.state_dir.join(LOG_FILE), state.log_bytes)?;
        let events = match config.report_to.contains(&ReportTo::Tensorboard) {
            true => Some(EventFile::create(&run.state_dir.join(tensorboard::FOLDER))?),
            false => None,
        };
        Ok(Self {
            identity,
            order,
            steps,
            schedule: Schedule::new(config, steps.total),
            events,
            learner,
            log,
            resumed_from: state.step,
            state,
            best,
            window_rate: (0, 0.0),
            run,
        })
    }

    fn run(mut self) -> Result<Outcome> {
        self.progress("");
        if self.run.config.learning_rate.is_nan() {
            let rate = match self.state.found_rate {
                Some(bits) => f64::from_bits(bits),
                None => self.find_rate()?,
            };
            self.state.found_rate = Some(rate.to_bits());
            self.schedule = self.schedule.clone().with_learning_rate(rate);
        }
        loop {
            // Before the step, so that a run that resumes here evaluates first as well.
            if self.evaluation_due() {
                let done = self.evaluate();
                if let Err(e) = &done
                    && e.kind() == ErrorKind::Cancelled
                {
                    self.save()?;
                }
                done?;
            }
            if self.state.step >= self.steps.total || self.state.stopped {
                break;
            }
            if self.run.cancel.is_cancelled() {
                self.save()?;
                return Err(Error::cancelled());
            }
            let started = Instant::now();
            let result = self.step()?;
            self.account(&result, started.elapsed().as_secs_f64())?;
            if self.state.step.is_multiple_of(self.run.config.save_steps) {
                self.save()?;
            }
        }
        self.log.sync()?;
        self.finish()
    }

    /// The range test of `learning_rate: auto`, which leaves no trace but its curve.
    fn find_rate(&mut self) -> Result<f64> {
        info(&self.run, format!("looking for a learning rate in {} steps", lr_range::STEPS));
        let before = self.learner.values()?;
        let mut test = RangeTest::default();
        for i in 0..lr_range::STEPS {
            if self.run.cancel.is_cancelled() {
                return Err(Error::cancelled());
            }
            let result = self.gradients(i)?;
            let rate = RangeTest::rate(i);
            if result.bad.is_some() || !test.push(rate, result.loss()) {
                break;
            }
            let max_norm = self.run.config.max_grad_norm;
            if !self.learner.step(&mut self.run.lora, max_norm, rate, i + 1)?.is_finite() {
                break;
            }
            self.progress(&format!("rate {rate:.1e}: loss {:.3}", result.loss()));
        }
        self.learner.restore(before)?;
        self.learner.write_to(&mut self.run.lora)?;
        let rate = test.choice().ok_or_else(|| {
            Error::new("`learning_rate: auto` found no rate at which the loss falls")
                .with_hint("give a number, or check the weights and the data")
        })?;
        let curve = serde_json::json!({ "learning_rate": rate, "curve": test.curve });
        fs_err::write(
            self.run.state_dir.join(LR_RANGE_FILE),
            serde_json::to_string_pretty(&curve)? + "\n",
        )?;
        info(&self.run, format!("learning rate {rate:.1e}"));
        Ok(rate)
    }

    /// Forward and backward over the batches of the step, clipping, and the update. A step whose
    /// loss or gradient is no number ends the run before its update, with a checkpoint, so that
    /// the same run begins with just this step when it is started again.
    fn step(&mut self) -> Result<StepResult> {
        let done = self.state.step;
        let mut result = self.gradients(done)?;
        if result.bad.is_none() {
            let learning_rate = self.schedule.at(done);
            let max_norm = self.run.config.max_grad_norm;
            let norm = self.learner.step(&mut self.run.lora, max_norm, learning_rate, done + 1)?;
            (result.learning_rate, result.grad_norm) = (learning_rate, norm);
            if !norm.is_finite() {
                let rows = self.order.step(done).concat();
                result.bad = Some(format!("the gradient is not finite; rows {rows:?}"));
            }
        }
        if let Some(bad) = &result.bad {
            let error = Error::new(format!("step {}: {bad}", done + 1)).with_hint(
                "lower `learning_rate`, or look at these rows; run again to repeat just this \
                 step: a checkpoint stands right before it",
            );
            self.save()?;
            return Err(error);
        }
        self.state.step += 1;
        Ok(result)
    }

    /// Loss and gradients of the step that follows `done` others.
    fn gradients(&mut self, done: u64) -> Result<StepResult> {
        let rows = self.order.step(done);
        let passes: Vec<Loaded> =
            rows.iter().map(|rows| load(self.run.train, rows)).collect::<Result<_>>()?;
        let supervised: usize = passes.iter().map(|p| p.batch.supervised()).sum();
        let failed = |what: String| {
            Error::new(format!("step {}: {what}; rows {:?}", done + 1, rows.concat()))
        };
        if supervised == 0 {
            return Err(failed("no supervised tokens".into()));
        }
        self.learner.clear();
        let tokens = passes.iter().map(|p| p.tokens).sum();
        let mut result = StepResult {
            nll: 0.0,
            supervised,
            tokens,
            grad_norm: f64::NAN,
            learning_rate: 0.0,
            bad: None,
        };
        for (index, pass) in passes.iter().enumerate().filter(|(_, p)| !p.batch.is_empty()) {
            let mut key = stream("dropout", self.run.config.seed, &[done, index as u64]);
            let options = PassOptions {
                grad_scale: 1.0 / supervised as f32,
                dropout: Some(DropoutKey(key.next_u64())),
                checkpoint: match self.run.config.gradient_checkpointing {
                    true => decoder::Checkpoint::Full,
                    false => decoder::Checkpoint::Auto,
                },
            };
            let loss = self
                .learner
                .pass(&pass.batch, &self.run.lora, &options)
                .with_context(|| format!("step {} failed", done + 1))?;
            result.nll += loss.nll_sum();
            if let Some(bad) = rows_not_finite(pass, &loss.nll) {
                result.bad = Some(format!("the loss is not finite in {bad}"));
                return Ok(result);
            }
        }
        Ok(result)
    }

    /// Warns of a spike, or ends the run.
    fn watch(&mut self, result: &StepResult) -> Result<()> {
        let Some(factor) = self.run.config.spike_factor else { return Ok(()) };
        let (loss, norm) = (result.loss(), result.grad_norm);
        let Some(spike) = watch(&mut self.state.history, loss, norm, factor) else { return Ok(()) };
        let step = self.state.step;
        let rows = self.order.step(step - 1).concat();
        let message = format!(
            "step {step}: `{}` is {:.4}, {:.1} times the median of the steps before; rows {rows:?}",
            spike.what,
            spike.value,
            spike.value / spike.median
        );
        if self.run.config.on_spike == OnSpike::Warn {
            self.run.reporter.event(Event::Log { level: LogLevel::Warn, message });
            return Ok(());
        }
        self.save()?;
        Err(Error::new(message)
            .with_hint("lower `learning_rate`, look at these rows, or `on_spike: warn`"))
    }

    /// Counts a step, and writes a line of the log when one is due.
    fn account(&mut self, result: &StepResult, seconds: f64) -> Result<()> {
        let state = &mut self.state;
        state.tokens_seen += result.tokens as u64;
        state.last_loss_bits = result.loss().to_bits();
        add(&mut state.seconds_bits, seconds);
        add(&mut state.window_nll_bits, result.nll);
        state.window_tokens += result.supervised as u64;
        self.window_rate.0 += result.tokens as u64;
        self.window_rate.1 += seconds;
        self.watch(result)?;
        let rate = self.window_rate.0 as f64 / self.window_rate.1.max(1e-9);
        let state = &self.state;
        let loss = f64::from_bits(state.window_nll_bits) / state.window_tokens as f64;
        let step = state.step;
        self.progress(&format!("loss {loss:.3} · {rate:.0} tok/s"));
        if !step.is_multiple_of(self.run.config.logging_steps) && step < self.steps.total {
            return Ok(());
        }
        let line = StepLine {
            step,
            epoch: self.epoch(),
            loss,
            grad_norm: result.grad_norm,
            learning_rate: result.learning_rate,
            tokens_seen: self.state.tokens_seen,
            tokens_per_second: rate,
            peak_rss_bytes: peak_rss_bytes(),
        };
        self.log.write(&line)?;
        let metrics = [
            ("train/loss", line.loss),
            ("train/grad_norm", line.grad_norm),
            ("train/learning_rate", line.learning_rate),
            ("train/tokens_per_second", line.tokens_per_second),
            ("train/tokens_seen", line.tokens_seen as f64),
            ("train/peak_rss_bytes", line.peak_rss_bytes as f64),
        ];
        self.metrics(&metrics)?;
        (self.state.window_nll_bits, self.state.window_tokens) = (0, 0);
        self.window_rate = (0, 0.0);
        Ok(())
    }

    fn evaluation_due(&self) -> bool {
        let step = self.state.step;
        let periodic = || {
            step > 0 && self.run.config.eval_steps.is_some_and(|every| step.is_multiple_of(every))
        };
        self.run.eval.is_some()
            && self.state.last_eval.is_none_or(|(last, _)| last != step)
            && (step >= self.steps.total || periodic())
    }

    /// Loss on the evaluation rows; keeps the adapter if it is the best so far.
    fn evaluate(&mut self) -> Result<()> {
        let Some(data) = self.run.eval else { return Ok(()) };
        let budget =
            Budget { rows: self.run.config.per_device_eval_batch_size, tokens: usize::MAX };
        let (cancel, step) = (self.run.cancel.clone(), self.state.step);
        self.learner.write_to(&mut self.run.lora)?;
        let (decoder, lora) = (self.run.decoder, Some(&self.run.lora));
        let losses = document_losses(decoder, lora, data, data.len(), budget, |_| {
            if cancel.is_cancelled() { Err(Error::cancelled()) } else { Ok(()) }
        })
        .with_context(|| format!("the evaluation after step {step} failed"))?;
        let MeanLoss { mean, tokens, .. } = mean_loss(&losses)
            .ok_or_else(|| Error::new("input `eval` has no supervised tokens"))?;
        let line =
            EvalLine { step, epoch: self.epoch(), eval_loss: mean, eval_tokens: tokens as u64 };
        self.log.write(&line)?;
        self.metrics(&[("eval/loss", mean)])?;
        self.state.last_eval = Some((step, mean.to_bits()));
        let config = self.run.config;
        let lowered = |best: f64| best - mean > config.early_stopping_threshold;
        let progress = self.state.best.is_none_or(|(_, best)| lowered(f64::from_bits(best)));
        self.state.stale = if progress { 0 } else { self.state.stale + 1 };
        if config.early_stopping_patience.is_some_and(|patience| self.state.stale >= patience) {
            self.state.stopped = true;
            let stale = self.state.stale;
            let message = format!("stopping early: {stale} evaluations did not lower the loss");
            info(&self.run, message);
        }
        if self.state.best.is_none_or(|(_, best)| mean < f64::from_bits(best)) {
            self.state.best = Some((step, mean.to_bits()));
            self.best = self.learner.params()?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        self.state.log_bytes = self.log.sync()?;
        let Values { params, m, v } = self.learner.values()?;
        let tensors = Tensors { params: &params, m: &m, v: &v, best: &self.best };
        let step = self.state.step;
        checkpoint::save(self.run.state_dir, self.identity, &self.state, tensors)
            .with_context(|| format!("cannot write the checkpoint after step {step}"))
    }

    fn finish(mut self) -> Result<Outcome> {
        let last = self.learner.params()?;
        if self.run.config.load_best_model_at_end && !self.best.is_empty() {
            optimizer::write(&mut self.run.lora, &self.best)?;
        } else if last.iter().flatten().any(|x| !x.is_finite()) {
            return Err(Error::new("the last step made the adapter infinite")
                .with_hint("lower `learning_rate`"));
        } else {
            optimizer::write(&mut self.run.lora, &last)?;
        }
        let state = self.state;
        Ok(Outcome {
            lora: self.run.lora,
            steps: state.step,
            stopped_early: state.stopped && state.step < self.steps.total,
            learning_rate: state.found_rate.map_or(self.run.config.learning_rate, f64::from_bits),
            resumed_from: self.resumed_from,
            train_loss: f64::from_bits(state.last_loss_bits),
            eval_loss: state.last_eval.map(|(_, loss)| f64::from_bits(loss)),
            best: state.best.map(|(step, loss)| (step, f64::from_bits(loss))),
            tokens_seen: state.tokens_seen,
            seconds: f64::from_bits(state.seconds_bits),
        })
    }

    fn epoch(&self) -> f64 {
        self.state.step as f64 / self.steps.per_epoch.max(1) as f64
    }

    fn progress(&self, message: &str) {
        self.run.reporter.event(Event::Progress(Progress {
            done: self.state.step,
            total: Some(self.steps.total),
            unit: "step".into(),
            message: message.into(),
        }));
    }

    fn metrics(&mut self, metrics: &[(&str, f64)]) -> Result<()> {
        let step = self.state.step;
        for (name, value) in metrics {
            let (name, value) = ((*name).to_owned(), *value);
            self.run.reporter.event(Event::Metric { name, step, value });
        }
        match &mut self.events {
            Some(events) => events.scalars(step, metrics),
            None => Ok(()),
        }
    }
}

/// Adds to a float stored by its bits.
fn add(bits: &mut u64, value: f64) {
    *bits = (f64::from_bits(*bits) + value).to_bits();
}

fn info(run: &Run<'_>, message: String) {
    run.reporter.event(Event::Log { level: LogLevel::Info, message });
}

/// Indices of the rows that have supervised tokens.
fn usable_rows(run: &Run<'_>) -> Result<Vec<usize>> {
    let all = run.train.len();
    let rows: Vec<_> = (0..all).filter(|i| supervised(run.train.row(*i)) > 0).collect();
    if rows.is_empty() {
        return Err(Error::new(format!(
            "none of the {all} training rows has a supervised token, there is nothing to learn"
        ))
        .with_hint("look at the report of the `tokenize` task: what does its mask cover?"));
    }
    if rows.len() < all {
        let message =
            format!("{} of {all} rows have no supervised token and are left out", all - rows.len());
        run.reporter.event(Event::Log { level: LogLevel::Warn, message });
    }
    Ok(rows)
}

/// Names the rows that have a loss which is not finite.
fn rows_not_finite(pass: &Loaded, nll: &[f32]) -> Option<String> {
    let mut at = 0;
    let mut rows = Vec::new();
    for (source, count) in pass.sources.iter().zip(pass.batch.supervised_per_document()) {
        if nll[at..at + count].iter().any(|x| !x.is_finite()) && rows.last() != Some(&source.row) {
            rows.push(source.row);
        }
        at += count;
    }
    if rows.is_empty() {
        return None;
    }
    let names: Vec<_> = rows.iter().map(usize::to_string).collect();
    Some(format!("row{} {}", if rows.len() == 1 { "" } else { "s" }, names.join(", ")))
}

//! Text generation with cached keys and values: greedy, or sampled with temperature and top-p.
//!
//! The adapter is an argument of each call, so that adapters are swapped without loading the base
//! again. The same seed gives the same tokens.
//!
//! Several prompts go together: on a CPU a step costs one pass over the weights, for one row as for
//! some. A prompt runs alone and a row's products do not depend on the rows beside it, so what is
//! generated for a prompt has the same bits whatever else is asked.

use lora_flow_core::{Error, Result};
use lora_flow_kernels::linear::FEW_ROWS;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::adapter::AdapterMap;
use crate::decoder::Decoder;
use crate::layer::KvCache;
use crate::lora::Lora;

/// Most prompts that go together: products with so few rows run row by row as the weights pass.
pub const MOST_TOGETHER: usize = FEW_ROWS;

/// How to choose tokens, and when to stop.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// At most this many new tokens.
    pub max_new_tokens: usize,
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f64,
    /// Sample among the likeliest tokens whose probabilities add up to this (nucleus sampling,
    /// Holtzman et al. 2020); 1 samples among all.
    pub top_p: f64,
    /// Seed of the samples.
    pub seed: u64,
    /// Tokens that end the generation; `None`: the model's end-of-sequence tokens.
    pub stop: Option<Vec<u32>>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 128, temperature: 0.0, top_p: 1.0, seed: 0, stop: None }
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// At a stop token, which is not among the tokens.
    Token(u32),
    /// At `max_new_tokens`.
    Length,
    /// The caller asked for it.
    Caller,
}

/// What was generated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// New tokens, without the prompt.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: Stop,
}

/// Generates with one decoder.
#[derive(Debug, Clone, Copy)]
pub struct Generator<'a> {
    decoder: &'a Decoder,
}

impl<'a> Generator<'a> {
    /// A generator over a decoder.
    pub fn new(decoder: &'a Decoder) -> Self {
        Self { decoder }
    }

    /// Continues `prompt`. `on_token` sees each token as it is chosen and returns whether to go on.
    ///
    /// # Errors
    /// When the prompt is empty or has ids outside the vocabulary, an option is out of range, the
    /// adapter does not fit, or the logits are not numbers.
    pub fn generate(
        &self,
        prompt: &[u32],
        adapter: Option<&Lora>,
        options: &GenerateOptions,
        mut on_token: impl FnMut(u32) -> bool,
    ) -> Result<Generated> {
        let mut one = None;
        let done = |_, generated| {
            one = Some(generated);
            Ok(())
        };
        self.generate_all(&[prompt], adapter, options, 1, |_, token| on_token(token), done)?;
        one.ok_or_else(|| Error::new("nothing was generated"))
    }

    /// Continues each of `prompts`, up to `together` and [`MOST_TOGETHER`] of them at a time, each as
    /// [`Self::generate`] does. `on_token` gets the prompt's number and a token, `done` what was
    /// generated for a prompt as soon as it has ended.
    ///
    /// # Errors
    /// As there, and those of `done`.
    pub fn generate_all(
        &self,
        prompts: &[&[u32]],
        adapter: Option<&Lora>,
        options: &GenerateOptions,
        together: usize,
        mut on_token: impl FnMut(usize, u32) -> bool,
        mut done: impl FnMut(usize, Generated) -> Result<()>,
    ) -> Result<()> {
        options.check()?;
        if let Some(empty) = prompts.iter().position(|prompt| prompt.is_empty()) {
            let which = if prompts.len() > 1 { format!(" {empty}") } else { String::new() };
            return Err(Error::new(format!("the prompt{which} has no tokens")));
        }
        if let Some((own, lora)) = self.decoder.overlaid(adapter)? {
            let own = Generator::new(&own);
            return own.generate_all(prompts, Some(&lora), options, together, on_token, done);
        }
        let config = self.decoder.config();
        let stops = options.stop.as_ref().unwrap_or(&config.eos_token_ids);
        let map = AdapterMap::new(config, adapter, None)?;
        // On a GPU a prompt has a session, and memory, of its own.
        let most = if self.decoder.on_cpu() { MOST_TOGETHER } else { 1 };
        let mut waiting = prompts.iter().enumerate();
        let mut lanes: Vec<Lane<'_>> = Vec::new();
        loop {
            while lanes.len() < together.clamp(1, most)
                && let Some((index, prompt)) = waiting.next()
            {
                let mut lane = Lane::new(self.decoder, adapter, index, &map, options);
                if options.max_new_tokens == 0 {
                    done(index, lane.ended(Stop::Length))?;
                    continue;
                }
                lane.read(self.decoder, prompt, &map)?;
                lanes.push(lane);
            }
            if lanes.is_empty() {
                return Ok(());
            }
            let mut going = Vec::with_capacity(lanes.len());
            for mut lane in lanes {
                match lane.choose(options, stops, &mut on_token)? {
                    Some(stop) => done(lane.index, lane.ended(stop))?,
                    None => going.push(lane),
                }
            }
            lanes = going;
            step(self.decoder, &mut lanes, &map)?;
        }
    }
}

impl GenerateOptions {
    fn check(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::new(format!(
                "`temperature` is {}, it must not be negative",
                self.temperature
            )));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::new(format!(
                "`top_p` is {}, it must be above 0 and at most 1",
                self.top_p
            )));
        }
        Ok(())
    }
}

/// One prompt under way.
struct Lane<'a> {
    /// Number of the prompt.
    index: usize,
    tokens: Vec<u32>,
    rng: ChaCha8Rng,
    /// Of the next token; empty until they are known.
    logits: Vec<f32>,
    /// Tokens whose keys and values are known.
    past: usize,
    caches: Vec<KvCache>,
    #[cfg(feature = "cuda")]
    on_gpu: Option<crate::cuda::Session<'a>>,
    #[cfg(not(feature = "cuda"))]
    on_gpu: std::marker::PhantomData<&'a ()>,
}

impl<'a> Lane<'a> {
    #[cfg_attr(
        not(feature = "cuda"),
        allow(unused_variables, reason = "the GPU's session needs them")
    )]
    fn new(
        decoder: &'a Decoder,
        adapter: Option<&'a Lora>,
        index: usize,
        map: &AdapterMap<'_>,
        options: &GenerateOptions,
    ) -> Self {
        Self {
            index,
            tokens: Vec::new(),
            rng: ChaCha8Rng::seed_from_u64(options.seed),
            logits: Vec::new(),
            past: 0,
            caches: map.layers.iter().map(|_| KvCache::new()).collect(),
            #[cfg(feature = "cuda")]
            on_gpu: decoder.cuda().map(|cuda| cuda.session(adapter)),
            #[cfg(not(feature = "cuda"))]
            on_gpu: std::marker::PhantomData,
        }
    }

    /// Reads the prompt.
    fn read(&mut self, decoder: &Decoder, prompt: &[u32], map: &AdapterMap<'_>) -> Result<()> {
        self.past = prompt.len();
        #[cfg(feature = "cuda")]
        if let Some(session) = &mut self.on_gpu {
            self.logits = session.next_logits(prompt)?;
            return Ok(());
        }
        self.logits = decoder.read_prompt(prompt, &map.layers, &mut self.caches)?;
        Ok(())
    }

    /// Chooses the next token; why it ends, if it does.
    fn choose(
        &mut self,
        options: &GenerateOptions,
        stops: &[u32],
        on_token: &mut impl FnMut(usize, u32) -> bool,
    ) -> Result<Option<Stop>> {
        let token = choose(std::mem::take(&mut self.logits), options, &mut self.rng)?;
        if stops.contains(&token) {
            return Ok(Some(Stop::Token(token)));
        }
        self.tokens.push(token);
        if !on_token(self.index, token) {
            return Ok(Some(Stop::Caller));
        }
        Ok((self.tokens.len() >= options.max_new_tokens).then_some(Stop::Length))
    }

    fn ended(self, stop: Stop) -> Generated {
        Generated { tokens: self.tokens, stop }
    }
}

/// Takes the last token of each lane through the model.
fn step(decoder: &Decoder, lanes: &mut [Lane<'_>], map: &AdapterMap<'_>) -> Result<()> {
    if lanes.is_empty() {
        return Ok(());
    }
    let ids: Vec<u32> = lanes.iter().filter_map(|lane| lane.tokens.last().copied()).collect();
    #[cfg(feature = "cuda")]
    if decoder.cuda().is_some() {
        for (lane, id) in lanes.iter_mut().zip(&ids) {
            if let Some(session) = &mut lane.on_gpu {
                lane.logits = session.next_logits(&[*id])?;
            }
            lane.past += 1;
        }
        return Ok(());
    }
    let positions: Vec<u32> = lanes.iter().map(|lane| lane.past as u32).collect();
    let mut caches: Vec<&mut [KvCache]> =
        lanes.iter_mut().map(|lane| lane.caches.as_mut_slice()).collect();
    let logits = decoder.next_logits(&ids, &positions, &map.layers, &mut caches)?;
    for (lane, logits) in lanes.iter_mut().zip(logits) {
        lane.logits = logits;
        lane.past += 1;
    }
    Ok(())
}

/// The next token by its logits.
fn choose(logits: Vec<f32>, options: &GenerateOptions, rng: &mut ChaCha8Rng) -> Result<u32> {
    if logits.iter().any(|l| l.is_nan()) {
        return Err(Error::new("the model's logits are not numbers")
            .with_hint("check the weights and the adapter for NaN"));
    }
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let logit = |id: u32| f64::from(logits[id as usize]);
    // Ties go to the lower id.
    let likelier = |a: &u32, b: &u32| logit(*b).total_cmp(&logit(*a)).then(a.cmp(b));
    let Some(best) = order.iter().copied().min_by(|a, b| likelier(a, b)) else {
        return Err(Error::new("the model has no vocabulary"));
    };
    if options.temperature == 0.0 {
        return Ok(best);
    }
    let weight = |id: u32| ((logit(id) - logit(best)) / options.temperature).exp();
    let total: f64 = order.iter().map(|id| weight(*id)).sum();
    let mut nucleus = total;
    if options.top_p < 1.0 {
        order.sort_unstable_by(likelier);
        let mut sum = 0.0;
        let kept = order.iter().take_while(|id| {
            let before = sum;
            sum += weight(**id);
            before < options.top_p * total
        });
        let kept = kept.count().max(1);
        order.truncate(kept);
        nucleus = order.iter().map(|id| weight(*id)).sum();
    }
    let mut point = rng.random::<f64>() * nucleus;
    for id in &order {
        point -= weight(*id);
        if point < 0.0 {
            return Ok(*id);
        }
    }
    // Rounding left a last sliver.
    Ok(order.iter().rev().copied().find(|id| weight(*id) > 0.0).unwrap_or(best))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(temperature: f64, top_p: f64) -> GenerateOptions {
        GenerateOptions { temperature, top_p, ..GenerateOptions::default() }
    }

    #[test]
    fn sampling_follows_the_probabilities_and_the_nucleus() {
        let logits = [0.1f32, 0.2, 0.3, 0.4].map(f32::ln).to_vec();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut counts = |options: GenerateOptions| {
            let mut counts = [0usize; 4];
            for _ in 0..20_000 {
                counts[choose(logits.clone(), &options, &mut rng).unwrap() as usize] += 1;
            }
            counts
        };
        let all = counts(options(1.0, 1.0));
        for (count, p) in all.iter().zip([0.1, 0.2, 0.3, 0.4]) {
            assert!((*count as f64 / 20_000.0 - p).abs() < 0.015, "{all:?}");
        }
        let nucleus = counts(options(1.0, 0.6));
        assert_eq!(nucleus[..2], [0, 0], "0.4 + 0.3 already reach 0.6");
        assert_eq!(counts(options(0.0, 1.0)), [0, 0, 0, 20_000]);
        let cold = counts(options(0.05, 1.0));
        assert!(cold[3] > 19_000, "{cold:?}");
    }

    #[test]
    fn logits_that_are_no_numbers_are_an_error() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        assert!(choose(vec![0.0, f32::NAN], &options(1.0, 1.0), &mut rng).is_err());
    }
}

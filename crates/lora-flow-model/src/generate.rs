//! Text generation with cached keys and values: greedy, or sampled with temperature and top-p.
//!
//! The adapter is an argument of each call, so that adapters are swapped without loading the base
//! again. The same seed gives the same tokens.

use lora_flow_core::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::adapter::AdapterMap;
use crate::decoder::Decoder;
use crate::layer::KvCache;
use crate::lora::Lora;

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
        if prompt.is_empty() {
            return Err(Error::new("the prompt has no tokens"));
        }
        if !(options.temperature >= 0.0 && options.temperature.is_finite()) {
            return Err(Error::new(format!(
                "`temperature` is {}, it must not be negative",
                options.temperature
            )));
        }
        if !(options.top_p > 0.0 && options.top_p <= 1.0) {
            return Err(Error::new(format!(
                "`top_p` is {}, it must be above 0 and at most 1",
                options.top_p
            )));
        }
        if let Some((own, lora)) = self.decoder.overlaid(adapter)? {
            return Generator::new(&own).generate(prompt, Some(&lora), options, on_token);
        }
        let config = self.decoder.config();
        let stops = options.stop.as_ref().unwrap_or(&config.eos_token_ids);
        let map = AdapterMap::new(config, adapter, None)?;
        let mut caches: Vec<_> = map.layers.iter().map(|_| KvCache::new()).collect();
        #[cfg(feature = "cuda")]
        let mut session = self.decoder.cuda().map(|cuda| cuda.session(adapter));
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        let mut tokens = Vec::new();
        let mut next = prompt.to_vec();
        let mut past = 0;
        while tokens.len() < options.max_new_tokens {
            #[cfg(feature = "cuda")]
            let on_gpu = session.as_mut().map(|s| s.next_logits(&next)).transpose()?;
            #[cfg(not(feature = "cuda"))]
            let on_gpu = None;
            let logits = match on_gpu {
                Some(logits) => logits,
                None => self.decoder.next_logits(&next, past, &map.layers, &mut caches)?,
            };
            past += next.len();
            let token = choose(logits, options, &mut rng)?;
            if stops.contains(&token) {
                return Ok(Generated { tokens, stop: Stop::Token(token) });
            }
            tokens.push(token);
            if !on_token(token) {
                return Ok(Generated { tokens, stop: Stop::Caller });
            }
            next = vec![token];
        }
        Ok(Generated { tokens, stop: Stop::Length })
    }
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

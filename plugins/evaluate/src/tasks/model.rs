//! The model's side of an evaluation: texts to tokens, batches by length, log-likelihoods, answers.
//!
//! The recipe is lm-evaluation-harness's, so that per-sample numbers agree: context and continuation
//! are tokenised together and parted by the context's length, trailing blanks of the context belong
//! to the continuation, an empty context is the prefix token, and what is too long loses its left
//! end. Batches have no padding and attention never crosses a document, so neither the size nor the
//! order of batches matters to more than rounding.

use std::collections::HashMap;

use lora_flow_core::{Error, Result};
use lora_flow_data::TextTokenizer;
use lora_flow_model::batch::Batch;
use lora_flow_model::decoder::Decoder;
use lora_flow_model::generate::{GenerateOptions, Generator, Stop};
use lora_flow_model::lora::Lora;
use lora_flow_model::score::{Ask, Told};

use crate::metric::text::is_space;
use crate::tasks::task_file::Generation;

/// Tokens of a batch that take as long as a pass of a few tokens through the model on a CPU, which
/// reads every weight for them.
const PASS_TOKENS: usize = 12;

/// A model, and how it is fed.
pub(crate) struct Judge<'a> {
    pub(crate) decoder: &'a Decoder,
    pub(crate) lora: Option<&'a Lora>,
    pub(crate) tokenizer: &'a TextTokenizer,
    /// Most tokens that the model sees at once.
    pub(crate) max_length: usize,
    /// Tokens that each window of a rolling log-likelihood predicts.
    pub(crate) stride: usize,
    /// Most tokens in one pass; a longer document goes alone.
    pub(crate) max_tokens_per_batch: usize,
    pub(crate) batch_size: usize,
}

/// A continuation to be scored: the model reads `input` and is asked about its last positions.
struct Scored {
    input: Vec<u32>,
    continuation: Vec<u32>,
}

/// ln p of a continuation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LogLikelihood {
    /// Sum over its tokens.
    pub(crate) sum: f64,
    /// Whether greedy decoding gives just this.
    pub(crate) greedy: bool,
    /// Its tokens.
    pub(crate) tokens: usize,
}

impl Judge<'_> {
    /// The token that an empty context stands for: BOS, or EOS where there is none.
    fn prefix_token(&self) -> Result<u32> {
        let special = self.tokenizer.bos().or(self.tokenizer.eos());
        special.map(|t| t.id).ok_or_else(|| {
            Error::new("the tokenizer has neither a BOS nor an EOS token to begin a text with")
        })
    }

    /// Ids of a text; BOS goes before it if the tokenizer adds one, unless the text has it already.
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode(text)?;
        let special = self.tokenizer.bos().or(self.tokenizer.eos());
        let prefix = self.tokenizer.prefix();
        if prefix.is_empty() || special.is_some_and(|t| text.starts_with(t.text.as_str())) {
            return Ok(ids);
        }
        Ok(prefix.iter().copied().chain(ids).collect())
    }

    fn pair(&self, context: &str, continuation: &str) -> Result<Scored> {
        let (context, continuation) = if context.is_empty() {
            let ids = self.tokenizer.encode(continuation)?;
            let prefix = self.prefix_token()?;
            match ids.split_first() {
                Some((first, rest)) if *first == prefix && !rest.is_empty() => {
                    (vec![prefix], rest.to_vec())
                }
                _ => (vec![prefix], ids),
            }
        } else {
            let kept = context.trim_end_matches(is_space);
            let whole = self.encode(&format!("{context}{continuation}"))?;
            let context = self.encode(kept)?;
            let at = context.len().min(whole.len());
            (context, whole[at..].to_vec())
        };
        if context.is_empty() || continuation.is_empty() {
            return Err(Error::new(format!(
                "context or continuation has no tokens of its own: `{}`",
                continuation_text(&continuation, self.tokenizer)
            )));
        }
        if continuation.len() > self.max_length {
            return Err(Error::new(format!(
                "a continuation has {} tokens, the model sees {} at once",
                continuation.len(),
                self.max_length
            )));
        }
        let mut input = context;
        input.extend(&continuation);
        let start = input.len().saturating_sub(self.max_length + 1);
        input.drain(..start);
        input.pop();
        Ok(Scored { input, continuation })
    }

    /// ln p of each continuation after its context, in order. `progress` gets the number done.
    pub(crate) fn loglikelihoods(
        &self,
        pairs: &[(String, String)],
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<LogLikelihood>> {
        let scored = pairs.iter().map(|(c, t)| self.pair(c, t)).collect::<Result<Vec<_>>>()?;
        self.score(&scored, progress)
    }

    fn score(
        &self,
        scored: &[Scored],
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<LogLikelihood>> {
        // Continuations that differ in their last token alone share one pass.
        let mut shared: HashMap<&[u32], Vec<usize>> = HashMap::new();
        for (i, s) in scored.iter().enumerate() {
            shared.entry(&s.input).or_default().push(i);
        }
        let mut documents: Vec<(&[u32], Vec<usize>)> = shared.into_iter().collect();
        documents.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.1.cmp(&b.1)));
        let nothing = LogLikelihood { sum: f64::NAN, greedy: false, tokens: 0 };
        let mut out = vec![nothing; scored.len()];
        let mut done = self.score_shared(scored, &mut out, progress)?;
        documents.retain(|(_, members)| members.iter().any(|i| out[*i].tokens == 0));
        let mut rest = documents.as_slice();
        while !rest.is_empty() {
            let (mut tokens, mut count) = (0, 0);
            while count < rest.len().min(self.batch_size) {
                tokens += rest[count].0.len();
                if count > 0 && tokens > self.max_tokens_per_batch {
                    break;
                }
                count += 1;
            }
            let (now, later) = rest.split_at(count);
            self.score_batch(now, scored, &mut out)?;
            rest = later;
            done += now.iter().map(|d| d.1.len()).sum::<usize>();
            progress(done)?;
        }
        Ok(out)
    }

    /// Scores the continuations that share a context long enough to be worth keeping. On a GPU full
    /// batches are faster than the saved work.
    fn score_shared(
        &self,
        scored: &[Scored],
        out: &mut [LogLikelihood],
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<usize> {
        if !self.decoder.device().is_cpu() {
            return Ok(0);
        }
        let mut contexts: HashMap<&[u32], Vec<usize>> = HashMap::new();
        for (i, s) in scored.iter().enumerate() {
            if let Some(length) = (s.input.len() + 1).checked_sub(s.continuation.len()) {
                contexts.entry(&s.input[..length]).or_default().push(i);
            }
        }
        let mut contexts: Vec<(&[u32], Vec<usize>)> = contexts.into_iter().collect();
        contexts.sort_by(|a, b| a.1.cmp(&b.1));
        let mut done = 0;
        for (context, members) in contexts {
            // One-token continuations cost nothing more; each other one costs a pass over the weights,
            // about as much as some tokens of a batch.
            let passes = members.iter().filter(|i| scored[**i].continuation.len() > 1).count();
            // What is saved must also outweigh that continuations then go one by one.
            let tokens: usize = members.iter().map(|i| scored[*i].continuation.len()).sum();
            if passes < 2 || context.len() * (passes - 1) < PASS_TOKENS * passes + tokens {
                continue;
            }
            let continuations: Vec<&[u32]> =
                members.iter().map(|i| scored[*i].continuation.as_slice()).collect();
            let told = self.decoder.score_continuations(context, &continuations, self.lora)?;
            for (i, (sum, greedy)) in members.iter().zip(told) {
                out[*i] = LogLikelihood { sum, greedy, tokens: scored[*i].continuation.len() };
            }
            done += members.len();
            progress(done)?;
        }
        Ok(done)
    }

    fn score_batch(
        &self,
        documents: &[(&[u32], Vec<usize>)],
        scored: &[Scored],
        out: &mut [LogLikelihood],
    ) -> Result<()> {
        let inputs: Vec<&[u32]> = documents.iter().map(|d| d.0).collect();
        let batch = Batch::from_documents(&inputs);
        // All questions to one position become one.
        let mut asks: Vec<Ask> = Vec::new();
        let mut first_ask = Vec::with_capacity(documents.len());
        for ((input, members), end) in documents.iter().zip(&batch.doc_starts[1..]) {
            let longest = members.iter().map(|i| scored[*i].continuation.len()).max().unwrap_or(0);
            let longest = longest.min(input.len());
            first_ask.push((asks.len(), longest));
            for back in (1..=longest).rev() {
                let mut tokens: Vec<u32> = Vec::new();
                for i in members {
                    let continuation = &scored[*i].continuation;
                    if let Some(at) = continuation.len().checked_sub(back) {
                        tokens.push(continuation[at]);
                    }
                }
                tokens.sort_unstable();
                tokens.dedup();
                asks.push(Ask { position: end - back, tokens });
            }
        }
        let told = self.decoder.score(&batch, self.lora, &asks)?;
        for ((_, members), (first, longest)) in documents.iter().zip(first_ask) {
            for i in members {
                let continuation = &scored[*i].continuation;
                let at = first + longest - continuation.len();
                let mut sum = 0.0;
                let mut greedy = true;
                for ((token, ask), told) in continuation.iter().zip(&asks[at..]).zip(&told[at..]) {
                    sum += logprob(ask, told, *token);
                    greedy &= told.likeliest == *token;
                }
                out[*i] = LogLikelihood { sum, greedy, tokens: continuation.len() };
            }
        }
        Ok(())
    }

    /// ln p of each whole text and its number of tokens. The first window begins with the prefix
    /// token; every further one predicts `stride` tokens with as much of what stands before them as
    /// fits, the last one the rest.
    pub(crate) fn rolling(
        &self,
        texts: &[String],
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<LogLikelihood>> {
        let prefix = self.prefix_token()?;
        let mut windows = Vec::new();
        let mut owners = Vec::new();
        for (i, text) in texts.iter().enumerate() {
            let ids = self.encode(text)?;
            for window in rolling_windows(&ids, prefix, self.max_length, self.stride) {
                windows.push(window);
                owners.push(i);
            }
        }
        // Sums come from the loss kernel, which never holds a row of logits whole.
        let mut out = vec![LogLikelihood { sum: 0.0, greedy: false, tokens: 0 }; texts.len()];
        let mut order: Vec<usize> = (0..windows.len()).collect();
        order.sort_by(|a, b| windows[*b].input.len().cmp(&windows[*a].input.len()).then(a.cmp(b)));
        let mut sums = vec![0.0; windows.len()];
        let mut done = 0;
        while done < order.len() {
            let (mut tokens, mut count) = (0, 0);
            while count < (order.len() - done).min(self.batch_size) {
                tokens += windows[order[done + count]].input.len();
                if count > 0 && tokens > self.max_tokens_per_batch {
                    break;
                }
                count += 1;
            }
            let now = &order[done..done + count];
            let mut batch = Batch { doc_starts: vec![0], ..Batch::default() };
            for w in now {
                let Scored { input, continuation } = &windows[*w];
                batch.input_ids.extend(input);
                batch.targets.resize(batch.input_ids.len() - continuation.len(), None);
                batch.targets.extend(continuation.iter().map(|t| Some(*t)));
                batch.doc_starts.push(batch.input_ids.len());
            }
            let nll = self.decoder.nll(&batch, self.lora)?;
            let mut at = 0;
            for w in now {
                let n = windows[*w].continuation.len();
                sums[*w] = -nll[at..at + n].iter().map(|x| f64::from(*x)).sum::<f64>();
                at += n;
            }
            done += count;
            progress(done * texts.len() / order.len())?;
        }
        for ((owner, window), sum) in owners.iter().zip(&windows).zip(sums) {
            out[*owner].sum += sum;
            out[*owner].tokens += window.continuation.len();
        }
        Ok(out)
    }

    /// What the model writes after a prompt, up to the first of the stop texts.
    pub(crate) fn generate(&self, prompt: &str, generation: &Generation) -> Result<String> {
        let room = self.max_length.checked_sub(generation.max_gen_toks).filter(|n| *n > 0);
        let room = room.ok_or_else(|| {
            Error::new(format!(
                "`max_gen_toks` is {}, the model sees {} tokens in all",
                generation.max_gen_toks, self.max_length
            ))
        })?;
        let mut ids = self.encode(prompt)?;
        if ids.is_empty() {
            ids.push(self.prefix_token()?);
        }
        ids.drain(..ids.len().saturating_sub(room));
        let stops: Vec<&str> =
            generation.until.iter().map(String::as_str).filter(|s| !s.is_empty()).collect();
        let eos: Vec<u32> = self.tokenizer.eos().map(|t| t.id).into_iter().collect();
        let options = GenerateOptions {
            max_new_tokens: generation.max_gen_toks,
            temperature: generation.temperature,
            top_p: generation.top_p,
            seed: 0,
            stop: Some(eos),
        };
        let mut written: Vec<u32> = Vec::new();
        let mut failed = None;
        let done = Generator::new(self.decoder).generate(&ids, self.lora, &options, |token| {
            written.push(token);
            if stops.is_empty() {
                return true;
            }
            match self.tokenizer.inner().decode(&written, true) {
                Ok(text) => !stops.iter().any(|s| text.contains(s)),
                Err(e) => {
                    failed = Some(e.to_string());
                    false
                }
            }
        })?;
        if let (Some(e), Stop::Caller) = (failed, done.stop) {
            return Err(Error::new(format!("the tokenizer cannot decode what was generated: {e}")));
        }
        let text = self.tokenizer.inner().decode(&done.tokens, true).map_err(|e| {
            Error::new("the tokenizer cannot decode what was generated").with_source(e)
        })?;
        let mut text = text.as_str();
        for stop in stops {
            text = text.split(stop).next().unwrap_or(text);
        }
        Ok(text.to_owned())
    }
}

fn continuation_text(ids: &[u32], tokenizer: &TextTokenizer) -> String {
    tokenizer.decode(ids).unwrap_or_default()
}

/// ln p of a token among those asked about, which are sorted.
fn logprob(ask: &Ask, told: &Told, token: u32) -> f64 {
    ask.tokens.binary_search(&token).map_or(f64::NAN, |i| told.logprobs[i])
}

/// Windows over a text's tokens, each token predicted once.
fn rolling_windows(ids: &[u32], prefix: u32, max_length: usize, stride: usize) -> Vec<Scored> {
    let mut out = Vec::new();
    let first = ids.len().min(max_length);
    if first == 0 {
        return out;
    }
    let mut input = vec![prefix];
    input.extend(&ids[..first - 1]);
    out.push(Scored { input, continuation: ids[..first].to_vec() });
    let mut predicted = first;
    while predicted < ids.len() {
        let end = (predicted + stride).min(ids.len());
        out.push(Scored {
            input: ids[end - max_length - 1..end - 1].to_vec(),
            continuation: ids[predicted..end].to_vec(),
        });
        predicted = end;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_predict_every_token_once_and_the_last_keeps_its_left_context() {
        let ids: Vec<u32> = (10..20).collect();
        let windows = rolling_windows(&ids, 1, 4, 4);
        let inputs: Vec<&[u32]> = windows.iter().map(|w| w.input.as_slice()).collect();
        assert_eq!(inputs, [&[1, 10, 11, 12][..], &[13, 14, 15, 16], &[15, 16, 17, 18]]);
        let predicted: Vec<u32> = windows.iter().flat_map(|w| w.continuation.clone()).collect();
        assert_eq!(predicted, ids);
        let strided = rolling_windows(&ids, 1, 4, 2);
        assert_eq!(strided[1].input, [11, 12, 13, 14]);
        assert_eq!(strided[1].continuation, [14, 15]);
        let predicted: Vec<u32> = strided.iter().flat_map(|w| w.continuation.clone()).collect();
        assert_eq!(predicted, ids);
        assert_eq!(rolling_windows(&ids[..2], 1, 4, 4)[0].input, [1, 10]);
        assert!(rolling_windows(&[], 1, 4, 4).is_empty());
    }
}

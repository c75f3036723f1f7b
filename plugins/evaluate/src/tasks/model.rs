//! The model's side of an evaluation: texts to tokens, batches by length, log-likelihoods, answers.
//!
//! The recipe is lm-evaluation-harness's, so that per-sample numbers agree: context and continuation
//! are tokenised together and parted by the context's length, trailing blanks of the context belong
//! to the continuation, an empty context is the prefix token, and what is too long loses its left
//! end. Batches have no padding, attention never crosses a document, and beginnings that documents
//! share are computed once, so neither the size nor the order of batches matters to more than
//! rounding.

use lora_flow_core::{Error, Result};
use lora_flow_data::TextTokenizer;
use lora_flow_model::batch::Batch;
use lora_flow_model::decoder::Decoder;
use lora_flow_model::generate::{GenerateOptions, Generated, Generator};
use lora_flow_model::lora::Lora;
use lora_flow_model::prefix_tree::PrefixTree;
use lora_flow_model::score::Ask;

use crate::metric::text::is_space;
use crate::tasks::task_file::Generation;

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
        // Side by side what begins alike, so that it is computed once.
        let mut order: Vec<usize> = (0..scored.len()).collect();
        order.sort_by(|a, b| scored[*a].input.cmp(&scored[*b].input).then(a.cmp(b)));
        let mut out = vec![LogLikelihood { sum: 0.0, greedy: true, tokens: 0 }; scored.len()];
        let mut done = 0;
        while done < order.len() {
            let now = &order[done..done + self.batch(scored, &order[done..])];
            let inputs: Vec<&[u32]> = now.iter().map(|i| scored[*i].input.as_slice()).collect();
            let mut asks = Vec::new();
            for (document, i) in now.iter().enumerate() {
                let Scored { input, continuation } = &scored[*i];
                let first = input.len() - continuation.len();
                let ask = |(at, token): (usize, &u32)| Ask {
                    document,
                    position: first + at,
                    token: *token,
                };
                asks.extend(continuation.iter().enumerate().map(ask));
            }
            let told = self.decoder.score(&inputs, self.lora, &asks)?;
            for (ask, told) in asks.iter().zip(told) {
                let found = &mut out[now[ask.document]];
                found.sum += told.logprob;
                found.greedy &= told.likeliest;
                found.tokens += 1;
            }
            done += now.len();
            progress(done)?;
        }
        Ok(out)
    }

    /// How many of the first in `order` make a batch: tokens that are computed count.
    fn batch(&self, scored: &[Scored], order: &[usize]) -> usize {
        let (mut tokens, mut count) = (0, 0);
        let mut before: &[u32] = &[];
        while count < order.len().min(self.batch_size) {
            let input = scored[order[count]].input.as_slice();
            tokens += match self.decoder.shares_beginnings() {
                true => PrefixTree::new_tokens(before, input),
                false => input.len(),
            };
            if count > 0 && tokens > self.max_tokens_per_batch {
                break;
            }
            before = input;
            count += 1;
        }
        count
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

    /// What the model writes after each prompt, up to the first of the stop texts. Some prompts go
    /// together; what is written for one does not depend on the others.
    pub(crate) fn generate(
        &self,
        prompts: &[&str],
        generation: &Generation,
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<String>> {
        let room = self.max_length.checked_sub(generation.max_gen_toks).filter(|n| *n > 0);
        let room = room.ok_or_else(|| {
            Error::new(format!(
                "`max_gen_toks` is {}, the model sees {} tokens in all",
                generation.max_gen_toks, self.max_length
            ))
        })?;
        let mut inputs = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let mut ids = self.encode(prompt)?;
            if ids.is_empty() {
                ids.push(self.prefix_token()?);
            }
            ids.drain(..ids.len().saturating_sub(room));
            inputs.push(ids);
        }
        let inputs: Vec<&[u32]> = inputs.iter().map(Vec::as_slice).collect();
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
        let decode = |ids: &[u32]| {
            self.tokenizer.inner().decode(ids, true).map_err(|e| {
                Error::new("the tokenizer cannot decode what was generated").with_source(e)
            })
        };
        let mut written: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
        let on_token = |i: usize, token| {
            written[i].push(token);
            // What cannot be decoded is an error below.
            stops.is_empty()
                || decode(&written[i]).is_ok_and(|text| !stops.iter().any(|s| text.contains(s)))
        };
        let (mut texts, mut ready) = (vec![String::new(); prompts.len()], 0);
        let done = |i: usize, generated: Generated| {
            let mut text = decode(&generated.tokens)?;
            for stop in &stops {
                text.truncate(text.find(stop).unwrap_or(text.len()));
            }
            texts[i] = text;
            ready += 1;
            progress(ready)
        };
        let generator = Generator::new(self.decoder);
        generator.generate_all(&inputs, self.lora, &options, self.batch_size, on_token, done)?;
        Ok(texts)
    }
}

fn continuation_text(ids: &[u32], tokenizer: &TextTokenizer) -> String {
    tokenizer.decode(ids).unwrap_or_default()
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

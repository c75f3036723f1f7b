//! `lora-flow generate`: one base in memory, asked with and without adapters.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::DType;
use lora_flow_core::{Artifact, ArtifactKind, Error};
use lora_flow_data::{ChatTemplate, TextTokenizer};
use lora_flow_model::decoder::Decoder;
use lora_flow_model::generate::{GenerateOptions, Generated, Generator};
use lora_flow_model::lora::Lora;
use lora_flow_train::open_device;
use serde_json::json;

use crate::args::GenerateArgs;
use crate::table::duration;
use crate::ui::{self, Failure};

pub fn generate(args: &GenerateArgs) -> Result<i32, Failure> {
    let device = open_device(args.device).map_err(Failure::Usage)?;
    let model = open_dir(ArtifactKind::Model, &args.model)?;
    let tokenizer = TextTokenizer::open(&model)?;
    let started = Instant::now();
    let decoder = Decoder::open(&model, &device, DType::F32)?;
    let loaded = started.elapsed();

    // All adapters are read before the first answer, so that a bad one loses no time.
    let modules = decoder.linear_modules();
    let mut variants: Vec<(&str, Option<Lora>)> = Vec::new();
    if !args.no_base || args.adapters.is_empty() {
        variants.push(("base", None));
    }
    for (name, dir) in &args.adapters {
        if variants.iter().any(|(taken, _)| taken == name) {
            return Err(Failure::Usage(Error::new(format!(
                "two answers would be called `{name}`"
            ))));
        }
        let adapter = open_dir(ArtifactKind::Adapter, Path::new(dir))?;
        variants.push((name, Some(Lora::load_peft(&adapter, &modules)?)));
    }

    let prompt = prompt_ids(args, &tokenizer)?;
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        stop: None,
    };
    if !ui::global().quiet {
        eprintln!("base loaded once in {}", duration(loaded));
    }
    let mut answers = Vec::new();
    for (name, adapter) in &variants {
        let started = Instant::now();
        decoder.check_adapter(adapter.as_ref())?;
        let swap = started.elapsed();
        let started = Instant::now();
        let generator = Generator::new(&decoder);
        let Generated { tokens, .. } =
            generator.generate(&prompt, adapter.as_ref(), &options, |_| true)?;
        let wall = started.elapsed();
        let text = tokenizer.decode(&tokens)?;
        if !args.json {
            println!(
                "── {name} ({}, {}, swapped in within {:.2} ms) ──",
                ui::count(tokens.len(), "token"),
                rate(tokens.len(), wall),
                swap.as_secs_f64() * 1e3
            );
            println!("{}\n", text.trim_end());
        }
        answers.push(json!({ "adapter": name, "text": text, "tokens": tokens.len(), "seconds": wall.as_secs_f64(), "swap_seconds": swap.as_secs_f64() }));
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&answers)?);
    }
    Ok(0)
}

pub(super) fn open_dir(kind: ArtifactKind, dir: &Path) -> Result<Artifact, Failure> {
    if !dir.is_dir() {
        let error = Error::new(format!("there is no folder `{}`", dir.display()))
            .with_hint("a folder is made by `publish:` in a pipeline");
        return Err(Failure::Usage(error));
    }
    Ok(Artifact::from_dir(kind, dir)?)
}

fn prompt_ids(args: &GenerateArgs, tokenizer: &TextTokenizer) -> Result<Vec<u32>, Failure> {
    let mut text = args.prompt.clone();
    if text == "-" {
        text.clear();
        std::io::stdin().read_to_string(&mut text)?;
    }
    if !args.chat {
        let mut ids = tokenizer.prefix().to_vec();
        ids.extend(tokenizer.encode(&text)?);
        return Ok(ids);
    }
    let Some(template) = tokenizer.chat_template() else {
        let error = Error::new("the model has no chat template").with_hint("leave out `--chat`");
        return Err(Failure::Usage(error));
    };
    // The template writes the beginning-of-text token itself where the model wants one.
    let rendered = ChatTemplate::new(template, tokenizer.named_tokens(), &BTreeMap::new(), None)?
        .render_turns(&[("user", &text)], true)?;
    Ok(tokenizer.encode(&rendered)?)
}

fn rate(tokens: usize, wall: Duration) -> String {
    format!("{:.0} tok/s", tokens as f64 / wall.as_secs_f64().max(1e-9))
}

//! The decoder against finite differences, against itself in other arrangements, and against
//! generation. Models are tiny and random.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::batch::RowRef;
use crate::config::{Architecture, RopeScaling};
use crate::generate::{GenerateOptions, Generated, Generator};
use crate::lora::{Init, LoraConfig, LoraModule, SavedTensor, TargetModules};
use crate::score::Ask;

fn config() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 37,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        rms_norm_eps: 1e-5,
        rope_theta: 100.0,
        rope_scaling: RopeScaling::None,
        max_position_embeddings: 128,
        tie_word_embeddings: true,
        hidden_act: HiddenAct::Silu,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        dtype: DType::F32,
        bos_token_id: None,
        eos_token_ids: vec![],
        pad_token_id: None,
        initializer_range: 0.02,
    }
}

/// The same in other clothes: every feature that the config can switch.
fn variants() -> Vec<(&'static str, ModelConfig)> {
    let llama3 = RopeScaling::Llama3 {
        factor: 4.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 16,
    };
    let base = config;
    vec![
        ("llama", base()),
        (
            "untied, scaled rope",
            ModelConfig { tie_word_embeddings: false, rope_scaling: llama3, ..base() },
        ),
        ("biases", ModelConfig { qkv_bias: true, o_bias: true, mlp_bias: true, ..base() }),
        ("norms of heads", ModelConfig { qk_norm: true, ..base() }),
        (
            "window, gelu",
            ModelConfig { sliding_window: Some(3), hidden_act: HiddenAct::Gelu, ..base() },
        ),
        (
            "one kv head, gelu tanh",
            ModelConfig { num_key_value_heads: 1, hidden_act: HiddenAct::GeluTanh, ..base() },
        ),
    ]
}

fn random(shape: &[usize], scale: f32, rng: &mut ChaCha8Rng) -> Tensor {
    let len = shape.iter().product();
    let values: Vec<f32> = (0..len).map(|_| scale * (rng.random::<f32>() * 2.0 - 1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn tensors(config: &ModelConfig, seed: u64) -> HashMap<String, Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let make = |(name, shape): (String, Vec<usize>)| {
        let tensor = if name.ends_with("norm.weight") {
            (random(&shape, 0.5, &mut rng) + 1.0).unwrap()
        } else {
            random(&shape, if shape.len() == 2 { 0.5 } else { 0.2 }, &mut rng)
        };
        (name, tensor)
    };
    config.tensors().into_iter().map(make).collect()
}

fn decoder(config: &ModelConfig) -> Decoder {
    Decoder::from_tensors(config.clone(), &tensors(config, 1)).unwrap()
}

/// The same weights in f64, which take the plain reference of every kernel.
fn decoder_f64(config: &ModelConfig) -> Decoder {
    let wide = |(name, t): (String, Tensor)| (name, t.to_dtype(DType::F64).unwrap());
    let tensors = tensors(config, 1).into_iter().map(wide).collect();
    Decoder::from_tensors(config.clone(), &tensors).unwrap()
}

/// An adapter on the modules that `keep` takes, with B ≠ 0.
fn adapter(config: &ModelConfig, dropout: f64, keep: impl Fn(&str) -> bool) -> Lora {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let r = 2;
    let module = |info: ModuleInfo| LoraModule {
        a: random(&[r, info.in_features], 0.5, &mut rng),
        b: random(&[info.out_features, r], 0.5, &mut rng),
        path: info.path,
        in_features: info.in_features,
        out_features: info.out_features,
        r,
        scale: 0.75,
        magnitude: None,
    };
    let modules: Vec<_> = config.linear_modules().into_iter().map(module).collect();
    Lora {
        config: LoraConfig {
            r,
            lora_alpha: 1.5,
            lora_dropout: dropout,
            target_modules: TargetModules::AllLinear,
            exclude_modules: None,
            layers_to_transform: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            use_rslora: false,
            init_lora_weights: Init::Default,
            use_dora: false,
            modules_to_save: Vec::new(),
        },
        modules: modules.into_iter().filter(|m| keep(&m.path)).collect(),
        saved: Vec::new(),
    }
}

fn ids(len: usize, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(0..37)).collect()
}

/// Two documents, in one of which a prompt is not supervised.
fn batch() -> Batch {
    let (a, b) = (ids(7, 3), ids(5, 4));
    let row = |ids, mask, docs| RowRef { input_ids: ids, loss_mask: mask, doc_lengths: docs };
    let mask = [false, false, false, true, true, false, true];
    Batch::from_rows([row(&a, &mask, &[7]), row(&b, &[true; 5], &[5])]).unwrap().0
}

fn options(scale: f32, checkpoint: Checkpoint) -> PassOptions {
    PassOptions { grad_scale: scale, dropout: Some(DropoutKey(9)), checkpoint }
}

fn grads(decoder: &Decoder, lora: &Lora, batch: &Batch, options: PassOptions) -> (f64, LoraGrads) {
    let mut grads = LoraGrads::zeros(lora);
    let loss = decoder.loss_and_grad(batch, lora, &options, &mut grads).unwrap();
    (loss.nll_sum(), grads)
}

/// Loss of the f64 decoder with one value of an adapter moved. The pass draws dropout masks as
/// the training does.
fn moved_loss(
    decoder: &Decoder,
    lora: &Lora,
    batch: &Batch,
    module: usize,
    b: bool,
    direction: &[f64],
    by: f64,
) -> f64 {
    let mut lora = lora.clone();
    for m in &mut lora.modules {
        m.a = m.a.to_dtype(DType::F64).unwrap();
        m.b = m.b.to_dtype(DType::F64).unwrap();
    }
    let m = &mut lora.modules[module];
    let tensor = if b { &mut m.b } else { &mut m.a };
    let step = Tensor::from_slice(direction, tensor.shape(), &Device::Cpu).unwrap();
    *tensor = (&*tensor + (step * by).unwrap()).unwrap();
    grads(decoder, &lora, batch, options(1.0, Checkpoint::None)).0
}

/// Central difference along `direction`.
fn slope(
    decoder: &Decoder,
    lora: &Lora,
    batch: &Batch,
    at: (usize, bool),
    direction: &[f64],
) -> f64 {
    let h = 4e-3;
    let loss = |by| moved_loss(decoder, lora, batch, at.0, at.1, direction, by);
    (loss(h) - loss(-h)) / (2.0 * h)
}

fn close(found: f64, expected: f64, what: &str) {
    let error = (found - expected).abs();
    assert!(error < 3e-3 + 5e-3 * expected.abs(), "{what}: {found}, expected {expected}");
}

fn each_tensor(lora: &Lora) -> Vec<(usize, bool, String)> {
    let name = |i: usize, b| format!("{}.{}", lora.modules[i].path, if b { "B" } else { "A" });
    (0..lora.modules.len())
        .flat_map(|i| [(i, false, name(i, false)), (i, true, name(i, true))])
        .collect()
}

fn tensor_of(grads: &LoraGrads, module: usize, b: bool) -> &[f32] {
    let m = &grads.modules[module];
    if b { &m.b } else { &m.a }
}

#[test]
fn a_swapped_adapter_leaves_no_trace_of_the_one_before() {
    let config = config();
    let (decoder, batch) = (decoder(&config), batch());
    let bits = |decoder: &Decoder, lora: Option<&Lora>| -> Vec<u32> {
        let logits = decoder.logits(&batch, lora).unwrap().flatten_all().unwrap();
        logits.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    };
    let one = adapter(&config, 0.0, |_| true);
    let mut two = adapter(&config, 0.0, |path| path.ends_with("v_proj"));
    let head = decoder.tensor("model.norm.weight").unwrap();
    let name = "model.norm.weight".to_owned();
    two.saved = vec![SavedTensor { name, tensor: (head * 1.5).unwrap() }];
    let mut dora = adapter(&config, 0.0, |path| path.ends_with("up_proj"));
    for m in &mut dora.modules {
        m.magnitude = Some(Tensor::ones(m.out_features, DType::F32, &Device::Cpu).unwrap());
    }
    let fresh: Vec<_> =
        [None, Some(&one), Some(&two), Some(&dora)].map(|lora| bits(&decoder, lora)).into();
    for (i, a) in fresh.iter().enumerate() {
        assert!(fresh[..i].iter().all(|b| a != b), "each does something of its own");
    }
    // In any order afterwards.
    for which in [3usize, 0, 2, 1, 0, 3, 1, 2, 0] {
        let lora = [None, Some(&one), Some(&two), Some(&dora)][which];
        assert_eq!(bits(&decoder, lora), fresh[which], "{which}");
    }
}

#[test]
fn every_gradient_matches_finite_differences() {
    let config = ModelConfig { num_hidden_layers: 1, ..config() };
    let (fast, exact) = (decoder(&config), decoder_f64(&config));
    let (lora, batch) = (adapter(&config, 0.0, |_| true), batch());
    let (_, found) = grads(&fast, &lora, &batch, options(1.0, Checkpoint::None));
    for (module, b, name) in each_tensor(&lora) {
        let gradient = tensor_of(&found, module, b);
        for i in 0..gradient.len() {
            let mut unit = vec![0.0; gradient.len()];
            unit[i] = 1.0;
            let expected = slope(&exact, &lora, &batch, (module, b), &unit);
            close(f64::from(gradient[i]), expected, &format!("{name}[{i}]"));
        }
    }
}

/// Compares the gradient along one random direction for each trainable tensor.
fn check_directions(what: &str, config: &ModelConfig, lora: &Lora, checkpoint: Checkpoint) {
    let (fast, exact) = (decoder(config), decoder_f64(config));
    let batch = batch();
    let (_, found) = grads(&fast, lora, &batch, options(1.0, checkpoint));
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for (module, b, name) in each_tensor(lora) {
        let gradient = tensor_of(&found, module, b);
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 0.05, "{what}: {name} has next to no gradient, {norm}");
        let direction: Vec<f64> =
            gradient.iter().map(|_| rng.random::<f64>() * 2.0 - 1.0).collect();
        let along: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * d).sum();
        let expected = slope(&exact, lora, &batch, (module, b), &direction);
        close(along, expected, &format!("{what}: {name}"));
    }
}

#[test]
fn gradients_match_in_every_architecture() {
    for (what, config) in variants() {
        check_directions(what, &config, &adapter(&config, 0.0, |_| true), Checkpoint::None);
    }
}

#[test]
fn gradients_match_with_dropout() {
    let lora = adapter(&config(), 0.3, |_| true);
    check_directions("dropout", &config(), &lora, Checkpoint::Full);
}

#[test]
fn a_backward_that_stops_early_gives_the_same_gradients() {
    for info in config().linear_modules() {
        let lora = adapter(&config(), 0.0, |path| path == info.path);
        check_directions("alone", &config(), &lora, Checkpoint::None);
    }
}

#[test]
fn checkpoint_policies_give_the_same_bits() {
    for (what, config) in variants() {
        let decoder = decoder(&config);
        let lora = adapter(&config, 0.3, |path| !path.contains("layers.0.self_attn"));
        let run = |policy| grads(&decoder, &lora, &batch(), options(0.1, policy));
        assert_eq!(run(Checkpoint::None), run(Checkpoint::Full), "{what}");
        for keep in [Keep::All, Keep::WithoutMlp, Keep::Input] {
            let map = AdapterMap::new(&config, Some(&lora), Some(DropoutKey(9))).unwrap();
            let mut found = LoraGrads::zeros(&lora);
            let options = options(0.1, Checkpoint::Auto);
            let keep = [keep, Keep::WithoutMlp];
            let loss =
                decoder.forward_backward(&batch(), &map, 0, &keep, &options, &mut found).unwrap();
            assert_eq!((loss.nll_sum(), found), run(Checkpoint::None), "{what}, {keep:?}");
        }
    }
}

#[test]
fn packed_separate_and_padded_documents_have_the_same_loss_and_gradients() {
    for (what, config) in variants() {
        let decoder = decoder(&config);
        let lora = adapter(&config, 0.0, |_| true);
        let documents = [ids(9, 1), ids(2, 2), ids(6, 3)];
        let pass = |batch: &Batch| grads(&decoder, &lora, batch, options(1.0, Checkpoint::None));
        let packed = Batch::from_documents(&documents);
        let (loss, gradients) = pass(&packed);
        let nll = decoder.nll(&packed, Some(&lora)).unwrap();

        let mut sum = LoraGrads::zeros(&lora);
        let mut separate = Vec::new();
        for document in &documents {
            let batch = Batch::from_documents(&[document]);
            separate.extend(decoder.nll(&batch, Some(&lora)).unwrap());
            let options = options(1.0, Checkpoint::None);
            decoder.loss_and_grad(&batch, &lora, &options, &mut sum).unwrap();
        }
        let near = |a: &[f32], b: &[f32], part: &str| {
            assert_eq!(a.len(), b.len());
            for (x, y) in a.iter().zip(b) {
                let tolerance = 2e-5 * (1.0 + x.abs());
                assert!((x - y).abs() < tolerance, "{what}, {part}: {x} and {y}");
            }
        };
        near(&nll, &separate, "one at a time");
        assert!((loss - nll.iter().map(|x| f64::from(*x)).sum::<f64>()).abs() < 1e-4);
        gradients.tensors().zip(sum.tensors()).for_each(|(a, b)| near(a, b, "gradients"));

        // Right padding to one length, as other trainers do.
        let mut padded = Vec::new();
        for document in &documents {
            let mut batch = Batch::from_documents(&[document]);
            batch.input_ids.resize(12, 0);
            batch.targets.resize(12, None);
            batch.doc_starts = vec![0, 12];
            padded.extend(decoder.nll(&batch, Some(&lora)).unwrap());
        }
        near(&nll, &padded, "padded");
    }
}

#[test]
fn micro_batches_add_up_to_the_big_batch() {
    let decoder = decoder(&config());
    let lora = adapter(&config(), 0.0, |_| true);
    // Of unequal lengths, so that a mean of means would be another number.
    let documents = [ids(12, 1), ids(3, 2), ids(5, 3), ids(2, 4)];
    let supervised = 11 + 2 + 4 + 1;
    let options = options(1.0 / supervised as f32, Checkpoint::None);
    let (big_loss, big) = grads(&decoder, &lora, &Batch::from_documents(&documents), options);
    let mut sum = LoraGrads::zeros(&lora);
    let mut loss = 0.0;
    for pair in documents.chunks(2) {
        let batch = Batch::from_documents(pair);
        loss += decoder.loss_and_grad(&batch, &lora, &options, &mut sum).unwrap().nll_sum();
    }
    assert!((loss - big_loss).abs() < 1e-4);
    for (a, b) in sum.tensors().flatten().zip(big.tensors().flatten()) {
        assert!((a - b).abs() < 1e-6, "{a} and {b}");
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let config = ModelConfig {
        hidden_size: 96,
        intermediate_size: 200,
        head_dim: 24,
        vocab_size: 1500,
        ..config()
    };
    let decoder = decoder(&config);
    let lora = adapter(&config, 0.1, |_| true);
    let batch = Batch::from_documents(&[ids(190, 1), ids(77, 2), ids(31, 3)]);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let nll = decoder.nll(&batch, Some(&lora)).unwrap();
            (nll, grads(&decoder, &lora, &batch, options(0.01, Checkpoint::None)))
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(3));
}

#[test]
fn generation_with_the_cache_is_generation_without() {
    for (what, config) in variants() {
        let decoder = decoder(&config);
        for lora in [None, Some(adapter(&config, 0.0, |_| true))] {
            let prompt = ids(5, 8);
            let options = GenerateOptions { max_new_tokens: 70, ..GenerateOptions::default() };
            let made = Generator::new(&decoder)
                .generate(&prompt, lora.as_ref(), &options, |_| true)
                .unwrap();
            assert_eq!(made.tokens.len(), 70);
            let mut all = prompt.clone();
            all.extend(&made.tokens);
            // Greedy: each token is the best by the logits of one pass over everything.
            let logits = decoder.logits(&Batch::from_documents(&[all]), lora.as_ref()).unwrap();
            let logits = logits.to_vec2::<f32>().unwrap();
            for (i, token) in made.tokens.iter().enumerate() {
                let row = &logits[prompt.len() - 1 + i];
                let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert!(best - row[*token as usize] < 1e-3, "{what}: token {i}");
            }
        }
    }
}

#[test]
fn what_is_generated_does_not_depend_on_what_else_is() {
    for (what, config) in variants() {
        let decoder = decoder(&config);
        let lora = adapter(&config, 0.0, |_| true);
        let generator = Generator::new(&decoder);
        for temperature in [0.0, 0.8] {
            let options = GenerateOptions { max_new_tokens: 20, temperature, ..Default::default() };
            let prompts: Vec<Vec<u32>> = (1..22).map(|n| ids(n * 5 % 37 + 1, n as u64)).collect();
            // Each ends elsewhere, so that places become free at different times.
            let go_on = |prompt: usize, count: usize| count < 3 + prompt * 7 % 19;
            let alone: Vec<Generated> = prompts
                .iter()
                .enumerate()
                .map(|(i, prompt)| {
                    let mut count = 0;
                    let on_token = |_| {
                        count += 1;
                        go_on(i, count)
                    };
                    generator.generate(prompt, Some(&lora), &options, on_token).unwrap()
                })
                .collect();
            let run = |together: usize, order: &[usize]| {
                let asked: Vec<&[u32]> = order.iter().map(|i| prompts[*i].as_slice()).collect();
                let (mut counts, mut out) = (vec![0; order.len()], vec![None; order.len()]);
                generator
                    .generate_all(
                        &asked,
                        Some(&lora),
                        &options,
                        together,
                        |i, _| {
                            counts[i] += 1;
                            go_on(order[i], counts[i])
                        },
                        |i, generated| {
                            out[i] = Some(generated);
                            Ok(())
                        },
                    )
                    .unwrap();
                for (i, found) in order.iter().zip(out) {
                    assert_eq!(found.as_ref(), Some(&alone[*i]), "{what}: {together} together");
                }
            };
            let (forth, back): (Vec<usize>, Vec<usize>) =
                ((0..prompts.len()).collect(), (0..prompts.len()).rev().collect());
            for together in [1, 2, 5, 16, 100] {
                run(together, &forth);
                run(together, &back);
            }
        }
    }
}

#[test]
fn an_empty_prompt_among_several_is_named() {
    let (_, config) = variants().remove(0);
    let decoder = decoder(&config);
    let prompts: [&[u32]; 2] = [&[1], &[]];
    let options = GenerateOptions::default();
    let error = Generator::new(&decoder)
        .generate_all(&prompts, None, &options, 2, |_, _| true, |_, _| Ok(()))
        .unwrap_err();
    assert!(error.to_string().contains("prompt 1 has no tokens"), "{error}");
}

#[test]
fn scores_of_documents_that_begin_alike_are_those_of_each_alone() {
    for (what, config) in variants() {
        let decoder = decoder(&config);
        let lora = adapter(&config, 0.0, |_| true);
        let (begin, other) = (ids(40, 1), ids(9, 2));
        let documents: Vec<Vec<u32>> = (0..14)
            .map(|i| {
                let start = if i % 5 == 4 { &other } else { &begin };
                let kept = start.len() - i % 3;
                [&start[..kept], &ids(1 + i * 3 % 8, i as u64 / 2)].concat()
            })
            .collect();
        let asks = |document: usize, ids: &[u32]| -> Vec<Ask> {
            let ask = |position| Ask { document, position, token: (position * 7 % 11) as u32 };
            (0..ids.len()).rev().map(ask).collect()
        };
        let all: Vec<&[u32]> = documents.iter().map(Vec::as_slice).collect();
        let together: Vec<Ask> =
            documents.iter().enumerate().flat_map(|(i, d)| asks(i, d)).collect();
        let mut found = decoder.score(&all, Some(&lora), &together).unwrap().into_iter();
        for ids in all {
            let alone = decoder.score(&[ids], Some(&lora), &asks(0, ids)).unwrap();
            let logits = decoder.logits(&Batch::from_documents(&[ids]), Some(&lora)).unwrap();
            let logits = logits.to_vec2::<f32>().unwrap();
            for (ask, (a, b)) in asks(0, ids).iter().zip(alone.iter().zip(found.by_ref())) {
                assert!((a.logprob - b.logprob).abs() < 1e-4, "{what}: {a:?} and {b:?}");
                let row = &logits[ask.position];
                let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
                let want = f64::from(row[ask.token as usize]) - sum.ln();
                assert!((a.logprob - want).abs() < 1e-4, "{what}: {a:?} and {want}");
            }
        }
        assert!(found.next().is_none());
        let outside = Ask { document: 0, position: 99, token: 0 };
        assert!(decoder.score(&[&[1]], None, &[outside]).is_err());
    }
}

/// Weights rounded to bf16 in two forms: kept so, and widened again.
fn narrow_and_wide(config: &ModelConfig) -> [Decoder; 2] {
    let narrow: HashMap<_, _> = tensors(config, 1)
        .into_iter()
        .map(|(name, t)| (name, t.to_dtype(DType::BF16).unwrap()))
        .collect();
    let wide: HashMap<_, _> =
        narrow.iter().map(|(n, t)| (n.clone(), t.to_dtype(DType::F32).unwrap())).collect();
    [narrow, wide].map(|tensors| Decoder::from_tensors(config.clone(), &tensors).unwrap())
}

#[test]
fn bf16_is_near_f32_and_only_the_operands_are_rounded() {
    for (what, config) in variants() {
        let lora = adapter(&config, 0.0, |_| true);
        let pass =
            |decoder: &Decoder| grads(decoder, &lora, &batch(), options(1.0, Checkpoint::None));
        let [narrow, wide] = narrow_and_wide(&config).map(|decoder| pass(&decoder));
        // Two roundings of 2⁻⁹ in each of a dozen products in a row.
        let error = (narrow.0 - wide.0).abs() / wide.0;
        assert!(error > 0.0 && error < 0.02, "{what}: {} and {}", narrow.0, wide.0);
        let (mut difference, mut norm) = (0.0, 0.0);
        for (a, b) in narrow.1.tensors().flatten().zip(wide.1.tensors().flatten()) {
            difference += f64::from(a - b).powi(2);
            norm += f64::from(*b).powi(2);
        }
        assert!(difference.sqrt() < 0.06 * norm.sqrt(), "{what}: {difference} of {norm}");
    }
}

#[test]
fn in_bf16_packed_documents_and_policies_and_threads_agree() {
    let config = config();
    let [decoder, _] = narrow_and_wide(&config);
    let lora = adapter(&config, 0.0, |_| true);
    let documents = [ids(9, 1), ids(2, 2), ids(26, 3)];
    let packed = Batch::from_documents(&documents);
    let run = |policy| grads(&decoder, &lora, &packed, options(1.0, policy));
    let whole = run(Checkpoint::None);
    assert_eq!(whole, run(Checkpoint::Full));
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(whole, pool.install(|| run(Checkpoint::None)));
    }
    let separate: f64 = documents
        .iter()
        .map(|document| {
            let batch = Batch::from_documents(&[document]);
            let nll = decoder.nll(&batch, Some(&lora)).unwrap();
            nll.iter().map(|x| f64::from(*x)).sum::<f64>()
        })
        .sum();
    // The order of additions may move an operand to the other side of a rounding.
    assert!((whole.0 - separate).abs() < 2e-3 * separate, "{} and {separate}", whole.0);
}

#[test]
fn adapters_and_batches_that_do_not_fit_are_refused() {
    let decoder = decoder(&config());
    let batch = batch();
    let mut lora = adapter(&config(), 0.0, |_| true);
    lora.modules[3].path = "model.layers.9.self_attn.q_proj".into();
    let e = decoder.nll(&batch, Some(&lora)).unwrap_err();
    assert!(e.to_string().contains("model.layers.9.self_attn.q_proj"), "{e}");

    let mut lora = adapter(&config(), 0.0, |_| true);
    lora.modules[1].a = random(&[2, 15], 1.0, &mut ChaCha8Rng::seed_from_u64(0));
    let e = decoder.nll(&batch, Some(&lora)).unwrap_err();
    assert!(e.to_string().contains("[2, 15]"), "{e}");

    let e = decoder.nll(&Batch::from_documents(&[[1u32, 99]]), None).unwrap_err();
    assert!(e.to_string().contains("token id 99"), "{e}");
}

//! Combinations against dense ΔW in f64.

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::combine::{Combination, combine};
use crate::config::ModuleInfo;
use crate::lora::{Lora, LoraConfig, TargetModules};
use crate::residual::delta;

fn modules() -> Vec<ModuleInfo> {
    ["q_proj", "v_proj"]
        .into_iter()
        .map(|name| ModuleInfo {
            path: format!("model.layers.0.self_attn.{name}"),
            in_features: 12,
            out_features: 9,
        })
        .collect()
}

/// An adapter of some rank with B ≠ 0, on some of the layers.
fn adapter(r: usize, seed: u64, targets: &[&str]) -> Lora {
    let list = targets.iter().map(|t| (*t).to_owned()).collect();
    let target_modules = TargetModules::List(list);
    let config = LoraConfig { r, lora_alpha: 5.0, target_modules, ..LoraConfig::default() };
    let mut lora = Lora::init(&config, &modules(), seed).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for m in &mut lora.modules {
        let values: Vec<f32> = (0..9 * r).map(|_| rng.random::<f32>() - 0.5).collect();
        m.b = Tensor::from_vec(values, (9, r), &Device::Cpu).unwrap();
    }
    lora
}

/// Σ wᵢΔWᵢ of a layer.
fn dense(parts: &[(f64, &Lora)], path: &str) -> Vec<f64> {
    let mut sum = vec![0f64; 9 * 12];
    for (weight, lora) in parts {
        if let Some(m) = lora.get(path) {
            sum.iter_mut().zip(delta(m).unwrap()).for_each(|(s, d)| *s += weight * d);
        }
    }
    sum
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

#[test]
fn cat_and_linear_are_exact_and_ranks_are_what_they_must_be() {
    let (one, two) = (adapter(2, 1, &["q_proj", "v_proj"]), adapter(3, 2, &["q_proj"]));
    let parts = [(0.7, &one), (-1.3, &two)];
    for (how, ranks) in [(Combination::Cat, [5, 2]), (Combination::Linear, [5, 2])] {
        let (lora, report) = combine(&parts, &modules(), how).unwrap();
        for ((m, combined), r) in lora.modules.iter().zip(&report).zip(ranks) {
            let off = distance(&delta(m).unwrap(), &dense(&parts, &m.path));
            assert!(off < 3e-7, "{how:?} {}: {off:.1e}", m.path);
            assert_eq!((m.r, combined.r), (r, r), "{how:?}");
        }
        // What was made is an adapter that can be saved and loaded, with other ranks by layer.
        let dir = tempfile::tempdir().unwrap();
        lora.save_peft(dir.path(), None).unwrap();
        let kind = lora_flow_core::ArtifactKind::Adapter;
        let artifact = lora_flow_core::Artifact::from_dir(kind, dir.path()).unwrap();
        let again = Lora::load_peft(&artifact, &modules()).unwrap();
        for (a, b) in again.modules.iter().zip(&lora.modules) {
            assert_eq!((&a.path, a.r, a.scale), (&b.path, b.r, b.scale));
            assert_eq!(delta(a).unwrap(), delta(b).unwrap());
        }
    }
    // The same adapter twice needs no more rank than once; taken from itself, next to none.
    let (twice, _) = combine(&[(1.0, &one), (1.0, &one)], &modules(), Combination::Linear).unwrap();
    assert!(twice.modules.iter().all(|m| m.r == 2));
}

#[test]
fn svd_is_the_best_of_its_rank() {
    let (one, two) = (adapter(4, 3, &["q_proj"]), adapter(4, 4, &["q_proj"]));
    let parts = [(1.0, &one), (1.0, &two)];
    let (lora, report) = combine(&parts, &modules(), Combination::Svd { r: 3 }).unwrap();
    let wanted = dense(&parts, &lora.modules[0].path);
    let off = distance(&delta(&lora.modules[0]).unwrap(), &wanted);
    assert!((off - report[0].relative_error).abs() < 1e-6);
    // Eckart–Young: the error is the tail of the singular values.
    let all = crate::svd::top(&wanted, 9, 12, 9).unwrap().values;
    let square = |values: &[f64]| values.iter().map(|s| s * s).sum::<f64>();
    assert!((off - (square(&all[3..]) / square(&all)).sqrt()).abs() < 1e-6);
}

#[test]
fn ties_is_its_definition_entry_by_entry() {
    let (one, two) = (adapter(2, 5, &["v_proj"]), adapter(2, 6, &["v_proj"]));
    let (weights, density) = ([0.5, 2.0], 0.4);
    let how = Combination::Ties { r: 9, density };
    let (lora, _) = combine(&[(weights[0], &one), (weights[1], &two)], &modules(), how).unwrap();
    let trimmed: Vec<Vec<f64>> = [&one, &two]
        .iter()
        .map(|lora| {
            let d = delta(&lora.modules[0]).unwrap();
            let mut sizes: Vec<f64> = d.iter().map(|x| x.abs()).collect();
            sizes.sort_by(|a, b| b.total_cmp(a));
            // 0.4 of 108 entries, rounded.
            d.into_iter().map(|x| if x.abs() >= sizes[42] { x } else { 0.0 }).collect()
        })
        .collect();
    let wanted: Vec<f64> = (0..108)
        .map(|i| {
            let (a, b) = (trimmed[0][i], trimmed[1][i]);
            let positive = a + b > 0.0;
            let agree: Vec<f64> = [(a, weights[0]), (b, weights[1])]
                .into_iter()
                .filter(|(x, _)| *x != 0.0 && (*x > 0.0) == positive)
                .map(|(x, w)| x * w)
                .collect();
            if agree.is_empty() { 0.0 } else { agree.iter().sum::<f64>() / agree.len() as f64 }
        })
        .collect();
    let off = distance(&delta(&lora.modules[0]).unwrap(), &wanted);
    assert!(off < 1e-6, "{off:.1e}");
}

#[test]
fn dare_keeps_the_mean_and_all_of_it_at_density_one() {
    let (one, two) = (adapter(2, 7, &["v_proj"]), adapter(2, 8, &["v_proj"]));
    let parts = [(1.0, &one), (0.5, &two)];
    let path = one.modules[0].path.clone();
    let wanted = dense(&parts, &path);
    let made = |density, seed| {
        let how = Combination::Dare { r: 9, density, seed };
        let (lora, _) = combine(&parts, &modules(), how).unwrap();
        delta(&lora.modules[0]).unwrap()
    };
    assert!(distance(&made(1.0, 0), &wanted) < 1e-6);
    let mut mean = vec![0f64; 108];
    for seed in 0..600 {
        mean.iter_mut().zip(made(0.5, seed)).for_each(|(m, d)| *m += d / 600.0);
    }
    assert!(distance(&mean, &wanted) < 0.08, "{}", distance(&mean, &wanted));
    assert!(distance(&made(0.5, 1), &made(0.5, 2)) > 0.1, "the seed matters");
    assert_eq!(made(0.5, 1), made(0.5, 1));
}

#[test]
fn what_cannot_be_combined_is_said() {
    let one = adapter(2, 1, &["q_proj"]);
    let mut dora = one.clone();
    dora.modules[0].magnitude =
        Some(Tensor::ones(9, candle_core::DType::F32, &Device::Cpu).unwrap());
    let error = combine(&[(1.0, &one), (1.0, &dora)], &modules(), Combination::Cat).unwrap_err();
    assert!(error.to_string().contains("DoRA"), "{error}");
    let mut other = modules();
    other[0].in_features = 13;
    let error = combine(&[(1.0, &one)], &other, Combination::Cat).unwrap_err();
    assert!(error.to_string().contains("q_proj [9, 12] instead of [9, 13]"), "{error}");
    assert!(combine(&[], &modules(), Combination::Cat).is_err());
}

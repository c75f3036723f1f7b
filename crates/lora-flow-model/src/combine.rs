//! Several adapters of one base as one, defined on what they do to it: ΔW = s·B·A.
//!
//! | | ΔW of a layer |
//! |---|---|
//! | `cat` | Σ wᵢΔWᵢ, exact: A stacked, B side by side; the ranks add up |
//! | `linear` | the same at the least rank that holds it |
//! | `svd` | the same, its r largest singular values |
//! | `ties` | trim each to its largest entries, elect a sign, mean of those that agree (Yadav et al. 2023); r largest singular values |
//! | `dare` | drop entries at random and scale up the rest, then Σ wᵢΔWᵢ (Yu et al. 2024); r largest singular values |
//!
//! Factors are never averaged: the mean of A and the mean of B have a product with cross terms
//! that no adapter asked for.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use lora_flow_core::{Digest, Error, Result, ResultExt};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::config::ModuleInfo;
use crate::lora::{Init, Lora, LoraConfig, LoraModule, TargetModules};
use crate::lora_match::suffixes;
use crate::residual::delta;
use crate::svd::{self, Svd};
use crate::weights::list;

/// Singular values below this share of the largest are rounding.
const NOTHING: f64 = 1e-7;

/// How adapters become one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Combination {
    /// Exact, ranks add up.
    Cat,
    /// Exact, at the least rank.
    Linear,
    /// Truncated to a rank.
    Svd {
        /// Rank of the result.
        r: usize,
    },
    /// TIES.
    Ties {
        /// Rank of the result.
        r: usize,
        /// Share of each ΔW's entries that is kept, the largest ones.
        density: f64,
    },
    /// DARE.
    Dare {
        /// Rank of the result.
        r: usize,
        /// Share of each ΔW's entries that is kept, by chance.
        density: f64,
        /// Of the chance.
        seed: u64,
    },
}

/// What became of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Combined {
    /// Path of the layer.
    pub path: String,
    /// Rank of the result.
    pub r: usize,
    /// ‖ΔW − s·BA‖ / ‖ΔW‖ (Frobenius) of the result against what its definition asks for.
    pub relative_error: f64,
}

/// Combines adapters with weights; `modules` are the linear layers of their base.
///
/// # Errors
/// When there are none, their layers have other shapes than the base's, or they carry what has no
/// ΔW of low rank (DoRA, `modules_to_save`).
pub fn combine(
    adapters: &[(f64, &Lora)],
    modules: &[ModuleInfo],
    how: Combination,
) -> Result<(Lora, Vec<Combined>)> {
    for (i, (weight, lora)) in adapters.iter().enumerate() {
        if !weight.is_finite() {
            return Err(Error::new(format!("the weight of adapter {} is {weight}", i + 1)));
        }
        if lora.modules.iter().any(|m| m.magnitude.is_some()) || !lora.saved.is_empty() {
            return Err(Error::new(
                "adapters with DoRA or `modules_to_save` cannot be combined: they do more to the \
                 base than add a matrix of low rank",
            )
            .with_hint("merge them into the base one after the other instead"));
        }
        check_shapes(lora, modules)?;
    }
    let layers: Vec<(&ModuleInfo, Vec<(f64, &LoraModule)>)> = modules
        .iter()
        .filter_map(|info| {
            let parts: Vec<_> =
                adapters.iter().filter_map(|(w, lora)| Some((*w, lora.get(&info.path)?))).collect();
            (!parts.is_empty()).then_some((info, parts))
        })
        .collect();
    if layers.is_empty() {
        return Err(Error::new("there are no adapters to combine"));
    }
    let made: Vec<(LoraModule, Combined)> = layers
        .par_iter()
        .map(|(info, parts)| {
            layer(info, parts, how)
                .with_context(|| format!("cannot combine the adapters of `{}`", info.path))
        })
        .collect::<Result<_>>()?;
    let (modules_out, report): (Vec<_>, Vec<_>) = made.into_iter().unzip();
    Ok((
        Lora { config: config(&modules_out, modules), modules: modules_out, saved: Vec::new() },
        report,
    ))
}

fn check_shapes(lora: &Lora, modules: &[ModuleInfo]) -> Result<()> {
    let wrong: Vec<_> = lora
        .modules
        .iter()
        .filter_map(|m| match modules.iter().find(|info| info.path == m.path) {
            None => Some(format!("{} is not in the base", m.path)),
            Some(i) if (i.in_features, i.out_features) != (m.in_features, m.out_features) => {
                Some(format!(
                    "{} [{}, {}] instead of [{}, {}]",
                    m.path, m.out_features, m.in_features, i.out_features, i.in_features
                ))
            }
            Some(_) => None,
        })
        .collect();
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Error::new(format!("the adapter does not fit the base: {}", list(&wrong)))
        .with_hint("it was made for another model"))
}

fn layer(
    info: &ModuleInfo,
    parts: &[(f64, &LoraModule)],
    how: Combination,
) -> candle_core::Result<(LoraModule, Combined)> {
    let (rows, cols) = (info.out_features, info.in_features);
    if how == Combination::Cat {
        let a: Vec<&Tensor> = parts.iter().map(|(_, m)| &m.a).collect();
        let b = parts.iter().map(|(w, m)| &m.b * (w * m.scale));
        let b = b.collect::<candle_core::Result<Vec<_>>>()?;
        let (a, b) = (Tensor::cat(&a, 0)?, Tensor::cat(&b, 1)?);
        let r = a.dim(0)?;
        let combined = Combined { path: info.path.clone(), r, relative_error: 0.0 };
        return Ok((module(info, r, a, b), combined));
    }
    let total: usize = parts.iter().map(|(_, m)| m.r).sum();
    let mut deltas = parts.iter().map(|(w, m)| Ok((*w, delta(m)?)));
    let (wanted, rank) = match how {
        Combination::Ties { r, density } => {
            let deltas: Vec<_> = deltas.collect::<candle_core::Result<_>>()?;
            (ties(deltas, density), r)
        }
        Combination::Dare { r, density, seed } => {
            let mut sum = vec![0f64; rows * cols];
            for (i, part) in deltas.enumerate() {
                let (weight, values) = part?;
                let name = format!("dare/{seed}/{i}/{}", info.path);
                let mut rng = ChaCha8Rng::from_seed(Digest::of_bytes(name.as_bytes()).0);
                for (s, v) in sum.iter_mut().zip(values) {
                    if rng.random::<f64>() < density {
                        *s += weight * v / density;
                    }
                }
            }
            (sum, r)
        }
        _ => {
            let sum = deltas.try_fold(vec![0f64; rows * cols], |mut sum, part| {
                let (weight, values) = part?;
                sum.iter_mut().zip(values).for_each(|(s, v)| *s += weight * v);
                candle_core::Result::Ok(sum)
            })?;
            (sum, if let Combination::Svd { r } = how { r } else { total })
        }
    };
    let rank = rank.min(rows).min(cols).max(1);
    let mut svd = svd::top(&wanted, rows, cols, rank)?;
    if how == Combination::Linear {
        let least = svd.values.first().map_or(0.0, |s| s * NOTHING);
        let kept = svd.values.iter().take_while(|s| **s > least).count().max(1);
        svd.values.truncate(kept);
    }
    let (a, b) = factors(&svd, rows, cols)?;
    let r = svd.values.len();
    let m = module(info, r, a, b);
    let (mut error, mut norm) = (0f64, 0f64);
    for (got, want) in delta(&m)?.iter().zip(&wanted) {
        error += (got - want).powi(2);
        norm += want.powi(2);
    }
    let relative_error = if norm > 0.0 { (error / norm).sqrt() } else { 0.0 };
    Ok((m, Combined { path: info.path.clone(), r, relative_error }))
}

/// A = √σ·vᵀ and B = u·√σ.
fn factors(svd: &Svd, rows: usize, cols: usize) -> candle_core::Result<(Tensor, Tensor)> {
    let r = svd.values.len();
    let scaled = |vectors: &[Vec<f64>]| -> Vec<f32> {
        let pairs = vectors.iter().zip(&svd.values);
        pairs.flat_map(|(v, s)| v.iter().map(|x| (x * s.sqrt()) as f32)).collect()
    };
    let a = Tensor::from_vec(scaled(&svd.right), (r, cols), &Device::Cpu)?;
    let b = Tensor::from_vec(scaled(&svd.left), (r, rows), &Device::Cpu)?;
    Ok((a, b.t()?.contiguous()?))
}

fn module(info: &ModuleInfo, r: usize, a: Tensor, b: Tensor) -> LoraModule {
    LoraModule {
        path: info.path.clone(),
        in_features: info.in_features,
        out_features: info.out_features,
        r,
        scale: 1.0,
        a,
        b,
        magnitude: None,
    }
}

/// Trims each to the `density` largest entries, takes for every entry the sign of their sum, and
/// the mean of the weighted entries that have it.
fn ties(mut deltas: Vec<(f64, Vec<f64>)>, density: f64) -> Vec<f64> {
    for (_, values) in &mut deltas {
        let keep = (density * values.len() as f64).round() as usize;
        if keep == 0 || keep >= values.len() {
            continue;
        }
        let mut sizes: Vec<f64> = values.iter().map(|v| v.abs()).collect();
        let at = sizes.len() - keep;
        let (_, least, _) = sizes.select_nth_unstable_by(at, f64::total_cmp);
        let least = *least;
        values.iter_mut().filter(|v| v.abs() < least).for_each(|v| *v = 0.0);
    }
    let entries = deltas.first().map_or(0, |(_, v)| v.len());
    (0..entries)
        .map(|i| {
            let sign = deltas.iter().map(|(_, v)| v[i]).sum::<f64>().signum();
            let agreeing = deltas.iter().filter(|(_, v)| v[i] * sign > 0.0);
            let (sum, count) =
                agreeing.fold((0.0, 0u32), |(sum, n), (w, v)| (sum + w * v[i], n + 1));
            if count == 0 { 0.0 } else { sum / f64::from(count) }
        })
        .collect()
}

/// A configuration that means just these modules at their ranks, with scale 1.
fn config(modules: &[LoraModule], all: &[ModuleInfo]) -> LoraConfig {
    let mut count: BTreeMap<usize, usize> = BTreeMap::new();
    modules.iter().for_each(|m| *count.entry(m.r).or_default() += 1);
    let r = count.iter().max_by_key(|(_, n)| **n).map_or(1, |(r, _)| *r);
    let others = || modules.iter().filter(|m| m.r != r);
    let infos: Vec<_> = all.iter().filter(|i| modules.iter().any(|m| m.path == i.path)).collect();
    let names: Vec<_> = infos.iter().map(|i| (*i).clone()).collect();
    let short: Vec<String> = suffixes(&names).into_iter().map(str::to_owned).collect();
    // Names where they mean just these layers, whole paths where they would mean more.
    let meant = all.iter().filter(|i| short.iter().any(|s| i.path.ends_with(&format!(".{s}"))));
    let targets = if meant.count() == modules.len() {
        short
    } else {
        modules.iter().map(|m| m.path.clone()).collect()
    };
    LoraConfig {
        r,
        lora_alpha: r as f64,
        target_modules: TargetModules::List(targets),
        rank_pattern: others().map(|m| (m.path.clone(), m.r)).collect(),
        alpha_pattern: others().map(|m| (m.path.clone(), m.r as f64)).collect(),
        init_lora_weights: Init::Default,
        ..LoraConfig::default()
    }
}

//! LoRA adapters as data: configuration in PEFT's words, and the initial weights. The match of
//! `target_modules` against the model's linear layers is [`crate::lora_match`].
//!
//! y = Wx + s·B(A(dropout(x))), s = α/r, or α/√r with rsLoRA (Hu et al. 2021; Kalajdzievski 2023).

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use lora_flow_core::{Digest, Result, ResultExt};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::config::ModuleInfo;

/// Which linear layers get an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Those whose path equals an entry or ends in `.` + entry.
    List(Vec<String>),
    /// Those whose whole path matches this regular expression.
    Regex(String),
    /// All but the output head.
    AllLinear,
}

impl TargetModules {
    /// A string means `all-linear` or a regular expression, as in PEFT.
    pub fn from_text(text: &str) -> Self {
        if text.eq_ignore_ascii_case("all-linear") {
            Self::AllLinear
        } else {
            Self::Regex(text.to_owned())
        }
    }
}

/// How A starts; B starts at zero, so the adapted model starts as the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Init {
    /// Kaiming uniform with a = √5, which is U(±1/√in). PEFT's `true`.
    #[default]
    Default,
    /// Normal with standard deviation 1/r, as PEFT has it.
    Gaussian,
}

/// An adapter's configuration, in PEFT's words.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// α of the scale.
    pub lora_alpha: f64,
    /// Probability that an element of an adapter's input is dropped while training.
    pub lora_dropout: f64,
    /// Which layers.
    pub target_modules: TargetModules,
    /// Which of those not.
    pub exclude_modules: Option<TargetModules>,
    /// Only these decoder layers.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Other ranks by path suffix or regular expression.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other α by path suffix or regular expression.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Scale α/√r instead of α/r.
    pub use_rslora: bool,
    /// How A starts.
    pub init_lora_weights: Init,
}

impl Default for LoraConfig {
    /// PEFT's defaults, on all linear layers.
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::AllLinear,
            exclude_modules: None,
            layers_to_transform: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            use_rslora: false,
            init_lora_weights: Init::Default,
        }
    }
}

impl LoraConfig {
    /// s of y = Wx + s·BAx.
    pub fn scale(&self, r: usize, alpha: f64) -> f64 {
        if self.use_rslora { alpha / (r as f64).sqrt() } else { alpha / r as f64 }
    }
}

/// The two matrices of one adapted layer.
#[derive(Debug, Clone)]
pub struct LoraModule {
    /// Path of the layer: `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Columns of the layer's weight.
    pub in_features: usize,
    /// Rows of the layer's weight.
    pub out_features: usize,
    /// Rank.
    pub r: usize,
    /// s: α/r or α/√r.
    pub scale: f64,
    /// A: [r, in], f32.
    pub a: Tensor,
    /// B: [out, r], f32.
    pub b: Tensor,
}

/// An adapter: its configuration and its modules in model order.
#[derive(Debug, Clone)]
pub struct Lora {
    /// Configuration it was made with.
    pub config: LoraConfig,
    /// One entry per adapted layer, in model order.
    pub modules: Vec<LoraModule>,
}

impl Lora {
    /// A fresh adapter on the CPU: A random, B zero. Every module draws from its own stream,
    /// named by the seed and the module's path, so its values depend on nothing else.
    ///
    /// # Errors
    /// When the configuration does not fit the model ([`LoraConfig::resolve`]).
    pub fn init(config: &LoraConfig, modules: &[ModuleInfo], seed: u64) -> Result<Self> {
        let modules = config
            .resolve(modules)?
            .into_iter()
            .map(|m| {
                m.check_rank()?;
                let (n_in, n_out) = (m.module.in_features, m.module.out_features);
                let name = format!("lora-init/{seed}/{}", m.module.path);
                let mut rng = ChaCha8Rng::from_seed(Digest::of_bytes(name.as_bytes()).0);
                let values: Vec<f32> = match config.init_lora_weights {
                    Init::Default => {
                        let bound = 1.0 / (n_in as f64).sqrt();
                        let draw = |_| ((2.0 * rng.random::<f64>() - 1.0) * bound) as f32;
                        (0..m.r * n_in).map(draw).collect()
                    }
                    Init::Gaussian => {
                        let std = 1.0 / m.r as f64;
                        (0..m.r * n_in).map(|_| (normal(&mut rng) * std) as f32).collect()
                    }
                };
                let device = Device::Cpu;
                let a = Tensor::from_vec(values, (m.r, n_in), &device);
                let b = Tensor::from_vec(vec![0f32; n_out * m.r], (n_out, m.r), &device);
                Ok(LoraModule {
                    in_features: n_in,
                    out_features: n_out,
                    r: m.r,
                    scale: config.scale(m.r, m.alpha),
                    a: a.context("cannot make an adapter's A")?,
                    b: b.context("cannot make an adapter's B")?,
                    path: m.module.path,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { config: config.clone(), modules })
    }

    /// The same adapter with its matrices on another device.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let mut out = self.clone();
        for m in &mut out.modules {
            let moved = m.a.to_device(device).and_then(|a| Ok((a, m.b.to_device(device)?)));
            (m.a, m.b) =
                moved.with_context(|| format!("cannot move the adapter of `{}`", m.path))?;
        }
        Ok(out)
    }

    /// The module of a layer's path, if it is adapted.
    pub fn get(&self, path: &str) -> Option<&LoraModule> {
        self.modules.iter().find(|m| m.path == path)
    }

    /// Number of trainable parameters: Σ r(in + out).
    pub fn trainable_parameters(&self) -> usize {
        self.modules.iter().map(|m| m.r * (m.in_features + m.out_features)).sum()
    }
}

/// A standard normal value (Box–Muller).
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    // 1 − u lies in (0, 1], where the logarithm is finite.
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (2.0 * std::f64::consts::PI * rng.random::<f64>()).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules() -> Vec<ModuleInfo> {
        ["q_proj", "k_proj"]
            .map(|name| ModuleInfo {
                path: format!("model.layers.0.self_attn.{name}"),
                in_features: 400,
                out_features: 100,
            })
            .to_vec()
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn moments(v: &[f32]) -> (f64, f64) {
        let n = v.len() as f64;
        let mean = v.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
        let var = v.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / n;
        (mean, var.sqrt())
    }

    #[test]
    fn default_init_is_uniform_within_one_over_root_in() {
        let lora = Lora::init(&LoraConfig::default(), &modules(), 7).unwrap();
        let a = values(&lora.modules[0].a);
        let bound = 1.0 / 400f64.sqrt();
        assert!(a.iter().all(|x| f64::from(x.abs()) <= bound));
        let (mean, std) = moments(&a);
        assert!(mean.abs() < 0.1 * bound, "{mean}");
        assert!((std - bound / 3f64.sqrt()).abs() < 0.05 * bound, "{std}");
        assert!(values(&lora.modules[0].b).iter().all(|x| *x == 0.0));
    }

    #[test]
    fn gaussian_init_has_standard_deviation_one_over_r() {
        let config = LoraConfig { init_lora_weights: Init::Gaussian, ..LoraConfig::default() };
        let lora = Lora::init(&config, &modules(), 7).unwrap();
        let (mean, std) = moments(&values(&lora.modules[0].a));
        assert!(mean.abs() < 0.01 && (std - 0.125).abs() < 0.01, "{mean} {std}");
    }

    #[test]
    fn init_depends_on_seed_and_path_only() {
        let config = LoraConfig::default();
        let all = Lora::init(&config, &modules(), 7).unwrap();
        let one = Lora::init(&config, &modules()[1..], 7).unwrap();
        assert_eq!(values(&all.modules[1].a), values(&one.modules[0].a));
        assert_ne!(values(&all.modules[0].a), values(&all.modules[1].a));
        let other = Lora::init(&config, &modules(), 8).unwrap();
        assert_ne!(values(&all.modules[0].a), values(&other.modules[0].a));
    }

    #[test]
    fn trainables_are_r_times_in_plus_out() {
        let config = LoraConfig { r: 4, ..LoraConfig::default() };
        let lora = Lora::init(&config, &modules(), 0).unwrap();
        assert_eq!(lora.trainable_parameters(), 2 * 4 * 500);
    }
}

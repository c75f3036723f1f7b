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
    /// A and B from the largest singular values of W, which is lessened by s·BA (Meng et al.
    /// 2024). [`crate::residual`] says how.
    Pissa,
    /// A and B from the QR decomposition of W, which is lessened by s·BA (Büyükakyüz 2024).
    Olora,
}

impl Init {
    /// Whether A and B come from W, and W is lessened by what they make.
    pub fn from_weights(self) -> bool {
        matches!(self, Self::Pissa | Self::Olora)
    }
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
    /// Train a magnitude of each row of W + sBA beside them (Liu et al. 2024).
    pub use_dora: bool,
    /// Whole modules that are trained and stored beside the low-rank ones: names like `lm_head`.
    pub modules_to_save: Vec<String>,
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
            use_dora: false,
            modules_to_save: Vec::new(),
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
    /// DoRA's magnitude m: [out], f32. y = (m/‖W + sBA‖)·(Wx + sBAx), norms by row.
    pub magnitude: Option<Tensor>,
}

/// A tensor of the base that is trained as a whole.
#[derive(Debug, Clone)]
pub struct SavedTensor {
    /// Hugging Face's name: `lm_head.weight`.
    pub name: String,
    /// Values, f32, in the shape of the base's.
    pub tensor: Tensor,
}

/// What a trainable tensor is, as far as the optimizer cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A of a module.
    A,
    /// B of a module.
    B,
    /// DoRA's magnitude.
    Magnitude,
    /// A whole matrix of the base.
    Weight,
    /// A whole norm or bias of the base, which weight decay leaves alone.
    Undecayed,
}

/// What is trained on a base: low-rank modules, and tensors that take the place of the base's. An
/// adapter has the first and seldom the second; full fine-tuning has the second alone.
#[derive(Debug, Clone)]
pub struct Lora {
    /// Configuration it was made with.
    pub config: LoraConfig,
    /// One entry per adapted layer, in model order.
    pub modules: Vec<LoraModule>,
    /// Tensors trained as a whole (`modules_to_save`), in model order.
    pub saved: Vec<SavedTensor>,
}

impl Lora {
    /// A fresh adapter on the CPU: A random, B zero. Every module draws from its own stream,
    /// named by the seed and the module's path, so its values depend on nothing else. What comes
    /// from the weights (DoRA's magnitudes, PiSSA, OLoRA, `modules_to_save`) is added by
    /// [`Lora::init_from`].
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
                    Init::Pissa | Init::Olora => vec![0.0; m.r * n_in],
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
                    magnitude: None,
                    path: m.module.path,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { config: config.clone(), modules, saved: Vec::new() })
    }

    /// The trainable tensors, in the order of gradients and optimizer state: A, B and magnitude of
    /// each module, then the whole ones.
    pub fn tensors(&self) -> impl Iterator<Item = (Role, &Tensor)> {
        let modules = self.modules.iter().flat_map(|m| {
            let magnitude = m.magnitude.as_ref().map(|t| (Role::Magnitude, t));
            [(Role::A, &m.a), (Role::B, &m.b)].into_iter().chain(magnitude)
        });
        modules.chain(self.saved.iter().map(|s| (s.role(), &s.tensor)))
    }

    /// [`Self::tensors`], to change them.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        let modules = self
            .modules
            .iter_mut()
            .flat_map(|m| [&mut m.a, &mut m.b].into_iter().chain(m.magnitude.as_mut()));
        modules.chain(self.saved.iter_mut().map(|s| &mut s.tensor))
    }

    /// The same adapter with its matrices on another device.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let mut out = self.clone();
        for tensor in out.tensors_mut() {
            *tensor = tensor.to_device(device).context("cannot move the adapter")?;
        }
        Ok(out)
    }

    /// The module of a layer's path, if it is adapted.
    pub fn get(&self, path: &str) -> Option<&LoraModule> {
        self.modules.iter().find(|m| m.path == path)
    }

    /// Number of trainable parameters: Σ r(in + out), Σ out of DoRA's magnitudes, and the tensors
    /// trained as a whole.
    pub fn trainable_parameters(&self) -> usize {
        self.tensors().map(|(_, t)| t.elem_count()).sum()
    }
}

impl SavedTensor {
    /// Weight decay is for matrices: Hugging Face's trainer exempts norms and biases.
    fn role(&self) -> Role {
        if self.tensor.rank() == 2 { Role::Weight } else { Role::Undecayed }
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

    #[test]
    fn the_papers_count_for_gpt3_comes_out() {
        // Hu et al. 2021, table 4: r = 4 on q and v of 96 layers of width 12,288 are 18.9 M.
        let width = 12_288;
        let layer = |i: usize| {
            ["q_proj", "v_proj"].map(|name| ModuleInfo {
                path: format!("model.layers.{i}.self_attn.{name}"),
                in_features: width,
                out_features: width,
            })
        };
        let modules: Vec<_> = (0..96).flat_map(layer).collect();
        let config = LoraConfig { r: 4, ..LoraConfig::default() };
        let resolved = config.resolve(&modules).unwrap();
        let parameters = |m: &crate::lora_match::Resolved| m.r * 2 * width;
        assert_eq!(resolved.iter().map(parameters).sum::<usize>(), 18_874_368);
    }
}

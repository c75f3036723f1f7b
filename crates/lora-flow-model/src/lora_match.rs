//! Which linear layers an adapter attaches to, at which rank and α: PEFT's matching rules.
//!
//! - A list entry matches a path that equals it or ends in `.` + entry; a string is a regular
//!   expression for the whole path; `all-linear` is every linear layer but the head.
//! - `rank_pattern` and `alpha_pattern` keys match as `(.*\.)?(key)$` from the path's start.
//!
//! Stricter than PEFT: whatever matches nothing is an error, and so are two patterns that give
//! one layer different values (PEFT takes the first in file order).

use std::collections::{BTreeMap, BTreeSet};

use lora_flow_core::{Error, Result, nearest};
use regex::Regex;

use crate::config::ModuleInfo;
use crate::lora::{LoraConfig, TargetModules};
use crate::weights::list;

/// A layer that gets an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The layer.
    pub module: ModuleInfo,
    /// Its rank.
    pub r: usize,
    /// Its α.
    pub alpha: f64,
}

impl Resolved {
    /// Refuses a rank above the smaller side of the layer, where B·A has more parameters than W
    /// and no more freedom. Only for new adapters: PEFT makes such ones, and they load.
    pub(crate) fn check_rank(&self) -> Result<()> {
        if self.r > self.limit() { Err(self.misfit()) } else { Ok(()) }
    }

    fn limit(&self) -> usize {
        self.module.in_features.min(self.module.out_features)
    }

    fn misfit(&self) -> Error {
        let (r, module) = (self.r, &self.module);
        let (out, inner) = (module.out_features, module.in_features);
        Error::new(format!("rank {r} does not fit `{}` of {out} × {inner}", module.path))
            .with_hint(format!("its rank can be 1 to {}", self.limit()))
    }
}

impl LoraConfig {
    /// The layers among `modules` that get an adapter, in the order of `modules`.
    ///
    /// # Errors
    /// When a target or pattern matches nothing, a regular expression is not valid, the rank
    /// exceeds a layer's smaller side, or a number makes no sense.
    pub fn resolve(&self, modules: &[ModuleInfo]) -> Result<Vec<Resolved>> {
        self.check_numbers()?;
        let targets = Matcher::new(&self.target_modules, "target_modules")?;
        targets.check_entries(modules)?;
        let excluded = match &self.exclude_modules {
            Some(exclude) => Some(Matcher::new(exclude, "exclude_modules")?),
            None => None,
        };
        if let Some(excluded) = &excluded {
            excluded.check_entries(modules)?;
        }
        self.check_layers(modules)?;
        let ranks = Patterns::new(&self.rank_pattern, "rank_pattern")?;
        let alphas = Patterns::new(&self.alpha_pattern, "alpha_pattern")?;

        let mut out = Vec::new();
        for module in modules {
            let path = module.path.as_str();
            let in_layers = self.layers_to_transform.as_ref().is_none_or(|layers| {
                layers.is_empty() || layer_index(path).is_some_and(|l| layers.contains(&l))
            });
            if !targets.matches(path)
                || !in_layers
                || excluded.as_ref().is_some_and(|e| e.matches(path))
                || self.modules_to_save.iter().any(|e| path.ends_with(e.as_str()))
            {
                continue;
            }
            let r = ranks.find(path)?.unwrap_or(self.r);
            let alpha = alphas.find(path)?.unwrap_or(self.lora_alpha);
            let resolved = Resolved { module: module.clone(), r, alpha };
            if r == 0 {
                return Err(resolved.misfit());
            }
            out.push(resolved);
        }
        if out.is_empty() {
            return Err(Error::new(
                "`target_modules` less `exclude_modules` and `layers_to_transform` leaves no layer",
            )
            .with_hint(available(modules)));
        }
        ranks.check_used(&out)?;
        alphas.check_used(&out)?;
        Ok(out)
    }

    fn check_numbers(&self) -> Result<()> {
        if self.r == 0 {
            return Err(Error::new("`r` is 0").with_hint("the rank must be at least 1"));
        }
        for alpha in self.alpha_pattern.values().chain([&self.lora_alpha]) {
            if !(alpha.is_finite() && *alpha > 0.0) {
                return Err(Error::new(format!("`lora_alpha` is {alpha}, not a positive number")));
            }
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(Error::new(format!(
                "`lora_dropout` is {}, not in 0 ≤ p < 1",
                self.lora_dropout
            )));
        }
        Ok(())
    }

    fn check_layers(&self, modules: &[ModuleInfo]) -> Result<()> {
        let Some(layers) = &self.layers_to_transform else { return Ok(()) };
        if matches!(self.target_modules, TargetModules::Regex(_)) {
            return Err(Error::new(
                "`layers_to_transform` cannot be combined with a regular expression",
            )
            .with_hint("name the layers in the regular expression itself"));
        }
        let there: BTreeSet<_> = modules.iter().filter_map(|m| layer_index(&m.path)).collect();
        match layers.iter().find(|l| !there.contains(l)) {
            None => Ok(()),
            Some(missing) => Err(Error::new(format!(
                "`layers_to_transform` names layer {missing}, which the model does not have"
            ))
            .with_hint(format!("it has layers 0 to {}", there.last().copied().unwrap_or(0)))),
        }
    }
}

/// The number after the last `.name.` that is followed by more: PEFT's `.*\.[^.]*\.(\d+)\.`.
fn layer_index(path: &str) -> Option<usize> {
    let parts: Vec<_> = path.split('.').collect();
    (2..parts.len().checked_sub(1)?).rev().find_map(|i| {
        parts[i].bytes().all(|b| b.is_ascii_digit()).then(|| parts[i].parse().ok()).flatten()
    })
}

/// A compiled `target_modules` or `exclude_modules`.
enum Matcher<'a> {
    All,
    List(&'a [String], &'a str),
    Regex(Regex, &'a str, &'a str),
}

impl<'a> Matcher<'a> {
    fn new(target: &'a TargetModules, field: &'a str) -> Result<Self> {
        Ok(match target {
            TargetModules::AllLinear => Self::All,
            TargetModules::List(entries) if entries.is_empty() => {
                return Err(Error::new(format!("`{field}` is an empty list")));
            }
            TargetModules::List(entries) => Self::List(entries, field),
            TargetModules::Regex(regex) => {
                Self::Regex(compile(&format!(r"\A(?:{regex})\z"), regex, field)?, regex, field)
            }
        })
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::All => true,
            Self::List(entries, _) => entries.iter().any(|e| is_suffix(path, e)),
            Self::Regex(regex, ..) => regex.is_match(path),
        }
    }

    /// Every entry of a list, or the expression, must match a layer.
    fn check_entries(&self, modules: &[ModuleInfo]) -> Result<()> {
        match self {
            Self::All => Ok(()),
            Self::Regex(regex, text, field) => {
                if modules.iter().any(|m| regex.is_match(&m.path)) {
                    return Ok(());
                }
                let example = modules.first().map_or("", |m| m.path.as_str());
                Err(Error::new(format!("`{field}`: `{text}` matches no linear layer")).with_hint(
                    format!(
                        "a string is a regular expression for the whole path, such as `{example}`; {}",
                        available(modules)
                    ),
                ))
            }
            Self::List(entries, field) => {
                let missing: Vec<_> = entries
                    .iter()
                    .filter(|e| !modules.iter().any(|m| is_suffix(&m.path, e)))
                    .collect();
                if missing.is_empty() {
                    return Ok(());
                }
                let names = suffixes(modules);
                let near = match missing.as_slice() {
                    [one] => nearest(one, names.iter().copied()),
                    _ => None,
                };
                let mut hint = near.map_or(String::new(), |n| format!("did you mean `{n}`? "));
                if missing.iter().any(|m| ["lm_head", "embed_tokens"].contains(&m.as_str())) {
                    hint.push_str("the embedding and the output head cannot be adapted; ");
                }
                hint.push_str(&available(modules));
                Err(Error::new(format!("`{field}`: no linear layer matches {}", list(&missing)))
                    .with_hint(hint))
            }
        }
    }
}

/// A compiled `rank_pattern` or `alpha_pattern`.
struct Patterns<'a, T> {
    field: &'a str,
    entries: Vec<(&'a str, Regex, T)>,
}

impl<'a, T: Copy + PartialEq + std::fmt::Display> Patterns<'a, T> {
    fn new(map: &'a BTreeMap<String, T>, field: &'a str) -> Result<Self> {
        let entries = map
            .iter()
            .map(|(key, value)| {
                let regex = compile(&format!(r"\A(?:.*\.)?(?:{key})\z"), key, field)?;
                Ok((key.as_str(), regex, *value))
            })
            .collect::<Result<_>>()?;
        Ok(Self { field, entries })
    }

    fn find(&self, path: &str) -> Result<Option<T>> {
        let mut hits = self.entries.iter().filter(|(_, regex, _)| regex.is_match(path));
        let Some((key, _, value)) = hits.next() else { return Ok(None) };
        match hits.find(|(_, _, other)| other != value) {
            None => Ok(Some(*value)),
            Some((other_key, _, other)) => Err(Error::new(format!(
                "`{}`: both `{key}` ({value}) and `{other_key}` ({other}) match `{path}`",
                self.field
            ))),
        }
    }

    fn check_used(&self, resolved: &[Resolved]) -> Result<()> {
        let unused: Vec<_> = self
            .entries
            .iter()
            .filter(|(_, regex, _)| !resolved.iter().any(|r| regex.is_match(&r.module.path)))
            .map(|(key, ..)| *key)
            .collect();
        if unused.is_empty() {
            return Ok(());
        }
        let modules: Vec<_> = resolved.iter().map(|r| r.module.clone()).collect();
        Err(Error::new(format!("`{}`: no adapted layer matches {}", self.field, list(&unused)))
            .with_hint(available(&modules)))
    }
}

/// Checks a regular expression of `target_modules`, `exclude_modules` or a pattern before there
/// is a model to match it against.
///
/// # Errors
/// When it is not valid; `field` is named.
pub fn check_regex(text: &str, field: &str) -> Result<()> {
    compile(&format!(r"\A(?:{text})\z"), text, field).map(drop)
}

fn compile(regex: &str, written: &str, field: &str) -> Result<Regex> {
    Regex::new(regex).map_err(|e| {
        Error::new(format!("`{field}`: `{written}` is not a valid regular expression"))
            .with_source(e)
            .with_hint("look-around and back-references are not supported")
    })
}

fn is_suffix(path: &str, entry: &str) -> bool {
    path.strip_suffix(entry).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Last parts of the paths, each once, in model order.
pub(crate) fn suffixes(modules: &[ModuleInfo]) -> Vec<&str> {
    let mut out: Vec<&str> = Vec::new();
    for module in modules {
        let name = module.path.rsplit('.').next().unwrap_or(&module.path);
        if !out.contains(&name) {
            out.push(name);
        }
    }
    out
}

fn available(modules: &[ModuleInfo]) -> String {
    format!("the linear layers are {}", list(&suffixes(modules)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules() -> Vec<ModuleInfo> {
        (0..12)
            .flat_map(|l| {
                ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"].map(|n| ModuleInfo {
                    path: format!("model.layers.{l}.{n}"),
                    in_features: 32,
                    out_features: 16,
                })
            })
            .collect()
    }

    fn list_of(entries: &[&str]) -> TargetModules {
        TargetModules::List(entries.iter().map(|s| (*s).to_owned()).collect())
    }

    fn paths(config: &LoraConfig) -> Vec<String> {
        config.resolve(&modules()).unwrap().into_iter().map(|r| r.module.path).collect()
    }

    fn error(config: &LoraConfig) -> (String, String) {
        let e = crate::lora::Lora::init(config, &modules(), 0).err().unwrap();
        (e.chain(), e.hint().unwrap_or_default().to_owned())
    }

    fn with(target_modules: TargetModules) -> LoraConfig {
        LoraConfig { target_modules, ..LoraConfig::default() }
    }

    #[test]
    fn targets_match_as_in_peft() {
        // (target, number of matches)
        let table = [
            (list_of(&["q_proj"]), 12),
            (list_of(&["self_attn.q_proj"]), 12),
            (list_of(&["1.self_attn.q_proj"]), 1), // `.`-boundary: not layer 11
            (list_of(&["model.layers.3.mlp.down_proj"]), 1),
            (list_of(&["q_proj", "v_proj"]), 24),
            (TargetModules::Regex(r".*\.q_proj".into()), 12),
            (TargetModules::Regex(r".*layers\.(0|1)\..*(q|v)_proj".into()), 4),
            (TargetModules::Regex(r"model\.layers\.\d\.mlp\.down_proj".into()), 10),
            (TargetModules::from_text("All-Linear"), 36),
        ];
        for (target, expected) in table {
            assert_eq!(paths(&with(target.clone())).len(), expected, "{target:?}");
        }
    }

    #[test]
    fn what_matches_nothing_is_an_error_with_help() {
        let (message, hint) = error(&with(list_of(&["q_porj"])));
        assert_eq!(message, "`target_modules`: no linear layer matches `q_porj`");
        assert_eq!(
            hint,
            "did you mean `q_proj`? the linear layers are `q_proj`, `v_proj`, `down_proj`"
        );
        // A regular expression is matched in full: `q_proj` alone is not enough.
        let (message, hint) = error(&with(TargetModules::Regex("q_proj".into())));
        assert_eq!(message, "`target_modules`: `q_proj` matches no linear layer");
        assert!(hint.contains("model.layers.0.self_attn.q_proj"), "{hint}");
        // `proj` is no whole part of a path.
        error(&with(list_of(&["proj"])));
        error(&with(list_of(&[])));
        let (_, hint) = error(&with(list_of(&["q_proj", "lm_head"])));
        assert!(hint.contains("head"), "{hint}");
        let (message, _) = error(&with(TargetModules::Regex("(".into())));
        assert!(message.contains("not a valid regular expression"), "{message}");
    }

    #[test]
    fn exclusion_and_layers_narrow_the_targets() {
        let config = LoraConfig {
            exclude_modules: Some(list_of(&["v_proj"])),
            layers_to_transform: Some(vec![1, 11]),
            ..with(TargetModules::AllLinear)
        };
        assert_eq!(
            paths(&config),
            [
                "model.layers.1.self_attn.q_proj",
                "model.layers.1.mlp.down_proj",
                "model.layers.11.self_attn.q_proj",
                "model.layers.11.mlp.down_proj",
            ]
        );
        let (message, hint) =
            error(&LoraConfig { layers_to_transform: Some(vec![12]), ..LoraConfig::default() });
        assert!(message.contains("layer 12") && hint.contains("0 to 11"), "{message} {hint}");
        error(&LoraConfig {
            layers_to_transform: Some(vec![0]),
            ..with(TargetModules::Regex(".*q_proj".into()))
        });
        let all = LoraConfig {
            exclude_modules: Some(TargetModules::Regex(".*".into())),
            ..LoraConfig::default()
        };
        assert!(error(&all).0.contains("leaves no layer"));
    }

    #[test]
    fn patterns_change_rank_and_alpha() {
        let config = LoraConfig {
            r: 4,
            lora_alpha: 8.0,
            rank_pattern: [("q_proj".to_owned(), 2), (r"layers\.1\.mlp\.down_proj".to_owned(), 16)]
                .into(),
            alpha_pattern: [("down_proj".to_owned(), 1.0)].into(),
            ..LoraConfig::default()
        };
        let found = config.resolve(&modules()).unwrap();
        let of = |path: &str| {
            let r = found.iter().find(|r| r.module.path == path).unwrap();
            (r.r, r.alpha)
        };
        assert_eq!(of("model.layers.1.self_attn.q_proj"), (2, 8.0));
        assert_eq!(of("model.layers.1.self_attn.v_proj"), (4, 8.0));
        assert_eq!(of("model.layers.1.mlp.down_proj"), (16, 1.0));
        assert_eq!(of("model.layers.11.mlp.down_proj"), (4, 1.0)); // `.`-boundary

        let mut twice = config.clone();
        twice.rank_pattern.insert(r"self_attn\.q_proj".into(), 3);
        assert!(error(&twice).0.contains("both"));
        let mut unused = config.clone();
        unused.rank_pattern.insert("k_proj".into(), 3);
        assert!(error(&unused).0.contains("no adapted layer matches `k_proj`"));
    }

    #[test]
    fn numbers_are_checked() {
        assert!(error(&LoraConfig { r: 0, ..LoraConfig::default() }).0.contains("`r`"));
        let (message, hint) = error(&LoraConfig { r: 17, ..LoraConfig::default() });
        assert!(message.contains("rank 17") && hint.contains("1 to 16"), "{message} {hint}");
        error(&LoraConfig { lora_alpha: f64::NAN, ..LoraConfig::default() });
        error(&LoraConfig { lora_dropout: 1.0, ..LoraConfig::default() });
    }

    #[test]
    fn rslora_scales_by_the_root() {
        let plain = LoraConfig::default();
        assert_eq!(plain.scale(16, 32.0), 2.0);
        assert_eq!(LoraConfig { use_rslora: true, ..plain }.scale(16, 32.0), 8.0);
    }
}

//! What a training pass on the CPU keeps of each layer between its forward and its backward, and the
//! memory of that.

use crate::config::ModelConfig;

/// Most bytes that [`Checkpoint::Auto`] keeps for models smaller than that, for a batch of so many
/// tokens: what a budget leaves beside the buffers of the layer at work, most of them as wide as the
/// MLP. Over weights in bf16 there are rounded copies among them.
fn most_kept(config: &ModelConfig, weight_bytes: usize, tokens: usize) -> usize {
    let (budget, floats) = if weight_bytes > 2 { (732 << 20, 7) } else { (774 << 20, 14) };
    let at_work: usize = 4 * floats * config.intermediate_size * tokens;
    usize::saturating_sub(budget, at_work)
}

/// What a training step keeps of each layer between forward and backward. The gradients have the
/// same bits either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checkpoint {
    /// As much as the model's weights would take in f32, or what 732 MiB (774 over weights in bf16)
    /// leave beside the buffers of the layer at work if that is more: first the products Gate and
    /// Up of some layers are made twice, then the attention as well.
    #[default]
    Auto,
    /// Everything that a matrix product or the attention made: no product is computed twice.
    None,
    /// Only the residual stream that enters the layer; its forward runs again in the backward.
    Full,
}

/// What a layer keeps between its forward and its backward. The gradients have the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Everything that a product or the attention made.
    All,
    /// That without Gate and Up.
    WithoutMlp,
    /// The stream that enters the layer.
    Input,
}

impl Keep {
    /// Bytes of a layer for a batch of so many tokens. `ranks` is the sum over its modules.
    fn bytes(self, config: &ModelConfig, tokens: usize, ranks: usize) -> usize {
        let hidden = config.hidden_size;
        let (q, kv) = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        );
        let before_norm = if config.qk_norm { q + kv } else { 0 };
        let mlp = 2 * config.intermediate_size;
        let attention = 2 * hidden + 2 * q + 2 * kv + before_norm + config.num_attention_heads + 2;
        let floats = match self {
            Self::All => attention + ranks + mlp,
            Self::WithoutMlp => attention + ranks,
            Self::Input => hidden,
        };
        4 * floats * tokens
    }
}

/// What each of `layers` layers keeps for a batch of so many tokens, over weights of so many bytes.
pub(crate) fn plan(
    config: &ModelConfig,
    policy: Checkpoint,
    weight_bytes: usize,
    tokens: usize,
    ranks: usize,
    layers: usize,
) -> Vec<Keep> {
    let limit = match policy {
        Checkpoint::None => return vec![Keep::All; layers],
        Checkpoint::Full => return vec![Keep::Input; layers],
        Checkpoint::Auto => {
            let weights: usize =
                config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
            most_kept(config, weight_bytes, tokens).max(4 * weights)
        }
    };
    let size = |keep: Keep| keep.bytes(config, tokens, ranks);
    let mut total = size(Keep::All) * layers;
    let mut keep = vec![Keep::All; layers];
    for (from, to) in [(Keep::All, Keep::WithoutMlp), (Keep::WithoutMlp, Keep::Input)] {
        // From the bottom, whose turn in the backward comes when the others' share is free.
        for layer in &mut keep {
            if total <= limit {
                return keep;
            }
            *layer = to;
            total -= size(from) - size(to);
        }
    }
    keep
}

/// Memory of what a pass keeps, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// When the forward is done.
    pub after_forward: u64,
    /// At most in the backward, where layers are made whole again one by one while what those above
    /// had kept is free.
    pub most: u64,
}

impl Kept {
    /// Of a pass over so many tokens through the `layers` layers from the lowest adapter up.
    pub fn of(
        config: &ModelConfig,
        policy: Checkpoint,
        weight_bytes: usize,
        tokens: usize,
        ranks: usize,
        layers: usize,
    ) -> Self {
        let whole = Keep::All.bytes(config, tokens, ranks);
        let (mut held, mut most) = (0, 0);
        for keep in plan(config, policy, weight_bytes, tokens, ranks, layers) {
            // This layer's turn: those below are as the forward left them.
            most = most.max(held + whole);
            held += keep.bytes(config, tokens, ranks);
        }
        Self { after_forward: held as u64, most: most as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_automatic_policy_keeps_what_its_limit_allows() {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 6, "vocab_size": 40, "tie_word_embeddings": true,
        });
        let config = ModelConfig::from_hf(&json).unwrap().0;
        // Floats of a layer and token: 2·16 + 2·24 + 2·12 + 4 + 2 + 7·2 = 124, Gate and Up 48.
        let keep = |tokens| plan(&config, Checkpoint::Auto, 4, tokens, 14, 2);
        let kept = |tokens| Kept::of(&config, Checkpoint::Auto, 4, tokens, 14, 2);
        for (floats, expected, highest) in [
            (2 * 172, [Keep::All, Keep::All], 2 * 172),
            (124 + 172, [Keep::WithoutMlp, Keep::All], 124 + 172),
            (2 * 124, [Keep::WithoutMlp, Keep::WithoutMlp], 124 + 172),
            (16 + 124, [Keep::Input, Keep::WithoutMlp], 172 + 16),
            (16, [Keep::Input, Keep::Input], 172 + 16),
        ] {
            // Just what the budget allows: 4·floats·tokens beside 4·7·24·tokens at work.
            let tokens = (732 << 20) / (4 * floats + 4 * 7 * 24);
            assert_eq!(keep(tokens), expected);
            assert_eq!(kept(tokens).most, 4 * (highest * tokens) as u64);
            assert!(kept(tokens).after_forward <= kept(tokens).most);
        }
    }
}

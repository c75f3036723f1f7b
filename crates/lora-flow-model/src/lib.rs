//! Decoder models: config, weights, LoRA adapters, generation, PEFT folders.
//!
//! One normalised [`config::ModelConfig`] describes every architecture of the Llama family; the
//! weights come from safetensors or GGUF under the names Hugging Face gives them
//! ([`weights::WeightSource`]); adapters are plain data ([`lora::Lora`]) that stand beside the
//! frozen weights and are stored as PEFT folders ([`peft`]).

pub mod adapter;
pub mod batch;
pub mod combine;
pub mod config;
mod config_gguf;
mod config_hf;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod decoder;
mod dora;
mod full;
pub mod generate;
pub mod gguf;
pub mod gguf_tokenizer;
pub mod keep;
mod layer;
pub mod lora;
pub mod lora_match;
pub mod merge;
pub mod peft;
pub mod place;
pub mod prefix_tree;
pub mod residual;
pub mod safetensors_file;
pub mod score;
pub mod svd;
pub mod weights;

#[cfg(test)]
mod tests;

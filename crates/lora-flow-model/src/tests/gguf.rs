use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value as Gguf;
use candle_core::{DType, Device};
use lora_flow_core::ArtifactKind;

use super::{GgufBuilder, artifact, config, values};
use crate::config::{ModelConfig, RopeScaling};
use crate::gguf::{GgufFile, parse};
use crate::weights::WeightSource;

fn open(bytes: &[u8]) -> (tempfile::TempDir, lora_flow_core::Result<GgufFile>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let file = GgufFile::open(&path);
    (dir, file)
}

fn source(builder: &GgufBuilder) -> (tempfile::TempDir, WeightSource, ModelConfig) {
    let (dir, file) = open(&builder.bytes());
    let config = ModelConfig::from_gguf(&file.unwrap()).unwrap();
    let source = WeightSource::open(&artifact(ArtifactKind::Model, dir.path())).unwrap();
    (dir, source, config)
}

#[test]
fn config_and_weights_come_back_under_hf_names_and_unpermuted() {
    let (_dir, source, config) = source(&GgufBuilder::llama(GgmlDType::F32));
    assert_eq!(config, super::config(serde_json::json!({})));
    assert_eq!(source.check_all(&config).unwrap(), Vec::<String>::new());
    for (name, shape) in config.tensors() {
        let found = source.read_f32(&name, &shape).unwrap();
        assert_eq!(found, values(&name, found.len()), "{name}");
    }
}

#[test]
fn quantised_weights_are_near_and_bf16_is_their_rounding() {
    for (dtype, tolerance) in [
        (GgmlDType::F16, 3e-4),
        (GgmlDType::BF16, 2e-3),
        (GgmlDType::Q8_0, 5e-3),
        (GgmlDType::Q5_1, 0.025),
        (GgmlDType::Q4_1, 0.05),
        (GgmlDType::Q4_0, 0.08),
    ] {
        let (_dir, source, config) = source(&GgufBuilder::llama(dtype));
        for (name, shape) in config.tensors().into_iter().filter(|(_, s)| s.len() == 2) {
            let found = source.read_f32(&name, &shape).unwrap();
            let wanted = values(&name, found.len());
            let error = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error < tolerance, "{dtype:?} {name}: {error}");
            let rounded = source.tensor(&name, &shape, DType::BF16, &Device::Cpu).unwrap();
            let rounded: Vec<half::bf16> = rounded.flatten_all().unwrap().to_vec1().unwrap();
            assert!(rounded.iter().zip(&found).all(|(r, f)| *r == half::bf16::from_f32(*f)));
        }
    }
}

#[test]
fn k_quants_dequantise_as_candle_does() {
    for dtype in [GgmlDType::Q2K, GgmlDType::Q3K, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K] {
        let mut builder = GgufBuilder { metadata: [].into(), tensors: [].into() };
        builder.tensor("t", &values("t", 3 * 512), &[3, 512], dtype);
        let expected = builder.tensors["t"].dequantize(&Device::Cpu).unwrap();
        let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
        let (_dir, file) = open(&builder.bytes());
        assert_eq!(file.unwrap().read_f32("t", &|i| i, false).unwrap(), expected, "{dtype:?}");
    }
}

#[test]
fn permuted_biases_are_put_back_too() {
    let mut builder = GgufBuilder::llama(GgmlDType::F32);
    let q = super::permute(&values("q", 32), 4, 32, 1);
    builder.tensor("blk.0.attn_q.bias", &q, &[32], GgmlDType::F32);
    let (_dir, source, _) = source(&builder);
    let name = "model.layers.0.self_attn.q_proj.bias";
    assert_eq!(source.read_f32(name, &[32]).unwrap(), values("q", 32));
}

#[test]
fn other_architectures_are_not_permuted() {
    let mut builder = GgufBuilder::llama(GgmlDType::F32);
    let metadata = std::mem::take(&mut builder.metadata);
    builder.metadata =
        metadata.into_iter().map(|(k, v)| (k.replace("llama.", "qwen2."), v)).collect();
    builder.metadata.insert("general.architecture".into(), Gguf::String("qwen2".into()));
    let name = "model.layers.1.self_attn.k_proj.weight";
    builder.tensor("blk.1.attn_k.weight", &values(name, 16 * 32), &[16, 32], GgmlDType::F32);
    let (_dir, source, _) = source(&builder);
    assert_eq!(source.read_f32(name, &[16, 32]).unwrap(), values(name, 16 * 32));
}

#[test]
fn every_truncation_is_an_error_and_never_a_panic() {
    let bytes = GgufBuilder::llama(GgmlDType::Q4_1).bytes();
    parse(&bytes).unwrap();
    // The last tensor ends within a block of padding.
    for cut in (0..3000).chain((3000..bytes.len() - 32).step_by(97)) {
        assert!(parse(&bytes[..cut]).is_err(), "cut at {cut}");
    }
    let (_dir, file) = open(&bytes[..bytes.len() / 2]);
    let error = file.unwrap_err();
    assert!(error.chain().contains("model.gguf") && error.hint().is_some(), "{}", error.chain());
}

#[test]
fn damaged_bytes_never_panic() {
    let bytes = GgufBuilder::llama(GgmlDType::Q8_0).bytes();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    // The header is some 1,800 bytes.
    for at in (0..1900).step_by(3) {
        for value in [0xff, 0x09] {
            let mut damaged = bytes.clone();
            damaged[at] = value;
            if parse(&damaged).is_err() {
                continue;
            }
            std::fs::write(&path, &damaged).unwrap();
            let file = GgufFile::open(&path).unwrap();
            let config = ModelConfig::from_gguf(&file);
            if let (Ok(config), Ok(source)) = (config, WeightSource::open_gguf(file)) {
                let _ = source.check_all(&config);
                for (name, shape) in config.tensors().into_iter().take(4) {
                    let _ = source.read_f32(&name, &shape);
                }
            }
        }
    }
}

#[test]
fn absurd_counts_and_shapes_are_refused_before_allocating() {
    let header = |tensors: u64, metadata: u64| {
        let mut out = b"GGUF\x03\x00\x00\x00".to_vec();
        out.extend(tensors.to_le_bytes());
        out.extend(metadata.to_le_bytes());
        out
    };
    let mut cases = vec![header(u64::MAX, 0), header(0, u64::MAX), b"GGUF".to_vec(), Vec::new()];
    // An array of 2^60 strings, a string of 2^63 bytes.
    for (kind, length) in [(9u32, 1u64 << 60), (8, 1 << 63)] {
        let mut bytes = header(0, 1);
        bytes.extend(1u64.to_le_bytes());
        bytes.push(b'k');
        bytes.extend(kind.to_le_bytes());
        if kind == 9 {
            bytes.extend(8u32.to_le_bytes());
        }
        bytes.extend(length.to_le_bytes());
        cases.push(bytes);
    }
    // Tensors of 2^40 × 2^40 values, of none, and of rows that are no whole blocks.
    for (shape, kind) in [([1u64 << 40, 1 << 40], 0u32), ([0, 1 << 62], 0), ([33, 2], 3)] {
        let mut bytes = header(1, 0);
        bytes.extend(1u64.to_le_bytes());
        bytes.push(b't');
        bytes.extend(2u32.to_le_bytes());
        shape.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend([0; 64]);
        cases.push(bytes);
    }
    for bytes in cases {
        let (_dir, file) = open(&bytes);
        file.unwrap_err();
    }
    let mut zero_alignment = GgufBuilder::llama(GgmlDType::F32);
    zero_alignment.metadata.insert("general.alignment".into(), Gguf::U32(0));
    let (_dir, file) = open(&zero_alignment.bytes());
    assert!(file.unwrap_err().chain().contains("general.alignment"));
    let (_dir, file) = open(b"PK\x03\x04 something else");
    assert!(file.unwrap_err().chain().contains("does not start with `GGUF`"));
}

#[test]
fn unsupported_settings_are_refused_by_name() {
    for (key, value, expected) in [
        ("general.architecture", Gguf::String("gemma".into()), "`gemma`"),
        ("llama.expert_count", Gguf::U32(8), "`llama.expert_count`"),
        ("llama.attention.sliding_window", Gguf::U32(8), "`llama.attention.sliding_window`"),
        ("llama.rope.dimension_count", Gguf::U32(4), "`llama.rope.dimension_count`"),
        ("llama.rope.scaling.type", Gguf::String("yarn".into()), "`yarn`"),
        ("llama.block_count", Gguf::String("two".into()), "`llama.block_count`"),
        ("general.type", Gguf::String("adapter".into()), "`adapter`"),
    ] {
        let mut builder = GgufBuilder::llama(GgmlDType::F32);
        builder.metadata.insert(key.into(), value);
        let (_dir, file) = open(&builder.bytes());
        let message = ModelConfig::from_gguf(&file.unwrap()).unwrap_err().chain();
        assert!(message.contains(expected), "{key}: {message}");
    }
}

#[test]
fn rope_scaling_is_read_from_metadata_or_the_table() {
    let mut builder = GgufBuilder::llama(GgmlDType::F32);
    builder.metadata.insert("llama.rope.scaling.type".into(), Gguf::String("linear".into()));
    builder.metadata.insert("llama.rope.scaling.factor".into(), Gguf::F32(4.0));
    let (_dir, _, found) = source(&builder);
    assert_eq!(found.rope_scaling, RopeScaling::Linear { factor: 4.0 });

    let mut builder = GgufBuilder::llama(GgmlDType::F32);
    builder.metadata.insert("llama.rope.freq_base".into(), Gguf::F32(500_000.0));
    let llama3 = config(serde_json::json!({ "rope_theta": 500000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192 } }));
    let plain = config(serde_json::json!({ "rope_theta": 500000.0 }));
    let table: Vec<f32> =
        plain.inv_freq().iter().zip(llama3.inv_freq()).map(|(p, s)| p / s).collect();
    builder.tensor("rope_freqs.weight", &table, &[4], GgmlDType::F32);
    let (_dir, source, found) = source(&builder);
    assert_eq!(found.rope_scaling, llama3.rope_scaling);
    source.check_all(&found).unwrap();

    builder.tensor("rope_freqs.weight", &[1.0, 2.0, 3.0, 4.0], &[4], GgmlDType::F32);
    let (_dir, file) = open(&builder.bytes());
    assert!(ModelConfig::from_gguf(&file.unwrap()).is_err());
}

#[test]
fn missing_and_strange_tensors_are_listed() {
    let mut builder = GgufBuilder::llama(GgmlDType::F32);
    builder.tensors.remove("blk.1.ffn_up.weight");
    builder.tensor("blk.0.ssm_a", &[0.0; 4], &[4], GgmlDType::F32);
    builder.tensor("blk.0.attn_v.weight", &[0.0; 64], &[2, 32], GgmlDType::F32);
    let (_dir, source, config) = source(&builder);
    let message = source.check_all(&config).unwrap_err().chain();
    for part in [
        "missing: `model.layers.1.mlp.up_proj.weight`",
        "model.layers.0.self_attn.v_proj.weight [2, 32] instead of [16, 32]",
        "not of this architecture: `blk.0.ssm_a`",
    ] {
        assert!(message.contains(part), "{message}");
    }
}

use candle_core::{DType, Device, Tensor};
use lora_flow_core::{ArtifactKind, Error};
use serde_json::json;

use super::{artifact, config, values, write_model};
use crate::lora::{Lora, LoraConfig, TargetModules};
use crate::merge::{MergeOptions, MergeReport, merge_weights};
use crate::weights::{INDEX, WeightSource};

fn lora() -> Lora {
    let config_ = LoraConfig {
        r: 4,
        lora_alpha: 6.0,
        target_modules: TargetModules::List(vec!["q_proj".into(), "down_proj".into()]),
        rank_pattern: [("down_proj".to_owned(), 2)].into(),
        ..LoraConfig::default()
    };
    let mut lora = Lora::init(&config_, &config(json!({})).linear_modules(), 1).unwrap();
    for m in &mut lora.modules {
        let data = values(&m.path, m.out_features * m.r);
        m.b = Tensor::from_vec(data, (m.out_features, m.r), &Device::Cpu).unwrap();
    }
    lora
}

fn merge(
    base: DType,
    dtype: DType,
    max_shard_size: Option<u64>,
) -> (tempfile::TempDir, MergeReport, WeightSource) {
    let config = config(json!({}));
    let from = tempfile::tempdir().unwrap();
    write_model(from.path(), &config, base);
    let source = WeightSource::open(&artifact(ArtifactKind::Model, from.path())).unwrap();
    let to = tempfile::tempdir().unwrap();
    let options = MergeOptions { dtype, max_shard_size };
    let mut calls = 0;
    let report = merge_weights(&source, &config, &lora(), to.path(), options, |done, total| {
        calls += 1;
        assert_eq!((done, total), (calls, config.tensors().len()));
        Ok(())
    })
    .unwrap();
    let merged = WeightSource::open(&artifact(ArtifactKind::Model, to.path())).unwrap();
    merged.check_all(&config).unwrap();
    (to, report, merged)
}

#[test]
fn merged_weights_equal_the_dense_sum_in_f64() {
    let lora = lora();
    for (dtype, relative) in [(DType::F32, 1e-6), (DType::BF16, 1.0 / 256.0), (DType::F16, 1e-3)] {
        let (_dir, report, merged) = merge(DType::F32, dtype, None);
        assert_eq!(report.modules.len(), 4);
        for (name, shape) in config(json!({})).tensors() {
            let found = merged.read_f32(&name, &shape).unwrap();
            let mut wanted: Vec<f64> =
                values(&name, found.len()).into_iter().map(f64::from).collect();
            if let Some(m) = lora.get(name.trim_end_matches(".weight")) {
                let a: Vec<Vec<f32>> = m.a.to_vec2().unwrap();
                let b: Vec<Vec<f32>> = m.b.to_vec2().unwrap();
                for (o, row) in wanted.chunks_mut(m.in_features).enumerate() {
                    for (i, w) in row.iter_mut().enumerate() {
                        let sum: f64 =
                            (0..m.r).map(|k| f64::from(b[o][k]) * f64::from(a[k][i])).sum();
                        *w += m.scale * sum;
                    }
                }
                assert!(
                    wanted
                        .iter()
                        .zip(&values(&name, found.len()))
                        .any(|(w, v)| { (w - f64::from(*v)).abs() > 0.05 })
                );
            }
            for (f, w) in found.iter().zip(&wanted) {
                assert!((f64::from(*f) - w).abs() <= relative * (w.abs() + 0.1), "{name}: {f} {w}");
            }
        }
        let rounded = dtype != DType::F32;
        assert!(report.modules.iter().all(|m| (m.max_rounding > 0.0) == rounded));
        assert!(report.modules.iter().all(|m| m.max_delta > 0.05 && m.relative < 0.1));
    }
}

#[test]
fn untouched_tensors_keep_their_bytes_and_tied_heads_stay_away() {
    let (_dir, report, merged) = merge(DType::BF16, DType::BF16, None);
    assert_eq!(report.files, ["model.safetensors"]);
    assert!(merged.shape("lm_head.weight").is_none());
    let name = "model.layers.0.mlp.up_proj.weight";
    let expected = crate::safetensors_file::encode(&values(name, 64 * 32), DType::BF16);
    assert_eq!(merged.raw(name, DType::BF16).unwrap(), expected);
}

#[test]
fn shards_stay_below_the_limit_and_are_indexed() {
    let (dir, report, _) = merge(DType::F32, DType::F32, Some(20_000));
    assert!(report.files.len() > 3);
    assert_eq!(report.files.last().unwrap(), INDEX);
    let mut total = 0;
    for file in &report.files[..report.files.len() - 1] {
        let size = std::fs::metadata(dir.path().join(file)).unwrap().len();
        assert!(size < 22_000, "{file}: {size}");
        total += size;
    }
    assert!(total > report.bytes);
}

#[test]
fn overflow_and_interruption_are_errors() {
    let config = config(json!({}));
    let from = tempfile::tempdir().unwrap();
    write_model(from.path(), &config, DType::F32);
    let source = WeightSource::open(&artifact(ArtifactKind::Model, from.path())).unwrap();
    let to = tempfile::tempdir().unwrap();
    let mut huge = lora();
    huge.modules[0].scale = 1e6;
    let options = MergeOptions { dtype: DType::F16, max_shard_size: None };
    let message = merge_weights(&source, &config, &huge, to.path(), options, |_, _| Ok(()))
        .unwrap_err()
        .chain();
    assert!(message.contains("q_proj.weight") && message.contains("float16"), "{message}");
    let stopped = merge_weights(&source, &config, &lora(), to.path(), options, |done, _| {
        if done == 3 { Err(Error::cancelled()) } else { Ok(()) }
    });
    assert_eq!(stopped.unwrap_err().kind(), lora_flow_core::ErrorKind::Cancelled);
}

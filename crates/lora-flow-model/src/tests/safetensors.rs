use candle_core::{DType, Device};
use lora_flow_core::{Artifact, ArtifactKind};
use serde_json::json;

use super::{artifact, config, values, write_model, write_safetensors};
use crate::safetensors_file::SafetensorsFile;
use crate::weights::{INDEX, WeightSource};

fn open(dir: &std::path::Path) -> lora_flow_core::Result<WeightSource> {
    WeightSource::open(&artifact(ArtifactKind::Model, dir))
}

#[test]
fn single_file_is_read_in_every_dtype() {
    let config = config(json!({}));
    for (dtype, tolerance) in [(DType::F32, 0.0), (DType::BF16, 2e-3), (DType::F16, 3e-4)] {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), &config, dtype);
        let source = open(dir.path()).unwrap();
        source.check_all(&config).unwrap();
        for (name, shape) in config.tensors() {
            let found = source.read_f32(&name, &shape).unwrap();
            let wanted = values(&name, found.len());
            assert!(found.iter().zip(&wanted).all(|(a, b)| (a - b).abs() <= tolerance), "{name}");
            let tensor = source.tensor(&name, &shape, DType::BF16, &Device::Cpu).unwrap();
            assert_eq!((tensor.dtype(), tensor.dims()), (DType::BF16, &shape[..]));
        }
        assert_eq!(source.storage_type("model.norm.weight").unwrap(), format!("{dtype:?}"));
    }
}

#[test]
fn python_readers_find_the_header_they_expect() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &config(json!({})), DType::F32);
    let bytes = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header % 8, 0);
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
}

#[test]
fn every_truncation_is_an_error_that_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    write_safetensors(&path, &[("a".into(), vec![4, 4]), ("b".into(), vec![3])], DType::F32);
    let bytes = std::fs::read(&path).unwrap();
    for cut in 0..bytes.len() {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        let message = SafetensorsFile::open(&path).expect_err(&cut.to_string()).chain();
        assert!(message.contains("model.safetensors"), "{message}");
    }
    for at in 0..bytes.len() - 76 {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x15;
        std::fs::write(&path, &damaged).unwrap();
        if let Ok(file) = SafetensorsFile::open(&path) {
            let names: Vec<_> = file.tensors().keys().cloned().collect();
            names.iter().for_each(|n| drop(file.read_f32(n)));
        }
    }
    std::fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
    SafetensorsFile::open(&path).unwrap_err();
}

#[test]
fn tensors_must_be_those_of_the_config() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &config(json!({})), DType::F32);
    let source = open(dir.path()).unwrap();

    let untied = config(json!({ "tie_word_embeddings": false }));
    let message = source.check_all(&untied).unwrap_err().chain();
    assert!(message.contains("missing: `lm_head.weight`"), "{message}");
    let wide = config(json!({ "intermediate_size": 65 }));
    let message = source.check_all(&wide).unwrap_err().chain();
    assert!(message.contains("[64, 32] instead of [65, 32]"), "{message}");
    let shallow = config(json!({ "num_hidden_layers": 1 }));
    let message = source.check_all(&shallow).unwrap_err().chain();
    assert!(message.contains("not of this architecture"), "{message}");
    assert!(message.contains("and 1 more"), "{message}");
    assert!(source.read_f32("model.norm.weight", &[31]).is_err());
    assert!(source.read_f32("model.morn.weight", &[32]).is_err());

    // The head of a tied model and rotary tables do no harm.
    let mut tensors = untied.tensors();
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), vec![4]));
    write_safetensors(&dir.path().join("model.safetensors"), &tensors, DType::F32);
    assert_eq!(open(dir.path()).unwrap().check_all(&config(json!({}))).unwrap().len(), 2);
}

#[test]
fn shards_are_found_through_their_index() {
    let config = config(json!({}));
    let dir = tempfile::tempdir().unwrap();
    let tensors = config.tensors();
    let (first, second) = tensors.split_at(5);
    write_safetensors(&dir.path().join("a.safetensors"), first, DType::F32);
    write_safetensors(&dir.path().join("b.safetensors"), second, DType::BF16);
    let map: serde_json::Map<_, _> = tensors
        .iter()
        .enumerate()
        .map(|(i, (n, _))| {
            (n.clone(), json!(if i < 5 { "a.safetensors" } else { "b.safetensors" }))
        })
        .collect();
    let index = |map: &serde_json::Map<_, _>| {
        std::fs::write(dir.path().join(INDEX), json!({ "weight_map": map }).to_string()).unwrap();
    };
    index(&map);
    let source = open(dir.path()).unwrap();
    source.check_all(&config).unwrap();
    assert_eq!(source.read_f32(&tensors[0].0, &tensors[0].1).unwrap()[..], {
        let count = tensors[0].1.iter().product();
        values(&tensors[0].0, count)
    });

    let mut wrong = map.clone();
    wrong.insert(tensors[0].0.clone(), json!("b.safetensors"));
    index(&wrong);
    assert!(open(dir.path()).unwrap_err().chain().contains("does not have it"));
    wrong.insert(tensors[0].0.clone(), json!("c.safetensors"));
    index(&wrong);
    let message = open(dir.path()).unwrap_err().chain();
    assert_eq!(message, format!("`{INDEX}` names `c.safetensors` that is not there"));
    std::fs::write(dir.path().join(INDEX), "{").unwrap();
    assert!(open(dir.path()).unwrap_err().chain().contains(INDEX));
}

#[test]
fn a_folder_without_weights_says_so() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let model: Artifact = artifact(ArtifactKind::Model, dir.path());
    let error = WeightSource::open(&model).unwrap_err();
    assert_eq!(error.chain(), "the model has no weights");
    assert!(error.hint().unwrap().contains("`model.safetensors`"));
}

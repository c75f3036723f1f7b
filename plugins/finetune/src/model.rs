//! `model`: a base model from a GGUF file or a Hugging Face folder.
//!
//! Makes a Model artifact with a normalised `config.json` and Hugging Face's tokenizer files, and
//! checks every tensor's name and shape before any other task relies on them. The weights stay
//! in the form they have; those of an input artifact are not copied.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::DType;
use lora_flow_core::{
    Artifact, ArtifactFile, ArtifactKind, Digest, Error, FileRef, Ports, Problem, Result,
    ResultExt, Task, TaskContext, nearest,
};
use lora_flow_model::config::{ModelConfig, RopeScaling, dtype_name};
use lora_flow_model::gguf::GgufFile;
use lora_flow_model::gguf_tokenizer;
use lora_flow_model::weights::{GGUF, INDEX, WeightSource};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Parameters of `model`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// A `.gguf` file or a Hugging Face folder (`config.json`, `tokenizer.json`,
    /// `*.safetensors`), relative to the pipeline's root. Leave it out to take the model from the
    /// input `files`.
    #[serde(default)]
    pub source: Option<String>,
    /// Which `.gguf` file or model folder, by name, where there are several.
    #[serde(default)]
    pub file: Option<String>,
    /// Number format to hold the base weights in while computing.
    #[serde(default)]
    pub dtype: ComputeDtype,
}

/// Number format of the base weights in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// 32 bits; holds bfloat16, float16 and quantised weights exactly.
    #[default]
    Float32,
    /// 16 bits with the range of float32: half the memory.
    Bfloat16,
}

impl Task for Model {
    fn inputs(&self) -> Ports {
        match self.source {
            Some(_) => Ports::none(),
            None => Ports::none().required(
                "files",
                ArtifactKind::Files,
                "files that hold a `.gguf` file or a Hugging Face folder",
            ),
        }
    }

    fn outputs(&self) -> Ports {
        Ports::none().required("model", ArtifactKind::Model, "the model")
    }

    fn files(&self) -> Vec<FileRef> {
        let source = self.source.iter();
        source.map(|s| FileRef { pointer: "/source".into(), pattern: s.clone() }).collect()
    }

    fn validate(&self) -> Vec<Problem> {
        let mut out = Vec::new();
        match self.source.as_deref() {
            Some("") => out.push(Problem::at("/source", "`source` is empty")),
            Some(s) if s.contains("://") => out.push(
                Problem::at("/source", format!("`{s}` is not a path"))
                    .with_hint("models are read from disk; fetch it first and name the folder"),
            ),
            _ => {}
        }
        if self.file.as_deref() == Some("") {
            out.push(Problem::at("/file", "`file` is empty"));
        }
        out
    }

    fn run(&self, cx: &mut TaskContext) -> Result<()> {
        let members = match &self.source {
            Some(_) => outside(cx.files("/source"))?,
            None => inside(cx.input("files")?),
        };
        let model = match choose(&members, self.file.as_deref())? {
            Choice::Gguf(name) => read_gguf(&members, &name)?,
            Choice::Folder(prefix) => read_folder(&members, &prefix)?,
        };
        self.write(cx, model)
    }
}

impl Model {
    fn write(&self, cx: &mut TaskContext, model: Loaded) -> Result<()> {
        let mut config = model.config;
        config.dtype = match self.dtype {
            ComputeDtype::Float32 => DType::F32,
            ComputeDtype::Bfloat16 => DType::BF16,
        };
        for note in &model.notes {
            cx.warn(note);
        }
        cx.check_cancelled()?;

        let parameters = config.parameters();
        let out = cx.output("model")?;
        out.write_json("config.json", &config.to_hf())?;
        for (name, text) in &model.texts {
            out.write(name, text)?;
        }
        for (name, member) in &model.weights {
            match &member.stored {
                Some(file) => out.adopt(name, file),
                None => {
                    fs_err::copy(&member.path, out.file(name)?)?;
                }
            }
        }
        out.set_meta(json!({
            "architecture": config.architecture.hf_name(),
            "parameters": parameters,
        }));

        let stored = model.storage.into_iter().collect::<Vec<_>>().join(" + ");
        cx.report(describe(&config, &stored));
        cx.summary("architecture", config.architecture.hf_name());
        cx.summary("parameters", format!("{:.1} M", parameters as f64 / 1e6));
        cx.summary("dtype", format!("{stored}, computed in {}", dtype_name(config.dtype)));
        Ok(())
    }
}

/// A file to choose from.
#[derive(Debug, Clone)]
struct Member {
    path: PathBuf,
    /// Set when it stands in the store already.
    stored: Option<ArtifactFile>,
}

type Members = BTreeMap<String, Member>;

fn inside(files: &Artifact) -> Members {
    files
        .files
        .iter()
        .map(|(name, file)| {
            (name.clone(), Member { path: file.path.clone(), stored: Some(file.clone()) })
        })
        .collect()
}

/// Outside files under their names relative to the folder that holds them all.
fn outside(paths: &[PathBuf]) -> Result<Members> {
    let mut root = paths
        .first()
        .and_then(|p| p.parent())
        .ok_or_else(|| Error::new("`source` names no file"))?;
    while !paths.iter().all(|p| p.starts_with(root)) {
        root = root.parent().unwrap_or(Path::new(""));
    }
    let named = paths.iter().map(|path| {
        let name = path.strip_prefix(root).unwrap_or(path).to_string_lossy().replace('\\', "/");
        (name, Member { path: path.clone(), stored: None })
    });
    Ok(named.collect())
}

/// What was found to be the model.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    /// Name of a GGUF file.
    Gguf(String),
    /// Prefix of the names of a Hugging Face folder: empty or ending in `/`.
    Folder(String),
}

impl Choice {
    /// How to name it under `file`.
    fn name(&self) -> &str {
        match self {
            Self::Gguf(name) => name,
            Self::Folder(prefix) => prefix.strip_suffix('/').unwrap_or("config.json"),
        }
    }
}

/// The one model among the files, or the one that `file` names.
fn choose(members: &Members, file: Option<&str>) -> Result<Choice> {
    let mut found: Vec<Choice> = members
        .keys()
        .filter_map(|name| {
            if name.ends_with(".gguf") {
                return Some(Choice::Gguf(name.clone()));
            }
            let prefix = name.strip_suffix("config.json")?;
            (prefix.is_empty() || prefix.ends_with('/')).then(|| Choice::Folder(prefix.to_owned()))
        })
        .collect();
    let names = |found: &[Choice]| {
        found.iter().map(|c| format!("`{}`", c.name())).collect::<Vec<_>>().join(", ")
    };
    if let Some(file) = file {
        let wanted = file.trim_end_matches("/config.json");
        let matching = |c: &Choice| {
            let name = c.name();
            name == wanted || name.strip_suffix(wanted).is_some_and(|rest| rest.ends_with('/'))
        };
        let (hits, others): (Vec<_>, Vec<_>) = found.into_iter().partition(matching);
        if hits.is_empty() {
            let near = nearest(file, others.iter().map(Choice::name));
            let hint = match near {
                Some(near) => format!("did you mean `{near}`?"),
                None if others.is_empty() => {
                    "there is neither a `.gguf` file nor a model folder".into()
                }
                None => format!("there are {}", names(&others)),
            };
            return Err(Error::new(format!("no model named `{file}`")).with_hint(hint));
        }
        found = hits;
    }
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(Error::new(format!("there is no model among {} files", members.len()))
            .with_hint("a model is a `.gguf` file or a folder with `config.json`")),
        n => Err(Error::new(format!("there are {n} models: {}", names(&found)))
            .with_hint("choose one with `file:`")),
    }
}

/// A model read and checked, ready to be written.
struct Loaded {
    config: ModelConfig,
    /// Small files by name.
    texts: BTreeMap<String, String>,
    /// Weight files by their name in the artifact.
    weights: BTreeMap<String, Member>,
    /// Storage types of the tensors.
    storage: BTreeSet<String>,
    /// Warnings for the user.
    notes: Vec<String>,
}

fn read_gguf(members: &Members, name: &str) -> Result<Loaded> {
    let member = member(members, name)?;
    if name.contains("-of-") {
        return Err(Error::new(format!("`{name}` is one part of a split GGUF file"))
            .with_hint("join the parts with `llama-gguf-split --merge`"));
    }
    let file = GgufFile::open(&member.path)?;
    let config = ModelConfig::from_gguf(&file)?;
    let tokenizer = gguf_tokenizer::from_gguf(&file)?;
    gguf_tokenizer::check(&tokenizer.tokenizer, config.vocab_size)?;
    let source = WeightSource::open_gguf(file)?;
    let idle = source.check_all(&config).with_context(|| format!("cannot use `{name}`"))?;

    let mut texts = BTreeMap::new();
    texts.insert("tokenizer.json".to_owned(), tokenizer.tokenizer);
    texts.insert("tokenizer_config.json".to_owned(), pretty(&tokenizer.config)?);
    texts.insert("generation_config.json".to_owned(), pretty(&generation_config(&config))?);
    if let Some(template) = tokenizer.chat_template {
        texts.insert("chat_template.jinja".to_owned(), template);
    }
    Ok(Loaded {
        storage: storage(&source, &config),
        weights: [(GGUF.to_owned(), member.clone())].into(),
        notes: idle_notes(&idle),
        config,
        texts,
    })
}

fn read_folder(members: &Members, prefix: &str) -> Result<Loaded> {
    // Only what lies directly in the folder belongs to the model.
    let folder: Members = members
        .iter()
        .filter_map(|(name, m)| Some((name.strip_prefix(prefix)?.to_owned(), m.clone())))
        .filter(|(name, _)| !name.contains('/'))
        .collect();
    let text = |name: &str| -> Result<Option<String>> {
        let member = folder.get(name);
        member.map(|m| Ok(fs_err::read_to_string(&m.path)?)).transpose()
    };
    let json = |name: &str| -> Result<Option<Value>> {
        let Some(text) = text(name)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).with_context(|| format!("cannot read `{name}`"))
    };
    let config = json("config.json")?.ok_or_else(|| Error::new("there is no `config.json`"))?;
    let (mut config, ignored) =
        ModelConfig::from_hf(&config).context("cannot use the model's `config.json`")?;
    let mut notes = Vec::new();
    if !ignored.is_empty() {
        notes.push(format!(
            "fields of `config.json` that {} does not read: {}",
            config.architecture.hf_name(),
            ignored.join(", ")
        ));
    }
    let tokenizer = text("tokenizer.json")?.ok_or_else(|| {
        Error::new("the model folder has no `tokenizer.json`")
            .with_hint("save the tokenizer with `AutoTokenizer.save_pretrained` of transformers")
    })?;
    gguf_tokenizer::check(&tokenizer, config.vocab_size)?;
    let mut tokenizer_config = json("tokenizer_config.json")?.unwrap_or_else(|| json!({}));
    let embedded_template = normalise_tokenizer_config(&mut tokenizer_config);
    let generation = match json("generation_config.json")? {
        Some(found) => {
            extend_eos(&mut config, &found);
            found
        }
        None => generation_config(&config),
    };

    let mut texts = BTreeMap::new();
    texts.insert("tokenizer.json".to_owned(), tokenizer);
    texts.insert("tokenizer_config.json".to_owned(), pretty(&tokenizer_config)?);
    texts.insert("generation_config.json".to_owned(), pretty(&generation)?);
    if let Some(template) = text("chat_template.jinja")?.or(embedded_template) {
        texts.insert("chat_template.jinja".to_owned(), template);
    }

    let view = Artifact {
        kind: ArtifactKind::Model,
        digest: Digest::of_bytes(&[]),
        files: folder
            .iter()
            .filter(|(name, _)| name.ends_with(".safetensors") || *name == INDEX)
            .map(|(name, m)| {
                let file =
                    ArtifactFile { digest: Digest::of_bytes(&[]), size: 0, path: m.path.clone() };
                (name.clone(), file)
            })
            .collect(),
        meta: Value::Null,
    };
    if view.files.is_empty() && folder.keys().any(|n| n.ends_with(".bin") || n.ends_with(".pth")) {
        return Err(Error::new("the model folder holds pickled weights, not safetensors")
            .with_hint("convert them with `save_pretrained(..., safe_serialization=True)`"));
    }
    let source = WeightSource::open(&view)?;
    notes.extend(idle_notes(&source.check_all(&config)?));
    let weights = view.files.keys().map(|name| Ok((name.clone(), member(&folder, name)?.clone())));
    Ok(Loaded {
        weights: weights.collect::<Result<_>>()?,
        storage: storage(&source, &config),
        config,
        texts,
        notes,
    })
}

fn member<'a>(members: &'a Members, name: &str) -> Result<&'a Member> {
    members.get(name).ok_or_else(|| Error::new(format!("there is no file `{name}`")))
}

fn pretty(value: &Value) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// Makes the special tokens plain strings (older files have objects) and takes out the chat
/// template, which gets a file of its own.
fn normalise_tokenizer_config(config: &mut Value) -> Option<String> {
    let map = config.as_object_mut()?;
    for name in ["bos_token", "eos_token", "pad_token", "unk_token"] {
        if let Some(content) = map.get(name).and_then(|t| t.get("content")).cloned() {
            map.insert(name.to_owned(), content);
        }
    }
    match map.remove("chat_template")? {
        Value::String(template) => Some(template),
        // A list of named templates.
        Value::Array(list) => list
            .iter()
            .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|t| t.get("template")?.as_str().map(str::to_owned)),
        _ => None,
    }
}

/// `generation_config.json` often knows more end tokens than `config.json`.
fn extend_eos(config: &mut ModelConfig, generation: &Value) {
    let eos = generation.get("eos_token_id");
    let ids = match eos {
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).collect(),
        Some(one) => one.as_u64().into_iter().collect(),
        None => Vec::new(),
    };
    for id in ids.into_iter().filter_map(|id| u32::try_from(id).ok()) {
        if !config.eos_token_ids.contains(&id) {
            config.eos_token_ids.push(id);
        }
    }
}

fn generation_config(config: &ModelConfig) -> Value {
    let full = config.to_hf();
    let mut out = json!({});
    for name in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        out[name] = full[name].clone();
    }
    out
}

fn storage(source: &WeightSource, config: &ModelConfig) -> BTreeSet<String> {
    // Norms are kept in f32 by every quantised format and say nothing.
    let matrices = config.tensors().into_iter().filter(|(_, shape)| shape.len() > 1);
    matrices.filter_map(|(name, _)| source.storage_type(&name)).collect()
}

fn idle_notes(idle: &[String]) -> Vec<String> {
    match idle {
        [] => Vec::new(),
        names => vec![format!("tensors that the model does not use: {}", names.join(", "))],
    }
}

fn describe(config: &ModelConfig, stored: &str) -> String {
    let rope = match config.rope_scaling {
        RopeScaling::None => String::new(),
        RopeScaling::Linear { factor } => format!(", linear scaling by {factor}"),
        RopeScaling::Llama3 { factor, .. } => format!(", llama3 scaling by {factor}"),
    };
    let tied = if config.tie_word_embeddings { "tied to the head" } else { "with its own head" };
    format!(
        "{}: {:.1} M parameters stored as {stored}, computed in {}\n\
         {} layers, width {}, MLP {}, {} query and {} key/value heads of {}\n\
         vocabulary {} {tied}, {} positions, RoPE θ {}{rope}",
        config.architecture.hf_name(),
        config.parameters() as f64 / 1e6,
        dtype_name(config.dtype),
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size,
        config.max_position_embeddings,
        config.rope_theta,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(names: &[&str]) -> Members {
        let member = Member { path: PathBuf::new(), stored: None };
        names.iter().map(|n| ((*n).to_owned(), member.clone())).collect()
    }

    #[test]
    fn the_only_model_is_found_wherever_it_lies() {
        let gguf = members(&["pkg/__init__.py", "pkg/a.gguf", "LICENSE"]);
        assert_eq!(choose(&gguf, None).unwrap(), Choice::Gguf("pkg/a.gguf".into()));
        let folder = members(&["config.json", "model.safetensors", "tokenizer_config.json"]);
        assert_eq!(choose(&folder, None).unwrap(), Choice::Folder(String::new()));
        let error = choose(&members(&["README.md"]), None).unwrap_err();
        assert!(error.chain().contains("no model among 1 files"));
    }

    #[test]
    fn several_models_need_a_choice() {
        let several = members(&["a.gguf", "x/config.json", "x/model.safetensors", "y/b.gguf"]);
        let error = choose(&several, None).unwrap_err();
        assert_eq!(error.chain(), "there are 3 models: `a.gguf`, `x`, `y/b.gguf`");
        assert_eq!(choose(&several, Some("b.gguf")).unwrap(), Choice::Gguf("y/b.gguf".into()));
        for name in ["x", "x/config.json"] {
            assert_eq!(choose(&several, Some(name)).unwrap(), Choice::Folder("x/".into()));
        }
        let error = choose(&several, Some("a.guff")).unwrap_err();
        assert_eq!(error.hint(), Some("did you mean `a.gguf`?"));
    }

    #[test]
    fn outside_files_are_named_from_their_common_folder() {
        let paths = ["/m/x/config.json", "/m/x/sub/a.bin"].map(PathBuf::from);
        let names: Vec<_> = outside(&paths).unwrap().into_keys().collect();
        assert_eq!(names, ["config.json", "sub/a.bin"]);
        let names: Vec<_> = outside(&paths[1..]).unwrap().into_keys().collect();
        assert_eq!(names, ["a.bin"]);
        assert!(outside(&[]).is_err());
    }

    #[test]
    fn special_tokens_become_strings_and_the_template_moves_out() {
        let mut config = json!({
            "bos_token": { "content": "<s>", "lstrip": false }, "eos_token": "</s>",
            "chat_template": [{ "name": "tool", "template": "t" },
                              { "name": "default", "template": "d" }],
        });
        assert_eq!(normalise_tokenizer_config(&mut config).as_deref(), Some("d"));
        assert_eq!(config, json!({ "bos_token": "<s>", "eos_token": "</s>" }));
    }

    #[test]
    fn remote_names_and_empty_ones_are_problems() {
        let model = |source: &str| Model {
            source: Some(source.into()),
            file: None,
            dtype: ComputeDtype::Float32,
        };
        assert_eq!(model("hf://org/name").validate().len(), 1);
        assert_eq!(model("").validate().len(), 1);
        assert!(model("models/x.gguf").validate().is_empty());
    }
}

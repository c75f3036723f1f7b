//! Keys of tasks as runs make them, from real files, folders and variables: whatever the result
//! depends on changes the key, and nothing else does.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lora_flow_core::{DeviceSpec, Digest};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::bench::Bench;
use crate::external::ExternalTask;
use crate::key::tests::{any_json, reversed};
use crate::plugin_manifest::PluginManifest;

/// What a task's result depends on.
#[derive(Debug, Clone)]
struct World {
    params: Value,
    text: Vec<u8>,
    input: Vec<u8>,
    files: Vec<Vec<u8>>,
    env: BTreeMap<String, String>,
    plugin: BTreeMap<String, Vec<u8>>,
}

/// What it does not depend on.
#[derive(Debug, Clone, Default)]
struct Around {
    names: String,
    folder: String,
    age: u64,
    cpu: usize,
    jobs: usize,
    retries: u32,
    timeout: Option<Duration>,
    reversed: bool,
}

const MANIFEST: &str = "protocol: 1\nname: p\nversion: 0.1.0\ncommand: [sh, main.sh]\ntasks:\n  work:\n    \
    inputs: { in: Files }\n    outputs: { out: Files }\n    params: { type: object, additionalProperties: true }\n";

/// The key that a run would look up.
fn key(world: &World, around: &Around) -> Digest {
    let mut bench = Bench::new();
    let root = bench.path(&format!("r{}", around.folder));
    bench.root = Some(root.clone());
    bench.name = format!("pipeline{}", around.names);
    bench.options.jobs = around.jobs;
    let write = |path: &Path, bytes: &[u8]| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        let time = SystemTime::now() - Duration::from_secs(around.age);
        fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
    };
    let plugin = root.join("plugin");
    write(&plugin.join("plugin.yaml"), MANIFEST.as_bytes());
    for (name, bytes) in &world.plugin {
        write(&plugin.join(name), bytes);
    }
    let names: Vec<String> =
        (0..world.files.len()).map(|i| format!("d{}/f{i}", around.folder)).collect();
    for (name, bytes) in names.iter().zip(&world.files) {
        write(&root.join(name), bytes);
    }

    let upstream = format!("a{}", around.names);
    let input = world.input.clone();
    bench.add_with(&upstream, json!({}), &[], move |cx| cx.output("out")?.write("text", &input));
    bench.run();
    let mut params = json!({ "any": world.params, "text": world.text });
    if around.reversed {
        params = reversed(&params);
    }
    let manifest = Arc::new(PluginManifest::load(&plugin).unwrap());
    let task = Arc::new(ExternalTask::new(manifest, 0, params.clone()));
    let edge = format!("in={upstream}");
    let work = bench.add_any(&format!("work{}", around.names), params, &[&edge], task);
    work.env = world.env.clone();
    work.resources.cpu = around.cpu;
    work.retries = around.retries;
    work.timeout = around.timeout;
    bench.reads(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let parts = bench.engine().key_parts(&bench.plan(), 1, &[], DeviceSpec::Cpu).unwrap();
    assert_eq!(parts.key.inputs["in"].len(), 1, "the input is known");
    parts.key.digest()
}

fn bytes(least: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), least..40)
}

fn worlds() -> impl Strategy<Value = World> {
    let env = prop::collection::btree_map("[A-Z]{1,4}", "[ -~]{1,8}", 1..3);
    let files = prop::collection::vec(bytes(1), 1..4);
    let plugin = prop::collection::btree_map("[a-z]{1,5}(/[a-z]{1,5}\\.sh)?", bytes(1), 1..3);
    // A name that is a file and a folder at once is no folder of files.
    let plugin = plugin.prop_map(|files: BTreeMap<String, Vec<u8>>| -> BTreeMap<_, _> {
        let free = |name: &String| {
            !name.starts_with("target/")
                && !files.keys().any(|o| o.starts_with(&format!("{name}/")))
        };
        files.iter().filter(|(name, _)| free(name)).map(|(k, v)| (k.clone(), v.clone())).collect()
    });
    (any_json(), bytes(1), bytes(1), files, env, plugin).prop_map(
        |(params, text, input, files, env, plugin)| World {
            params,
            text,
            input,
            files,
            env,
            plugin,
        },
    )
}

fn arounds() -> impl Strategy<Value = Around> {
    let limits = (0..100u64, 0..5usize, 1..5usize, 0..4u32, any::<bool>(), any::<bool>());
    ("[a-z]{0,6}", "[a-z]{0,6}", limits).prop_map(
        |(names, folder, (age, cpu, jobs, retries, timeout, reversed))| Around {
            names,
            folder,
            age: 1000 * age,
            cpu,
            jobs,
            retries,
            timeout: timeout.then(|| Duration::from_secs(retries.into())),
            reversed,
        },
    )
}

/// Changes one byte of one thing; says what, if there is such a thing.
fn change(
    world: &mut World,
    what: usize,
    which: prop::sample::Index,
    bit: u8,
) -> Option<&'static str> {
    let flip = |bytes: &mut Vec<u8>| {
        let at = which.index(bytes.len());
        bytes[at] ^= 1 << bit;
    };
    Some(match what {
        0 => {
            flip(&mut world.text);
            "a parameter"
        }
        1 => {
            flip(&mut world.input);
            "an input"
        }
        2 => {
            let at = which.index(world.files.len());
            flip(&mut world.files[at]);
            "a file"
        }
        3 => {
            let value = world.env.values_mut().next()?;
            let mut bytes = value.clone().into_bytes();
            // Stays ASCII.
            let at = which.index(bytes.len());
            bytes[at] ^= 1 << (bit % 7);
            *value = String::from_utf8(bytes).unwrap();
            "a variable"
        }
        4 => {
            flip(world.plugin.values_mut().next()?);
            "a plugin's file"
        }
        5 => {
            let (name, bytes) = world.plugin.pop_first()?;
            world.plugin.insert(format!("{name}x"), bytes);
            "the name of a plugin's file"
        }
        _ => {
            world.files.push(vec![0]);
            "the number of files"
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn what_does_not_matter_does_not_change_the_key(world in worlds(), around in arounds()) {
        prop_assert_eq!(key(&world, &Around { jobs: 1, ..Around::default() }), key(&world, &around));
    }

    #[test]
    fn any_changed_byte_changes_the_key(
        world in worlds(),
        what in 0..7usize,
        which in any::<prop::sample::Index>(),
        bit in 0..8u8,
    ) {
        let around = Around { jobs: 1, ..Around::default() };
        let mut changed = world.clone();
        if let Some(what) = change(&mut changed, what, which, bit) {
            prop_assert_ne!(key(&world, &around), key(&changed, &around), "{}", what);
        }
    }
}

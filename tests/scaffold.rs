//! `init` and `plugin new` make what works at once.

#[path = "support/mod.rs"]
mod support;

use support::{Project, write_model};

#[test]
fn a_new_pipeline_runs_and_with_a_model_it_is_whole() {
    let project = Project::empty();
    let made = project.expect(0, &["init", "first"]).stdout;
    assert!(made.contains("made first/pipeline.yaml") && made.contains("cd first"), "{made}");
    let checked = project.expect(0, &["check", "first/pipeline.yaml"]).stderr;
    assert!(checked.is_empty(), "{checked}");
    let ran = project.expect(0, &["run", "first/pipeline.yaml"]).stdout;
    assert!(ran.contains("rows 16") && !ran.contains("eval 0"), "{ran}");
    // Nothing of the user's is written over.
    let again = project.expect(2, &["init", "first"]).stderr;
    assert!(again.contains("`first/pipeline.yaml` is there already"), "{again}");

    write_model(&project.path("models/tiny"));
    project.expect(0, &["init", "whole", "--model", "models/tiny"]);
    let ran = project.run(&["run", "whole/pipeline.yaml", "--set", "steps=8"]);
    assert!([0, 3].contains(&ran.code), "{}\n{}", ran.stdout, ran.stderr);
    assert!(project.path("whole/out/adapter/adapter_model.safetensors").is_file());

    // The commented tasks are the same ones.
    let text = std::fs::read_to_string(project.path("first/pipeline.yaml")).unwrap();
    let (head, tail) = text.split_once("Remove the leading `# ` of each line.\n").unwrap();
    let tail: String = tail
        .lines()
        .map(|l| l.strip_prefix("# ").or(l.strip_prefix('#')).unwrap_or(l).to_owned() + "\n")
        .collect();
    project.write("first/pipeline.yaml", format!("{head}\n{tail}"));
    write_model(&project.path("first/models/base"));
    let checked = project.expect(0, &["check", "first/pipeline.yaml"]).stdout;
    assert!(checked.contains("10 tasks"), "{checked}");
    let here = project.expect(0, &["init"]).stdout;
    assert!(here.contains("made pipeline.yaml") && !here.contains("cd "), "{here}");
}

#[test]
fn a_new_python_plugin_runs_in_a_pipeline() {
    let project = Project::empty();
    project.expect(0, &["plugin", "new", "my-rows", "--lang", "python", "--dir", "plugins"]);
    let checked = project.expect(0, &["plugin", "check", "plugins/my-rows"]).stdout;
    assert!(checked.contains("my-rows: nothing → files (Files)"), "{checked}");
    let pipeline = "version: 1\nname: p\nplugins: [plugins/my-rows]\ntasks:\n  rows:\n    \
                    uses: my-rows\n    with: { rows: 5, text: é }\n  docs:\n    uses: ingest\n    \
                    inputs: { files: rows }\n    with: { text: text }\n";
    project.write("pipeline.yaml", pipeline);
    let ran = project.expect(0, &["run", "pipeline.yaml"]).stdout;
    assert!(ran.contains("rows 5"), "{ran}");

    let bug = "    raise lora_flow_plugin.PluginError(\"no rows\", \"ask for some\")\n";
    project.edit("plugins/my-rows/main.py", "def run(task):\n", &format!("def run(task):\n{bug}"));
    let failed = project.expect(1, &["run", "pipeline.yaml"]).stderr;
    assert!(failed.contains("no rows") && failed.contains("hint: ask for some"), "{failed}");
    project.edit("plugins/my-rows/main.py", bug, "    print('noise')\n    task.params[1]\n");
    let failed = project.expect(1, &["run", "pipeline.yaml"]).stderr;
    assert!(failed.contains("KeyError: 1"), "{failed}");
}

#[test]
fn plugin_check_reports_every_mistake_of_a_manifest_and_a_failed_build() {
    let project = Project::empty();
    project.expect(2, &["plugin", "new", "Shout", "--lang", "rust"]);
    project.expect(2, &["plugin", "new", "train", "--lang", "rust"]);
    project.expect(0, &["plugin", "new", "shout", "--lang", "rust"]);
    let manifest = "shout/plugin.yaml";
    project.edit(manifest, "[sh, build.sh]", "[sh, -c, \"exit 7\"]");
    let failed = project.expect(1, &["plugin", "check", "shout"]).stderr;
    assert!(failed.contains("the build of plugin `shout` ended with exit status: 7"), "{failed}");
    project.edit(manifest, "\"exit 7\"", "\"true\"");
    let missing = project.expect(1, &["plugin", "check", "shout"]).stderr;
    assert!(missing.contains("the program `{build}/shout` of `command` is not there"), "{missing}");
    project.edit(manifest, "\"true\"", "\"cp build.sh $LORA_FLOW_PLUGIN_BUILD/shout\"");
    project.expect(0, &["plugin", "check", "shout"]);
    project.edit(manifest, "protocol: 1", "protocol: 9");
    project.edit(manifest, "kind: Files", "kind: File");
    let wrong = project.expect(2, &["plugin", "check", "shout"]).stderr;
    assert!(wrong.contains("2 problems in shout/plugin.yaml"), "{wrong}");
}

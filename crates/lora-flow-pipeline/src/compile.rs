//! Pipeline file → [`Plan`]: every problem of the file is found here, before anything runs.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_flow_core::Digest;
use serde_json::{Map, Value};

use crate::expr::Scope;
use crate::kinds::{Kinds, Maker};
use crate::matrix::members;
use crate::member::{Member, member};
use crate::order;
use crate::overrides;
use crate::plan::{CompileOptions, InputEdge, Plan, PlannedTask, ResolvedFiles};
use crate::plugin_manifest::{PluginManifest, missing_manifest};
use crate::publish;
use crate::reader::suggest;
use crate::source::{Diagnostic, Diagnostics, Problems, SourceFile, Span};
use crate::spec::{self, Spec};
use crate::wiring::{Net, Wires};
use crate::{files, include, params};

/// Reads, checks and resolves a pipeline file.
///
/// # Errors
/// All problems of the file and of the plugins it names, in the order of their places.
pub fn compile(path: &Path, options: &CompileOptions) -> Result<Plan, Diagnostics> {
    let source = SourceFile::read(path).map_err(|d| Diagnostics::from(*d))?;
    compile_source(source, options)
}

/// [`compile`] for a text that has been read already.
///
/// # Errors
/// As [`compile`].
pub fn compile_source(
    source: Arc<SourceFile>,
    options: &CompileOptions,
) -> Result<Plan, Diagnostics> {
    let (tree, sources) = include::read(&source).map_err(|problems| {
        let mut problems = Diagnostics(problems);
        problems.sort(&source.path);
        problems
    })?;
    let mut problems = Problems::over(&sources);
    let spec = spec::read(&tree, &mut problems);
    let root = root(&source, &spec, &mut problems);

    let mut elsewhere = Vec::new();
    let mut parameters: Map<String, Value> =
        spec.params.iter().map(|(k, v)| (k.name.clone(), v.to_json())).collect();
    if let Some(path) = &options.params_file {
        overrides::apply_file(&mut parameters, path, &mut elsewhere);
    }
    overrides::apply(&mut parameters, &options.set, &mut elsewhere);
    let (kinds, plugins) = load_kinds(&root, &spec, options, &mut problems, &mut elsewhere);

    let declared_env: Vec<String> = spec.env.iter().map(|n| n.value.clone()).collect();
    let env: BTreeMap<String, String> = declared_env
        .iter()
        .filter_map(|name| Some((name.clone(), options.env.get(name)?.clone())))
        .collect();
    let used_params = RefCell::new(BTreeSet::new());
    let scope = Scope {
        params: &parameters,
        declared_env: &declared_env,
        env: &env,
        matrix: None,
        used_params: &used_params,
    };

    let members = make_members(&spec, &kinds, &scope, &mut problems);
    let net = Net::new(&members, spec.tasks.iter().map(|t| t.name.name.as_str()).collect());
    let wires: Vec<Wires> = (0..members.len()).map(|i| net.wire(i, &mut problems)).collect();
    order::report_cycles(&members, &wires, &mut problems);

    let wanted = select(&members, &wires, options, &mut elsewhere);
    let forced = forced(&members, &wires, &wanted, &options.from, &mut elsewhere);
    let resolved = resolve_files(&members, &wanted, &root, &mut problems);
    elsewhere.extend(shown_as(check_files(&members, &resolved), &root, &source.path));
    let published = publish::resolve(&members, &root, &mut problems);

    problems.found.iter_mut().for_each(|p| sources.localise(p));
    if !problems.found.is_empty() || !elsewhere.is_empty() {
        let mut all = Diagnostics(problems.found);
        all.0.extend(elsewhere);
        all.sort(&source.path);
        return Err(all);
    }
    let mut warnings = unused_params(&spec, &used_params.into_inner(), &sources.whole);
    warnings.iter_mut().for_each(|w| sources.localise(w));
    let plan = Plan {
        name: spec.name.clone().unwrap_or_else(|| stem(&source.path)),
        description: spec.description.clone(),
        root,
        warnings,
        tasks: assemble(&members, wires, &wanted, &forced, resolved, published, &options.env),
        params: Value::Object(parameters),
        plugins,
        env: declared(&spec, &env),
        source: sources.whole.clone(),
        sources,
    };
    Ok(plan)
}

fn declared(spec: &Spec, env: &BTreeMap<String, String>) -> Vec<(String, Option<Digest>, Span)> {
    let digest = |name| env.get(name).map(|value| Digest::of_bytes(value.as_bytes()));
    spec.env.iter().map(|n| (n.value.clone(), digest(&n.value), n.span)).collect()
}

fn stem(path: &Path) -> String {
    path.file_stem().map_or_else(|| "pipeline".to_owned(), |s| s.to_string_lossy().into_owned())
}

/// The folder that relative paths are taken from, absolute and without links.
fn root(source: &SourceFile, spec: &Spec, problems: &mut Problems) -> PathBuf {
    let folder = source.path.parent().filter(|p| !p.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let wanted = match &spec.root {
        Some(root) => folder.join(&root.value),
        None => folder.to_owned(),
    };
    match std::fs::canonicalize(&wanted) {
        Ok(path) if path.is_dir() => path,
        found => {
            if let Some(root) = &spec.root {
                let message = match found {
                    Ok(_) => format!("the root `{}` is not a folder", root.value),
                    Err(_) => format!("there is no folder `{}`", root.value),
                };
                let hint = "`root` is relative to the folder of the pipeline file".to_owned();
                problems.report(root.span, message, hint);
            }
            std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned())
        }
    }
}

/// The built-in kinds and those of the pipeline's plugins.
fn load_kinds(
    root: &Path,
    spec: &Spec,
    options: &CompileOptions,
    problems: &mut Problems,
    elsewhere: &mut Vec<Diagnostic>,
) -> (Kinds, Vec<Arc<PluginManifest>>) {
    let mut plugins = Vec::new();
    let mut kinds = Kinds::builtin(options.builtin);
    let mut seen: BTreeMap<PathBuf, Span> = BTreeMap::new();
    for plugin in &spec.plugins {
        let dir = files::normalise(&root.join(&plugin.value));
        if seen.insert(dir.clone(), plugin.span).is_some() {
            problems.report(plugin.span, format!("`{}` is listed twice", plugin.value), None);
            continue;
        }
        if let Some(problem) = missing_manifest(problems, plugin.span, &plugin.value, &dir) {
            problems.found.push(problem);
            kinds.incomplete = true;
            continue;
        }
        let manifest = match PluginManifest::load(&dir) {
            Ok(manifest) => Arc::new(manifest),
            Err(diagnostics) => {
                elsewhere.extend(shown_as(diagnostics, root, &problems.source.path));
                kinds.incomplete = true;
                continue;
            }
        };
        plugins.push(manifest.clone());
        for (i, kind) in manifest.kinds.iter().enumerate() {
            let taken = kinds.insert(&kind.name, Maker::Plugin(manifest.clone(), i));
            let owner = taken.map(|kind| match &kind.maker {
                Maker::Builtin(_) => "is built in".to_owned(),
                Maker::Plugin(other, _) => format!("is offered by the plugin `{}`", other.name),
            });
            if let Some(owner) = owner {
                let message = format!(
                    "the plugin `{}` offers the kind `{}`, which {owner} already",
                    manifest.name, kind.name
                );
                problems.report(plugin.span, message, "rename one of them".to_owned());
            }
        }
    }
    (kinds, plugins)
}

/// Problems of a file under the root, with its path as it looks from the pipeline file's side.
fn shown_as(diagnostics: Diagnostics, root: &Path, pipeline: &Path) -> Vec<Diagnostic> {
    let folder = pipeline.parent().unwrap_or(Path::new(""));
    let same =
        std::fs::canonicalize(if folder.as_os_str().is_empty() { Path::new(".") } else { folder })
            .is_ok_and(|f| f == root);
    let mut diagnostics = diagnostics.0;
    for diagnostic in &mut diagnostics {
        if let (true, Ok(below)) = (same, diagnostic.source.path.strip_prefix(root)) {
            let path = folder.join(below);
            diagnostic.source = SourceFile::new(path, diagnostic.source.text.clone());
        }
    }
    diagnostics
}

/// All tasks, each once for every combination of its matrix.
fn make_members<'a>(
    spec: &'a Spec,
    kinds: &'a Kinds,
    scope: &Scope,
    problems: &mut Problems,
) -> Vec<Member<'a>> {
    let mut all = Vec::new();
    for task in spec.tasks.iter().filter(|t| t.usable) {
        let kind = task.uses.as_ref().and_then(|uses| {
            let kind = kinds.get(&uses.value);
            if kind.is_none() && !kinds.incomplete {
                let hint = suggest(&uses.value, kinds.names(), "known kinds");
                problems.report(uses.span, format!("unknown kind `{}`", uses.value), hint);
            }
            kind
        });
        let Some(assignments) = members(task, scope, problems) else { continue };
        for assignment in assignments {
            all.push(member(task, kind, assignment, scope, problems));
        }
    }
    all
}

/// Which members the targets need; all without targets.
fn select(
    members: &[Member],
    wires: &[Wires],
    options: &CompileOptions,
    elsewhere: &mut Vec<Diagnostic>,
) -> Vec<bool> {
    if options.targets.is_empty() && options.until.is_empty() {
        return vec![true; members.len()];
    }
    let mut wanted = vec![false; members.len()];
    let mut open = Vec::new();
    for (option, names) in [("--target", &options.targets), ("--until", &options.until)] {
        open.extend(names.iter().flat_map(|name| named(members, option, name, elsewhere)));
    }
    while let Some(i) = open.pop() {
        if !std::mem::replace(&mut wanted[i], true) {
            open.extend(wires[i].waits.iter().map(|(producer, _)| *producer));
        }
    }
    wanted
}

/// Which wanted members are to run again: those named and all that wait for them.
fn forced(
    members: &[Member],
    wires: &[Wires],
    wanted: &[bool],
    from: &[String],
    elsewhere: &mut Vec<Diagnostic>,
) -> Vec<bool> {
    let mut forced = vec![false; members.len()];
    if from.is_empty() {
        return forced;
    }
    let mut consumers = vec![Vec::new(); members.len()];
    for (consumer, wires) in wires.iter().enumerate() {
        wires.waits.iter().for_each(|(producer, _)| consumers[*producer].push(consumer));
    }
    let mut open = Vec::new();
    for name in from {
        let found = named(members, "--from", name, elsewhere);
        if !found.is_empty() && !found.iter().any(|i| wanted[*i]) {
            let message = format!("`{name}` is not among the tasks that are wanted");
            let source = SourceFile::new("--from", name.as_str());
            let problem = Diagnostic::new(&source, Span::new(0, name.len()), message);
            let hint = "what `--target` and `--until` name does not need it";
            elsewhere.push(problem.with_hint(hint));
        }
        open.extend(found);
    }
    while let Some(i) = open.pop() {
        if wanted[i] && !std::mem::replace(&mut forced[i], true) {
            open.extend(&consumers[i]);
        }
    }
    forced
}

/// The members that an option means: one, or all of a matrix.
fn named(
    members: &[Member],
    option: &str,
    name: &str,
    elsewhere: &mut Vec<Diagnostic>,
) -> Vec<usize> {
    let means = |m: &Member| m.id == name || m.spec.name.name == name;
    let found: Vec<usize> = (0..members.len()).filter(|i| means(&members[*i])).collect();
    if found.is_empty() {
        let source = SourceFile::new(option, name);
        let mut known: Vec<&str> =
            members.iter().flat_map(|m| [m.spec.name.name.as_str(), m.id.as_str()]).collect();
        known.dedup();
        let hint = suggest(name, known, "the tasks are");
        let message = format!("there is no task `{name}`");
        let problem = Diagnostic::new(&source, Span::new(0, name.len()), message);
        elsewhere.push(problem.with_hint_opt(hint));
    }
    found
}

/// The outside files of all wanted members.
fn resolve_files(
    members: &[Member],
    wanted: &[bool],
    root: &Path,
    problems: &mut Problems,
) -> Vec<Vec<ResolvedFiles>> {
    let resolve = |(member, wanted): (&Member, &bool)| {
        let mut all = Vec::new();
        let configured = member.configured.as_ref().filter(|_| *wanted);
        for file in configured.map(|c| c.task.files()).unwrap_or_default() {
            match files::resolve(root, &file.pattern) {
                Ok(paths) => {
                    all.push(ResolvedFiles { pointer: file.pointer, pattern: file.pattern, paths })
                }
                Err((message, hint)) => {
                    let values = &member.places.values;
                    let span = crate::plan::nearest_span(values, &file.pointer)
                        .unwrap_or(member.spec.name.span);
                    problems.report(span, message, hint);
                }
            }
        }
        all
    };
    members.iter().zip(wanted).map(resolve).collect()
}

/// What the tasks say of the content of their files; each problem once, however many tasks have it.
fn check_files(members: &[Member], resolved: &[Vec<ResolvedFiles>]) -> Diagnostics {
    let mut all = Diagnostics::default();
    for (member, files) in members.iter().zip(resolved) {
        let Some(configured) = &member.configured else { continue };
        let files = files.iter().map(|f| (f.pointer.clone(), f.paths.clone())).collect();
        for problem in configured.task.check_files(&files) {
            let source = SourceFile::read(&problem.path).unwrap_or_else(|d| d.source.clone());
            let span = problem.bytes.map(|b| Span::new(b.start, b.end));
            let found = Diagnostic::new(&source, span, problem.message);
            all.push(found.with_hint_opt(problem.hint));
        }
    }
    all
}

fn unused_params(
    spec: &Spec,
    used: &BTreeSet<String>,
    source: &Arc<SourceFile>,
) -> Vec<Diagnostic> {
    let unused = spec.params.iter().filter(|(key, _)| !used.contains(&key.name));
    unused
        .map(|(key, _)| {
            let message = format!("the parameter `{}` is never used", key.name);
            let hint = format!("use it as `${{{{ params.{} }}}}`, or remove it", key.name);
            Diagnostic::new(source, key.span, message).with_hint(hint)
        })
        .collect()
}

/// The wanted members as planned tasks, in topological order.
fn assemble(
    members: &[Member],
    wires: Vec<Wires>,
    wanted: &[bool],
    forced: &[bool],
    resolved: Vec<Vec<ResolvedFiles>>,
    published: Vec<Vec<publish::Target>>,
    env: &BTreeMap<String, String>,
) -> Vec<PlannedTask> {
    let order = order::topological(&wires, wanted);
    let mut position = vec![usize::MAX; members.len()];
    order.iter().enumerate().for_each(|(at, member)| position[*member] = at);
    let mut parts: Vec<_> = wires.into_iter().zip(resolved).zip(published).map(Some).collect();
    let mut tasks = Vec::with_capacity(order.len());
    for i in order {
        let member = &members[i];
        // Without problems every member is configured and every position is known.
        let (Some(configured), Some(kind), Some(((wires, files), publish))) =
            (&member.configured, member.kind, parts[i].take())
        else {
            continue;
        };
        let inputs = wires.inputs.into_iter().map(|wire| InputEdge {
            port: wire.port,
            reference: wire.reference,
            task: position[wire.member],
            output: wire.output,
        });
        let mut needs: Vec<usize> = wires.needs.into_iter().map(|m| position[m]).collect();
        needs.sort_unstable();
        needs.dedup();
        let seen_env = match &kind.maker {
            Maker::Builtin(_) => BTreeMap::new(),
            Maker::Plugin(manifest, _) => {
                // All that it is given and may depend on, whether the pipeline names it or not.
                let given = |name: &String| Some((name.clone(), env.get(name)?.clone()));
                manifest.env.iter().filter_map(given).collect()
            }
        };
        tasks.push(PlannedTask {
            id: member.id.clone(),
            kind: kind.name.clone(),
            kind_version: kind.version(),
            task: configured.task.clone(),
            params: configured.params.clone(),
            inputs: inputs.collect(),
            needs,
            input_ports: configured.task.inputs(),
            outputs: configured.task.outputs(),
            files,
            publish: publish.iter().map(|(o, p, _)| (o.clone(), p.clone())).collect(),
            publish_spans: publish.iter().map(|(_, _, span)| *span).collect(),
            network: matches!(&kind.maker, Maker::Plugin(manifest, _) if manifest.network),
            env: seen_env,
            resources: member.resources,
            timeout: member.timeout,
            retries: member.retries,
            forced: forced[i],
            span: member.spec.name.span,
            param_spans: params::spans(&member.places),
        });
    }
    tasks
}

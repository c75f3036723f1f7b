//! Connects members: `inputs` and `needs` → edges, with their kinds checked.

use std::collections::{HashMap, HashSet};

use lora_flow_core::{ArtifactKind, Port, Ports};

use crate::matrix::text;
use crate::member::{InputSpec, Member};
use crate::reader::{At, list, suggest};
use crate::source::{Problems, Span};

/// The edges of one member; indexes are of members.
#[derive(Debug, Default)]
pub(crate) struct Wires {
    pub inputs: Vec<Wire>,
    pub needs: Vec<usize>,
    /// Every member it waits for and where that is written, also where the edge has a problem.
    pub waits: Vec<(usize, Span)>,
}

#[derive(Debug)]
pub(crate) struct Wire {
    pub port: String,
    pub reference: String,
    pub member: usize,
    pub output: String,
}

/// All members, by the name of their task.
pub(crate) struct Net<'a> {
    members: &'a [Member<'a>],
    by_task: HashMap<&'a str, Vec<usize>>,
    /// Task names in the order of the file.
    names: Vec<&'a str>,
    known: HashSet<&'a str>,
}

/// `task`, `task.output`, `task[r=8]`, `task[r=8].output`.
struct Reference<'a> {
    task: &'a str,
    /// Axis and value, as text.
    selection: Vec<(&'a str, &'a str)>,
    output: Option<&'a str>,
}

impl<'a> Reference<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (head, selection, rest) = match text.split_once('[') {
            Some((head, rest)) => {
                let (selection, rest) = rest.rsplit_once(']')?;
                let pairs = selection.split(',').map(|pair| pair.trim().split_once('='));
                (head, pairs.collect::<Option<Vec<_>>>()?, rest)
            }
            None => match text.split_once('.') {
                Some((head, _)) => (head, Vec::new(), &text[head.len()..]),
                None => (text, Vec::new(), ""),
            },
        };
        let output = match rest.strip_prefix('.') {
            Some(output) => Some(output),
            None if rest.is_empty() => None,
            None => return None,
        };
        Some(Self { task: head, selection, output })
    }
}

/// What an input port takes.
struct Takes<'a> {
    port: &'a str,
    kinds: &'a [ArtifactKind],
    many: bool,
}

impl<'a> Net<'a> {
    /// `names` are those of all tasks of the file, also of those without members.
    pub fn new(members: &'a [Member<'a>], names: Vec<&'a str>) -> Self {
        let mut by_task: HashMap<&str, Vec<usize>> = HashMap::new();
        for (i, member) in members.iter().enumerate() {
            by_task.entry(member.spec.name.name.as_str()).or_default().push(i);
        }
        let known = names.iter().copied().collect();
        Self { members, by_task, names, known }
    }

    /// Connects one member.
    pub fn wire(&self, consumer: usize, problems: &mut Problems) -> Wires {
        let mut wires = Wires::default();
        let Some(member) = self.members.get(consumer) else { return wires };
        let ports = member.configured.as_ref().map(|c| c.task.inputs());
        for input in &member.inputs {
            self.input(member, input, ports.as_ref(), &mut wires, problems);
        }
        for need in &member.spec.needs {
            self.need(member, need, &mut wires, problems);
        }
        if let Some(ports) = ports {
            self.missing(member, &ports, problems);
            let order = |port: &str| ports.ports.iter().position(|p| p.name == port);
            wires.inputs.sort_by_key(|w| order(&w.port).unwrap_or(usize::MAX));
        }
        wires
    }

    fn input(
        &self,
        member: &Member,
        input: &InputSpec,
        ports: Option<&Ports>,
        wires: &mut Wires,
        problems: &mut Problems,
    ) {
        let task = &member.spec.name.name;
        let port = ports.map(|ports| (ports, ports.get(&input.port.name)));
        let takes = match port {
            None => None,
            Some((_, Some(port))) => {
                Some(Takes { port: &port.name, kinds: &port.kinds, many: port.many })
            }
            Some((ports, None)) if !ports.any_name.is_empty() => {
                Some(Takes { port: &input.port.name, kinds: &ports.any_name, many: false })
            }
            Some((ports, None)) => {
                let known = ports.ports.iter().map(|p| p.name.as_str());
                let hint = suggest(&input.port.name, known, "its inputs");
                let hint = hint.or_else(|| Some("it takes no inputs".to_owned()));
                let message = format!("`{task}` has no input `{}`", input.port.name);
                problems.report(input.port.span, message, hint);
                None
            }
        };
        if let Some(takes) = takes.as_ref().filter(|t| input.list && !t.many) {
            let message = format!("the input `{}` takes one artifact, found a list", takes.port);
            problems.report(input.span, message, None);
            return;
        }
        for reference in &input.references {
            let Some(parsed) = self.parse(reference, problems) else { continue };
            let Some(producers) = self.producers(member, &parsed, reference, problems) else {
                continue;
            };
            wires.waits.extend(producers.iter().map(|p| (*p, reference.span)));
            let Some(takes) = &takes else { continue };
            if producers.len() > 1 && !takes.many {
                self.too_many(member, takes.port, &producers, reference, problems);
                continue;
            }
            for producer in producers {
                let output = self.output(producer, &parsed, reference, takes, problems);
                let Some(output) = output else { continue };
                let id = &self.members[producer].id;
                let shown = match parsed.output {
                    Some(output) => format!("{id}.{output}"),
                    None => id.clone(),
                };
                wires.inputs.push(Wire {
                    port: takes.port.to_owned(),
                    reference: shown,
                    member: producer,
                    output,
                });
            }
        }
    }

    fn need(&self, member: &Member, need: &At<String>, wires: &mut Wires, problems: &mut Problems) {
        let Some(parsed) = self.parse(need, problems) else { return };
        if let Some(output) = parsed.output {
            problems.report(
                need.span,
                format!("`needs` names tasks, found `{}`", need.value),
                format!("write `{}` without `.{output}`", parsed.task),
            );
            return;
        }
        if let Some(producers) = self.producers(member, &parsed, need, problems) {
            wires.waits.extend(producers.iter().map(|p| (*p, need.span)));
            wires.needs.extend(producers);
        }
    }

    fn parse<'r>(
        &self,
        reference: &'r At<String>,
        problems: &mut Problems,
    ) -> Option<Reference<'r>> {
        let Some(parsed) = Reference::parse(&reference.value) else {
            problems.report(
                reference.span,
                format!("`{}` is not a reference to a task", reference.value),
                "write `task`, `task.output` or `task[axis=value]`".to_owned(),
            );
            return None;
        };
        if self.known.contains(parsed.task) {
            return Some(parsed);
        }
        let hint = suggest(parsed.task, self.names.iter().copied(), "the tasks are");
        let message = format!("there is no task `{}`", parsed.task);
        problems.report(reference.span, message, hint);
        None
    }

    /// The members that a reference stands for: of a matrix those that agree with the consumer
    /// in all axes that both have, and with the selection. None if there is none, which is
    /// reported, or if the matrix of the producer has a problem, which has been.
    fn producers(
        &self,
        consumer: &Member,
        parsed: &Reference,
        reference: &At<String>,
        problems: &mut Problems,
    ) -> Option<Vec<usize>> {
        let all = self.by_task.get(parsed.task)?;
        let first = self.members.get(*all.first()?)?;
        for (axis, _) in &parsed.selection {
            let axes = || first.assignment.iter().map(|(k, _)| k.as_str());
            if !axes().any(|k| k == *axis) {
                let hint = suggest(axis, axes(), "its axes");
                let hint = hint.or_else(|| Some(format!("`{}` has no matrix", parsed.task)));
                let message = format!("the matrix of `{}` has no axis `{axis}`", parsed.task);
                problems.report(reference.span, message, hint);
                return None;
            }
        }
        let agrees = |producer: &Member| {
            producer.assignment.iter().all(|(axis, value)| {
                match parsed.selection.iter().find(|(k, _)| k == axis) {
                    Some((_, wanted)) => text(value) == *wanted,
                    None => consumer
                        .assignment
                        .iter()
                        .find(|(k, _)| k == axis)
                        .is_none_or(|(_, own)| text(own) == text(value)),
                }
            })
        };
        let found: Vec<usize> = all.iter().copied().filter(|i| agrees(&self.members[*i])).collect();
        if found.is_empty() {
            let members = all.iter().map(|i| self.members[*i].id.as_str());
            let message = if parsed.selection.is_empty() {
                format!("no member of `{}` fits `{}`", parsed.task, consumer.id)
            } else {
                format!("there is no member `{}`", reference.value)
            };
            problems.report(
                reference.span,
                message,
                format!("its members are {}", list(members, "and")),
            );
            return None;
        }
        Some(found)
    }

    fn too_many(
        &self,
        member: &Member,
        port: &str,
        producers: &[usize],
        reference: &At<String>,
        problems: &mut Problems,
    ) {
        let one = producers.first().map_or("", |p| self.members[*p].id.as_str());
        let message = format!(
            "`{}` stands for {} tasks of a matrix, but the input `{port}` takes one artifact",
            reference.value,
            producers.len()
        );
        let hint = format!(
            "name one, such as `{one}`, or give `{}` the same `matrix`",
            member.spec.name.name
        );
        problems.report(reference.span, message, hint);
    }

    /// The output of a producer that a reference means, of a kind that the port takes.
    fn output(
        &self,
        producer: usize,
        parsed: &Reference,
        reference: &At<String>,
        takes: &Takes,
        problems: &mut Problems,
    ) -> Option<String> {
        let producer = self.members.get(producer)?;
        let outputs = producer.configured.as_ref()?.task.outputs();
        let task = &producer.spec.name.name;
        let fits = |port: &Port| port.kinds.iter().any(|k| takes.kinds.contains(k));
        let wanted = kinds(takes.kinds);
        if let Some(name) = parsed.output {
            let Some(output) = outputs.get(name) else {
                let known = outputs.ports.iter().map(|p| p.name.as_str());
                let hint = suggest(name, known, "its outputs");
                problems.report(reference.span, format!("`{task}` has no output `{name}`"), hint);
                return None;
            };
            if !fits(output) {
                let message = format!(
                    "the input `{}` takes {wanted}, but `{}` is {}",
                    takes.port,
                    reference.value,
                    kinds(&output.kinds)
                );
                let hint = self.makers(takes.kinds);
                problems.report(reference.span, message, hint);
                return None;
            }
            return Some(output.name.clone());
        }
        let fitting: Vec<&Port> = outputs.ports.iter().filter(|p| fits(p)).collect();
        match fitting.as_slice() {
            [only] => Some(only.name.clone()),
            [] => {
                let made: Vec<ArtifactKind> =
                    outputs.ports.iter().flat_map(|p| p.kinds.clone()).collect();
                let message = format!(
                    "the input `{}` takes {wanted}, but `{task}` makes {}",
                    takes.port,
                    kinds(&made)
                );
                problems.report(reference.span, message, self.makers(takes.kinds));
                None
            }
            several => {
                let names: Vec<String> =
                    several.iter().map(|p| format!("{}.{}", reference.value, p.name)).collect();
                let message = format!("`{}` has several outputs that fit here", reference.value);
                problems.report(reference.span, message, format!("write {}", list(names, "or")));
                None
            }
        }
    }

    /// Reports the required inputs that are not connected.
    fn missing(&self, member: &Member, ports: &Ports, problems: &mut Problems) {
        for port in ports.ports.iter().filter(|p| p.required) {
            let given = member.inputs.iter().find(|i| i.port.name == port.name);
            let task = &member.spec.name.name;
            match given {
                None => {
                    // A port with a misspelt name has been reported; this would be an echo.
                    let misspelt = member.inputs.iter().any(|i| {
                        ports.get(&i.port.name).is_none()
                            && lora_flow_core::nearest(&i.port.name, [port.name.as_str()]).is_some()
                    });
                    if misspelt || (member.spec.inputs.is_some() && member.inputs.is_empty()) {
                        continue;
                    }
                    let message =
                        format!("`{task}` needs the input `{}`, {}", port.name, kinds(&port.kinds));
                    let makers = self.makers(&port.kinds);
                    let hint = makers.unwrap_or_else(|| {
                        format!("no task of the pipeline makes {}", kinds(&port.kinds))
                    });
                    problems.report(member.spec.name.span, message, hint);
                }
                Some(input) if input.references.is_empty() => {
                    let message = format!("the input `{}` of `{task}` is empty", port.name);
                    problems.report(input.port.span, message, None);
                }
                Some(_) => {}
            }
        }
        let empty = ports.ports.iter().all(|p| !p.required) && !ports.any_name.is_empty();
        if empty && member.spec.inputs.is_none() && ports.ports.is_empty() {
            let message = format!("`{}` needs at least one input", member.spec.name.name);
            problems.report(
                member.spec.name.span,
                message,
                format!("its inputs have any name and take {}", kinds(&ports.any_name)),
            );
        }
    }

    /// The tasks that make an artifact of one of some kinds, as a hint.
    fn makers(&self, wanted: &[ArtifactKind]) -> Option<String> {
        let mut found: Vec<String> = Vec::new();
        for member in self.members {
            let Some(configured) = &member.configured else { continue };
            let outputs = configured.task.outputs();
            let fitting: Vec<&Port> = outputs
                .ports
                .iter()
                .filter(|p| p.kinds.iter().any(|k| wanted.contains(k)))
                .collect();
            let task = &member.spec.name.name;
            let names = match fitting.as_slice() {
                [] => continue,
                [_] => vec![task.clone()],
                several => several.iter().map(|p| format!("{task}.{}", p.name)).collect(),
            };
            names.into_iter().for_each(|n| {
                if !found.contains(&n) {
                    found.push(n);
                }
            });
        }
        let makes = if found.len() == 1 { "is" } else { "are" };
        (!found.is_empty()).then(|| {
            format!("{} {makes} {}", list(&found, "and"), kinds_plural(wanted, found.len()))
        })
    }
}

/// `a Model`, `a Dataset or Files`.
fn kinds(kinds: &[ArtifactKind]) -> String {
    let mut names: Vec<String> = Vec::new();
    for kind in kinds {
        let name = match kind {
            ArtifactKind::Adapter => format!("an {kind}"),
            ArtifactKind::Tokens | ArtifactKind::Metrics | ArtifactKind::Files => kind.to_string(),
            _ => format!("a {kind}"),
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if names.is_empty() { "nothing".to_owned() } else { names.join(" or ") }
}

fn kinds_plural(wanted: &[ArtifactKind], count: usize) -> String {
    if count == 1 {
        return kinds(wanted);
    }
    let names: Vec<String> = wanted.iter().map(ToString::to_string).collect();
    format!("of kind {}", names.join(" or "))
}

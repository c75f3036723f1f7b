//! The order of tasks: cycles refused, the rest topological and otherwise as in the file.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use petgraph::algo::tarjan_scc;
use petgraph::graph::DiGraph;

use crate::member::Member;
use crate::source::{Problems, Span};
use crate::wiring::Wires;

/// Reports every group of tasks that wait for each other, once, with one cycle through it.
pub(crate) fn report_cycles(members: &[Member], wires: &[Wires], problems: &mut Problems) {
    let mut graph: DiGraph<(), ()> = DiGraph::new();
    let nodes: Vec<_> = members.iter().map(|_| graph.add_node(())).collect();
    for (consumer, wires) in wires.iter().enumerate() {
        for (producer, _) in &wires.waits {
            graph.add_edge(nodes[consumer], nodes[*producer], ());
        }
    }
    let mut cycles: Vec<(Span, String, String)> = Vec::new();
    for group in tarjan_scc(&graph) {
        let group: Vec<usize> = group.into_iter().map(|n| n.index()).collect();
        let cycle = cycle_through(&group, wires);
        if cycle.is_empty() {
            continue;
        }
        let place = |span: Span| problems.place(span);
        let name = |i: usize| members[i].id.as_str();
        let mut path = String::new();
        let mut steps = Vec::new();
        for (consumer, producer, span) in &cycle {
            path.push_str(&format!("`{}` → ", name(*consumer)));
            let (consumer, producer) = (name(*consumer), name(*producer));
            steps.push(format!("`{consumer}` takes `{producer}` at {}", place(*span)));
        }
        let (first, _, span) = cycle[0];
        path.push_str(&format!("`{}`", name(first)));
        let message = if cycle.len() == 1 {
            format!("`{}` waits for itself", name(first))
        } else {
            format!("these tasks wait for each other: {path}")
        };
        cycles.push((span, message, steps.join(", ")));
    }
    cycles.sort_by_key(|c| c.0);
    // The members of a matrix have the same cycle, at the same place.
    cycles.dedup_by_key(|c| c.0);
    for (span, message, hint) in cycles {
        problems.report(span, message, hint);
    }
}

/// The steps (consumer, producer, place) of the shortest cycle through the first task of a
/// strongly connected group; empty if the group is one task that does not wait for itself.
fn cycle_through(group: &[usize], wires: &[Wires]) -> Vec<(usize, usize, Span)> {
    let Some(start) = group.iter().copied().min() else { return Vec::new() };
    if group.len() == 1 && wires[start].waits.iter().all(|(producer, _)| *producer != start) {
        return Vec::new();
    }
    let mut came_from: Vec<Option<(usize, Span)>> = vec![None; wires.len()];
    let mut queue = std::collections::VecDeque::from([start]);
    while let Some(at) = queue.pop_front() {
        for (next, span) in &wires[at].waits {
            if !group.contains(next) || came_from[*next].is_some() {
                continue;
            }
            came_from[*next] = Some((at, *span));
            if *next == start {
                let mut steps = Vec::new();
                let mut node = start;
                while let Some((before, span)) = came_from[node] {
                    steps.push((before, node, span));
                    node = before;
                    if node == start {
                        break;
                    }
                }
                steps.reverse();
                return steps;
            }
            queue.push_back(*next);
        }
    }
    Vec::new()
}

/// The wanted members, each after all it waits for, otherwise in their order.
pub(crate) fn topological(wires: &[Wires], wanted: &[bool]) -> Vec<usize> {
    let mut waiting = vec![0usize; wires.len()];
    let mut consumers: Vec<Vec<usize>> = vec![Vec::new(); wires.len()];
    let chosen = || (0..wires.len()).filter(|i| wanted[*i]);
    for consumer in chosen() {
        for (producer, _) in &wires[consumer].waits {
            waiting[consumer] += 1;
            consumers[*producer].push(consumer);
        }
    }
    let mut ready: BinaryHeap<Reverse<usize>> =
        chosen().filter(|i| waiting[*i] == 0).map(Reverse).collect();
    let mut order = Vec::new();
    while let Some(Reverse(next)) = ready.pop() {
        order.push(next);
        for consumer in &consumers[next] {
            waiting[*consumer] -= 1;
            if waiting[*consumer] == 0 {
                ready.push(Reverse(*consumer));
            }
        }
    }
    order
}

//! A plan as a self-contained SVG: tasks in layers from left to right, in the reader's colours.
//!
//! The layout is Sugiyama's in its simplest form. A task stands one layer to the right of the last
//! one that it waits for; an edge over several layers gets a waypoint in each; the order within a
//! layer comes from sweeps that put everything at the mean place of its neighbours; and heights
//! from pulling towards those neighbours as far as the order leaves room.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::{edge_label, order_only};
use crate::plan::Plan;
use crate::record::{RunEdge, RunRecord};
use crate::run::{State, Status, TaskStatus};

/// Sweeps over the layers, there and back. More change nothing that one would see.
const SWEEPS: usize = 8;

/// Sizes in pixels.
const CHARACTER: f64 = 7.4;
const SMALL_CHARACTER: f64 = 6.2;
const PADDING: f64 = 14.0;
const HEIGHT: f64 = 46.0;
/// Room for an edge with its label at the task that it enters.
const ENTRY: f64 = 17.0;
const GAP: f64 = 18.0;
const WAYPOINT: f64 = 10.0;
const MARGIN: f64 = 20.0;

/// Longer names are cut; the whole one is in the tooltip.
const LONGEST_NAME: usize = 36;

/// Plain colours and then those for the dark: not every program that shows SVG knows variables.
const STYLE: &str = "\
text{font-family:ui-sans-serif,system-ui,sans-serif;font-size:13px;fill:#1f2328}\
.page{fill:#fff}.task text{text-anchor:middle}.port{text-anchor:end}.task .name{font-weight:600}\
.task .kind,.small{font-size:11px;fill:#59636e}\
.port{paint-order:stroke;stroke:#fff;stroke-width:3px}\
.task rect{fill:#f6f8fa;stroke:#d1d9e0;stroke-width:1.5}\
.cached rect{fill:#dafbe1;stroke:#1a7f37}.will rect{fill:#ddf4ff;stroke:#0969da}\
.may rect{fill:#fff8c5;stroke:#9a6700}\
.blocked rect{fill:#ffebe9;stroke:#cf222e;stroke-dasharray:5 3}\
.out rect{fill:none;stroke-dasharray:2 2}\
.line{fill:none;stroke:#818b98;stroke-width:1.3}.order{stroke-dasharray:4 3}.tip{fill:#818b98}\
@media (prefers-color-scheme:dark){text{fill:#f0f6fc}.page{fill:#0d1117}\
.task .kind,.small{fill:#9198a1}.port{stroke:#0d1117}.task rect{fill:#151b23;stroke:#3d444d}\
.cached rect{fill:#12261e;stroke:#3fb950}.will rect{fill:#121d2f;stroke:#4493f8}\
.may rect{fill:#272115;stroke:#d29922}.blocked rect{fill:#25171c;stroke:#f85149}\
.out rect{fill:none}.line{stroke:#656c76}.tip{fill:#656c76}}";

/// Draws a plan. Tasks are coloured by what `states` says of them; those it does not name are grey.
pub fn svg(plan: &Plan, states: &[TaskStatus]) -> String {
    let mut picture = Picture::of(plan, states);
    picture.arrange();
    picture.draw(&plan.name, if states.is_empty() { &[] } else { &PLANNED })
}

/// Draws a run: the tasks of its record, coloured by how they ended, with the times they took.
pub fn run_svg(record: &RunRecord) -> String {
    let mut picture = Picture::of_run(record);
    picture.arrange();
    picture.draw(&record.report.name, &ENDED)
}

/// Legend of a plan: class and word.
const PLANNED: [(&str, &str); 4] =
    [("cached", "cached"), ("will", "will run"), ("may", "may run"), ("blocked", "blocked")];

/// Legend of a run.
const ENDED: [(&str, &str); 4] =
    [("cached", "cached"), ("will", "ran"), ("may", "did not run"), ("blocked", "failed, denied")];

/// A box, or a waypoint of an edge.
struct Node {
    /// None for a waypoint.
    content: Option<Content>,
    layer: usize,
    /// Place within its layer.
    rank: usize,
    width: f64,
    height: f64,
    x: f64,
    /// Of its middle.
    y: f64,
}

struct Content {
    name: String,
    kind: String,
    class: &'static str,
    tooltip: String,
}

struct Edge {
    /// Nodes from the producer over waypoints to the consumer.
    path: Vec<usize>,
    label: String,
    /// Mere order, no data.
    order_only: bool,
}

struct Picture {
    nodes: Vec<Node>,
    edges: Vec<Edge>,
    layers: Vec<Vec<usize>>,
}

impl Picture {
    fn of(plan: &Plan, states: &[TaskStatus]) -> Self {
        let states: BTreeMap<&str, &State> =
            states.iter().map(|s| (s.id.as_str(), &s.state)).collect();
        let mut picture = Self { nodes: Vec::new(), edges: Vec::new(), layers: Vec::new() };
        for task in &plan.tasks {
            // What it waits for stands before it in the plan, and so has its layer.
            let upstream = task.upstream();
            let layer = upstream.iter().map(|i| picture.nodes[*i].layer + 1).max().unwrap_or(0);
            let state = states.get(task.id.as_str());
            let mut tooltip = format!("{} ({})", task.id, task.kind);
            if let Some(state) = state {
                let _ = write!(tooltip, ": {}", state.word());
                for reason in state.reasons() {
                    let _ = write!(tooltip, "\n{reason}");
                }
            }
            let content = Content {
                name: short(&task.id),
                kind: if task.id == task.kind { String::new() } else { short(&task.kind) },
                class: state.map_or("", |s| class(s)),
                tooltip,
            };
            picture.add(content, layer, task.inputs.len());
        }
        for (i, task) in plan.tasks.iter().enumerate() {
            for edge in &task.inputs {
                let label = edge_label(plan, edge.task, &edge.output, &edge.port);
                picture.connect(edge.task, i, short(&label), false);
            }
            for before in order_only(plan, i) {
                picture.connect(before, i, String::new(), true);
            }
            for (_, path) in &task.publish {
                let shown = path.strip_prefix(&plan.root).unwrap_or(path).display().to_string();
                let content = Content {
                    name: short(&shown),
                    kind: String::new(),
                    class: "out",
                    tooltip: format!("{} is published to {shown}", task.id),
                };
                let folder = picture.add(content, picture.nodes[i].layer + 1, 1);
                picture.connect(i, folder, String::new(), false);
            }
        }
        picture
    }

    fn of_run(record: &RunRecord) -> Self {
        let tasks = &record.report.tasks;
        let index: BTreeMap<&str, usize> =
            tasks.iter().enumerate().map(|(i, t)| (t.id.as_str(), i)).collect();
        let ends = |edge: &RunEdge| Some((*index.get(&*edge.from)?, *index.get(&*edge.to)?));
        let mut picture = Self { nodes: Vec::new(), edges: Vec::new(), layers: Vec::new() };
        for (i, task) in tasks.iter().enumerate() {
            let entering: Vec<usize> =
                record.edges.iter().filter_map(ends).filter(|e| e.1 == i).map(|e| e.0).collect();
            // Tasks stand in the order of the plan: what it waited for has its layer.
            let before = entering.iter().filter(|from| **from < i);
            let layer = before.map(|from| picture.nodes[*from].layer + 1).max().unwrap_or(0);
            let (class, note) = match &task.status {
                Status::Ran => ("will", format!("{:.1} s", task.wall.as_secs_f64())),
                Status::Cached => ("cached", "cached".to_owned()),
                Status::Failed => ("blocked", "failed".to_owned()),
                Status::Denied { .. } => ("blocked", "denied".to_owned()),
                Status::Skipped(_) => ("may", "skipped".to_owned()),
                Status::Cancelled => ("may", "cancelled".to_owned()),
            };
            let content = Content {
                name: short(&task.id),
                kind: format!("{} · {note}", short(&task.kind)),
                class,
                tooltip: format!("{} ({}): {note}", task.id, task.kind),
            };
            picture.add(content, layer, entering.len());
        }
        for edge in &record.edges {
            if let Some((from, to)) = ends(edge).filter(|(from, to)| from < to) {
                let label = edge.port.as_deref().map(short).unwrap_or_default();
                picture.connect(from, to, label, edge.port.is_none());
            }
        }
        picture
    }

    fn arrange(&mut self) {
        self.place_waypoints();
        self.order();
        self.set_heights();
        self.set_columns();
    }

    fn add(&mut self, content: Content, layer: usize, entries: usize) -> usize {
        let width = text_width(&content.name, CHARACTER)
            .max(text_width(&content.kind, SMALL_CHARACTER))
            + 2.0 * PADDING;
        let height = HEIGHT.max(ENTRY * entries as f64 + 10.0);
        self.push(Some(content), layer, width, height)
    }

    fn push(&mut self, content: Option<Content>, layer: usize, width: f64, height: f64) -> usize {
        let node = Node { content, layer, rank: 0, width, height, x: 0.0, y: 0.0 };
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn connect(&mut self, from: usize, to: usize, label: String, order_only: bool) {
        self.edges.push(Edge { path: vec![from, to], label, order_only });
    }

    fn place_waypoints(&mut self) {
        for e in 0..self.edges.len() {
            let (from, to) = (self.edges[e].path[0], self.edges[e].path[1]);
            let between = self.nodes[from].layer + 1..self.nodes[to].layer;
            let points: Vec<usize> =
                between.map(|layer| self.push(None, layer, 0.0, WAYPOINT)).collect();
            self.edges[e].path.splice(1..1, points);
        }
        let count = self.nodes.iter().map(|n| n.layer + 1).max().unwrap_or(0);
        self.layers = vec![Vec::new(); count];
        for (i, node) in self.nodes.iter_mut().enumerate() {
            node.rank = self.layers[node.layer].len();
            self.layers[node.layer].push(i);
        }
    }

    /// Neighbours of each node one layer to the left and one to the right.
    fn neighbours(&self) -> (Vec<Vec<usize>>, Vec<Vec<usize>>) {
        let mut left = vec![Vec::new(); self.nodes.len()];
        let mut right = vec![Vec::new(); self.nodes.len()];
        for pair in self.edges.iter().flat_map(|e| e.path.windows(2)) {
            left[pair[1]].push(pair[0]);
            right[pair[0]].push(pair[1]);
        }
        (left, right)
    }

    fn order(&mut self) {
        let (left, right) = self.neighbours();
        for sweep in 0..SWEEPS {
            let forward = sweep % 2 == 0;
            let towards = if forward { &left } else { &right };
            for step in 0..self.layers.len() {
                let layer = if forward { step } else { self.layers.len() - 1 - step };
                let mean = |node: &usize| {
                    let ranks = towards[*node].iter().map(|n| self.nodes[*n].rank as f64);
                    let count = towards[*node].len();
                    match count {
                        0 => self.nodes[*node].rank as f64,
                        _ => ranks.sum::<f64>() / count as f64,
                    }
                };
                let mut keyed: Vec<(f64, usize)> =
                    self.layers[layer].iter().map(|n| (mean(n), *n)).collect();
                keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
                self.layers[layer] = keyed.into_iter().map(|(_, n)| n).collect();
                for (rank, node) in self.layers[layer].iter().enumerate() {
                    self.nodes[*node].rank = rank;
                }
            }
        }
    }

    fn set_heights(&mut self) {
        let (left, right) = self.neighbours();
        for layer in 0..self.layers.len() {
            self.pull(layer, &vec![Vec::new(); self.nodes.len()]);
        }
        for sweep in 0..SWEEPS {
            let forward = sweep % 2 == 0;
            for step in 0..self.layers.len() {
                let layer = if forward { step } else { self.layers.len() - 1 - step };
                self.pull(layer, if forward { &left } else { &right });
            }
        }
        let top = self.nodes.iter().map(|n| n.y - n.height / 2.0).fold(f64::INFINITY, f64::min);
        for node in &mut self.nodes {
            node.y += MARGIN - top;
        }
    }

    /// Moves a layer's nodes to the mean height of their neighbours, then apart again so that none
    /// overlap, and the whole so that on average nobody is moved.
    fn pull(&mut self, layer: usize, neighbours: &[Vec<usize>]) {
        let wanted: Vec<f64> = self.layers[layer]
            .iter()
            .map(|n| match neighbours[*n].len() {
                0 => self.nodes[*n].y,
                count => {
                    neighbours[*n].iter().map(|o| self.nodes[*o].y).sum::<f64>() / count as f64
                }
            })
            .collect();
        let mut bottom = f64::NEG_INFINITY;
        let mut moved = 0.0;
        for (node, wanted) in self.layers[layer].iter().zip(&wanted) {
            let node = &mut self.nodes[*node];
            node.y = wanted.max(bottom + node.height / 2.0);
            bottom = node.y + node.height / 2.0 + GAP;
            moved += node.y - wanted;
        }
        let back = moved / wanted.len().max(1) as f64;
        for node in &self.layers[layer] {
            self.nodes[*node].y -= back;
        }
    }

    fn set_columns(&mut self) {
        let mut x = MARGIN;
        for layer in 0..self.layers.len() {
            if layer > 0 {
                x += 46.0 + self.label_room(layer);
            }
            let widest =
                self.layers[layer].iter().map(|n| self.nodes[*n].width).fold(0.0, f64::max);
            for node in &self.layers[layer] {
                self.nodes[*node].x = x;
                if self.nodes[*node].content.is_some() {
                    self.nodes[*node].width = widest;
                }
            }
            x += widest;
        }
    }

    /// Width of the longest label at a task of a layer.
    fn label_room(&self, layer: usize) -> f64 {
        let enters = |e: &&Edge| e.path.last().is_some_and(|n| self.nodes[*n].layer == layer);
        let widths = self.edges.iter().filter(enters);
        widths.map(|e| text_width(&e.label, SMALL_CHARACTER)).fold(0.0, f64::max)
    }

    fn draw(&self, name: &str, legend: &[(&str, &str)]) -> String {
        let right = self.nodes.iter().map(|n| n.x + n.width).fold(0.0, f64::max) + MARGIN;
        let bottom = self.nodes.iter().map(|n| n.y + n.height / 2.0).fold(0.0, f64::max) + MARGIN;
        let (right, foot) = if legend.is_empty() { (right, 0.0) } else { (right.max(440.0), 26.0) };
        let (width, height) = (right.max(2.0 * MARGIN).ceil(), (bottom + foot).ceil());
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             width=\"{width}\" height=\"{height}\" role=\"img\">\n<title>{}</title>\n\
             <style>{STYLE}</style>\n<rect class=\"page\" width=\"100%\" height=\"100%\"/>\n",
            escape(name)
        );
        self.draw_edges(&mut out);
        for node in &self.nodes {
            draw_box(node, &mut out);
        }
        draw_legend(legend, height - MARGIN, &mut out);
        out.push_str("</svg>\n");
        out
    }

    fn draw_edges(&self, out: &mut String) {
        // Edges enter a task one below the other, in the order of where they come from.
        let mut entering: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (e, edge) in self.edges.iter().enumerate() {
            entering.entry(edge.path[edge.path.len() - 1]).or_default().push(e);
        }
        for (to, mut edges) in entering {
            let from = |e: &usize| self.nodes[self.edges[*e].path[self.edges[*e].path.len() - 2]].y;
            edges.sort_by(|a, b| from(a).total_cmp(&from(b)));
            let target = &self.nodes[to];
            let first = target.y - ENTRY * (edges.len() - 1) as f64 / 2.0;
            for (slot, e) in edges.iter().enumerate() {
                self.draw_edge(&self.edges[*e], first + ENTRY * slot as f64, out);
            }
        }
    }

    fn draw_edge(&self, edge: &Edge, entry: f64, out: &mut String) {
        let start = &self.nodes[edge.path[0]];
        let end = &self.nodes[edge.path[edge.path.len() - 1]];
        let (mut x, mut y) = (start.x + start.width, start.y);
        let mut line = format!("M{x:.1} {y:.1}");
        // The label lies on a straight piece before the task.
        let straight = text_width(&edge.label, SMALL_CHARACTER) + 10.0;
        let column = |n: &usize| self.layers[self.nodes[*n].layer].iter();
        for point in &edge.path[1..edge.path.len() - 1] {
            let widest = column(point).map(|n| self.nodes[*n].width).fold(0.0, f64::max);
            let node = &self.nodes[*point];
            curve(&mut line, (x, y), (node.x, node.y));
            x = node.x + widest;
            y = node.y;
            let _ = write!(line, "H{x:.1}");
        }
        curve(&mut line, (x, y), (end.x - straight, entry));
        let _ = write!(line, "H{:.1}", end.x - 5.0);
        let class = if edge.order_only { "line order" } else { "line" };
        let _ = writeln!(out, "<path class=\"{class}\" d=\"{line}\"/>");
        let tip = end.x;
        let _ = writeln!(out, "<path class=\"tip\" d=\"M{tip:.1} {entry:.1}l-7 -3.5v7z\"/>");
        if !edge.label.is_empty() {
            let (x, y) = (end.x - 9.0, entry - 4.0);
            let label = escape(&edge.label);
            let _ = writeln!(
                out,
                "<text class=\"small port\" x=\"{x:.1}\" y=\"{y:.1}\">{label}</text>"
            );
        }
    }
}

fn curve(line: &mut String, from: (f64, f64), to: (f64, f64)) {
    let middle = (from.0 + to.0) / 2.0;
    let _ =
        write!(line, "C{middle:.1} {:.1} {middle:.1} {:.1} {:.1} {:.1}", from.1, to.1, to.0, to.1);
}

fn draw_box(node: &Node, out: &mut String) {
    let Some(content) = &node.content else { return };
    let (x, y) = (node.x, node.y - node.height / 2.0);
    let middle = node.x + node.width / 2.0;
    let _ = writeln!(
        out,
        "<g class=\"task {}\"><title>{}</title><rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" \
         height=\"{:.1}\" rx=\"6\"/>",
        content.class,
        escape(&content.tooltip),
        node.width,
        node.height
    );
    let one_line = content.kind.is_empty();
    let baseline = if one_line { node.y + 4.5 } else { node.y - 3.0 };
    let _ = write!(
        out,
        "<text class=\"name\" x=\"{middle:.1}\" y=\"{baseline:.1}\">{}</text>",
        escape(&content.name)
    );
    if !one_line {
        let _ = write!(
            out,
            "<text class=\"kind\" x=\"{middle:.1}\" y=\"{:.1}\">{}</text>",
            node.y + 13.0,
            escape(&content.kind)
        );
    }
    out.push_str("</g>\n");
}

fn draw_legend(states: &[(&str, &str)], y: f64, out: &mut String) {
    for (i, (class, word)) in states.iter().enumerate() {
        let x = MARGIN + 95.0 * i as f64;
        let _ = writeln!(
            out,
            "<g class=\"task {class}\"><rect x=\"{x}\" y=\"{:.1}\" width=\"12\" height=\"12\" rx=\"3\"/></g>\
             <text class=\"small\" x=\"{}\" y=\"{y:.1}\">{word}</text>",
            y - 10.0,
            x + 18.0
        );
    }
}

fn class(state: &State) -> &'static str {
    match state {
        State::Cached | State::CachedRemote => "cached",
        State::Stale(_) => "will",
        State::Open(_) => "may",
        State::Blocked(_) => "blocked",
    }
}

fn short(name: &str) -> String {
    match name.char_indices().nth(LONGEST_NAME) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}

/// About how wide a text is; East Asian characters count twice.
fn text_width(text: &str, character: f64) -> f64 {
    text.chars().map(|c| if c >= '\u{1100}' && c != '…' { 1.7 } else { 1.0 }).sum::<f64>()
        * character
}

/// Text as XML holds it. Characters that XML has no place for are left out.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => out.push(c),
        }
    }
    out
}

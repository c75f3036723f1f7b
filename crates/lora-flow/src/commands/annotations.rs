//! `run --ci`: what did not hold, at the line of the pipeline file that asks for it.
//!
//! On GitHub as workflow commands, which it shows beside the line of a pull request; on GitLab as a
//! code quality report, which it shows in a merge request's diff.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

use lora_flow_core::Result;
use lora_flow_pipeline::{Plan, RunReport, Status};
use serde_json::{Value, json};

use crate::commands::verdict::Verdict;

/// Where GitLab's report goes; the job names it under `artifacts: reports: codequality`.
const CODE_QUALITY: &str = "gl-code-quality-report.json";

/// A remark at a line.
struct Note {
    /// Whether it made the run fail.
    error: bool,
    title: String,
    message: String,
    place: (PathBuf, usize, usize),
}

/// Tells the CI system that runs this, if it is one that shows remarks at lines.
pub fn write(plan: &Plan, report: &RunReport, verdicts: &[Verdict<'_>]) -> Result<()> {
    let set = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty() && v != "false");
    let (github, gitlab) = (set("GITHUB_ACTIONS"), set("GITLAB_CI"));
    if !github && !gitlab {
        return Ok(());
    }
    let notes = notes(plan, report, verdicts);
    if github {
        // GitHub reads commands from both streams; standard output is for results.
        notes.iter().for_each(|note| eprintln!("{}", command(note)));
    }
    if gitlab {
        let issues: Vec<Value> = notes.iter().map(issue).collect();
        fs_err::write(CODE_QUALITY, serde_json::to_string_pretty(&issues)? + "\n")?;
    }
    Ok(())
}

fn notes(plan: &Plan, report: &RunReport, verdicts: &[Verdict<'_>]) -> Vec<Note> {
    let planned = |id: &str| plan.tasks.iter().find(|t| t.id == id);
    let mut out = Vec::new();
    for verdict in verdicts {
        let Some(task) = planned(&verdict.task.id) else { continue };
        for rule in verdict.rules().filter(|r| r.outcome() != "pass") {
            // A member of a matrix may have made the rule from an expression; its place is the task's.
            let place = plan.place(task.param_span(rule.text("pointer")));
            out.push(Note {
                error: rule.blocks(),
                title: format!("{}: {}", verdict.task.id, rule.outcome()),
                message: format!("{}: {}", rule.text("rule"), rule.text("found")),
                place,
            });
        }
    }
    for task in &report.tasks {
        let (Status::Failed, Some(error), Some(planned)) =
            (&task.status, &task.error, planned(&task.id))
        else {
            continue;
        };
        out.push(Note {
            error: true,
            title: format!("{} failed", task.id),
            message: error.message.clone(),
            place: plan.place(planned.span),
        });
    }
    out
}

/// A path from the repository's root, which is where CI jobs start.
fn relative(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(here).unwrap_or(path).display().to_string()
}

/// `::error file=…,line=…,col=…,title=…::message`, with what would end a part escaped.
fn command(note: &Note) -> String {
    let text = |s: &str| s.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A");
    let property = |s: &str| text(s).replace(':', "%3A").replace(',', "%2C");
    let (path, line, column) = &note.place;
    format!(
        "::{} file={},line={line},col={column},title={}::{}",
        if note.error { "error" } else { "warning" },
        property(&relative(path)),
        property(&note.title),
        text(&note.message)
    )
}

/// An issue of GitLab's code quality format. The fingerprint stays the same while the rule and its
/// line do, so that GitLab can tell new ones from old ones.
fn issue(note: &Note) -> Value {
    let (path, line, _) = &note.place;
    let mut hasher = DefaultHasher::new();
    (relative(path), line, &note.title).hash(&mut hasher);
    json!({
        "description": format!("{}: {}", note.title, note.message),
        "check_name": "lora-flow",
        "fingerprint": format!("{:016x}", hasher.finish()),
        "severity": if note.error { "major" } else { "minor" },
        "location": { "path": relative(path), "lines": { "begin": line } },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_escape_what_would_end_them() {
        let note = Note {
            error: true,
            title: "gate: fail, again".into(),
            message: "50 % less\nthan `x`: no".into(),
            place: ("p,1.yaml".into(), 12, 5),
        };
        assert_eq!(
            command(&note),
            "::error file=p%2C1.yaml,line=12,col=5,title=gate%3A fail%2C again::50 %25 less%0Athan `x`: no"
        );
        let issue = issue(&note);
        assert_eq!(issue["location"], json!({ "path": "p,1.yaml", "lines": { "begin": 12 } }));
        assert_eq!(issue["severity"], "major");
    }
}

//! `lora-flow run --ci`: what a CI system reads of a run, as JUnit XML and as a Markdown summary.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use lora_flow_core::{Result, ResultExt};
use lora_flow_pipeline::{RunReport, Status, TaskOutcome};

use crate::commands::run;
use crate::table::duration;

/// Where the XML goes unless the user says: CI systems collect reports from the working folder.
pub const JUNIT: &str = "lora-flow-junit.xml";

/// GitHub drops a step's summary above 1,024 KiB; the rest is room for what the step itself adds.
const SUMMARY_LIMIT: usize = 1000 * 1024;

/// One table or error in a summary takes at most this much.
const BLOCK_LIMIT: usize = 64 * 1024;

/// Writes the XML, and the summary if GitHub asks for one.
pub fn write(report: &RunReport, junit_path: &Path) -> Result<()> {
    if let Some(parent) = junit_path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs_err::create_dir_all(parent)?;
    }
    fs_err::write(junit_path, junit(report)).context("cannot write the JUnit report")?;
    let Some(path) = std::env::var_os("GITHUB_STEP_SUMMARY").filter(|path| !path.is_empty()) else {
        return Ok(());
    };
    let there = std::fs::metadata(&path).map_or(0, |meta| meta.len() as usize);
    let text = summary(report, SUMMARY_LIMIT.saturating_sub(there));
    let mut file = fs_err::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .context("cannot write the summary that `GITHUB_STEP_SUMMARY` names")?;
    Ok(file.write_all(text.as_bytes())?)
}

/// One test suite for the run and one test case for each task.
fn junit(report: &RunReport) -> String {
    let count = |wanted: fn(&Status) -> bool| {
        report.tasks.iter().filter(|task| wanted(&task.status)).count()
    };
    let counts = format!(
        r#"tests="{}" failures="{}" errors="{}" skipped="{}" time="{}""#,
        report.tasks.len(),
        count(|s| matches!(s, Status::Failed | Status::Denied { .. })),
        count(|s| matches!(s, Status::Cancelled)),
        count(|s| matches!(s, Status::Skipped(_))),
        seconds(report.wall),
    );
    let name = escape(&report.name);
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(out, "<testsuites name=\"lora-flow\" {counts}>");
    // JUnit's schema wants the time without a zone.
    let started = escape(report.started.trim_end_matches('Z'));
    let _ = writeln!(out, "  <testsuite name=\"{name}\" timestamp=\"{started}\" {counts}>");
    for task in &report.tasks {
        let _ = write!(
            out,
            "    <testcase classname=\"{name}\" name=\"{}\" time=\"{}\"",
            escape(&task.id),
            seconds(task.wall)
        );
        let body = case_body(task);
        if body.is_empty() {
            out.push_str("/>\n");
        } else {
            let _ = writeln!(out, ">\n{body}    </testcase>");
        }
    }
    out.push_str("  </testsuite>\n</testsuites>\n");
    out
}

fn case_body(task: &TaskOutcome) -> String {
    let element = |tag: &str, message: &str, kind: &str, text: &str| {
        format!(
            "      <{tag} message=\"{}\" type=\"{kind}\">{}</{tag}>\n",
            escape(message),
            escape_text(text)
        )
    };
    match &task.status {
        Status::Failed => {
            let (message, text) = failure(task);
            element("failure", &message, "failed", &text)
        }
        Status::Denied { .. } => {
            let message = task.denied.as_deref().unwrap_or("the gate says no");
            element("failure", message, "denied", &task.report)
        }
        Status::Skipped(why) => format!("      <skipped message=\"{}\"/>\n", escape(why)),
        Status::Cancelled => element("error", "the run was stopped", "cancelled", ""),
        Status::Ran | Status::Cached => {
            let out = run::result(task);
            let out = if task.status == Status::Cached { format!("cached · {out}") } else { out };
            let out = out.trim_end_matches(" · ");
            if out.is_empty() {
                return String::new();
            }
            format!("      <system-out>{}</system-out>\n", escape_text(out))
        }
    }
}

/// The message of a failed task, and with its hint and the place of its log.
fn failure(task: &TaskOutcome) -> (String, String) {
    let Some(error) = &task.error else { return ("failed".to_owned(), String::new()) };
    let mut text = error.message.clone();
    if let Some(hint) = &error.hint {
        let _ = write!(text, "\nhint: {hint}");
    }
    let _ = write!(text, "\nlog: {}", error.log.display());
    (error.message.clone(), text)
}

fn seconds(time: Duration) -> String {
    format!("{:.3}", time.as_secs_f64())
}

/// What XML 1.0 cannot hold, not even escaped, such as the codes of terminal colours.
fn sound(c: char) -> char {
    match c {
        '\t' | '\n' | '\r' => c,
        '\0'..='\x1f' | '\u{fffe}' | '\u{ffff}' => '\u{fffd}',
        c => c,
    }
}

/// Text between tags.
fn escape_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars().map(sound) {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"), // `]]>` must not stand in text
            '\r' => out.push_str("&#13;"),
            c => out.push(c),
        }
    }
    out
}

/// The value of an attribute, whose line breaks a parser would make spaces.
fn escape(text: &str) -> String {
    escape_text(text).replace('"', "&quot;").replace('\n', "&#10;").replace('\t', "&#9;")
}

/// The run in Markdown, in at most `limit` bytes: what does not fit is left out, and that is said.
fn summary(report: &RunReport, limit: usize) -> String {
    const CUT: &str = "\n… cut: GitHub shows no more than 1 MiB of a step's summary\n";
    let outcome = match report.exit_code() {
        0 => "✅ done",
        3 => "⛔ a gate said no",
        130 => "⚪ cancelled",
        _ => "❌ failed",
    };
    let mut blocks = vec![format!(
        "## {}: {outcome}\n\nRun `{}`, {}.\n\n| task | kind | state | time | result |\n|---|---|---|---:|---|\n",
        cell(&report.name),
        report.run_id,
        duration(report.wall)
    )];
    for task in &report.tasks {
        let time = if task.wall.is_zero() { String::new() } else { duration(task.wall) };
        blocks.push(format!(
            "| {} | {} | {} | {time} | {} |\n",
            cell(&task.id),
            cell(&task.kind),
            run::state(task),
            cell(&run::result(task))
        ));
    }
    for task in &report.tasks {
        let text = match &task.status {
            Status::Failed => failure(task).1,
            _ if task.kind == "gate" || matches!(task.status, Status::Denied { .. }) => {
                task.report.clone()
            }
            _ => continue,
        };
        if !text.is_empty() {
            blocks.push(format!("\n### {}\n\n{}", cell(&task.id), fenced(&text)));
        }
    }
    let room = limit.saturating_sub(CUT.len() + 1);
    let mut out = String::new();
    for block in blocks {
        if out.len() + block.len() > room {
            if limit > CUT.len() {
                out.push_str(CUT);
            }
            break;
        }
        out.push_str(&block);
    }
    // Whatever the step appends next starts on its own line.
    if !out.is_empty() {
        out.push('\n');
    }
    out
}

/// Text for one cell of a table.
fn cell(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.replace('\\', "\\\\")
        .replace('|', "\\|")
        .replace('<', "&lt;")
        .replace('*', "\\*")
        .replace('_', "\\_")
        .replace('[', "\\[")
}

/// Text as it is, between fences longer than any in it.
fn fenced(text: &str) -> String {
    let mut end = text.len().min(BLOCK_LIMIT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let more = if end < text.len() { "\n… cut" } else { "" };
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat((longest + 1).max(3));
    format!("{fence}text\n{}{more}\n{fence}\n", text[..end].trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_flow_pipeline::ErrorRecord;

    fn task(id: &str, status: Status) -> TaskOutcome {
        TaskOutcome {
            id: id.to_owned(),
            kind: "train".to_owned(),
            status,
            key: None,
            wall: Duration::from_millis(1500),
            reasons: Vec::new(),
            report: String::new(),
            summary: Vec::new(),
            outputs: Default::default(),
            error: None,
            denied: None,
            published: Vec::new(),
        }
    }

    fn report(tasks: Vec<TaskOutcome>) -> RunReport {
        RunReport {
            run_id: "20260101-000000-0001".to_owned(),
            name: "p".to_owned(),
            started: "2026-01-01T00:00:00Z".to_owned(),
            wall: Duration::from_secs(2),
            tasks,
        }
    }

    #[test]
    fn xml_holds_what_xml_cannot() {
        let mut failed = task("a[r=\"<8>\"]", Status::Failed);
        failed.error = Some(ErrorRecord {
            message: "`x` < 3 && \u{1b}[31mred ]]>\nsecond \"line\"".to_owned(),
            hint: Some("a & b".to_owned()),
            log: "a.log".into(),
        });
        let skipped = task("b", Status::Skipped("needs `a`".to_owned()));
        let mut denied = task("g", Status::Denied { cached: true });
        denied.denied = Some("1 rule of 1 failed".to_owned());
        denied.report = "candidate.perplexity < 3   FAILS\n".to_owned();
        let xml = junit(&report(vec![failed, skipped, denied, task("c", Status::Ran)]));
        assert!(
            xml.contains(r#"tests="4" failures="2" errors="0" skipped="1" time="2.000""#),
            "{xml}"
        );
        assert!(xml.contains(r#"name="a[r=&quot;&lt;8&gt;&quot;]" time="1.500""#), "{xml}");
        assert!(xml.contains("message=\"`x` &lt; 3 &amp;&amp; \u{fffd}[31mred ]]&gt;&#10;second &quot;line&quot;\""), "{xml}");
        assert!(xml.contains("second \"line\"\nhint: a &amp; b\nlog: a.log</failure>"), "{xml}");
        assert!(xml.contains("<skipped message=\"needs `a`\"/>"), "{xml}");
        assert!(
            xml.contains("type=\"denied\">candidate.perplexity &lt; 3   FAILS\n</failure>"),
            "{xml}"
        );
        assert!(xml.contains("name=\"c\" time=\"1.500\"/>"), "{xml}");
        assert!(!xml.contains('\u{1b}'));
    }

    #[test]
    fn a_summary_keeps_its_table_whole_and_its_size_below_the_limit() {
        let mut gate = task("gate", Status::Denied { cached: false });
        gate.report = format!("a ```` fence\n{}", "é".repeat(BLOCK_LIMIT));
        let mut failed = task("a|b", Status::Skipped("x | y\nz".to_owned()));
        failed.summary = vec![("loss".to_owned(), "1".to_owned())];
        let report = report(vec![failed, gate]);
        let text = summary(&report, SUMMARY_LIMIT);
        assert!(text.contains("| a\\|b | train | skipped | 1.5 s | x \\| y z |\n"), "{text}");
        assert!(text.contains("\n`````text\na ```` fence\n") && text.contains("\n… cut\n`````\n"));
        assert!(text.len() < BLOCK_LIMIT + 2000);
        for limit in [0, 10, 100, 500, 70_000] {
            assert!(summary(&report, limit).len() <= limit, "{limit}");
        }
        assert!(summary(&report, 500).contains("… cut: GitHub"));
    }
}

//! `lora-flow run --ci`: what a CI system reads of a run, as JUnit XML and as a Markdown summary.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use lora_flow_core::{Result, ResultExt};
use lora_flow_pipeline::{RunReport, Status, TaskOutcome};

use crate::commands::run;
use crate::commands::verdict::{Rule, Verdict};
use crate::table::duration;

/// Where the XML goes unless the user says: CI systems collect reports from the working folder.
pub const JUNIT: &str = "lora-flow-junit.xml";

/// GitHub drops a step's summary above 1,024 KiB; the rest is room for what the step itself adds.
const SUMMARY_LIMIT: usize = 1000 * 1024;

/// One table or error in a summary takes at most this much.
const BLOCK_LIMIT: usize = 64 * 1024;

/// Writes the XML, and the summary if GitHub asks for one.
pub fn write(report: &RunReport, verdicts: &[Verdict<'_>], junit_path: &Path) -> Result<()> {
    if let Some(parent) = junit_path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs_err::create_dir_all(parent)?;
    }
    fs_err::write(junit_path, junit(report, verdicts)).context("cannot write the JUnit report")?;
    let Some(path) = std::env::var_os("GITHUB_STEP_SUMMARY").filter(|path| !path.is_empty()) else {
        return Ok(());
    };
    let there = std::fs::metadata(&path).map_or(0, |meta| meta.len() as usize);
    let text = summary(report, verdicts, SUMMARY_LIMIT.saturating_sub(there));
    let mut file = fs_err::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .context("cannot write the summary that `GITHUB_STEP_SUMMARY` names")?;
    Ok(file.write_all(text.as_bytes())?)
}

/// A test suite for the run, with a case for each task, and one for each gate, with a case for each
/// of its rules.
fn junit(report: &RunReport, verdicts: &[Verdict<'_>]) -> String {
    let name = escape(&report.name);
    let mut counts = Counts { seconds: report.wall.as_secs_f64(), ..Counts::default() };
    let mut cases = String::new();
    for task in &report.tasks {
        counts.tests += 1;
        match &task.status {
            Status::Failed | Status::Denied { .. } => counts.failures += 1,
            Status::Cancelled => counts.errors += 1,
            Status::Skipped(_) => counts.skipped += 1,
            Status::Ran | Status::Cached => {}
        }
        push_case(&mut cases, &report.name, &task.id, task.wall, &case_body(task));
    }
    // JUnit's schema wants the time without a zone.
    let started = escape(report.started.trim_end_matches('Z'));
    let mut suites = String::new();
    let suite = |out: &mut String, name: &str, counts: &Counts, cases: &str| {
        let _ =
            writeln!(out, "  <testsuite name=\"{name}\" timestamp=\"{started}\" {}>", counts.xml());
        out.push_str(cases);
        out.push_str("  </testsuite>\n");
    };
    suite(&mut suites, &name, &counts, &cases);
    for verdict in verdicts {
        let mut own = Counts::default();
        let mut cases = String::new();
        let class = format!("{}.{}", report.name, verdict.task.id);
        for rule in verdict.rules() {
            own.tests += 1;
            own.failures += usize::from(rule.blocks());
            push_case(&mut cases, &class, rule.text("rule"), Duration::ZERO, &rule_body(&rule));
        }
        suite(&mut suites, &escape(&class), &own, &cases);
        counts.add(&own);
    }
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(out, "<testsuites name=\"lora-flow\" {}>", counts.xml());
    out.push_str(&suites);
    out.push_str("</testsuites>\n");
    out
}

#[derive(Default)]
struct Counts {
    tests: usize,
    failures: usize,
    errors: usize,
    skipped: usize,
    seconds: f64,
}

impl Counts {
    fn xml(&self) -> String {
        let Self { tests, failures, errors, skipped, seconds } = self;
        format!(
            r#"tests="{tests}" failures="{failures}" errors="{errors}" skipped="{skipped}" time="{seconds:.3}""#
        )
    }

    fn add(&mut self, other: &Self) {
        self.tests += other.tests;
        self.failures += other.failures;
    }
}

fn push_case(out: &mut String, class: &str, name: &str, time: Duration, body: &str) {
    let (class, name, time) = (escape(class), escape(name), seconds(time));
    let _ = write!(out, "    <testcase classname=\"{class}\" name=\"{name}\" time=\"{time}\"");
    if body.is_empty() {
        out.push_str("/>\n");
    } else {
        let _ = writeln!(out, ">\n{body}    </testcase>");
    }
}

/// A rule that made the gate say no is a failure; a warning, or an open question that does not block,
/// has passed and says so.
fn rule_body(rule: &Rule<'_>) -> String {
    let (outcome, found) = (rule.outcome(), rule.text("found"));
    if rule.blocks() {
        let text = serde_json::to_string_pretty(&rule.json["details"]).unwrap_or_default();
        return element("failure", found, outcome, &text);
    }
    let mark = if outcome == "pass" { String::new() } else { format!("{outcome}: ") };
    format!("      <system-out>{}</system-out>\n", escape_text(&format!("{mark}{found}")))
}

fn element(tag: &str, message: &str, kind: &str, text: &str) -> String {
    format!(
        "      <{tag} message=\"{}\" type=\"{kind}\">{}</{tag}>\n",
        escape(message),
        escape_text(text)
    )
}

fn case_body(task: &TaskOutcome) -> String {
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
fn summary(report: &RunReport, verdicts: &[Verdict<'_>], limit: usize) -> String {
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
    for verdict in verdicts {
        blocks.extend(verdict_tables(verdict));
    }
    for task in &report.tasks {
        let told = verdicts.iter().any(|v| v.task.id == task.id);
        let text = match &task.status {
            Status::Failed => failure(task).1,
            Status::Denied { .. } if !told => task.report.clone(),
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

/// A gate's rules, and the results that they compare before and after.
fn verdict_tables(verdict: &Verdict<'_>) -> Vec<String> {
    let word = if verdict.json["passed"] == true { "✅ says yes" } else { "⛔ says no" };
    let mut out = vec![format!(
        "\n### {}: {word}\n\n| | rule | found |\n|---|---|---|\n",
        cell(&verdict.task.id)
    )];
    for rule in verdict.rules() {
        let mark = match rule.outcome() {
            "pass" => "✅",
            "warn" => "⚠️",
            "inconclusive" if rule.blocks() => "❓ blocks",
            "inconclusive" => "❓",
            _ => "❌",
        };
        out.push(format!(
            "| {mark} | {} | {} |\n",
            cell(rule.text("rule")),
            cell(rule.text("found"))
        ));
    }
    let compared: Vec<(Rule<'_>, (f64, f64, bool))> =
        verdict.rules().filter_map(|rule| rule.change().map(|change| (rule, change))).collect();
    if !compared.is_empty() {
        out.push("\n| metric | before | after | | Δ | interval | n |\n|---|---:|---:|---|---:|---|---:|\n".into());
    }
    for (rule, (before, after, higher_is_better)) in compared {
        let details = &rule.json["details"];
        let arrow = match (after > before, higher_is_better) {
            _ if after == before => "＝",
            (true, true) => "🟢 ▲",
            (false, false) => "🟢 ▼",
            (true, false) => "🔴 ▲",
            (false, true) => "🔴 ▼",
        };
        let bound =
            |i: usize| details["interval"][i].as_f64().map_or("?".into(), |x| format!("{x:+.4}"));
        out.push(format!(
            "| {} | {before:.4} | {after:.4} | {arrow} | {:+.4} | [{}, {}] | {} |\n",
            cell(details["metric"].as_str().unwrap_or_default()),
            after - before,
            bound(0),
            bound(1),
            details["n"],
        ));
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
            pulled: false,
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
        let xml = junit(&report(vec![failed, skipped, denied, task("c", Status::Ran)]), &[]);
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
        let text = summary(&report, &[], SUMMARY_LIMIT);
        assert!(text.contains("| a\\|b | train | skipped | 1.5 s | x \\| y z |\n"), "{text}");
        assert!(text.contains("\n`````text\na ```` fence\n") && text.contains("\n… cut\n`````\n"));
        assert!(text.len() < BLOCK_LIMIT + 2000);
        for limit in [0, 10, 100, 500, 70_000] {
            assert!(summary(&report, &[], limit).len() <= limit, "{limit}");
        }
        assert!(summary(&report, &[], 500).contains("… cut: GitHub"));
    }

    #[test]
    fn rules_are_cases_and_rows_with_marks() {
        let mut gate = task("gate", Status::Denied { cached: false });
        gate.denied = Some("no".to_owned());
        let json = serde_json::json!({
            "passed": false, "inconclusive": "warn",
            "rules": [
                { "rule": "a.x < 1", "outcome": "pass", "found": "0.5 against 1", "details": {} },
                { "rule": "improves | acc", "outcome": "fail", "found": "acc 0.5 → 0.4",
                  "details": { "metric": "t.acc", "baseline": { "value": 0.5 }, "candidate": { "value": 0.4 },
                               "higher_is_better": true, "interval": [-0.2, -0.01], "n": 50 } },
                { "rule": "not_worse", "outcome": "inconclusive", "found": "too few",
                  "details": { "metric": "t.ppl", "baseline": { "value": 9.0 }, "candidate": { "value": 8.0 },
                               "higher_is_better": false, "interval": [-2.0, 0.1], "n": 9 } },
            ],
        });
        let run = report(vec![gate]);
        let verdicts = [Verdict { task: &run.tasks[0], json }];
        let xml = junit(&run, &verdicts);
        assert!(xml.contains(r#"<testsuites name="lora-flow" tests="4" failures="2""#), "{xml}");
        assert!(xml.contains(r#"classname="p.gate" name="improves | acc" time="0.000">"#), "{xml}");
        assert!(xml.contains(r#"<failure message="acc 0.5 → 0.4" type="fail">"#), "{xml}");
        assert!(xml.contains("<system-out>inconclusive: too few</system-out>"), "{xml}");
        let text = summary(&run, &verdicts, SUMMARY_LIMIT);
        assert!(text.contains("| ❌ | improves \\| acc | acc 0.5 → 0.4 |"), "{text}");
        assert!(
            text.contains("| t.acc | 0.5000 | 0.4000 | 🔴 ▼ | -0.1000 | [-0.2000, -0.0100] | 50 |"),
            "{text}"
        );
        assert!(text.contains("| t.ppl | 9.0000 | 8.0000 | 🟢 ▼ | -1.0000 |"), "{text}");
        assert!(text.contains("| ❓ | not\\_worse | too few |"), "{text}");
    }
}

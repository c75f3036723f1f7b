use super::*;

const GOOD: &str = "\
task: faq
dataset_path: json
dataset_kwargs: { data_files: { test: faq.jsonl } }
test_split: test
output_type: multiple_choice
doc_to_text: \"{{q}}\"
doc_to_target: gold
doc_to_choice: [\"a\", \"b\"]
metric_list:
  - { metric: acc, aggregation: mean, higher_is_better: true }
";

fn read(text: &str) -> Result<TaskFile, Vec<String>> {
    TaskFile::parse(SourceFile::new("faq.yaml", text))
        .map_err(|problems| problems.iter().map(ToString::to_string).collect())
}

/// The only problem of the good file with one part replaced.
fn problem(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    let found = read(&GOOD.replace(from, to)).unwrap_err();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}

#[test]
fn a_simple_file_of_the_harness_is_understood() {
    let task = read(GOOD).unwrap();
    assert_eq!((task.name.as_str(), task.eval_split()), ("faq", "test"));
    assert_eq!(task.output_type, OutputType::MultipleChoice);
    assert_eq!(task.data_files["test"], ["faq.jsonl"]);
    assert_eq!(task.metrics[0].metric, Metric::Acc);
    assert_eq!(task.place("/metric_list/0/aggregation"), "faq.yaml:10:33");
}

#[test]
fn every_mistake_has_its_place() {
    for (from, to, expected) in [
        ("metric: acc,", "metric: bleu,", "faq.yaml:10:15: the metric `bleu` does not fit"),
        ("metric: acc,", "metric: acc_nrm,", "faq.yaml:10:15: there is no metric `acc_nrm`"),
        (
            "aggregation: mean",
            "aggregation: median",
            "faq.yaml:10:33: `acc` is aggregated by `mean`",
        ),
        ("higher_is_better", "higer_is_better", "faq.yaml:10:39: unknown key `higer_is_better`"),
        ("multiple_choice", "multi_choice", "faq.yaml:5:14: there is no output type"),
        ("{{q}}", "{{q}", "faq.yaml:6:14: this template cannot be read"),
        ("[\"a\", \"b\"]", "[\"a\"]", "faq.yaml:8:16: there must be at least two choices"),
        (
            "dataset_path: json",
            "dataset_path: cais/mmlu",
            "faq.yaml:2:15: the data set `cais/mmlu`",
        ),
        ("doc_to_target: gold\n", "", "faq.yaml:1:1: a task of this kind needs `doc_to_target`"),
        ("test_split: test", "test_splt: test", "faq.yaml:4:1: unknown key `test_splt`"),
        (
            "test_split: test",
            "process_docs: x\ntest_split: test",
            "faq.yaml:4:1: `process_docs` needs",
        ),
        ("task: faq", "task: faq\nrepeats: 2", "faq.yaml:2:10: `repeats` above 1"),
        (
            "task: faq",
            "task: faq\ngeneration_kwargs: {}",
            "faq.yaml:2:20: `generation_kwargs` needs",
        ),
        ("{{q}}\"", "{{q}}\"\nuse_prompt: !function u.f", "faq.yaml:7:23: the tag `!function`"),
    ] {
        let found = read(&GOOD.replacen(from, to, 1)).unwrap_err();
        assert!(found.iter().any(|p| p.starts_with(expected)), "{to}: {found:?}");
    }
    assert!(problem("metric: acc,", "metric: acc_nrm,").contains("did you mean `acc_norm`?"));
}

#[test]
fn all_mistakes_are_told_at_once() {
    let text = GOOD
        .replace("metric: acc,", "metric: bleu,")
        .replace("{{q}}", "{{q")
        .replace("task:", "tsk:");
    assert!(read(&text).unwrap_err().len() >= 3);
}

#[test]
fn options_and_filters_are_those_of_the_harness() {
    let text = "\
task: g
output_type: generate_until
doc_to_text: q
doc_to_target: a
generation_kwargs: { until: \"\\n\", max_gen_toks: 8, do_sample: false, temperature: 0.7 }
filter_list:
  - name: number
    filter: [ { function: regex, regex_pattern: \"\\\\d+\" }, { function: take_first } ]
metric_list: [ { metric: exact_match, ignore_case: true, regexes_to_ignore: [ \",\" ] } ]
";
    let task = read(text).unwrap();
    assert_eq!(task.generation.until, ["\n"]);
    assert_eq!(task.generation.temperature, 0.0, "`do_sample: false` takes the likeliest");
    assert_eq!((task.filters[0].name.as_str(), task.filters[0].filters.len()), ("number", 1));
    assert!(task.metrics[0].options.ignore_case);
    let wrong = text.replace("ignore_case", "ignore_cse");
    assert!(read(&wrong).unwrap_err()[0].contains("did you mean `ignore_case`?"));
}

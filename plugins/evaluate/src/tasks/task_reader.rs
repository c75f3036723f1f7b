//! A task file's tree → [`TaskFile`]; everything that is wrong is reported with its place.

use std::collections::BTreeMap;
use std::sync::Arc;

use lora_flow_data::{FileFormat, jinja};
use lora_flow_yaml::reader::{self, Known};
use lora_flow_yaml::source::{Problems, SourceFile};
use lora_flow_yaml::yaml::{Key, Node, NodeValue};
use serde_json::Value;

use crate::metric::{Metric, MetricOptions};
use crate::tasks::filter::Filter;
use crate::tasks::task_file::{
    Choices, FewShot, FilterChain, Generation, MetricSpec, OutputType, Target, TaskFile,
};

const TOP: Known = Known {
    of: "a task file",
    keys: &[
        "task",
        "task_alias",
        "tag",
        "group",
        "dataset_path",
        "dataset_name",
        "dataset_kwargs",
        "training_split",
        "validation_split",
        "test_split",
        "fewshot_split",
        "output_type",
        "doc_to_text",
        "doc_to_target",
        "doc_to_choice",
        "description",
        "target_delimiter",
        "fewshot_delimiter",
        "fewshot_config",
        "num_fewshot",
        "generation_kwargs",
        "filter_list",
        "metric_list",
        "repeats",
        "should_decontaminate",
        "doc_to_decontamination_query",
        "gen_prefix",
        "metadata",
    ],
    aliases: &[
        ("name", "task"),
        ("dataset", "dataset_path"),
        ("metrics", "metric_list"),
        ("prompt", "doc_to_text"),
        ("target", "doc_to_target"),
        ("choices", "doc_to_choice"),
        ("shots", "num_fewshot"),
    ],
};

/// Keys of the harness that need Python or files from its own tree.
const PYTHON: [&str; 7] = [
    "process_docs",
    "process_results",
    "custom_dataset",
    "use_prompt",
    "doc_to_image",
    "doc_to_audio",
    "include",
];

const METRIC_KEYS: [&str; 7] = [
    "metric",
    "aggregation",
    "higher_is_better",
    "ignore_case",
    "ignore_punctuation",
    "ignore_numbers",
    "regexes_to_ignore",
];

/// A tree and the problems found in it.
pub(crate) struct Reader<'a> {
    pub(crate) tree: &'a Node,
    pub(crate) problems: &'a mut Problems,
}

impl Reader<'_> {
    /// The task, if its parts could be read; problems may have been found nevertheless.
    pub(crate) fn task(mut self, source: &Arc<SourceFile>) -> Option<TaskFile> {
        if let NodeValue::Map(entries) = &self.tree.value {
            for (key, _) in entries.iter().filter(|(k, _)| PYTHON.contains(&k.name.as_str())) {
                let hint = "prepare the rows before, with `ingest` or a plugin".to_owned();
                let message = format!("`{}` needs lm-evaluation-harness itself", key.name);
                self.problems.report(key.span, message, hint);
            }
            let known = entries.iter().filter(|(k, _)| !PYTHON.contains(&k.name.as_str()));
            let known = NodeValue::Map(known.cloned().collect());
            reader::mapping(&Node { value: known, span: self.tree.span }, &TOP, self.problems);
        } else {
            reader::wrong(self.tree, "a task file", "a mapping", self.problems);
            return None;
        }
        let name = self.string("task").or_else(|| {
            self.problems.report(self.tree.span, "a task file needs `task`, its name", None);
            None
        });
        let output_type = self.output_type();
        let delimiter = self.text("fewshot_delimiter").unwrap_or_else(|| "\n\n".into());
        let target_delimiter = self.text("target_delimiter").unwrap_or_else(|| " ".into());
        let doc_to_text = self.template("doc_to_text");
        let doc_to_target = self.target(self.tree.get("doc_to_target"));
        let doc_to_choice = self.choices(self.tree.get("doc_to_choice"));
        let output_type = output_type?;
        match output_type {
            OutputType::MultipleChoice if doc_to_choice.is_none() => self.missing("doc_to_choice"),
            OutputType::Rolling => {}
            _ if doc_to_text.is_none() => self.missing("doc_to_text"),
            _ => {}
        }
        if doc_to_target.is_none() {
            self.missing("doc_to_target");
        }
        if let Some(node) = self.tree.get("repeats")
            && reader::whole(node, "`repeats`", 1, self.problems).is_some_and(|n| n > 1)
        {
            self.problems.report(node.span, "`repeats` above 1 is not supported", None);
        }
        let num_fewshot = match self.tree.get("num_fewshot") {
            Some(node) if node.value != NodeValue::Null => {
                reader::whole(node, "`num_fewshot`", 0, self.problems).unwrap_or(0) as usize
            }
            _ => 0,
        };
        let (format, data_files) = self.data();
        let generation = self.generation(output_type, &delimiter);
        let fewshot = self.fewshot(&delimiter, &target_delimiter);
        let filters = self.filters(output_type);
        let metrics = self.metrics(output_type);
        let name = name?;
        Some(TaskFile {
            places: self.tree.places(),
            json: self.tree.to_json(),
            alias: self.text("task_alias").unwrap_or_else(|| name.clone()),
            version: self
                .tree
                .get("metadata")
                .and_then(|m| m.get("version"))
                .map_or_else(|| Value::from("Yaml"), Node::to_json),
            format,
            data_files,
            training_split: self.string("training_split"),
            validation_split: self.string("validation_split"),
            test_split: self.string("test_split"),
            output_type,
            doc_to_text: doc_to_text.unwrap_or_default(),
            doc_to_target: doc_to_target?,
            doc_to_choice,
            description: self.text("description").unwrap_or_default(),
            target_delimiter,
            gen_prefix: self.text("gen_prefix"),
            num_fewshot,
            fewshot,
            generation,
            filters,
            metrics,
            source: source.clone(),
            name,
        })
    }

    fn missing(&mut self, key: &str) {
        self.problems.report(self.tree.span, format!("a task of this kind needs `{key}`"), None);
    }

    /// A string that is not empty.
    fn string(&mut self, key: &str) -> Option<String> {
        let node = self.tree.get(key).filter(|n| n.value != NodeValue::Null)?;
        reader::string(node, &format!("`{key}`"), self.problems).map(|s| s.value)
    }

    /// Any string, also an empty one or blanks.
    fn text(&mut self, key: &str) -> Option<String> {
        let node = self.tree.get(key).filter(|n| n.value != NodeValue::Null)?;
        if node.as_str().is_none() {
            reader::wrong(node, &format!("`{key}`"), "a string", self.problems);
        }
        node.as_str().map(str::to_owned)
    }

    /// A template: compiled once here, so that its mistakes have a place.
    fn template(&mut self, key: &str) -> Option<String> {
        let text = self.text(key)?;
        self.compile(self.tree.get(key), &text);
        Some(text)
    }

    fn compile(&mut self, node: Option<&Node>, text: &str) {
        if let (Some(node), Err(e)) = (node, jinja::environment().template_from_str(text)) {
            let message = format!("this template cannot be read: {}", jinja::what(&e));
            self.problems.report(node.span, message, None);
        }
    }

    fn target(&mut self, node: Option<&Node>) -> Option<Target> {
        let node = node?;
        match &node.value {
            NodeValue::String(text) => {
                self.compile(Some(node), text);
                Some(Target::Template(text.clone()))
            }
            NodeValue::Number(_) | NodeValue::Seq(_) => Some(Target::Fixed(node.to_json())),
            _ => {
                reader::wrong(node, "the target", "a template, a number or a list", self.problems);
                None
            }
        }
    }

    fn choices(&mut self, node: Option<&Node>) -> Option<Choices> {
        let node = node.filter(|n| n.value != NodeValue::Null)?;
        let texts = |nodes: Vec<&Node>, problems: &mut Problems| -> Vec<String> {
            let of = |n: &Node, problems: &mut Problems| match &n.value {
                NodeValue::String(s) if !s.is_empty() => Some(s.clone()),
                _ => {
                    reader::wrong(n, "a choice", "a string that is not empty", problems);
                    None
                }
            };
            nodes.into_iter().filter_map(|n| of(n, problems)).collect()
        };
        let fixed = match &node.value {
            NodeValue::String(text) => {
                self.compile(Some(node), text);
                return Some(Choices::Template(text.clone()));
            }
            NodeValue::Seq(items) => texts(items.iter().collect(), self.problems),
            NodeValue::Map(entries) => {
                texts(entries.iter().map(|(_, n)| n).collect(), self.problems)
            }
            _ => {
                reader::wrong(
                    node,
                    "the choices",
                    "a template or a list of strings",
                    self.problems,
                );
                return None;
            }
        };
        if fixed.len() < 2 {
            self.problems.report(node.span, "there must be at least two choices", None);
        }
        Some(Choices::Fixed(fixed))
    }

    fn output_type(&mut self) -> Option<OutputType> {
        let Some(node) = self.tree.get("output_type") else { return Some(OutputType::Generate) };
        let name = reader::string(node, "`output_type`", self.problems)?.value;
        let found = OutputType::ALL.iter().find(|(n, _)| *n == name).map(|(_, t)| *t);
        if found.is_none() {
            let names = OutputType::ALL.map(|(n, _)| n);
            let hint = reader::suggest(&name, names, "output types");
            self.problems.report(node.span, format!("there is no output type `{name}`"), hint);
        }
        found
    }

    fn data(&mut self) -> (Option<FileFormat>, BTreeMap<String, Vec<String>>) {
        let mut files = BTreeMap::new();
        let format = self.tree.get("dataset_path").and_then(|node| {
            let name = reader::string(node, "`dataset_path`", self.problems)?.value;
            let format = match name.as_str() {
                "json" => FileFormat::Jsonl,
                "parquet" => FileFormat::Parquet,
                "csv" => FileFormat::Csv,
                _ => {
                    let hint =
                        "use `json`, `parquet` or `csv` with `dataset_kwargs: { data_files: … }`, \
                                or leave it out and connect the input `data`"
                            .to_owned();
                    let message = format!("the data set `{name}` is not local");
                    self.problems.report(node.span, message, hint);
                    return None;
                }
            };
            Some(format)
        });
        let Some(kwargs) = self.tree.get("dataset_kwargs").filter(|n| n.value != NodeValue::Null)
        else {
            return (format, files);
        };
        let known = Known {
            of: "`dataset_kwargs`",
            keys: &["data_files", "trust_remote_code"],
            aliases: &[],
        };
        reader::mapping(kwargs, &known, self.problems);
        match kwargs.get("data_files") {
            None => {}
            Some(node) if matches!(node.value, NodeValue::Map(_)) => {
                for (key, node) in
                    reader::entries(node, "`data_files`", self.problems).unwrap_or_default()
                {
                    let names = reader::one_or_many(node, "the files of a split", self.problems);
                    let names = names.unwrap_or_default().into_iter().map(|n| n.value).collect();
                    files.insert(key.name.clone(), names);
                }
            }
            // As `datasets` does: files without a split are its `train`.
            Some(node) => {
                let names = reader::one_or_many(node, "`data_files`", self.problems);
                let names = names.unwrap_or_default().into_iter().map(|n| n.value).collect();
                files.insert("train".to_owned(), names);
            }
        }
        (format, files)
    }

    fn generation(&mut self, output_type: OutputType, delimiter: &str) -> Generation {
        let mut out = Generation {
            until: vec![delimiter.to_owned()],
            max_gen_toks: 256,
            temperature: 0.0,
            top_p: 1.0,
        };
        let Some(node) = self.tree.get("generation_kwargs") else { return out };
        if output_type != OutputType::Generate {
            let message = "`generation_kwargs` needs `output_type: generate_until`";
            self.problems.report(node.span, message, None);
        }
        let known = Known {
            of: "`generation_kwargs`",
            keys: &["until", "max_gen_toks", "do_sample", "temperature", "top_p"],
            aliases: &[
                ("max_new_tokens", "max_gen_toks"),
                ("max_tokens", "max_gen_toks"),
                ("max_completion_tokens", "max_gen_toks"),
                ("stop", "until"),
            ],
        };
        reader::mapping(node, &known, self.problems);
        if let Some(until) = node.get("until") {
            let items = match &until.value {
                NodeValue::Seq(items) => items.iter().collect(),
                _ => vec![until],
            };
            out.until.clear();
            for item in items {
                match item.as_str() {
                    Some(text) => out.until.push(text.to_owned()),
                    None => reader::wrong(item, "an item of `until`", "a string", self.problems),
                }
            }
        }
        if let Some(node) = node.get("max_gen_toks") {
            let n = reader::whole(node, "`max_gen_toks`", 1, self.problems);
            out.max_gen_toks = n.unwrap_or(1) as usize;
        }
        let number = |key: &str, problems: &mut Problems| {
            let node = node.get(key)?;
            let n = if let NodeValue::Number(n) = &node.value { n.as_f64() } else { None };
            if n.is_none_or(|n| n < 0.0) {
                reader::wrong(node, &format!("`{key}`"), "a number from 0 up", problems);
            }
            n
        };
        let temperature = number("temperature", self.problems);
        out.top_p = number("top_p", self.problems).unwrap_or(1.0);
        let sample =
            node.get("do_sample").map(|n| reader::boolean(n, "`do_sample`", self.problems));
        // The harness: without `do_sample` the temperature counts, with `false` it does not.
        out.temperature = match sample.flatten() {
            Some(false) => 0.0,
            Some(true) => temperature.unwrap_or(1.0),
            None => temperature.unwrap_or(0.0),
        };
        out
    }

    fn fewshot(&mut self, delimiter: &str, target_delimiter: &str) -> FewShot {
        let mut out = FewShot {
            split: self.string("fewshot_split"),
            first_n: false,
            samples: None,
            doc_to_text: None,
            doc_to_target: None,
            doc_to_choice: None,
            delimiter: delimiter.to_owned(),
            target_delimiter: target_delimiter.to_owned(),
        };
        let Some(config) = self.tree.get("fewshot_config").filter(|n| n.value != NodeValue::Null)
        else {
            return out;
        };
        let known = Known {
            of: "`fewshot_config`",
            keys: &[
                "sampler",
                "split",
                "samples",
                "doc_to_text",
                "doc_to_target",
                "doc_to_choice",
                "fewshot_delimiter",
                "target_delimiter",
            ],
            aliases: &[],
        };
        reader::mapping(config, &known, self.problems);
        if let Some(node) = config.get("sampler") {
            match node.as_str() {
                Some("first_n") => out.first_n = true,
                Some("default") => {}
                _ => reader::wrong(node, "`sampler`", "`default` or `first_n`", self.problems),
            }
        }
        if let Some(split) = config.get("split").and_then(Node::as_str) {
            out.split = Some(split.to_owned());
        }
        if let Some(node) = config.get("samples") {
            match node.to_json() {
                Value::Array(rows) if rows.iter().all(Value::is_object) => out.samples = Some(rows),
                _ => reader::wrong(node, "`samples`", "a list of mappings", self.problems),
            }
        }
        out.doc_to_text = config.get("doc_to_text").and_then(Node::as_str).map(str::to_owned);
        for (key, field) in [
            ("fewshot_delimiter", &mut out.delimiter),
            ("target_delimiter", &mut out.target_delimiter),
        ] {
            if let Some(text) = config.get(key).and_then(Node::as_str) {
                *field = text.to_owned();
            }
        }
        out.doc_to_target = self.target(config.get("doc_to_target"));
        out.doc_to_choice = self.choices(config.get("doc_to_choice"));
        out
    }

    fn filters(&mut self, output_type: OutputType) -> Vec<FilterChain> {
        let plain = || vec![FilterChain { name: "none".into(), filters: Vec::new() }];
        let Some(node) = self.tree.get("filter_list").filter(|n| n.value != NodeValue::Null) else {
            return plain();
        };
        if output_type != OutputType::Generate {
            let message = "`filter_list` needs `output_type: generate_until`";
            self.problems.report(node.span, message, None);
            return plain();
        }
        let NodeValue::Seq(items) = &node.value else {
            reader::wrong(node, "`filter_list`", "a list", self.problems);
            return plain();
        };
        let mut out = Vec::new();
        for item in items {
            let known = Known { of: "a filter", keys: &["name", "filter"], aliases: &[] };
            reader::mapping(item, &known, self.problems);
            let name = item.get("name").and_then(|n| reader::string(n, "`name`", self.problems));
            let Some(NodeValue::Seq(functions)) = item.get("filter").map(|n| &n.value) else {
                self.problems.report(
                    item.span,
                    "a filter needs `filter`, a list of functions",
                    None,
                );
                continue;
            };
            let mut filters = Vec::new();
            for function in functions {
                match Filter::parse(&function.to_json()) {
                    Ok(Some(filter)) => filters.push(filter),
                    Ok(None) => {}
                    Err((message, hint)) => self.problems.report(function.span, message, hint),
                }
            }
            match name {
                Some(name) => out.push(FilterChain { name: name.value, filters }),
                None => self.problems.report(item.span, "a filter needs a `name`", None),
            }
        }
        out
    }

    fn metrics(&mut self, output_type: OutputType) -> Vec<MetricSpec> {
        let default = |metric: Metric| MetricSpec {
            metric,
            options: MetricOptions::default(),
            higher_is_better: metric.higher_is_better(),
        };
        let Some(list) = self.tree.get("metric_list").filter(|n| n.value != NodeValue::Null) else {
            return Metric::defaults(output_type).iter().copied().map(default).collect();
        };
        let NodeValue::Seq(items) = &list.value else {
            reader::wrong(list, "`metric_list`", "a list", self.problems);
            return Vec::new();
        };
        if items.is_empty() {
            self.problems.report(list.span, "`metric_list` is empty", None);
        }
        let mut out: Vec<MetricSpec> = Vec::new();
        for item in items {
            let Some(entries) = reader::entries(item, "a metric", self.problems) else { continue };
            let Some(metric) = self.metric(item, output_type) else { continue };
            if out.iter().any(|m| m.metric == metric) {
                self.problems.report(
                    item.span,
                    format!("`{}` is listed twice", metric.name()),
                    None,
                );
                continue;
            }
            let mut spec = default(metric);
            for (key, value) in entries {
                self.metric_option(key, value, &mut spec);
            }
            out.push(spec);
        }
        out
    }

    fn metric(&mut self, item: &Node, output_type: OutputType) -> Option<Metric> {
        let Some(node) = item.get("metric") else {
            self.problems.report(item.span, "a metric needs `metric`, its name", None);
            return None;
        };
        let name = reader::string(node, "`metric`", self.problems)?.value;
        let Some(metric) = Metric::named(&name, output_type) else {
            let fitting = Metric::names(output_type);
            let (message, hint) = if Metric::exists(&name) {
                let hint = format!("those that do: {}", reader::list(fitting, "and"));
                (
                    format!(
                        "the metric `{name}` does not fit `output_type: {}`",
                        output_type.name()
                    ),
                    Some(hint),
                )
            } else {
                let hint = reader::suggest(&name, fitting, "metrics of this output type");
                (format!("there is no metric `{name}`"), hint)
            };
            self.problems.report(node.span, message, hint);
            return None;
        };
        Some(metric)
    }

    fn metric_option(&mut self, key: &Key, value: &Node, spec: &mut MetricSpec) {
        let options = &mut spec.options;
        let flag = match key.name.as_str() {
            "metric" => return,
            "higher_is_better" => &mut spec.higher_is_better,
            "ignore_case" => &mut options.ignore_case,
            "ignore_punctuation" => &mut options.ignore_punctuation,
            "ignore_numbers" => &mut options.ignore_numbers,
            "aggregation" => {
                let own = spec.metric.aggregation();
                if value.as_str() != Some(own) {
                    let message = format!("`{}` is aggregated by `{own}` here", spec.metric.name());
                    self.problems.report(value.span, message, None);
                }
                return;
            }
            "regexes_to_ignore" => {
                for pattern in
                    reader::strings(value, "`regexes_to_ignore`", self.problems).unwrap_or_default()
                {
                    match regex::Regex::new(&pattern.value) {
                        Ok(regex) => options.regexes_to_ignore.push(regex),
                        Err(e) => {
                            let message = format!("this is no regular expression: {e}");
                            self.problems.report(pattern.span, message, None);
                        }
                    }
                }
                return;
            }
            name => {
                let hint = reader::suggest(name, METRIC_KEYS, "known keys");
                self.problems.report(key.span, format!("unknown key `{name}` in a metric"), hint);
                return;
            }
        };
        if key.name != "higher_is_better" && spec.metric != Metric::ExactMatch {
            let message = format!("`{}` is an option of `exact_match`", key.name);
            self.problems.report(key.span, message, None);
        }
        if let Some(on) = reader::boolean(value, &format!("`{}`", key.name), self.problems) {
            *flag = on;
        }
    }
}

//! Texts against references, by sacreBLEU and rouge-score (`tests/reference/make_lm_eval.py`).

use std::path::Path;

use serde_json::Value;

use super::{Statistic, bleu, chrf, rouge};

#[test]
fn bleu_chrf_and_rouge_are_those_of_the_packages_that_define_them() {
    let path = "../../tests/reference/lm_eval/tiny/values.json";
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    let values: Value = serde_json::from_str(&text).unwrap();
    let near = |ours: f64, theirs: &Value, what: &str| {
        let theirs = theirs.as_f64().unwrap();
        assert!((ours - theirs).abs() < 1e-9, "{what}: {ours} against {theirs}");
    };
    let mut pairs = Vec::new();
    for row in values["texts"].as_array().unwrap() {
        let (p, t) = (row["prediction"].as_str().unwrap(), row["target"].as_str().unwrap());
        near(rouge::rouge_n(p, t, 1), &row["rouge1"], p);
        near(rouge::rouge_n(p, t, 2), &row["rouge2"], p);
        near(rouge::rouge_l(p, t), &row["rougeL"], p);
        pairs.push((p, t));
    }
    for corpus in values["corpus"].as_array().unwrap() {
        let first = corpus["first"].as_u64().unwrap() as usize;
        let of = |sample: fn(&str, &str) -> Vec<f64>| -> Vec<Vec<f64>> {
            pairs[..first].iter().map(|(p, t)| sample(p, t)).collect()
        };
        near(Statistic::Bleu.of(&of(bleu::sample)), &corpus["bleu"], &format!("bleu {first}"));
        near(Statistic::Chrf.of(&of(chrf::sample)), &corpus["chrf"], &format!("chrf {first}"));
    }
}

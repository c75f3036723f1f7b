//! The statistics against scipy, scikit-learn and CPython (`tests/reference/make_statistics.py`).

use std::path::Path;

use serde_json::Value;

use crate::metric::{Sample, Statistic};
use crate::stats::python_random::PythonRandom;
use crate::stats::{bootstrap, mcnemar, normal};

fn reference() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference/statistics.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("{value}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

fn near(ours: f64, theirs: f64, tolerance: f64) {
    let scale = theirs.abs().max(1e-300);
    assert!((ours - theirs).abs() <= tolerance * scale, "{ours} against {theirs}");
}

#[test]
fn random_numbers_are_those_of_cpython() {
    for case in list(&reference()["random"]) {
        let mut random = PythonRandom::new(case["seed"].as_u64().unwrap() as u32);
        for x in list(&case["random"]) {
            assert_eq!(random.random(), number(x));
        }
        for s in list(&case["samples"]) {
            let of = |key: &str| s[key].as_u64().unwrap() as usize;
            let drawn: Vec<Value> =
                random.sample(of("n"), of("k")).into_iter().map(Value::from).collect();
            assert_eq!(&drawn, list(&s["drawn"]));
        }
        for x in list(&case["choices"]) {
            assert_eq!(random.choice(17), x.as_u64().unwrap() as usize);
        }
    }
}

#[test]
fn the_normal_distribution_is_that_of_scipy() {
    let values = &reference()["normal"][0];
    for pair in list(&values["cdf"]) {
        near(normal::cdf(number(&pair[0])), number(&pair[1]), 1e-12);
    }
    for pair in list(&values["quantile"]) {
        let (ours, theirs) = (normal::quantile(number(&pair[0])), number(&pair[1]));
        // Next to 1 the argument itself has only so many digits.
        assert!((ours - theirs).abs() < 1e-5 * theirs.abs().max(1.0), "{ours} against {theirs}");
    }
}

#[test]
fn mcnemar_is_the_binomial_test_of_scipy() {
    for case in list(&reference()["mcnemar"]) {
        let of = |key: &str| case[key].as_u64().unwrap() as usize;
        let (gained, lost) = (of("gained"), of("lost"));
        near(mcnemar::p_greater(gained, lost), number(&case["greater"]), 1e-8);
        near(mcnemar::p_two_sided(gained, lost), number(&case["two_sided"]), 1e-8);
    }
}

#[test]
fn scores_of_classes_are_those_of_scikit_learn() {
    for case in list(&reference()["classes"]) {
        let pairs = list(&case["truth"]).iter().zip(list(&case["said"]));
        let samples: Vec<Sample> = pairs.map(|(t, s)| vec![number(t), number(s)]).collect();
        for (name, statistic) in
            [("f1", Statistic::F1), ("f1_macro", Statistic::F1Macro), ("mcc", Statistic::Mcc)]
        {
            if let Some(theirs) = case[name].as_f64() {
                let ours = statistic.of(&samples);
                assert!((ours - theirs).abs() < 1e-12, "{name}: {ours} against {theirs} in {case}");
            }
        }
    }
}

/// Both draw at random, so bounds agree to the spread of a bound over draws: about one per cent of
/// the interval with 20,000 replicates here.
#[test]
fn paired_bounds_are_those_of_scipy() {
    for case in list(&reference()["bootstrap"]) {
        let samples = |key: &str| -> Vec<Sample> {
            list(&case[key]).iter().map(|row| list(row).iter().map(number).collect()).collect()
        };
        let statistic = Statistic::named(case["statistic"].as_str().unwrap()).unwrap();
        let (a, b) = (samples("candidate"), samples("baseline"));
        let found = bootstrap::paired(statistic, &a, &b, 20_000, 3).unwrap();
        let (low, high) = (number(&case["low"]), number(&case["high"]));
        // scipy's shares move in steps of one row; so may ours.
        let slack = 0.03 * (high - low) + if case["name"] == "shares" { 1.0 / 120.0 } else { 0.0 };
        for (ours, theirs) in [(found.bound(0.05), low), (found.bound(0.95), high)] {
            assert!((ours - theirs).abs() <= slack, "{}: {ours} against {theirs}", case["name"]);
        }
        near(found.stderr, number(&case["stderr"]), 0.03);
    }
}

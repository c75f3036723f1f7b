use super::*;
use crate::key::KEY_FORMAT;
use serde_json::json;

fn explained(params: Value) -> Explained {
    let key = TaskKey {
        format: KEY_FORMAT,
        kind: "train".to_owned(),
        version: 1,
        params,
        inputs: BTreeMap::new(),
        files: BTreeMap::new(),
        env: BTreeMap::new(),
        extra: Value::Null,
        device: None,
    };
    Explained { key, files: BTreeMap::new(), references: BTreeMap::new() }
}

fn lines(old: &Explained, new: &Explained) -> Vec<String> {
    differences(old, new, &BTreeSet::new()).iter().map(ToString::to_string).collect()
}

fn of_params(old: Value, new: Value) -> Vec<String> {
    lines(&explained(old), &explained(new))
}

fn files(list: &[(&str, &str)]) -> Explained {
    let mut e = explained(json!({}));
    for (name, content) in list {
        let path = std::path::Path::new("/root").join(name);
        let digest = Digest::of_bytes(content.as_bytes());
        e.add_file("/files", std::path::Path::new("/root"), &path, digest);
    }
    e
}

#[test]
fn parameters_are_named_by_their_innermost_place() {
    assert_eq!(
        of_params(
            json!({ "learning_rate": 2e-4, "split": { "train": 0.9, "eval": 0.1 }, "list": [1, 2], "gone": "x" }),
            json!({ "learning_rate": 1e-4, "split": { "train": 0.8, "eval": 0.1 }, "list": [1, 3], "new": null }),
        ),
        [
            "`with.gone` removed: was \"x\"",
            "`with.learning_rate` changed: 0.0002 → 0.0001",
            "`with.list[1]` changed: 2 → 3",
            "`with.new` added: null",
            "`with.split.train` changed: 0.9 → 0.8",
        ]
    );
    assert_eq!(
        of_params(json!({ "a": [1] }), json!({ "a": [1, 2] })),
        ["`with.a` changed: [1] → [1,2]"]
    );
    assert_eq!(of_params(json!([1]), json!([2])), ["`with[0]` changed: 1 → 2"]);
    assert_eq!(of_params(json!({}), json!({})), [""; 0]);
    let long = "é".repeat(500);
    let line = &of_params(json!({ "a": 1 }), json!({ "a": long }))[0];
    assert!(line.ends_with("é…") && line.chars().count() < 100, "{line}");
}

#[test]
fn files_are_named_and_many_are_counted() {
    assert_eq!(
        lines(
            &files(&[("a.csv", "1"), ("b.csv", "2"), ("c.csv", "3")]),
            &files(&[("a.csv", "1"), ("b.csv", "x"), ("d.csv", "4")])
        ),
        ["file `b.csv` changed", "file `c.csv` removed", "file `d.csv` added"]
    );
    let many = |content: &str| {
        let names: Vec<String> = (0..10).map(|i| format!("{i}.csv")).collect();
        files(&names.iter().map(|n| (n.as_str(), content)).collect::<Vec<_>>())
    };
    let all = lines(&many("1"), &many("2"));
    assert_eq!(all.len(), 4);
    assert_eq!(all[3], "7 more files changed");
    assert_eq!(
        lines(&files(&[("a", "1"), ("b", "2")]), &files(&[("a", "2"), ("b", "1")])).len(),
        2
    );
    assert_eq!(lines(&files(&[("old/a", "1")]), &files(&[("new/a", "1")])), [""; 0]);
}

#[test]
fn the_other_parts_of_a_key_have_their_lines() {
    let old = explained(json!({}));
    let change = |f: fn(&mut Explained)| {
        let mut new = old.clone();
        f(&mut new);
        lines(&old, &new)
    };
    assert_eq!(change(|e| e.key.version = 2), ["implementation version 1 → 2"]);
    assert_eq!(change(|e| e.key.kind = "merge".into()), ["`uses` changed: train → merge"]);
    assert_eq!(change(|e| e.key.device = Some("cuda".into())), ["device changed: any → cuda"]);
    assert_eq!(change(|e| e.key.extra = json!({ "plugin": "p" })), ["plugin `p` changed"]);
    assert_eq!(change(|e| e.key.extra = json!(1)), ["implementation changed"]);
    assert_eq!(change(|e| e.key.format += 1), ["keys are made in a new way"]);
    assert_eq!(
        change(|e| {
            e.key.env.insert("X".into(), Digest::of_bytes(b""));
        }),
        ["environment variable `X` changed"]
    );
    let input = |digests: &[&str]| {
        let mut e = explained(json!({}));
        for d in digests {
            e.add_input("train", "tokens", Digest::of_bytes(d.as_bytes()));
        }
        e
    };
    assert_eq!(
        lines(&input(&["1"]), &input(&["2"])),
        ["input `train` changed: `tokens` has new content"]
    );
    assert_eq!(lines(&input(&["1"]), &input(&["1", "2"])), ["input `train` changed"]);
    let pending = BTreeSet::from(["train"]);
    assert_eq!(differences(&input(&["1"]), &input(&[]), &pending), []);
}

#[test]
fn the_last_keys_survive_reloads_cuts_and_compaction() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let key = |i: usize| Digest::of_bytes(i.to_string().as_bytes());
    let mut last = LastKeys::load(&store, "p");
    assert_eq!(last.get("a"), None);
    for i in 0..300 {
        last.set("a", key(i)).unwrap();
    }
    last.set("b", key(7)).unwrap();
    let size = |last: &LastKeys| std::fs::metadata(&last.path).unwrap().len();
    let before = size(&last);
    last.set("b", key(7)).unwrap();
    assert_eq!(size(&last), before, "nothing new, nothing written");
    let mut text = std::fs::read(&last.path).unwrap();
    text.extend_from_slice(b"{\"task\":\"a\",\"ke");
    std::fs::write(&last.path, text).unwrap();
    let mut last = LastKeys::load(&store, "p");
    assert_eq!((last.get("a"), last.get("b")), (Some(key(299)), Some(key(7))));
    assert!(size(&last) < before / 50, "compacted");
    last.set("c", key(1)).unwrap();
    let last = LastKeys::load(&store, "p");
    assert_eq!((last.get("a"), last.get("c")), (Some(key(299)), Some(key(1))));
    assert_eq!(LastKeys::load(&store, "q").get("a"), None, "another pipeline");
}

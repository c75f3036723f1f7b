//! The remote tier against a real S3 server on loopback and against a folder.

mod support;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lora_flow_pipeline::{Remote, State};
use lora_flow_remote::{Bucket, Patience};
use support::{Counts, Machine, PIPELINE, Server, Shared, Watched, impatient, s3};

#[test]
fn what_one_machine_made_another_takes() {
    for shared in Shared::both() {
        let (one, two) = (Machine::new(PIPELINE), Machine::new(PIPELINE));
        assert_eq!(one.run(shared.remote()), ["ran", "ran"]);
        assert_eq!((shared.files("entries").len(), shared.files("objects").len()), (2, 3));
        assert_eq!(two.states(None)[0], State::Stale(vec![lora_flow_pipeline::Reason::NeverRun]));
        assert_eq!(two.states(shared.remote()), [State::CachedRemote, State::CachedRemote]);
        assert_eq!(two.run(shared.remote()), ["pulled", "pulled"]);
        assert_eq!(two.text("b"), "twoone");
        assert!(two.is_sound());
        assert_eq!(two.states(shared.remote()), [State::Cached, State::Cached]);
        assert_eq!(two.run(None), ["cached", "cached"], "it is whole without the remote");
    }
}

#[test]
fn what_is_there_is_neither_sent_nor_fetched_again() {
    for shared in Shared::both() {
        let counts = Arc::new(Counts::default());
        let remote = || Watched::remote(shared.bucket(), &counts, 99);
        let one = Machine::new(PIPELINE);
        one.run(remote());
        assert_eq!(counts.take(), (2, 3), "two entries asked for; a common file and two texts");
        assert_eq!(one.run(remote()), ["cached", "cached"]);
        assert_eq!(counts.take(), (0, 0));
        let two = Machine::new(&PIPELINE.replace("two", "three"));
        assert_eq!(two.run(remote()), ["pulled", "ran"]);
        assert_eq!(counts.take(), (4, 1), "an entry, its two files, a miss; one new text");
    }
}

#[test]
fn large_files_go_in_parts() {
    let pipeline = "
version: 1
name: large
tasks:
  a: { uses: text, with: { text: '0123456789abcdefghijk', times: 1000000 } }
";
    for shared in Shared::both() {
        let (one, two) = (Machine::new(pipeline), Machine::new(pipeline));
        assert_eq!(one.run(shared.remote()), ["ran"]);
        assert_eq!(two.run(shared.remote()), ["pulled"]);
        assert_eq!(two.text("a").len(), 21_000_000);
        assert!(two.is_sound());
    }
}

#[test]
fn damaged_objects_are_never_served_and_are_replaced() {
    type Damage = fn(&mut Vec<u8>);
    let damages: [(&str, Damage); 3] = [
        ("a flipped bit", |bytes| bytes[0] ^= 1),
        ("cut", |bytes| bytes.truncate(2)),
        ("longer", |bytes| bytes.extend_from_slice(&[0; 100])),
    ];
    for shared in Shared::both() {
        for what in ["objects", "entries"] {
            for (how, damage) in damages {
                Machine::new(PIPELINE).run(shared.remote());
                for file in shared.files(what) {
                    let mut bytes = fs::read(&file).unwrap();
                    damage(&mut bytes);
                    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
                    fs::write(&file, bytes).unwrap();
                }
                let two = Machine::new(PIPELINE);
                assert_eq!(two.run(shared.remote()), ["ran", "ran"], "{what}, {how}");
                assert_eq!(two.text("b"), "twoone");
                assert!(two.is_sound());
                let three = Machine::new(PIPELINE);
                assert_eq!(three.run(shared.remote()), ["pulled", "pulled"], "{what}, {how}");
                assert!(three.is_sound());
            }
        }
        // An entry whose file is gone.
        fs::remove_file(&shared.files("objects")[0]).unwrap();
        let two = Machine::new(PIPELINE);
        assert!(two.run(shared.remote()).contains(&"ran".to_owned()));
        assert_eq!(Machine::new(PIPELINE).run(shared.remote()), ["pulled", "pulled"]);
    }
}

#[test]
fn an_upload_that_is_cut_leaves_no_entry() {
    for shared in Shared::both() {
        let one = Machine::new(PIPELINE);
        let counts = Arc::new(Counts::default());
        let report = one.report(Watched::remote(shared.bucket(), &counts, 1));
        assert_eq!((support::words(&report), report.exit_code()), (vec!["ran".to_owned(); 2], 0));
        assert_eq!(counts.take().1, 1);
        assert_eq!((shared.files("entries").len(), shared.files("objects").len()), (0, 1));
        assert_eq!(Machine::new(PIPELINE).run(shared.remote()), ["ran", "ran"]);
        // What was not sent by then can be sent later.
        assert_eq!(one.engine(shared.remote()).push_all(&one.options.cancel).unwrap().0, 0);
        for entry in shared.files("entries") {
            fs::remove_file(entry).unwrap();
        }
        assert_eq!(one.engine(shared.remote()).push_all(&one.options.cancel).unwrap(), (2, 0));
        assert_eq!(Machine::new(PIPELINE).run(shared.remote()), ["pulled", "pulled"]);
    }
}

#[test]
fn machines_may_send_the_same_at_once() {
    for shared in Shared::both() {
        let forced = |_| {
            let mut machine = Machine::new(PIPELINE);
            machine.options.force = vec!["*".to_owned()];
            machine
        };
        let machines: Vec<Machine> = (0..4).map(forced).collect();
        std::thread::scope(|scope| {
            for machine in &machines {
                scope.spawn(|| assert_eq!(machine.run(shared.remote()), ["ran", "ran"]));
            }
        });
        assert_eq!((shared.files("entries").len(), shared.files("objects").len()), (2, 3));
        let last = Machine::new(PIPELINE);
        assert_eq!(last.run(shared.remote()), ["pulled", "pulled"]);
        assert!(last.is_sound());
    }
}

/// A run with a remote that does not work, in the time it took; asked once, and no more.
fn runs_without(bucket: Bucket) -> Duration {
    let counts = Arc::new(Counts::default());
    let started = Instant::now();
    let machine = Machine::new(PIPELINE);
    let report = machine.report(Watched::remote(bucket, &counts, 99));
    assert_eq!((support::words(&report), report.exit_code()), (vec!["ran".to_owned(); 2], 0));
    assert_eq!(counts.take(), (1, 0));
    started.elapsed()
}

#[test]
fn a_remote_that_is_away_costs_one_try() {
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    runs_without(s3(&nobody, support::SECRET, impatient()));
    // It takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let took = runs_without(s3(&endpoint, support::SECRET, impatient()));
    assert!(took >= impatient().answer, "{took:?}");
    // A disk that is not mounted.
    let dir = tempfile::tempdir().unwrap();
    let url = format!("file://{}/missing/cache", dir.path().display());
    runs_without(Bucket::open(&url, [], Patience::default()).unwrap());
    assert!(!dir.path().join("missing").exists());
}

#[test]
fn whoever_is_refused_runs_without() {
    let server = Server::start();
    runs_without(s3(&server.endpoint, "wrong", Patience::default()));
}

#[test]
fn a_stop_does_not_wait_for_the_remote() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let machine = Machine::new(PIPELINE);
    let cancel = machine.options.cancel.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        cancel.cancel();
    });
    let bucket = s3(&endpoint, support::SECRET, Patience::default());
    let started = Instant::now();
    let report = machine.report(Some(Remote::new(Box::new(bucket), false)));
    assert_eq!(report.exit_code(), 130);
    assert!(started.elapsed() < Patience::default().answer);
}

#[test]
fn a_reader_sends_nothing() {
    for shared in Shared::both() {
        let reader = || Some(Remote::new(Box::new(shared.bucket()), true));
        assert_eq!(Machine::new(PIPELINE).run(reader()), ["ran", "ran"]);
        assert!(shared.files("entries").is_empty() && shared.files("objects").is_empty());
        Machine::new(PIPELINE).run(shared.remote());
        assert_eq!(Machine::new(PIPELINE).run(reader()), ["pulled", "pulled"]);
    }
}

#[test]
fn bad_urls_say_what_a_good_one_is() {
    for url in ["bucket", "s3://", "gs://bucket/x", "file://host/x", "s3://bucket?x=1", "s3:///x"] {
        let error = Bucket::open(url, [], Patience::default()).unwrap_err();
        assert!(error.chain().contains(url), "{}", error.chain());
        assert!(error.hint().unwrap().contains("s3://BUCKET/PREFIX"), "{url}");
    }
    // Nothing secret goes over a line unencrypted.
    let endpoint = ("AWS_ENDPOINT_URL".to_owned(), "http://storage.example".to_owned());
    let bucket = Bucket::open("s3://bucket/x", [endpoint], impatient()).unwrap();
    runs_without(bucket);
}

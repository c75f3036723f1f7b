//! Plugins that try more than they may. Each test is passed over, with a word, where the kernel
//! cannot confine.

use std::fs;
use std::io::Read;
use std::net::{TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::external::ExternalTask;
use crate::external::tests::{DONE, OUT, Plugin, STATE};
use crate::plugin_manifest::PluginManifest;
use crate::run::tests::{Bench, files_below, out};
use crate::run::{ErrorRecord, Status};

/// Whether this kernel confines all of it.
fn can_confine() -> bool {
    let scope =
        Scope { readable: Vec::new(), writable: Vec::new(), network: false, local_sockets: false };
    match confine(&Command::new("true"), &scope).unwrap().1 {
        None => true,
        Some(gap) => {
            eprintln!("passed over: on this system a plugin {gap}");
            false
        }
    }
}

/// The error of a plugin in bash, which can open sockets.
fn refused(script: &str) -> ErrorRecord {
    let script = format!("set -e\n{script}\n{OUT}echo x > $out/text\n{DONE}");
    let error = Plugin::with("command: [bash, main.sh]\n", &script).error();
    assert!(error.message.contains("Permission denied"), "{}", error.message);
    let hint = error.hint.as_deref().unwrap_or_default();
    assert!(hint.contains("`read` in its `plugin.yaml`"), "{hint}");
    error
}

#[test]
fn files_outside_can_neither_be_read_nor_listed_nor_written() {
    if !can_confine() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    let (dir, secret) = (outside.path().display(), secret.display());
    refused(&format!("cat {secret}"));
    refused(&format!("ls {dir}"));
    refused(&format!("echo x >> {secret}"));
    refused(&format!("truncate -s 0 {secret}"));
    refused(&format!("rm {secret}"));
    refused(&format!("mkdir {dir}/new"));
    refused("echo x > /etc/lora-flow-test");
    // The plugin's own folder and the inputs are there to be read.
    refused("echo x > \"$(dirname \"$0\")/new\"");
    refused(&format!("sh -c 'bash -c \"cat {secret}\"'"));
    assert_eq!(fs::read_to_string(secret.to_string()).unwrap(), "secret");
}

#[test]
fn the_store_and_other_processes_are_out_of_reach() {
    if !can_confine() {
        return;
    }
    // Its inputs can be read, but neither written nor its neighbours seen.
    let mut plugin = Plugin::new(&format!(
        "{OUT}in=$(printf '%s' \"$request\" | sed 's/.*\"path\":\"\\([^\"]*inputs\\/in\\.0\\)\".*/\\1/')\n\
         cat $in/text > $out/text\nblob=$(readlink $in/text)\n\
         ! echo x >> $in/text || exit 9\n! ls $(dirname $blob) || exit 8\n! ln $blob $out/hard || exit 7\n\
         ! kill -0 {} || exit 6\n{DONE}",
        std::process::id()
    ));
    plugin.bench.add("a", serde_json::json!({ "n": 1 }), &[]);
    plugin.load(&["in=a"]);
    let report = plugin.run();
    assert_eq!(out(&report, "work").status, Status::Ran, "{:?}", out(&report, "work").error);
}

#[test]
fn what_read_names_can_be_read_and_scratch_written() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("given"), "given").unwrap();
    let dir = outside.path().display();
    let script = format!(
        "{OUT}cat {dir}/given > $out/text\nmktemp > /dev/null\necho x > file\n\
         state=$(printf '%s' \"$request\" | sed 's/.*\"state\":\"\\([^\"]*\\)\".*/\\1/')\n\
         echo x > $state/x\nmv file $out/moved\n{DONE}"
    );
    for read in [dir.to_string(), format!("{dir}/given")] {
        let mut plugin =
            Plugin::with(&format!("command: [sh, main.sh]\nread: [{read}]\n"), &script);
        let report = plugin.run();
        assert_eq!(out(&report, "work").status, Status::Ran, "{:?}", out(&report, "work").error);
    }
}

#[test]
fn without_network_no_socket_opens() {
    if !can_confine() {
        return;
    }
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let tcp_port = tcp.local_addr().unwrap().port();
    let udp_port = udp.local_addr().unwrap().port();
    let error = refused(&format!("echo x > /dev/tcp/127.0.0.1/{tcp_port}"));
    assert!(error.hint.unwrap().contains("`network: true`"));
    refused(&format!("echo x > /dev/udp/127.0.0.1/{udp_port}"));
    udp.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(udp.recv(&mut [0; 8]).is_err(), "nothing came");
}

#[test]
fn the_network_is_for_those_that_ask_and_may() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = tcp.local_addr().unwrap().port();
    let head = "command: [bash, main.sh]\nnetwork: true\n";
    let script =
        format!("{OUT}set -e\necho x > /dev/tcp/127.0.0.1/{port}\necho x > $out/text\n{DONE}");
    let mut plugin = Plugin::with(head, &script);
    plugin.bench.options.allow_network = true;
    let report = plugin.run();
    assert_eq!(out(&report, "work").status, Status::Ran, "{:?}", out(&report, "work").error);
    let mut said = String::new();
    tcp.accept().unwrap().0.read_to_string(&mut said).unwrap();
    assert_eq!(said, "x\n");

    if can_confine() {
        let mut plugin = Plugin::with(head, &script);
        plugin.bench.options.allow_network = false;
        let error = plugin.error();
        assert!(error.message.contains("Permission denied"), "{}", error.message);
    }
}

#[test]
fn local_sockets_are_for_those_that_ask() {
    let Ok(python) = Command::new("python3").arg("--version").output() else { return };
    if !python.status.success() || !can_confine() {
        eprintln!("passed over: there is no python3, or no confinement");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service");
    let service = std::os::unix::net::UnixListener::bind(&path).unwrap();
    service.set_nonblocking(true).unwrap();
    let script = format!(
        "import socket, sys\na, b = socket.socketpair()\na.send(b'x'); assert b.recv(1) == b'x'\n\
         s = socket.socket(socket.AF_UNIX); s.connect('{}')\nsys.exit('it got through')\n",
        path.display()
    );
    let error = Plugin::with("command: [python3, main.sh]\n", &script).error();
    assert!(error.message.contains("PermissionError"), "{}", error.message);
    assert!(error.hint.unwrap().contains("`local_sockets: true`"));
    assert!(service.accept().is_err(), "nobody came");

    let head = "local_sockets: true\ncommand: [python3, main.sh]\n";
    let error = Plugin::with(head, &script).error();
    assert!(error.message.contains("it got through"), "{}", error.message);
}

/// Each line of the filter is one that a mistake in a jump would break: local sockets, pairs of
/// them, and what is no socket at all go on working.
#[test]
fn local_sockets_and_other_calls_go_on() {
    let Ok(python) = Command::new("python3").arg("--version").output() else { return };
    if !python.status.success() {
        eprintln!("passed over: there is no python3");
        return;
    }
    let script = "import json, socket, subprocess, sys, threading\n\
        request = json.load(sys.stdin)\n\
        a, b = socket.socketpair()\na.send(b'x'); assert b.recv(1) == b'x'\n\
        name = request['scratch'] + '/s'\n\
        server = socket.socket(socket.AF_UNIX); server.bind(name); server.listen()\n\
        client = socket.socket(socket.AF_UNIX); client.connect(name)\n\
        for family in (socket.AF_INET, socket.AF_INET6):\n\
        \x20   for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):\n\
        \x20       try: socket.socket(family, kind)\n\
        \x20       except PermissionError: continue\n\
        \x20       if sys.argv[1] == 'True': sys.exit('a socket opened')\n\
        subprocess.run(['true'], check=True)\n\
        open(request['outputs']['out']['path'] + '/text', 'w').write('x')\n\
        print(json.dumps({'event': 'done'}))\n";
    let confined = if can_confine() { "True" } else { "False" };
    let mut plugin = Plugin::with(
        &format!("local_sockets: true\ncommand: [python3, main.sh, \"{confined}\"]\n"),
        script,
    );
    let report = plugin.run();
    assert_eq!(out(&report, "work").status, Status::Ran, "{:?}", out(&report, "work").error);
}

/// Runs a plugin of the project, offline. None, with a word, where python3 with pip is missing.
fn of_the_project(name: &str, params: serde_json::Value) -> Option<crate::run::TaskOutcome> {
    let pip = Command::new("python3").args(["-m", "pip", "--version"]).output();
    if !pip.is_ok_and(|o| o.status.success()) {
        eprintln!("passed over: there is no python3 with pip");
        return None;
    }
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins").join(name);
    let manifest = PluginManifest::load(&dir.canonicalize().unwrap()).unwrap();
    let mut bench = Bench::new();
    let task = ExternalTask::new(Arc::new(manifest), 0, params.clone());
    bench.add_any("work", params, &[], Arc::new(task));
    Some(out(&bench.run(), "work").clone())
}

#[test]
fn pip_runs_confined() {
    let params = serde_json::json!({
        "package": "lora-flow-has-no-such-package", "version": "1.0", "members": ["x"],
        "sha256": {}, "format": "wheel",
    });
    let Some(outcome) = of_the_project("pip-fetch", params) else { return };
    let error = outcome.error.unwrap();
    assert!(error.message.starts_with("pip finds no wheel of"), "{error:?}");
}

#[test]
fn python_runs_confined() {
    let params = serde_json::json!({ "seed": 0, "hidden_size": 8, "num_hidden_layers": 1 });
    let Some(outcome) = of_the_project("tiny-model", params) else { return };
    assert_eq!(outcome.status, Status::Ran, "{:?}", outcome.error);
}

#[test]
fn what_a_failed_try_keeps_is_written() {
    let mut plugin = Plugin::new(&format!("{STATE}echo x > $state/kept\nexit 1\n"));
    assert_eq!(plugin.error().message, "plugin `p` exited with code 1");
    let kept = files_below(&plugin.bench.store_dir());
    assert!(kept.iter().any(|p| p.ends_with("kept")), "{kept:?}");
}

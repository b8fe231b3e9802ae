//! One machine that is a cluster of its own.

use std::fs::File;
use std::process::{Child, Stdio};
use std::time::Duration;

use lab::host::{Docker, Host};
use lab::image;
use lab::lan::Lan;
use lab::process::{built, output};
use lab::scratch::Scratch;
use lab::wait::{until, until_true};

#[test]
#[ignore = "needs root"]
fn one_machine_is_a_whole_cluster() {
    let scratch = Scratch::new().expect("a directory");
    let lan = Lan::new().expect("a switch");
    let host = Host::boot(&scratch, "alone", Docker::Yes).expect("a host");
    lan.plug(&host, 1).expect("plugged in");
    image::load(&host).expect("the image");
    let ask = |words: &[&str]| {
        let mut command = host.command(built("node-engine").expect("it is built"));
        output(command.args(words)).map_err(|error| error.context(host.log_tail("node-engine.log", 30)))
    };

    let daemon = start(&host, &["--on-exit", "stop"]);
    let joined = || ask(&["status"]).is_ok_and(|status| status.contains("10.18.0.0/26"));
    until_true("the machine is its own cluster", Duration::from_secs(30), || Ok(joined())).expect("in time");
    let image = ["--image", image::PROBE];
    ask(&[&["deploy", "--name", "web", "--replicas", "2", "--port", "8080:80"], &image[..]].concat()).expect("taken");
    let refused = || Ok(ask(&["ps"])?.contains("host port 8080:80/tcp is already mapped"));
    until_true("the second cannot have the host port too", Duration::from_secs(60), refused).expect("in time");

    ask(&["replicate", "web", "1"]).expect("taken");
    let running = || Ok(ask(&["ps"])?.matches(" RUNNING ").count() == 1);
    until_true("the one runs", Duration::from_secs(60), running).expect("in time");
    assert!(ask(&["ps", "--local"]).expect("it answers").contains(" running "));
    ask(&["logs", "web"]).expect("there is one instance of that name");
    assert_eq!(host.run("docker ps --quiet --filter name=web").expect("Docker answers").lines().count(), 2);

    end(&host, daemon);
    assert_eq!(host.run("docker ps --all --quiet").expect("Docker answers"), "", "told to stop workloads");
    let links = host.run("ip -o link").expect("ip answers");
    assert!(!links.contains("edge-"), "told to stop, so nothing is left: {links}");

    // What was wanted is wanted still; a cluster that had not heard of the end yet misses the instance after 30 s.
    let daemon = start(&host, &[]);
    let back = || Ok(ask(&["ps", "--local"])?.contains(" running "));
    until_true("it runs again", Duration::from_secs(90), back).expect("in time");
    end(&host, daemon);
    assert_ne!(host.run("docker ps --quiet").expect("Docker answers"), "", "told to leave workloads");
    ask(&["uninstall", "--purge"]).expect("everything goes");
    assert_eq!(host.run("docker ps --all --quiet").expect("Docker answers"), "");
    host.shell("! ls /run/node-engine /var/lib/node-engine 2>/dev/null").expect("nothing is left");
}

fn start(host: &Host, options: &[&str]) -> Child {
    let log = File::options().create(true).append(true).open(host.directory().join("node-engine.log")).expect("a log");
    let mut command = host.command(built("node-engine").expect("it is built"));
    command.args(["standalone", "--datapath", "tun"]).args(options).stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(log).spawn().expect("started")
}

fn end(host: &Host, mut daemon: Child) {
    host.shell("kill -TERM $(cat /run/node-engine/lock)").expect("it runs");
    let ended = until("the daemon ends", Duration::from_secs(30), || Ok(daemon.try_wait()?)).expect("in time");
    assert!(ended.success(), "{ended}\n{}", host.log_tail("node-engine.log", 30));
}

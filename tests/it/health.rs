//! Instances that fail or go: who used them is told, who comes next is sent elsewhere, and what runs to its end loses nothing.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lab::cluster::{Deploy, InstanceRow, json};
use lab::node::{Datapath, Node};
use lab::topology::{Lab, Plan};
use lab::wait::{until, until_true};
use serde_json::Value;

each_datapath!(who_does_not_answer_is_passed_over, who_is_gone_is_told_of_at_once, a_service_that_moves_loses_nothing);

const LIMIT: Duration = Duration::from_secs(30);
/// Long after a client should have been sent elsewhere.
const GIVES_UP: Duration = Duration::from_secs(3);

/// One of three stops listening, another falls silent; the cluster hears of neither, and both come back by themselves.
fn who_does_not_answer_is_passed_over(datapath: Datapath) {
    let lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let client = one(&lab, "client", "node-a");
    lab.deploy(&Deploy { name: "web", on: Some("node-b"), replicas: 2, ..Deploy::default() }, 2).expect("they run");
    let web = lab.deploy(&Deploy { name: "web", on: Some("node-a"), ..Deploy::default() }, 3).expect("they run");
    let to = web[0].service_address(false).expect("a service address");
    until_true("all answer", LIMIT, || {
        let gets = lab.within(&client, |client| client.get(to, 12))?;
        Ok(gets.failed == 0 && gets.answers.len() == 3)
    })
    .expect("seen");

    let node = &lab.nodes[0];
    for (nth, instance) in [(0, &web[0]), (2, &web[2])] {
        // On the other node, then on the client's.
        let verdict = if nth == 0 { "reject with tcp reset" } else { "drop" };
        block(&lab, instance, verdict).expect("a filter in front of it");
        let begin = Instant::now();
        until_true("it is passed over", LIMIT, || {
            lab.within(&client, |client| client.get_within(to, 3, GIVES_UP)).map(drop)?;
            Ok(state(node, nth)? == "passed over")
        })
        .expect("seen");
        let took = begin.elapsed();
        let gets = lab.within(&client, |client| client.get_within(to, 30, GIVES_UP)).expect("it runs");
        assert!(gets.failed <= 2, "no more than a trial or two: {gets:?} ({took:?})");
        assert!(gets.answers.len() == 2, "the others serve: {gets:?}");
        unblock(&lab, instance).expect("no filter");
        until_true("it is back", LIMIT, || {
            lab.within(&client, |client| client.get_within(to, 6, GIVES_UP)).map(drop)?;
            Ok(state(node, nth)? == "well")
        })
        .expect("seen");
    }
    let gets = lab.within(&client, |client| client.get(to, 30)).expect("it runs");
    assert_eq!((gets.failed, gets.answers.len()), (0, 3), "{gets:?}");
    let text = lab::process::output(node.client().expect("built").args(["net", "service", "web"])).expect("it prints");
    assert!(text.contains("NEW FLOWS GO TO") && text.contains("#0 33%, #1 33%, #2 33%"), "{text}");
}

/// Whoever has a connection to an instance that goes, or calls a service that has none any more, hears of it at once; and only they do.
fn who_is_gone_is_told_of_at_once(datapath: Datapath) {
    let lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let client = one(&lab, "client", "node-a");
    let web = one(&lab, "web", "node-b");
    let other = one(&lab, "other", "node-b");
    for v6 in [false, true] {
        let to = web.service_address(v6).expect("a service address");
        assert_eq!(lab.within(&client, |client| client.get(to, 1)).expect("it runs").failed, 0);
    }
    let to = web.service_address(false).expect("a service address");
    let mut stays = lab
        .within(&client, |client| client.stream(other.service_address(false)?, 40.0))
        .expect("a stream to another service");
    let mut idle = lab.within(&client, |client| client.stream(to, 40.0)).expect("a stream");
    idle.advances(Duration::from_secs(5)).expect("it flows");

    // Nobody says goodbye: neither the program nor its kernel is heard any more.
    silence(&lab, &web).expect("a filter around it");
    let begin = Instant::now();
    lab.cluster.delete("web").expect("deleted");
    lab.cluster.running("web", 0).expect("none is left");
    let ended = idle.finish().expect_err("its other end is gone").to_string();
    assert!(ended.contains("reset by peer"), "told, not timed out: {ended}");
    assert!(begin.elapsed() < Duration::from_secs(35), "{:?}", begin.elapsed());
    stays.advances(Duration::from_secs(5)).expect("what has its instance goes on");

    for v6 in [false, true] {
        let to = web.service_address(v6).expect("a service address");
        let gets = lab.within(&client, |client| client.get(to, 3)).expect("it runs");
        assert!(gets.failed == 3 && gets.error.contains("refused") && gets.seconds < 2.0, "{gets:?}");
        lab.within(&client, |client| client.ping(to)).expect_err("nobody is there");
    }
    assert!(lab.nodes[0].counter("told_gone").expect("a counter") >= 6);
}

/// Requests all the while; not one is lost, wherever the service goes and however many there are of it.
fn a_service_that_moves_loses_nothing(datapath: Datapath) {
    let lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let client = one(&lab, "client", "node-a");
    let web = one(&lab, "web", "node-b");
    let to = web.service_address(false).expect("a service address");
    assert_eq!(lab.within(&client, |client| client.get(to, 1)).expect("it runs").failed, 0);
    let stream = lab.within(&client, |client| client.stream(to, 6.0)).expect("a stream");
    asking(&lab, &client, to, || {
        lab.cluster.relocate("web#0", "node-a")?;
        until("it has moved", Duration::from_secs(40), || {
            let rows = lab.cluster.running("web", 1)?;
            Ok((rows[0].node == "node-a").then_some(()))
        })?;
        lab.cluster.replicate("web", 3)?;
        lab.cluster.running("web", 3)?;
        until_true("all answer", LIMIT, || Ok(lab.within(&client, |client| client.get(to, 12))?.answers.len() == 3))?;
        lab.cluster.replicate("web", 1)?;
        lab.cluster.running("web", 1).map(drop)
    });
    stream.finish().expect("a connection to the old instance runs to its end");
}

/// Does this while requests are made, and fails where one of them did.
fn asking(lab: &Lab, client: &InstanceRow, to: IpAddr, act: impl FnOnce() -> Result<()>) {
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut requests = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let gets = lab.within(client, |client| client.get(to, 50)).expect("the probe ends");
                assert_eq!(gets.failed, 0, "after {requests} requests: {gets:?}");
                requests += gets.requests;
            }
            requests
        });
        let acted = act();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        let requests = asking.join().expect("none was lost");
        acted.expect("done");
        assert!(requests > 200, "only {requests} requests");
    });
}

fn one(lab: &Lab, name: &str, on: &str) -> InstanceRow {
    lab.deploy(&Deploy { name, on: Some(on), ..Deploy::default() }, 1).expect("it runs").remove(0)
}

/// How the instance stands with this node.
fn state(node: &Node, number: u64) -> Result<String> {
    let page: Value = json(node.client()?.args(["net", "service", "web", "--json"]))?;
    let instances = page["rows"][0]["instances"].as_array().context("no instances")?;
    let instance = instances.iter().find(|one| one["number"].as_u64() == Some(number)).context("no such instance")?;
    Ok(instance["state"].as_str().context("no state")?.to_owned())
}

fn block(lab: &Lab, instance: &InstanceRow, verdict: &str) -> Result<()> {
    in_namespace(lab, instance, "add table inet blocked")?;
    in_namespace(lab, instance, "add chain inet blocked in { type filter hook input priority 0 ; }")?;
    in_namespace(lab, instance, &format!("add rule inet blocked in meta l4proto tcp {verdict}"))
}

fn silence(lab: &Lab, instance: &InstanceRow) -> Result<()> {
    in_namespace(lab, instance, "add table inet silent")?;
    for hook in ["input", "output"] {
        in_namespace(
            lab,
            instance,
            &format!("add chain inet silent {hook} {{ type filter hook {hook} priority 0 ; policy drop ; }}"),
        )?;
    }
    Ok(())
}

fn unblock(lab: &Lab, instance: &InstanceRow) -> Result<()> {
    in_namespace(lab, instance, "delete table inet blocked")
}

/// A packet filter's command in the instance's network namespace.
fn in_namespace(lab: &Lab, instance: &InstanceRow, nft: &str) -> Result<()> {
    let host = &lab.node(&instance.node)?.host;
    let pid = host.run(&format!("docker inspect -f {{{{.State.Pid}}}} {}", instance.container()))?;
    host.run(&format!("nsenter --net=/proc/{}/ns/net nft {nft}", pid.trim())).map(drop)
}

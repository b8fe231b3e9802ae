//! Nodes on their own: no cluster, no power, no dockerd, and programs that fall.

use std::time::{Duration, Instant};

use lab::cluster::{Deploy, json};
use lab::node::{Datapath, Node};
use lab::topology::{Lab, Plan};
use lab::wait::{until, until_true};
use serde::Deserialize;

each_datapath!(a_site_comes_up_again_without_its_cluster);

/// An instance as its node knows it.
#[derive(Debug, Deserialize)]
struct Known {
    service: String,
    state: String,
    address_v4: String,
}

/// What `explain` says.
#[derive(Debug, Deserialize)]
struct Explained {
    wanted: String,
    state: String,
    reasons: Vec<String>,
    restarts: usize,
    fell: Option<(u64, String)>,
}

fn known(node: &Node) -> anyhow::Result<Vec<Known>> {
    json(node.client()?.args(["ps", "--local", "--json"]))
}

fn explained(node: &Node, instance: &str) -> anyhow::Result<Explained> {
    json(node.client()?.args(["explain", instance, "--json"]))
}

fn a_site_comes_up_again_without_its_cluster(datapath: Datapath) {
    let mut lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let client = lab.deploy(&Deploy { name: "client", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    let web = lab.deploy(&Deploy { name: "web", on: Some("node-b"), ..Deploy::default() }, 1).expect("it runs");
    let to = web[0].service_address(false).expect("a service address");
    let gets = lab.within(&client[0], |client| client.get(to, 5)).expect("answers");
    assert_eq!(gets.failed, 0, "{gets:?}");
    // A deletion outlives the cut as well.
    lab.deploy(&Deploy { name: "gone", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    lab.cluster.delete("gone").expect("deleted");
    until_true("its container is gone", Duration::from_secs(20), || {
        Ok(!lab.nodes[0].host.run("docker ps --all --format {{.Names}}")?.contains("gone"))
    })
    .expect("gone");

    lab.cluster.stop();
    for node in &mut lab.nodes {
        node.power_cut().expect("the plug is pulled");
    }
    // One container was not there any more at all.
    lab.nodes[1].host.shell("docker rm --force $(docker ps --all --quiet)").expect("removed");
    let began = Instant::now();
    for node in &mut lab.nodes {
        node.start().expect("power is back");
    }
    for (node, service, address) in [(0, "client", &client[0].address), (1, "web", &web[0].address)] {
        let up = until(&format!("{service} runs again"), Duration::from_secs(60), || {
            let all = known(&lab.nodes[node])?;
            let one = all.iter().find(|known| known.service.contains(service) && known.state == "running");
            Ok(one.filter(|known| !known.address_v4.is_empty()).map(|known| (known.address_v4.clone(), all.len())))
        });
        let (has, all) = up.unwrap_or_else(|error| panic!("{error:#}\n{}", lab.nodes[node].log()));
        assert_eq!((&has, all), (address, 1), "at the address that its peers remember, and alone");
    }
    eprintln!("without a cluster, from the start of the daemons: up after {:?}", began.elapsed());
    until_true("the service is reached by the tables of before", Duration::from_secs(30), || {
        Ok(lab.within(&client[0], |client| client.get(to, 3)).is_ok_and(|gets| gets.failed == 0))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", lab.nodes[0].log()));
    eprintln!("services reached after {:?}", began.elapsed());

    let pids = |lab: &Lab| {
        let client = lab.nodes[0].container_pid(&client[0]).expect("a process");
        (client, lab.nodes[1].container_pid(&web[0]).expect("a process"))
    };
    let before = pids(&lab);
    lab.cluster.resume().expect("the cluster is back");
    for node in &mut lab.nodes {
        node.joined().expect("back in the cluster");
    }
    lab.cluster.running("web", 1).expect("reported");
    lab.cluster.running("client", 1).expect("reported");
    assert_eq!(pids(&lab), before, "nothing healthy is restarted");
    let gets = lab.within(&client[0], |client| client.get(to, 20)).expect("answers");
    assert_eq!(gets.failed, 0, "{gets:?}");
}

#[test]
#[ignore = "needs root"]
fn what_falls_is_raised_in_its_place_and_explained() {
    let options = ["--restart-limit", "2"];
    let lab = Lab::start(&Plan { options: &options, ..Plan::new(1, Datapath::Auto) }).expect("a laboratory");
    let node = &lab.nodes[0];
    let web = lab.deploy(&Deploy { name: "web", ..Deploy::default() }, 1).expect("it runs");
    let mut before = node.container_pid(&web[0]).expect("a process");
    for restart in 1..=2 {
        node.host.run(&format!("kill -9 {before}")).expect("killed");
        let pid = until("another process runs in its place", Duration::from_secs(30), || {
            let pid = node.container_pid(&web[0])?;
            Ok((pid != 0 && pid != before).then_some(pid))
        });
        before = pid.unwrap_or_else(|error| panic!("{error:#}\n{}", node.log()));
        let rows = lab.cluster.running("web", 1).expect("the cluster has not moved it");
        assert_eq!((&rows[0].node, &rows[0].address), (&web[0].node, &web[0].address));
        let told = until("it is explained as running", Duration::from_secs(20), || {
            Ok(Some(explained(node, "web")?).filter(|told| told.state == "running" && told.reasons.is_empty()))
        })
        .expect("explained");
        assert_eq!((told.wanted.as_str(), told.restarts), ("run", restart), "{told:?}");
        assert!(told.fell.is_some_and(|(_, why)| why.contains("137")));
    }
    node.host.run(&format!("kill -9 {before}")).expect("killed");
    // Now it is the cluster's: it deploys it anew, by another command.
    until_true("the cluster was told", Duration::from_secs(40), || Ok(node.log_has("given up after 2 restarts")))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", node.log()));
    lab.cluster.running("web", 1).expect("it runs again");
}

#[test]
#[ignore = "needs root"]
fn dockerd_may_die_hang_and_be_away() {
    let lab = Lab::start(&Plan::new(1, Datapath::Auto)).expect("a laboratory");
    let node = &lab.nodes[0];
    let web = lab.deploy(&Deploy { name: "web", replicas: 2, ..Deploy::default() }, 2).expect("they run");
    let pids = || [0, 1].map(|number: usize| node.container_pid(&web[number]).expect("a process"));
    let before = pids();

    // Killed, and away while an instance ends that nobody can watch.
    node.host.stop_docker("KILL").expect("killed");
    node.host.run(&format!("kill -9 {}", before[1])).expect("killed");
    let silent =
        until("the node says so", Duration::from_secs(20), || Ok(node.log_has("Docker does not answer").then_some(())));
    silent.unwrap_or_else(|error| panic!("{error:#}\n{}", node.log()));
    node.host.start_docker().expect("started again");
    let began = Instant::now();
    let raised = until("the end is noticed and mended", Duration::from_secs(60), || {
        let pid = node.container_pid(&web[1])?;
        Ok((pid != 0 && pid != before[1]).then_some(pid))
    });
    let raised = raised.unwrap_or_else(|error| panic!("{error:#}\n{}", node.log()));
    eprintln!("after dockerd was back: noticed and mended after {:?}", began.elapsed());
    assert_eq!(node.container_pid(&web[0]).expect("a process"), before[0], "the other is untouched");

    // It hangs; the node's own words are unaffected.
    node.host.shell("kill -STOP $(cat /run/docker.pid)").expect("stopped");
    assert!(known(node).is_ok_and(|all| all.iter().all(|known| known.state == "running")));
    std::thread::sleep(Duration::from_secs(3));
    node.host.shell("kill -CONT $(cat /run/docker.pid)").expect("goes on");
    assert_eq!(pids(), [before[0], raised]);
    lab.cluster.running("web", 2).expect("both are reported");
    // And what comes after that is done as ever.
    lab.cluster.delete("web#0").expect("deleted");
    lab.cluster.running("web", 1).expect("one is left");
    assert_eq!(node.container_pid(&web[1]).expect("a process"), raised);
}

#[test]
#[ignore = "needs root"]
fn clocks_may_jump_by_years() {
    let mut lab = Lab::prepare(&Plan::new(1, Datapath::Auto)).expect("a laboratory");
    let clock = lab.directory().join("clock");
    let set = |jump: &str| std::fs::write(&clock, jump).expect("written");
    set("+0");
    let library = lab.nodes[0].host.shell("ls /usr/lib/*/faketime/libfaketime.so.1").expect("faketime is installed");
    let text = clock.to_string_lossy().into_owned();
    for (name, value) in [
        ("LD_PRELOAD", library.trim()),
        ("FAKETIME_TIMESTAMP_FILE", &text),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ] {
        lab.nodes[0].set_variable(name, value);
    }
    lab.nodes[0].start_and_join().expect("it joins");
    let web = lab.deploy(&Deploy { name: "web", ..Deploy::default() }, 1).expect("it runs");
    let node = &lab.nodes[0];
    let (before, daemon) = (node.container_pid(&web[0]).expect("a process"), node.status().expect("a status").pid);
    // Hundredths of a second of processor time.
    let spent = || -> u64 {
        let stat = node.host.run(&format!("cat /proc/{daemon}/stat")).expect("it lives");
        stat.rsplit(") ")
            .next()
            .expect("fields")
            .split(' ')
            .skip(11)
            .take(2)
            .map(|ticks| ticks.parse::<u64>().expect("ticks"))
            .sum()
    };
    for jump in ["+3650d", "-3650d", "+0"] {
        set(jump);
        let began = spent();
        std::thread::sleep(Duration::from_secs(4));
        let storm = spent() - began;
        assert!(storm < 200, "{jump}: {storm} hundredths of a second in four seconds");
        let status = node.status().expect("a status");
        assert!(status.cluster.connected && status.pid == daemon && status.running == 1, "{jump}: {status:?}");
        assert_eq!(node.container_pid(&web[0]).expect("a process"), before, "{jump}");
    }
    lab.cluster.running("web", 1).expect("still reported");
}

//! What a person sees of the overlay while there is traffic: the tables of `node-engine net`, for people and for programs.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::cluster::{Deploy, json};
use lab::node::{Datapath, Node};
use lab::process::{capture, output};
use lab::topology::{Lab, Plan};
use lab::traffic::Flows;
use lab::wait::{until, until_true};
use serde_json::Value;

each_datapath!(tables_show_what_moves);

fn tables_show_what_moves(datapath: Datapath) {
    let mut lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let deploy = |name, on, replicas| {
        lab.deploy(&Deploy { name, on: Some(on), replicas, ..Deploy::default() }, replicas as usize).expect("it runs")
    };
    let client = deploy("client", "node-a", 1).remove(0);
    let web = deploy("web", "node-b", 2);
    let service = web[0].service_address(false).expect("a service address");
    let node = &lab.nodes[0];

    lab.within(&client, |client| client.echo(service, 20, Flows::Many)).expect("echoes");
    let mut stream = lab.within(&client, |client| client.stream(service, 8.0)).expect("a stream");

    let flows = net(node, &["flows", "--service", "web"]).expect("flows");
    let rows = flows["rows"].as_array().expect("rows");
    assert!(rows.len() >= 21, "twenty datagrams and a stream: {flows:#}");
    for row in rows {
        assert_eq!(row["client"], "app.default.client.default#0", "{row}");
        assert_eq!(row["service"], "app.default.web.default", "{row}");
        assert_eq!((&row["service_address"], &row["policy"]), (&service.to_string().into(), &"rr".into()), "{row}");
        let chosen = row["instance"].as_str().expect("text");
        assert!(chosen == "app.default.web.default#0" || chosen == "app.default.web.default#1", "{row}");
        assert_eq!(row["node"], "198.18.0.2", "{row}");
    }
    let tcp: Vec<&Value> = rows.iter().filter(|row| row["protocol"] == "tcp").collect();
    assert_eq!((tcp.len(), &tcp[0]["service_port"]), (1, &9.into()), "{tcp:?}");

    let text = say(node, &["flows", "--service", "web", "--limit", "3"]).expect("flows");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 5, "a heading, three rows, and how many there are: {text}");
    assert!(lines[0].starts_with("CLIENT") && lines[1].contains(&format!(" {service}:")), "{text}");
    assert!(lines[4].ends_with("3 of them shown: see --limit"), "{text}");
    let number = |instance: &str| net(node, &["flows", "--instance", instance]).expect("flows")["total"].as_u64();
    let (zero, one) = (number("web#0").expect("a number"), number("web#1").expect("a number"));
    assert_eq!(zero + one, rows.len() as u64, "each flow has chosen one of the two");
    assert_eq!(number("client#7"), Some(0));

    let services = net(node, &["services", "--service", "web"]).expect("services");
    let known = &services["rows"][0];
    assert_eq!(known["flows"].as_u64(), Some(rows.len() as u64), "{services:#}");
    assert_eq!(known["instances"].as_array().map(Vec::len), Some(2), "{services:#}");
    assert!(known["instances"].as_array().expect("rows").iter().all(|one| one["node"] == "198.18.0.2"), "{services:#}");
    let text = say(node, &["services"]).expect("services");
    assert!(text.contains(&service.to_string()) && text.contains("#0@198.18.0.2 #1@198.18.0.2"), "{text}");
    assert!(text.contains("#0@here"), "the client is on this node: {text}");

    let peers = until("the nodes know each other", Duration::from_secs(20), || {
        let peers = net(node, &["peers"])?;
        Ok((peers[0]["ours"] == true).then_some(peers))
    })
    .expect("peers");
    assert_eq!(peers.as_array().map(Vec::len), Some(1), "{peers:#}");
    assert_eq!(peers[0]["address"], "198.18.0.2:50103", "{peers:#}");
    assert_eq!(peers[0]["slots"], 4, "two instances, two families: {peers:#}");
    let text = say(node, &["peers"]).expect("peers");
    assert!(text.contains("198.18.0.2:50103") && text.contains("node-engine"), "{text}");

    stream.advances(Duration::from_secs(5)).expect("it moves");
    watched(node).expect("drops, again and again");
    stream.finish().expect("the stream arrives whole");

    // A daemon that is not there is named, not waited for.
    lab.nodes[0].kill().expect("killed");
    let refused = capture(lab.nodes[0].client().expect("built").args(["net", "drops"])).expect("it runs");
    assert_eq!(refused.status.code(), Some(1));
    let complaint = String::from_utf8_lossy(&refused.stderr);
    assert!(complaint.contains("no node-engine answers on") && complaint.contains("start it"), "{complaint}");
}

/// A packet to an address that nobody has is counted and explained; through a pipe the screens follow each other, in plain text.
fn watched(node: &Node) -> Result<()> {
    let mut child = node
        .client()?
        .args(["net", "drops", "--watch", "--every", "0.2"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start the watch")?;
    let mut lines = BufReader::new(child.stdout.take().context("not piped")?).lines();
    let name = "app.default.client.default.instance.0";
    output(&mut node.container(name).command(&["probe", "udp", "10.30.222.222:7", "5"]))?;
    let row = lines.by_ref().find_map(|line| match line {
        Ok(line) if line.contains('\u{1b}') => Some(Err(anyhow::anyhow!("an escape code in {line:?}"))),
        Ok(line) => line.starts_with("drop_unknown ").then_some(Ok(line)),
        Err(error) => Some(Err(error.into())),
    });
    // The reader has had enough: that is no error.
    drop(lines);
    let row = row.context("the watch ended")??;
    let ended = child.wait().context("cannot wait")?;
    if !row.contains("nobody in the cluster has this service address; `node-engine net services`") {
        bail!("{row:?}");
    }
    if !ended.success() {
        bail!("the watch ended with {ended}");
    }
    until_true("JSON tells the same", Duration::from_secs(5), || {
        let counters = net(node, &["drops"])?;
        let known = counters.as_array().context("rows")?.iter().find(|row| row["name"] == "drop_unknown").cloned();
        let known = known.context("no such counter")?;
        Ok(known["count"].as_u64() >= Some(1)
            && known["kind"] == "dropped"
            && row.contains(known["meaning"].as_str().unwrap_or("?")))
    })
}

fn net(node: &Node, words: &[&str]) -> Result<Value> {
    json(node.client()?.arg("net").args(words).args(["--json"]))
}

fn say(node: &Node, words: &[&str]) -> Result<String> {
    output(node.client()?.arg("net").args(words))
}

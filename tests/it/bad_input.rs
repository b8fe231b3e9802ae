//! Nothing that the broker or the network says ends the daemon, and what it does right goes on.

use std::time::Duration;

use lab::cluster::{BROKER_PORT, Broker, Deploy};
use lab::node::Datapath;
use lab::process::{built, output};
use lab::topology::{Lab, Plan};
use lab::traffic::Flows;
use lab::wait::until_true;

/// How often a stranger sends each datagram of a dozen.
const TIMES: &str = "5000";

each_datapath!(bad_commands_and_datagrams_change_nothing);

fn bad_commands_and_datagrams_change_nothing(datapath: Datapath) {
    let plan = Plan { broker: Broker::Mosquitto, ..Plan::new(2, datapath) };
    let mut lab = Lab::start(&plan).expect("a laboratory");
    let client = lab.deploy(&Deploy { name: "client", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    let web = lab.deploy(&Deploy { name: "web", on: Some("node-b"), ..Deploy::default() }, 1).expect("it runs");
    let to = web[0].service_address(false).expect("a service address");

    for node in &lab.nodes {
        send_bad_commands(&lab, &node.status().expect("it answers").node.id);
    }
    for number in 1..=2 {
        send_bad_datagrams(&lab, number);
    }
    for node in &mut lab.nodes {
        node.still_runs().expect("it lives");
        node.joined().expect("it is still connected");
    }
    let gets = lab.within(&client[0], |client| client.get(to, 20)).expect("answers");
    assert_eq!(gets.failed, 0, "{gets:?}");
    let echoes = lab.within(&client[0], |client| client.echo(to, 20, Flows::Many)).expect("echoes");
    assert_eq!(echoes.received, 20, "{echoes:?}");
    lab.deploy(&Deploy { name: "after", on: Some("node-a"), ..Deploy::default() }, 1).expect("deploys go on");
}

/// As anybody who reaches the broker can; and asks for an answer that only comes after all of them were read.
fn send_bad_commands(lab: &Lab, node: &str) {
    let broker = ["-h", "127.0.0.1", "-p", &BROKER_PORT.to_string()].map(str::to_owned);
    let publish = |topic: &str, payload: &[&str]| {
        let mut command = lab.lan.command("mosquitto_pub");
        command.args(&broker).args(["-q", "1", "-t", &format!("nodes/{node}/{topic}")]).args(payload);
        output(&mut command).expect("published");
    };
    let heard = lab.directory().join(format!("heard-{node}"));
    let mut listener = lab
        .lan
        .command("mosquitto_sub")
        .args(&broker)
        .args(["-q", "1", "-v", "-t", &format!("nodes/{node}/job")])
        .stdout(std::fs::File::create(&heard).expect("a file"))
        .spawn()
        .expect("mosquitto_sub starts");
    until_true("the listener hears", Duration::from_secs(10), || {
        publish("job", &["-m", r#"{"probe":1}"#]);
        Ok(std::fs::read_to_string(&heard)?.contains("probe"))
    })
    .expect("it hears");

    let large = lab.directory().join("large");
    std::fs::write(&large, "x".repeat(10 << 20)).expect("a large file");
    let large = large.to_string_lossy().into_owned();
    let deep = "[".repeat(100_000);
    let deep_file = lab.directory().join("deep");
    std::fs::write(&deep_file, deep).expect("a deep file");
    let deep_file = deep_file.to_string_lossy().into_owned();
    let path =
        r#"{"job_name":"../../etc.passwd.x.y","instance_number":0,"image":"lab/probe:1","virtualization":"container"}"#;
    let huge_number = r#"{"job_name":"a.b.c.d","instance_number":99999999999999999999,"image":"lab/probe:1"}"#;
    let wrong_types = r#"{"job_name":["a"],"instance_number":"x","image":7,"port":[],"cmd":{},"environment":"A=b"}"#;
    let bad_ports = r#"{"job_name":"a.b.ports.d","instance_number":0,"image":"lab/probe:1","virtualization":"container","port":"99999:0/sctp;;:"}"#;
    let unknown_runtime = r#"{"job_name":"a.b.runtime.d","instance_number":0,"image":"x","virtualization":"steam"}"#;
    let query = r#"{"app_name":5,"instance_list":[{"namespace_ip":"x"},null,7],"query_key":{}}"#;
    for topic in ["control/deploy", "control/delete", "control/error", "net/tablequery/result", "net/subnetwork/result"]
    {
        for payload in
            ["", "null", "[]", "7", "{", "{}", "\u{7}", "{\"a\":\"\\ud800\"}", path, huge_number, wrong_types, query]
        {
            let words = if payload.is_empty() { vec!["-n"] } else { vec!["-m", payload] };
            publish(topic, &words);
        }
        publish(topic, &["-f", &large]);
        publish(topic, &["-f", &deep_file]);
    }
    publish("control/nonsense", &["-m", "{}"]);
    publish("control/deploy", &["-m", bad_ports]);
    publish("control/deploy", &["-m", unknown_runtime]);
    // Duplicates, and a delete of what never was: answered, as the protocol asks.
    for _ in 0..5 {
        publish(
            "control/delete",
            &["-m", r#"{"job_name":"never.was.here.x","virtualization":"container","instance_number":3}"#],
        );
    }
    until_true("the delete of an unknown instance is answered", Duration::from_secs(20), || {
        let heard = std::fs::read_to_string(&heard)?;
        Ok(heard.contains("never.was.here.x") && heard.contains("UNDEPLOYED"))
    })
    .expect("answered");
    until_true("what cannot be run is refused with a reason", Duration::from_secs(20), || {
        let heard = std::fs::read_to_string(&heard)?;
        let refused = |name: &str| heard.lines().any(|line| line.contains(name) && line.contains("FAILED"));
        Ok(refused("a.b.ports.d") && refused("a.b.runtime.d"))
    })
    .expect("refused");
    listener.kill().expect("ended");
    listener.wait().expect("waited for");
}

/// As anybody who reaches the tunnel port can.
fn send_bad_datagrams(lab: &Lab, number: u8) {
    let forged = "4500001c000000004011000008080808 0a120002 0035 0007 0008 0000".replace(' ', "");
    let cut_v6 = "60000000ffff1140";
    let options = format!("4f00003c{}", "00".repeat(56));
    let fragment = format!("450000282000200040060000{}{}", "0a1e0001", "0a120002".repeat(5));
    let random: String =
        (0..1_400_u32).map(|at| format!("{:02x}", (at.wrapping_mul(2_654_435_761) >> 24) as u8)).collect();
    let mut command = lab.lan.command(built("lab").expect("built"));
    // A hello like those of nodes, which nobody here has introduced.
    let hello = "9e6e0101000000010102030405060708";
    command.args(["datagrams", &format!("198.18.0.{number}:50103"), TIMES]);
    command.args(["", "00", "45", "60", "f0", "4500", &forged, cut_v6, &options, &fragment, &random, hello]);
    let answers = output(&mut command).expect("sent");
    assert_eq!(answers.trim(), "0 answers", "a stranger learns nothing");
}

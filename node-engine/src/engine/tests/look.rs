//! A person looks at the instances of a node.

use super::*;
use crate::api::client::{ClientError, CommandOutput, Piece};
use crate::api::dto::look::{Event, EventsQuery, Terminal};

async fn running(dir: &Path) -> (Node, Client) {
    let mut node = start(dir, runtime(), OnExit::Leave).await;
    node.deploy(WEB).await;
    node.runs(WEB).await;
    (node, Client::new(&dir.join("run/api.sock")).unwrap())
}

fn web() -> crate::api::Selector {
    "web#0".parse().unwrap()
}

#[tokio::test]
async fn an_instance_is_shown_with_what_the_runtime_and_the_network_know() {
    let dir = tempfile::tempdir().unwrap();
    let (mut node, client) = running(dir.path()).await;
    let shown = client.inspect(&web()).await.unwrap();
    assert_eq!(
        (shown.service.as_str(), shown.state.as_str(), shown.restarts),
        ("app.default.web.default", "running", 0)
    );
    assert_eq!((shown.image.as_str(), shown.address_v4.as_str()), ("i", "10.18.0.64"));
    let held = shown.runtime.unwrap();
    assert_eq!((held.handle, held.pid), (format!("memory:{WEB}"), Some(std::process::id())));
    assert_eq!(shown.usage.unwrap().cpu_seconds, Some(1.0));
    let stats = client.stats().await.unwrap();
    assert_eq!((stats.len(), stats[0].instance.as_str()), (1, "app.default.web.default#0"));

    assert!(node.runtime.exit(&WEB.parse().unwrap(), 3, false));
    node.statuses_until(Status::Failed).await;
    let ended = client.inspect(&web()).await.unwrap();
    assert_eq!((ended.state.as_str(), ended.detail.as_str(), ended.runtime), ("failed", "exit code 3", None));
    assert_eq!(ended.runtime_error, format!("{WEB} is unknown to the runtime"));
    let unknown = client.inspect(&"web#7".parse().unwrap()).await.unwrap_err();
    assert_eq!(unknown.to_string(), "no instance app.default.web.default.instance.7 on this node");
}

#[tokio::test]
async fn a_command_gets_its_input_and_gives_its_output_and_code() {
    let dir = tempfile::tempdir().unwrap();
    let (mut node, client) = running(dir.path()).await;
    let command = |words: &str| words.split(' ').map(str::to_owned).collect::<Vec<_>>();

    let (_, mut output) = client.exec(&web(), command("echo hello there"), None).await.unwrap();
    assert_eq!(rest(&mut output).await, ("hello there\n".into(), String::new(), 0));
    let (_, mut output) = client.exec(&web(), command("exit 77"), None).await.unwrap();
    assert_eq!(rest(&mut output).await, (String::new(), String::new(), 77));
    let (_, mut output) = client.exec(&web(), command("frobnicate"), None).await.unwrap();
    assert_eq!(rest(&mut output).await, (String::new(), "frobnicate: not found\n".into(), 127));

    let (mut input, mut output) = client.exec(&web(), command("cat"), None).await.unwrap();
    // More than any queue between the two ends holds, read only after it was written.
    let sent = vec![b'x'; 3 << 20];
    let writing = async {
        for piece in sent.chunks(16 * 1024) {
            input.write(piece.to_vec()).await;
        }
        input.end().await;
    };
    let ((), (got, _, code)) = tokio::join!(writing, rest(&mut output));
    assert_eq!((got.len(), code), (sent.len(), 0));

    let terminal = Terminal { columns: 80, rows: 24 };
    let (mut input, mut output) = client.exec(&web(), command("size"), Some(terminal)).await.unwrap();
    input.resize(Terminal { columns: 132, rows: 50 }).await;
    input.end().await;
    assert_eq!(rest(&mut output).await.0, "80x24\n132x50\n");

    let events = happened(&client, &EventsQuery { past: None, follow: false }).await;
    let commands: Vec<&str> =
        events.iter().filter(|event| event.event == "exec").map(|event| event.detail.as_str()).collect();
    assert_eq!(commands, ["echo hello there", "exit 77", "frobnicate", "cat", "size"], "each is noted");

    assert!(node.runtime.exit(&WEB.parse().unwrap(), 0, false));
    node.statuses_until(Status::Dead).await;
    let (_, mut output) = client.exec(&web(), command("echo"), None).await.unwrap();
    let refused = output.next().await.unwrap_err();
    assert!(matches!(&refused, ClientError::Refused(words) if words.contains("no instance")), "{refused}");
}

#[tokio::test]
async fn an_output_is_followed_to_the_end_of_its_instance() {
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = running(dir.path()).await;
    let id: InstanceId = WEB.parse().unwrap();
    node.runtime.write_log(&id, b"one two");
    let mut following = client.follow_logs(&web(), Some(3)).await.unwrap();
    assert_eq!(following.next().await.unwrap().unwrap(), "two");
    node.runtime.write_log(&id, b" three");
    assert_eq!(following.next().await.unwrap().unwrap(), " three");
    node.runtime.exit(&id, 0, false);
    assert_eq!(following.next().await.unwrap(), None);
}

#[tokio::test]
async fn what_happens_is_told_as_it_happens_and_holds_up_no_end() {
    let dir = tempfile::tempdir().unwrap();
    let (mut node, client) = running(dir.path()).await;
    let past = happened(&client, &EventsQuery::default()).await;
    let words: Vec<&str> = past.iter().map(|event| event.event.as_str()).collect();
    assert_eq!(words, ["creating", "created"], "{past:?}");
    assert!(past.iter().all(|event| event.subject == "app.default.web.default#0" && event.about == "instance"));
    assert!(past[0].time_ms > 1_700_000_000_000 && past[0].time_ms <= past[1].time_ms);

    let mut following = client.events(&EventsQuery { past: Some(0), follow: true }).await.unwrap();
    node.runtime.exit(&WEB.parse().unwrap(), 137, true);
    node.statuses_until(Status::Failed).await;
    let mut heard = Vec::new();
    while heard.iter().filter(|byte| **byte == b'\n').count() < 2 {
        heard.extend_from_slice(&following.next().await.unwrap().unwrap());
    }
    let heard = String::from_utf8(heard).unwrap();
    assert!(heard.contains("\"out-of-memory\"") && heard.contains("exit code 137, out of memory"), "{heard}");
    assert!(heard.contains("\"failed\""), "{heard}");

    // Somebody still listens.
    let ending = Instant::now();
    node.drain.begin();
    node.end().await.unwrap();
    assert!(ending.elapsed() < Duration::from_secs(5), "{:?}", ending.elapsed());
    assert_eq!(following.next().await.unwrap(), None);
}

#[tokio::test]
async fn hardware_and_metrics_are_those_of_this_machine() {
    let dir = tempfile::tempdir().unwrap();
    let (_node, client) = running(dir.path()).await;
    let hardware = client.hardware().await.unwrap();
    let total = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total: u64 = total.lines().next().unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
    assert_eq!(hardware.memory_bytes, total * 1024);
    assert!(hardware.cpu.logical >= 1 && !hardware.cpu.architecture.is_empty(), "{hardware:?}");
    let metrics = client.metrics().await.unwrap();
    for line in [
        "node_engine_cluster_connected 0.0",
        "node_engine_instances{state=\"running\"} 1.0",
        "node_engine_instances{state=\"failed\"} 0.0",
        "node_engine_instances{state=\"absent\"} 0.0",
        "node_engine_instance_cpu_seconds_total{service=\"app.default.web.default\",number=\"0\",technology=\"docker\"} 1.0",
    ] {
        assert!(metrics.lines().any(|known| known == line), "{line} is not in {metrics}");
    }
    let value = |name: &str| -> f64 {
        let line =
            metrics.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap_or_else(|| panic!("{name}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(value("node_engine_process_resident_memory_bytes") > 1e6);
    assert!(value("node_engine_process_cpu_seconds_total") > 0.0 && value("node_engine_process_open_fds") > 3.0);
}

#[tokio::test]
async fn why_there_is_no_cluster_is_shown_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path(), runtime(), OnExit::Leave).await;
    let client = Client::new(&dir.path().join("run/api.sock")).unwrap();
    let deadline = Instant::now() + PATIENCE;
    for (command, connected, error) in [
        (Command::Trouble("no such host".into()), false, "no such host"),
        (Command::Connected, true, "no such host"),
        (Command::Disconnected("closed by peer".into()), false, "closed by peer"),
    ] {
        node.command(command).await;
        loop {
            let cluster = client.status().await.unwrap().cluster;
            if (cluster.connected, cluster.last_error.as_str()) == (connected, error) {
                break;
            }
            assert!(Instant::now() < deadline, "{cluster:?} and not {error}");
        }
    }
    let events = happened(&client, &EventsQuery::default()).await;
    let told: Vec<_> = events.iter().map(|event| (event.event.as_str(), event.detail.as_str())).collect();
    assert_eq!(told, [("connected", ""), ("disconnected", "closed by peer")]);
    while node.net.delivered.lock().unwrap().len() < 2 {
        assert!(Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    assert_eq!(*node.net.delivered.lock().unwrap(), ["Connected", "Disconnected"], "trouble is not the network's");
    node.drain.begin();
    node.end().await.unwrap();
}

/// Everything a command says, and its code.
async fn rest(output: &mut CommandOutput) -> (String, String, i64) {
    let (mut out, mut error) = (Vec::new(), Vec::new());
    loop {
        match tokio::time::timeout(PATIENCE, output.next()).await.unwrap().unwrap() {
            Piece::Out(bytes) => out.extend_from_slice(&bytes),
            Piece::Error(bytes) => error.extend_from_slice(&bytes),
            Piece::Exit(code) => return (String::from_utf8(out).unwrap(), String::from_utf8(error).unwrap(), code),
        }
    }
}

async fn happened(client: &Client, query: &EventsQuery) -> Vec<Event> {
    let mut following = client.events(query).await.unwrap();
    let mut lines = Vec::new();
    while let Some(piece) = following.next().await.unwrap() {
        lines.extend_from_slice(&piece);
    }
    lines
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect()
}

use std::net::SocketAddr;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::{config, http, start};

#[tokio::test]
async fn the_schema_is_that_of_the_newest_generation() {
    let state = tempfile::tempdir().unwrap();
    let cluster = start(config(state.path())).await;
    for (body, accepted) in [
        (json!({ "host": "x" }), true),
        (json!({ "host": "x", "port": "3000", "memory": 4000.5, "virtualization": null, "anything": [1] }), true),
        (json!({ "host": "x", "port": 3000 }), false),
        (json!({ "host": "x", "ip": null }), false),
        (json!({ "host": "x", "memory": "much" }), false),
        (json!({ "host": "x", "vcpus": null }), false),
        (json!({ "host": "x", "virtualization": "docker" }), false),
        (json!({ "host": "x", "aggregation_per_architecture": [] }), false),
        (json!({ "host": "" }), false),
        (json!({ "host": "a b" }), false),
        (json!({}), false),
        (json!([]), false),
    ] {
        let (status, answer) = http(cluster.standalone.http, "POST", "/api/node/register", &body.to_string()).await;
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        if accepted {
            assert_eq!(status, 200, "{body}");
            assert!(answer["id"].is_string() && answer["MQTT_BROKER_PORT"].is_string(), "{answer}");
        } else {
            assert_eq!(status, 500, "{body}");
            assert_eq!(answer, json!({ "code": 500, "status": "Internal Server Error" }));
        }
    }
    let (status, _) = http(cluster.standalone.http, "POST", "/api/node/register", &"x".repeat(100_000)).await;
    assert_eq!(status, 413);
    let (status, answer) = http(cluster.standalone.http, "GET", "/api/cluster/status", "").await;
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((status, &answer["connected_to_root"]), (200, &json!(false)));
    assert_eq!(http(cluster.standalone.http, "GET", "/api/job/ip/10_30_0_0/instances", "").await.0, 200);
    assert_eq!(http(cluster.standalone.http, "GET", "/api/job/ip/nonsense/instances", "").await.0, 404);
    cluster.stop().await;
}

const DESCRIPTION: &str = r#"{"host":"w","node_port":50011,"technology":["docker"],"cpu_count_total":4}"#;

fn greeting() -> String {
    format!("42/init,{}", json!(["cs1", DESCRIPTION]))
}

/// The event's name and argument.
fn event(packet: &str) -> (String, Value) {
    let list: Vec<Value> = serde_json::from_str(packet.strip_prefix("42/init,").expect("an event")).expect("a list");
    (list[0].as_str().expect("a name").to_owned(), list[1].clone())
}

fn check_answer(packet: &str, port: u16) -> Value {
    let (name, text) = event(packet);
    assert_eq!(name, "sc2");
    let answer: Value = serde_json::from_str(text.as_str().expect("JSON in a text")).unwrap();
    assert_eq!(answer["MQTT_BROKER_PORT"], port.to_string());
    answer
}

/// A conversation by polling: what is said at its beginning, and where it goes on.
async fn polling(address: SocketAddr) -> (Value, String) {
    let (_, open) = http(address, "GET", "/socket.io/?transport=polling&EIO=4&t=x", "").await;
    let handshake: Value = serde_json::from_str(open.strip_prefix('0').expect("an open packet")).unwrap();
    let session = format!("/socket.io/?transport=polling&EIO=4&sid={}", handshake["sid"].as_str().unwrap());
    (handshake, session)
}

/// Each ping has an answer that waits for whoever polls.
#[tokio::test]
async fn who_says_much_and_listens_to_nothing_is_sent_away() {
    let state = tempfile::tempdir().unwrap();
    let cluster = start(config(state.path())).await;
    let address = cluster.standalone.socketio;
    let (_, session) = polling(address).await;
    assert_eq!(http(address, "POST", &session, "2\u{1e}2").await.0, 200);
    assert_eq!(http(address, "POST", &session, &vec!["2"; 10_000].join("\u{1e}")).await.0, 400);
    let (status, answer) = http(address, "POST", &session, "2").await;
    assert_eq!((status, answer.as_str()), (400, "unknown session"));
    cluster.stop().await;
}

#[tokio::test]
async fn the_first_generation_registers_by_polling() {
    let state = tempfile::tempdir().unwrap();
    let cluster = start(config(state.path())).await;
    let address = cluster.standalone.socketio;
    let (handshake, session) = polling(address).await;
    assert_eq!((&handshake["pingInterval"], &handshake["pingTimeout"]), (&json!(25000), &json!(20000)));
    assert_eq!(http(address, "POST", &session, "40/init,").await, (200, "ok".into()));
    let (_, packets) = http(address, "GET", &session, "").await;
    let packets: Vec<&str> = packets.split('\u{1e}').collect();
    assert_eq!(event(packets[0]), ("sc1".into(), json!({ "hello-edge": "please send your node info" })));
    assert!(packets[1].starts_with("40/init,{\"sid\":"), "{packets:?}");
    http(address, "POST", &session, &greeting()).await;
    let (_, packet) = http(address, "GET", &session, "").await;
    let answer = check_answer(&packet, cluster.broker.1);
    assert!(answer.get("SUBNETWORK").is_none(), "only where the first generation is configured");

    http(address, "POST", &session, "41/init,\u{1e}1").await;
    assert_eq!(http(address, "POST", &session, "41/init,").await.0, 400, "the conversation is over");
    assert_eq!(http(address, "GET", "/socket.io/?transport=polling&EIO=3", "").await.0, 400);
    for nonsense in
        ["", "4", "42", "42/init", "42/init,", "42/init,{", "42/init,[3]", "42/init,[\"cs1\",\"x\"]", "9", "\u{e4}"]
    {
        let (_, session) = polling(address).await;
        assert_eq!(http(address, "POST", &session, nonsense).await.0, 200, "{nonsense:?}");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn the_first_generation_registers_by_websocket_and_gets_its_subnet() {
    let state = tempfile::tempdir().unwrap();
    let mut config = config(state.path());
    config.first_generation = true;
    let cluster = start(config).await;
    let address = cluster.standalone.socketio;

    let (_, open) = http(address, "GET", "/socket.io/?transport=polling&EIO=4", "").await;
    let handshake: Value = serde_json::from_str(&open[1..]).unwrap();
    let sid = handshake["sid"].as_str().unwrap();
    for (sid, subnet) in [(Some(sid), "10.18.0.0"), (None, "10.18.0.0")] {
        let parameter = sid.map(|sid| format!("&sid={sid}")).unwrap_or_default();
        let url = format!("ws://{address}/socket.io/?transport=websocket&EIO=4{parameter}");
        let (mut socket, _) = tokio_tungstenite::connect_async(url).await.expect("an upgrade");
        let mut say = Vec::new();
        if sid.is_some() {
            socket.send(Message::text("2probe")).await.unwrap();
            assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("3probe"));
            say.push("5");
        } else {
            let open = socket.next().await.unwrap().unwrap().into_text().unwrap();
            assert!(open.starts_with("0{"), "{open}");
        }
        say.push("40/init,");
        for packet in say {
            socket.send(Message::text(packet)).await.unwrap();
        }
        let mut heard = Vec::new();
        while heard.len() < 2 {
            let packet = socket.next().await.unwrap().unwrap().into_text().unwrap().to_string();
            if packet != "6" {
                heard.push(packet);
            }
        }
        assert_eq!(event(&heard[0]).0, "sc1");
        assert!(heard[1].starts_with("40/init,"), "the acknowledgement comes after");
        socket.send(Message::text(greeting())).await.unwrap();
        let packet = socket.next().await.unwrap().unwrap().into_text().unwrap();
        assert_eq!(check_answer(&packet, cluster.broker.1)["SUBNETWORK"], subnet);
    }
    cluster.stop().await;
}

//! The few Engine.IO 4 and Socket.IO 5 packets that a registration needs: bytes in, meaning out. No I/O.

use serde::Deserialize;

/// Longest packet that is looked at.
pub(super) const MAX_PACKET: usize = 64 * 1024;

/// Between the packets of one polling answer.
const SEPARATOR: char = '\u{1e}';

/// An Engine.IO packet from a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Packet {
    Open(Handshake),
    Close,
    /// To be answered with a pong of the same text.
    Ping(String),
    Pong,
    Message(Message),
    Noop,
    /// Something this side does not act on, such as a binary message.
    Other,
}

/// What a server offers with its first packet.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Handshake {
    pub(super) sid: String,
    #[serde(default)]
    pub(super) upgrades: Vec<String>,
    #[serde(rename = "pingInterval", default = "default_interval")]
    pub(super) ping_interval_ms: u64,
    #[serde(rename = "pingTimeout", default = "default_timeout")]
    pub(super) ping_timeout_ms: u64,
}

fn default_interval() -> u64 {
    25_000
}

fn default_timeout() -> u64 {
    20_000
}

/// A Socket.IO packet of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    Connected { namespace: String },
    Disconnected { namespace: String },
    Event { namespace: String, name: String, argument: String },
    Refused { namespace: String, reason: String },
    Other,
}

/// Why bytes are no packet.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("an empty packet")]
    Empty,
    #[error("a packet of {0} bytes, more than any of a registration")]
    TooLong(usize),
    #[error("a packet of unknown type {0:?}")]
    Type(char),
    #[error("a handshake that cannot be read: {0}")]
    Handshake(#[source] serde_json::Error),
    #[error("a session id that is no plain text")]
    SessionId,
    #[error("an event that cannot be read: {0}")]
    Event(#[source] serde_json::Error),
    #[error("an event without a name")]
    Nameless,
}

/// The packets of a polling answer.
pub(super) fn payload(text: &str) -> impl Iterator<Item = Result<Packet, FrameError>> + '_ {
    text.split(SEPARATOR).map(packet)
}

/// One Engine.IO packet.
pub(super) fn packet(text: &str) -> Result<Packet, FrameError> {
    if text.len() > MAX_PACKET {
        return Err(FrameError::TooLong(text.len()));
    }
    let kind = text.chars().next().ok_or(FrameError::Empty)?;
    let rest = &text[kind.len_utf8()..];
    match kind {
        '0' => handshake(rest).map(Packet::Open),
        '1' => Ok(Packet::Close),
        '2' => Ok(Packet::Ping(rest.to_owned())),
        '3' => Ok(Packet::Pong),
        '4' => message(rest).map(Packet::Message),
        '5' | 'b' => Ok(if kind == '5' { Packet::Other } else { Packet::Message(Message::Other) }),
        '6' => Ok(Packet::Noop),
        other => Err(FrameError::Type(other)),
    }
}

fn handshake(text: &str) -> Result<Handshake, FrameError> {
    let handshake: Handshake = serde_json::from_str(text).map_err(FrameError::Handshake)?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    // It becomes part of a URL.
    if handshake.sid.is_empty() || handshake.sid.len() > 128 || !handshake.sid.bytes().all(plain) {
        return Err(FrameError::SessionId);
    }
    Ok(handshake)
}

fn message(text: &str) -> Result<Message, FrameError> {
    let kind = text.chars().next().ok_or(FrameError::Empty)?;
    let (namespace, rest) = namespace(&text[kind.len_utf8()..]);
    let namespace = namespace.to_owned();
    match kind {
        '0' => Ok(Message::Connected { namespace }),
        '1' => Ok(Message::Disconnected { namespace }),
        '2' => event(namespace, rest),
        '4' => Ok(Message::Refused { namespace, reason: rest.chars().take(200).collect() }),
        '3' | '5' | '6' => Ok(Message::Other),
        other => Err(FrameError::Type(other)),
    }
}

/// `/name,` before the data; absent for the main namespace. A packet without data may leave out the comma.
fn namespace(text: &str) -> (&str, &str) {
    if !text.starts_with('/') {
        return ("/", text);
    }
    let (namespace, rest) = text.split_once(',').unwrap_or((text, ""));
    // A query after the name is legal and means nothing here.
    (namespace.split('?').next().unwrap_or(namespace), rest)
}

fn event(namespace: String, text: &str) -> Result<Message, FrameError> {
    // An acknowledgement id may stand before the data.
    let data = text.trim_start_matches(|letter: char| letter.is_ascii_digit());
    let parts: Vec<serde_json::Value> = serde_json::from_str(data).map_err(FrameError::Event)?;
    let mut parts = parts.into_iter();
    let Some(serde_json::Value::String(name)) = parts.next() else { return Err(FrameError::Nameless) };
    let argument = match parts.next() {
        // JSON inside a text: what is meant is the inner document.
        Some(serde_json::Value::String(inner)) => inner,
        Some(other) => other.to_string(),
        None => String::new(),
    };
    Ok(Message::Event { namespace, name, argument })
}

/// Asks to be let into a namespace.
pub(super) fn connect(namespace: &str) -> String {
    format!("40{namespace},")
}

/// Leaves a namespace.
pub(super) fn disconnect(namespace: &str) -> String {
    format!("41{namespace},")
}

/// Sends a JSON document as a text, which is how both sides of a registration send it.
pub(super) fn event_text(namespace: &str, name: &str, document: &str) -> String {
    format!("42{namespace},{}", serde_json::json!([name, document]))
}

pub(super) fn pong(text: &str) -> String {
    format!("3{text}")
}

pub(super) const CLOSE: &str = "1";
pub(super) const PROBE: &str = "2probe";
pub(super) const PROBE_ANSWER: &str = "3probe";
pub(super) const UPGRADE: &str = "5";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event_of(namespace: &str, name: &str, argument: &str) -> Packet {
        Packet::Message(Message::Event { namespace: namespace.into(), name: name.into(), argument: argument.into() })
    }

    #[test]
    fn the_transcript_of_a_registration_is_understood() {
        let open = r#"0{"sid":"lv_VI97HAXpY6yYWAAAC","upgrades":["websocket"],"pingInterval":25000,"pingTimeout":20000,"maxPayload":1000000}"#;
        let Packet::Open(handshake) = packet(open).unwrap() else { panic!() };
        assert_eq!((handshake.sid.as_str(), handshake.ping_timeout_ms), ("lv_VI97HAXpY6yYWAAAC", 20_000));
        assert_eq!(handshake.upgrades, ["websocket"]);
        let greeting = r#"42/init,["sc1",{"hello-edge":"please send your node info"}]"#;
        assert_eq!(
            packet(greeting).unwrap(),
            event_of("/init", "sc1", r#"{"hello-edge":"please send your node info"}"#)
        );
        assert_eq!(
            packet(r#"40/init,{"sid":"weeVbizfpwE-68z-AAAB"}"#).unwrap(),
            Packet::Message(Message::Connected { namespace: "/init".into() })
        );
        let answer = r#"42/init,["sc2","{\"id\": \"6b03561a69c09ab668d1c1fc\", \"MQTT_BROKER_PORT\": \"10003\"}"]"#;
        assert_eq!(
            packet(answer).unwrap(),
            event_of("/init", "sc2", r#"{"id": "6b03561a69c09ab668d1c1fc", "MQTT_BROKER_PORT": "10003"}"#)
        );
    }

    #[test]
    fn what_is_sent_is_what_servers_expect() {
        assert_eq!(connect("/init"), "40/init,");
        assert_eq!(disconnect("/init"), "41/init,");
        assert_eq!(event_text("/init", "cs1", r#"{"host":"w"}"#), r#"42/init,["cs1","{\"host\":\"w\"}"]"#);
        assert_eq!(packet(&event_text("/init", "cs1", "{}")).unwrap(), event_of("/init", "cs1", "{}"));
        assert_eq!(pong("probe"), PROBE_ANSWER);
    }

    #[test]
    fn several_packets_come_in_one_answer() {
        let text = "40/init,{\"sid\":\"x\"}\u{1e}2\u{1e}42/init,[\"sc1\"]\u{1e}6\u{1e}41/init";
        let packets: Vec<Packet> = payload(text).map(|packet| packet.unwrap()).collect();
        assert_eq!(packets.len(), 5);
        assert_eq!(packets[1], Packet::Ping(String::new()));
        assert_eq!(packets[2], event_of("/init", "sc1", ""));
        assert_eq!(packets[4], Packet::Message(Message::Disconnected { namespace: "/init".into() }));
    }

    #[test]
    fn variations_servers_may_send_are_understood() {
        assert_eq!(packet(r#"42["x",1]"#).unwrap(), event_of("/", "x", "1"));
        assert_eq!(packet(r#"42/init,17["x"]"#).unwrap(), event_of("/init", "x", ""));
        assert_eq!(packet("40").unwrap(), Packet::Message(Message::Connected { namespace: "/".into() }));
        let refused = packet(r#"44/init,{"message":"no"}"#).unwrap();
        assert_eq!(
            refused,
            Packet::Message(Message::Refused { namespace: "/init".into(), reason: r#"{"message":"no"}"#.into() })
        );
        assert_eq!(packet("bAQIDBA==").unwrap(), Packet::Message(Message::Other));
    }

    #[test]
    fn hostile_packets_are_refused() {
        let long = format!("4{}", "x".repeat(MAX_PACKET));
        for text in [
            "",
            "9",
            "é",
            "0",
            "0{}",
            "0[]",
            r#"0{"sid":""}"#,
            r#"0{"sid":"a&b=c"}"#,
            r#"0{"sid":7}"#,
            "4",
            "4x",
            "42",
            "42[",
            "42[]",
            "42[3]",
            "42/init",
            "42/init,",
            "42/init,{}",
            r#"42/init,[{"a":1}]"#,
            &long,
        ] {
            assert!(packet(text).is_err(), "{text:.60}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in r#"[0-6]?[0-6]?/?[a-z]{0,4},?[\[\]{}":,0-9a-zé\x1e\\]{0,60}"#) {
            let _ = packet(&text);
            for packet in payload(&text) {
                let _ = packet;
            }
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = payload(&String::from_utf8_lossy(&bytes)).count();
        }
    }
}

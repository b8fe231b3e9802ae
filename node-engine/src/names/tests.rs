//! Questions over loopback to a server with a directory in memory and a resolver behind it.

use std::collections::BTreeMap;
use std::sync::Mutex;

use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

use super::*;
use crate::netmanager::view::Named;

/// Whoever asks from loopback is an instance.
const SUBNET: Subnet = Subnet { v4: std::net::Ipv4Addr::new(127, 0, 0, 0), v6: std::net::Ipv6Addr::LOCALHOST };
const LIMIT: Duration = Duration::from_secs(10);

#[derive(Default)]
struct MemoryDirectory {
    known: Mutex<BTreeMap<String, Lookup>>,
    asked: Mutex<Vec<String>>,
}

#[async_trait]
impl Directory for MemoryDirectory {
    async fn look_up(&self, service: ServiceName) -> Lookup {
        self.asked.lock().unwrap().push(service.to_string());
        self.known.lock().unwrap().get(service.as_str()).cloned().unwrap_or(Lookup::Unknown)
    }

    async fn name_of(&self, address: IpAddr) -> Option<(ServiceName, String)> {
        let known = self.known.lock().unwrap();
        let all = known.values().filter_map(|lookup| match lookup {
            Lookup::Known(named) => Some(named),
            _ => None,
        });
        all.flat_map(|named| named.addresses.iter().map(move |(label, other)| (named, label, other)))
            .find(|(_, _, other)| **other == address)
            .map(|(named, label, _)| (named.service.clone(), label.clone()))
    }
}

struct Rig {
    directory: Arc<MemoryDirectory>,
    at: std::net::SocketAddr,
    _task: AbortOnDropHandle<io::Result<()>>,
    _dir: tempfile::TempDir,
}

impl Rig {
    /// `upstream`: the port where a resolver of others listens on loopback.
    fn new(upstream: Option<u16>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("resolv.conf");
        std::fs::write(&conf, if upstream.is_some() { "nameserver 127.0.0.1\n" } else { "" }).unwrap();
        let upstreams = Arc::new(Upstreams::of([conf, dir.path().join("none")], upstream.unwrap_or(1)));
        let directory = Arc::new(MemoryDirectory::default());
        let web = Named {
            service: "app.default.web.test".parse().unwrap(),
            addresses: [
                ("closest", "10.30.0.9"),
                ("rr", "10.30.0.1"),
                ("rr", "fdff:2000::1"),
                ("instance-0", "10.30.0.2"),
                ("instance-1", "10.30.0.3"),
            ]
            .map(|(label, address)| (label.to_owned(), address.parse().unwrap()))
            .into(),
        };
        let empty = Named { service: "app.default.empty.test".parse().unwrap(), addresses: Vec::new() };
        directory.known.lock().unwrap().extend([
            ("app.default.web.test".into(), Lookup::Known(web)),
            ("app.default.empty.test".into(), Lookup::Known(empty)),
            ("app.default.away.test".into(), Lookup::Unreachable),
        ]);
        let nets = ServiceNets { v4: ([10, 30, 0, 0].into(), 16), v6: ("fdff::".parse().unwrap(), 16) };
        let server = Server::new(directory.clone(), zone::Zone { nets, subnet: SUBNET }, upstreams);
        let door = Door::open([127, 0, 0, 1].into(), 0, None).unwrap();
        let at = door.address();
        let task = AbortOnDropHandle::new(tokio::spawn(Arc::new(server).serve(door)));
        Self { directory, at, _task: task, _dir: dir }
    }

    async fn ask(&self, name: &str, kind: RecordType) -> Message {
        let question = question(name, kind);
        let answer = self.say(&question.to_vec().unwrap()).await;
        assert_eq!(answer.metadata.id, question.metadata.id);
        answer
    }

    async fn say(&self, bytes: &[u8]) -> Message {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(bytes, self.at).await.unwrap();
        let mut buffer = vec![0; 4096];
        let length = tokio::time::timeout(LIMIT, socket.recv(&mut buffer)).await.expect("an answer").unwrap();
        Message::from_vec(&buffer[..length]).unwrap()
    }

    async fn say_by_tcp(&self, bytes: &[u8]) -> Message {
        let mut stream = TcpStream::connect(self.at).await.unwrap();
        let length = u16::try_from(bytes.len()).unwrap().to_be_bytes();
        stream.write_all(&[&length, bytes].concat()).await.unwrap();
        let mut answer = vec![0; stream.read_u16().await.unwrap().into()];
        stream.read_exact(&mut answer).await.unwrap();
        Message::from_vec(&answer).unwrap()
    }
}

#[tokio::test]
async fn names_of_services_have_their_addresses() {
    let rig = Rig::new(None);
    type Row = (&'static str, RecordType, ResponseCode, &'static [&'static str]);
    let rows: [Row; 15] = [
        ("web.test.default.app.edge.", RecordType::A, ResponseCode::NoError, &["10.30.0.1"]),
        ("web.test.default.app.edge.", RecordType::AAAA, ResponseCode::NoError, &["fdff:2000::1"]),
        ("WEB.test.default.app.EDGE.", RecordType::A, ResponseCode::NXDomain, &[]),
        ("closest.web.test.default.app.edge.", RecordType::A, ResponseCode::NoError, &["10.30.0.9"]),
        ("Closest.web.test.default.app.Edge.", RecordType::A, ResponseCode::NoError, &["10.30.0.9"]),
        ("closest.web.test.default.app.edge.", RecordType::AAAA, ResponseCode::NoError, &[]),
        ("rr.web.test.default.app.edge.", RecordType::A, ResponseCode::NoError, &["10.30.0.1"]),
        ("instance-1.web.test.default.app.edge.", RecordType::A, ResponseCode::NoError, &["10.30.0.3"]),
        ("instance-2.web.test.default.app.edge.", RecordType::A, ResponseCode::NXDomain, &[]),
        ("web.test.default.app.edge.", RecordType::MX, ResponseCode::NoError, &[]),
        ("empty.test.default.app.edge.", RecordType::A, ResponseCode::NoError, &[]),
        ("away.test.default.app.edge.", RecordType::A, ResponseCode::ServFail, &[]),
        ("default.app.edge.", RecordType::A, ResponseCode::NoError, &[]),
        ("a.b.web.test.default.app.edge.", RecordType::A, ResponseCode::NXDomain, &[]),
        ("w_b.test.default.app.edge.", RecordType::A, ResponseCode::NXDomain, &[]),
    ];
    for (name, kind, code, addresses) in rows {
        let answer = rig.ask(name, kind).await;
        assert_eq!(answer.metadata.response_code, code, "{name} {kind}");
        assert_eq!(told(&answer), addresses, "{name} {kind}");
        assert!(answer.answers.iter().all(|record| record.ttl == 5));
        // What is not there may be remembered for as long as what is.
        let negative = addresses.is_empty() && code != ResponseCode::ServFail;
        assert_eq!(answer.authorities.len(), usize::from(negative), "{name} {kind}");
    }
    let asked = |wanted: &str| rig.directory.asked.lock().unwrap().iter().filter(|name| *name == wanted).count();
    assert_eq!(asked("app.default.WEB.test"), 1);
    rig.ask("WEB.test.default.app.edge.", RecordType::A).await;
    assert_eq!(asked("app.default.WEB.test"), 1, "what the cluster has denied is not asked again at once");
}

#[tokio::test]
async fn addresses_have_their_names() {
    let rig = Rig::new(None);
    for (address, name) in [
        ("10.30.0.1", Some("web.test.default.app.edge.")),
        ("fdff:2000::1", Some("web.test.default.app.edge.")),
        ("10.30.0.9", Some("closest.web.test.default.app.edge.")),
        ("10.30.0.3", Some("instance-1.web.test.default.app.edge.")),
        ("10.30.7.7", None),
    ] {
        let reverse = Name::from(address.parse::<IpAddr>().unwrap()).to_ascii();
        let answer = rig.ask(&reverse, RecordType::PTR).await;
        let pointers: Vec<String> = answer
            .answers
            .iter()
            .filter_map(|record| match &record.data {
                RData::PTR(to) => Some(to.0.to_ascii()),
                _ => None,
            })
            .collect();
        assert_eq!(pointers, Vec::from_iter(name), "{address}");
        assert_eq!(answer.metadata.response_code == ResponseCode::NXDomain, name.is_none(), "{address}");
    }
}

#[tokio::test]
async fn names_of_others_are_asked_of_the_hosts_resolver() {
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let rig = Rig::new(Some(upstream.local_addr().unwrap().port()));
    let other = tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        let mut numbers = Vec::new();
        for _ in 0..2 {
            let (length, from) = upstream.recv_from(&mut buffer).await.unwrap();
            let asked = Message::from_vec(&buffer[..length]).unwrap();
            numbers.push(asked.metadata.id);
            let mut answer = Message::response(asked.metadata.id, asked.metadata.op_code);
            answer.queries = asked.queries.clone();
            let name = asked.queries[0].name().clone();
            let data = RData::A(hickory_proto::rr::rdata::A([203, 0, 113, 7].into()));
            answer.answers.push(hickory_proto::rr::Record::from_rdata(name, 300, data));
            // What somebody else says in between is not heard: another number.
            let mut forged = answer.clone();
            forged.metadata.id = !asked.metadata.id;
            forged.answers[0].data = RData::A(hickory_proto::rr::rdata::A([6, 6, 6, 6].into()));
            upstream.send_to(&forged.to_vec().unwrap(), from).await.unwrap();
            upstream.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
        }
        numbers
    });
    for _ in 0..2 {
        let answer = rig.ask("www.example.com.", RecordType::A).await;
        assert_eq!(told(&answer), ["203.0.113.7"]);
    }
    assert_eq!(other.await.unwrap().len(), 2);
    // It is gone now: the kernel says so at once, and so do we.
    let begin = std::time::Instant::now();
    let answer = rig.ask("www.example.com.", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    let own = rig.ask("web.test.default.app.edge.", RecordType::A).await;
    assert_eq!(told(&own), ["10.30.0.1"], "our own names go on");
}

#[tokio::test]
async fn silent_resolver_is_waited_for_once() {
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let rig = Rig::new(Some(silent.local_addr().unwrap().port()));
    let mut took = Vec::new();
    for _ in 0..2 {
        let begin = std::time::Instant::now();
        let answer = rig.ask("www.example.com.", RecordType::A).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
        took.push(begin.elapsed());
    }
    assert!(took[0] >= Duration::from_millis(1_900) && took[1] < Duration::from_secs(1), "{took:?}");
}

#[tokio::test]
async fn what_is_no_question_for_us_is_refused_or_unheard() {
    let rig = Rig::new(None);
    let bytes = |message: &Message| message.to_vec().unwrap();
    let mut twice = question("web.test.default.app.edge.", RecordType::A);
    twice.queries.push(twice.queries[0].clone());
    assert_eq!(rig.say(&bytes(&twice)).await.metadata.response_code, ResponseCode::FormErr);
    let mut other = question("web.test.default.app.edge.", RecordType::A);
    other.metadata.op_code = hickory_proto::op::OpCode::Status;
    assert_eq!(rig.say(&bytes(&other)).await.metadata.response_code, ResponseCode::NotImp);
    let transfer = question("edge.", RecordType::AXFR);
    assert_eq!(rig.say(&bytes(&transfer)).await.metadata.response_code, ResponseCode::Refused);

    // An answer would be answered by the other side's answer, for ever.
    let response = Message::response(7, hickory_proto::op::OpCode::Query);
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for unheard in [bytes(&response), b"nonsense".to_vec(), Vec::new()] {
        socket.send_to(&unheard, rig.at).await.unwrap();
    }
    let asked = question("web.test.default.app.edge.", RecordType::A);
    socket.send_to(&bytes(&asked), rig.at).await.unwrap();
    let mut buffer = vec![0; 4096];
    let length = tokio::time::timeout(LIMIT, socket.recv(&mut buffer)).await.expect("an answer").unwrap();
    let first = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!(first.metadata.id, asked.metadata.id, "the first answer is to the first question");
}

#[tokio::test]
async fn edns_and_tcp_are_understood() {
    let rig = Rig::new(None);
    let mut asked = question("web.test.default.app.edge.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(4_096);
    asked.edns = Some(edns.clone());
    let answer = rig.say(&asked.to_vec().unwrap()).await;
    assert_eq!(answer.edns.as_ref().map(Edns::max_payload), Some(1_232));
    assert_eq!(told(&answer), ["10.30.0.1"]);
    assert!(rig.ask("web.test.default.app.edge.", RecordType::A).await.edns.is_none(), "only who says it is told");
    asked.edns = Some(edns.set_version(1).clone());
    // Two codes share this number; the version is what is wrong here.
    let refused = u16::from(rig.say(&asked.to_vec().unwrap()).await.metadata.response_code);
    assert_eq!(refused, u16::from(ResponseCode::BADVERS));

    let answer = rig.say_by_tcp(&question("closest.web.test.default.app.edge.", RecordType::A).to_vec().unwrap()).await;
    assert_eq!(told(&answer), ["10.30.0.9"]);

    // So many instances do not fit the smallest datagram.
    let many = Named {
        service: "app.default.many.test".parse().unwrap(),
        addresses: (0..40_u16)
            .map(|number| (format!("instance-{number}"), IpAddr::from([0xfdff, 0, 0, 0, 0, 0, 0, number])))
            .collect(),
    };
    rig.directory.known.lock().unwrap().insert("app.default.many.test".into(), Lookup::Known(many));
    let asked = question("many.test.default.app.edge.", RecordType::AAAA).to_vec().unwrap();
    let cut = rig.say(&asked).await;
    assert!(cut.metadata.truncation && cut.answers.is_empty());
    let whole = rig.say_by_tcp(&asked).await;
    assert_eq!((whole.metadata.truncation, whole.answers.len()), (false, 32));
}

#[test]
fn a_service_without_round_robin_has_the_addresses_it_has() {
    let named = |addresses: &[(&str, &str)]| Named {
        service: "app.default.web.test".parse().unwrap(),
        addresses: addresses.iter().map(|(label, text)| ((*label).to_owned(), text.parse().unwrap())).collect(),
    };
    let chosen = |named: &Named, label| {
        zone::choose(named, label).map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let sticky = named(&[("instance-0", "10.30.0.2"), ("sticky", "10.30.0.8"), ("closest", "10.30.0.9")]);
    assert_eq!(chosen(&sticky, None), Some(vec!["10.30.0.8".into()]));
    assert_eq!(chosen(&sticky, Some("sticky")), Some(vec!["10.30.0.8".into()]), "whatever policies there are");
    assert_eq!(chosen(&sticky, Some("rr")), None);
    let bare = named(&[("instance-0", "10.30.0.2"), ("instance-1", "10.30.0.3")]);
    assert_eq!(chosen(&bare, None), Some(vec!["10.30.0.2".into(), "10.30.0.3".into()]));
}

proptest! {
    #[test]
    fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        heard(&bytes);
    }

    #[test]
    fn no_change_of_a_question_is_too_strange(
        changes in prop::collection::vec((0..60_usize, any::<u8>()), 0..8),
        length in 0..80_usize,
    ) {
        let mut bytes = question("closest.web.test.default.app.edge.", RecordType::A).to_vec().unwrap();
        for (at, value) in changes {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        bytes.truncate(length);
        heard(&bytes);
    }
}

/// Everything pure that happens to a datagram. What is said to it is never longer than a small multiple of it.
fn heard(bytes: &[u8]) {
    let nets = ServiceNets { v4: ([10, 30, 0, 0].into(), 16), v6: ("fdff::".parse().unwrap(), 16) };
    match zone::hear(bytes) {
        zone::Heard::Question(question) => {
            let _ = zone::Zone { nets, subnet: SUBNET }.read(&question.name);
            for answer in [question.no_such_name(), question.failed(), question.cut(), question.nothing()] {
                assert!(answer.is_none_or(|answer| answer.len() <= bytes.len() + 64));
            }
        }
        zone::Heard::Answer(answer) => assert!(answer.len() <= bytes.len() + 64),
        zone::Heard::Nothing => {}
    }
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.queries.push(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn told(answer: &Message) -> Vec<String> {
    let address = |record: &hickory_proto::rr::Record| match &record.data {
        RData::A(v4) => Some(v4.0.to_string()),
        RData::AAAA(v6) => Some(v6.0.to_string()),
        _ => None,
    };
    answer.answers.iter().filter_map(address).collect()
}

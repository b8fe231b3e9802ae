//! Instances that are gone, or do not answer, through both datapaths.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use netmanager_common::abi::{POLICY_ANY, POLICY_TRIAL, Slot};
use node_engine::config::DatapathChoice;
use node_engine::netmanager::datapath::{Event, TableDelta, Tally};

use super::lab::{Instance, Lab, Node, PATIENCE, service, until};
use super::{PORT, SERVICES, ready};

pub async fn who_has_a_connection_to_an_instance_that_goes_is_reset(choice: DatapathChoice) {
    let lab = ready(choice).await;
    let (node, client) = (&lab.nodes[0], &lab.nodes[0].instances[0]);
    for (family, (name, slot)) in SERVICES.into_iter().zip([1, 3]).enumerate() {
        let to = SocketAddr::new(name.parse().unwrap(), PORT);
        let [gone, other] = [&lab.nodes[1].instances[0], &lab.nodes[1].instances[1]];
        let (mut lost, _far_end) = connection(client, gone, to, family);
        node.apply(service(to.ip(), 1 + family as u32, 2, &[slot + 1])).await;
        let (mut stays, mut served) = connection(client, other, to, family);

        node.apply(TableDelta { slots: vec![(slot, emptied(2))], ..TableDelta::default() }).await;
        let begin = Instant::now();
        let error = tokio::task::spawn_blocking(move || {
            let _ = lost.write_all(b"is anybody there?");
            lost.read(&mut [0; 1]).expect_err("nobody is there")
        });
        let error = error.await.unwrap();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
        assert!(begin.elapsed() < PATIENCE / 2, "{:?}", begin.elapsed());
        stays.write_all(b"!").unwrap();
        served.read_exact(&mut [0; 1]).expect("only its own flows are left");
    }
    assert!(node.counter("told_gone").await >= 2, "{:?}", node.counters().await);
    assert!(node.counter("drop_no_instance").await >= 2);
}

pub async fn who_calls_a_service_without_instances_is_told(choice: DatapathChoice) {
    let lab = ready(choice).await;
    let (node, client) = (&lab.nodes[0], &lab.nodes[0].instances[0]);
    for (family, name) in SERVICES.into_iter().enumerate() {
        let to = SocketAddr::new(name.parse().unwrap(), PORT);
        node.apply(service(to.ip(), 1 + family as u32, 2, &[])).await;
        refused(node, client, to).await;
    }
    let nobody: SocketAddr = "10.30.99.99:8080".parse().unwrap();
    let socket = connected(client, nobody);
    socket.send(b"who is there?").unwrap();
    assert_eq!(node.event().await, Event::UnknownService(nobody.ip().into()));
    node.call(move |datapath| async move { datapath.give_up(nobody.ip().into()).await }).await;
    let error = tokio::task::spawn_blocking(move || socket.recv(&mut [0; 16]).expect_err("nobody")).await.unwrap();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "what has waited is told");
    refused(node, client, nobody).await;

    // The answers are few, however many ask.
    let before = node.counter("told_gone").await;
    let flood = connected(client, SocketAddr::new(SERVICES[0].parse().unwrap(), PORT));
    let dropped = || async { node.counter("drop_no_instance").await };
    let (seen, began) = (dropped().await, std::time::Instant::now());
    // The queue before user space takes some of a flood only.
    until("the flood has arrived", || async {
        for _ in 0..100 {
            let _ = flood.send(b"?");
        }
        dropped().await >= seen + 500
    })
    .await;
    let allowed = 300 + 100 * began.elapsed().as_secs();
    assert!(node.counter("told_gone").await - before < allowed, "{:?}", node.counters().await);
}

pub async fn answers_are_counted_and_a_trial_is_one_flow(choice: DatapathChoice) {
    let lab = ready(choice).await;
    let (node, client) = (&lab.nodes[0], &lab.nodes[0].instances[0]);
    let to = SocketAddr::new(SERVICES[0].parse().unwrap(), PORT);
    let servers = [&lab.nodes[1].instances[0], &lab.nodes[1].instances[1]];
    let _listener = servers[0].run(|| TcpListener::bind((servers[0].namespace[0], PORT))).unwrap();
    let connect = || client.run(|| TcpStream::connect_timeout(&to, PATIENCE)).map(drop);
    for _ in 0..3 {
        connect().expect("it listens");
    }
    let mut delta = service(to.ip(), 1, 2, &[1]);
    delta.services[0].1.policy = POLICY_ANY | POLICY_TRIAL;
    delta.trials = vec![(1, 2)];
    node.apply(delta).await;
    let outcomes: Vec<_> = (0..4).map(|_| connect().is_ok()).collect();
    assert_eq!(outcomes, [false, true, true, true], "the second instance does not listen, and is tried once");

    let tallies = || async { node.call(|datapath| async move { datapath.tallies(vec![0, 1, 2]).await }).await };
    let counts = |tally: &Tally| (tally.chosen, tally.answers.asked, tally.answers.answered, tally.answers.refused);
    let seen = tallies().await;
    assert_eq!(counts(&seen[1]), (6, 6, 6, 0));
    assert_eq!(counts(&seen[2]), (1, 1, 0, 1));
    assert_eq!(seen[0].answers.asked, 7, "in all");

    // Datagrams are chosen for, and prove nothing.
    connected(client, to).send(b"?").unwrap();
    until("it is counted", || async { tallies().await[1].chosen == 7 }).await;
    assert_eq!(tallies().await[1].answers.asked, 6);

    let again = Slot { generation: 3, ..lab.base(0).slots[0].1 };
    node.apply(TableDelta { slots: vec![(1, again)], ..TableDelta::default() }).await;
    assert_eq!(tallies().await[1], Tally::default(), "another instance begins anew");
}

/// An instance that opens more flows than there are rows takes nothing from those that another has.
pub async fn a_flood_of_flows_costs_others_nothing(choice: DatapathChoice) {
    const LIVE: usize = 1_000;
    // The TUN device's queue takes some of a flood only.
    const SOCKETS: u16 = 400;
    const PORTS: u16 = 2_000;
    let mut lab = Lab::new();
    lab.start(choice).await;
    for index in 0..2 {
        let full = accounted(lab.full(index, SERVICES.map(|name| name.parse().unwrap())));
        lab.nodes[index].apply(full).await;
    }
    let node = &lab.nodes[0];
    let (calm, greedy, server) = (&node.instances[0], &node.instances[1], &lab.nodes[1].instances[0]);
    let to = SocketAddr::new(SERVICES[0].parse().unwrap(), PORT);
    let echo = server.run(|| UdpSocket::bind((server.namespace[0], PORT))).unwrap();
    echo.set_read_timeout(Some(PATIENCE)).unwrap();
    let served = std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((len, from)) = echo.recv_from(&mut buffer) {
            if &buffer[..len] == b"end" {
                return;
            }
            let _ = echo.send_to(&buffer[..len], from);
        }
    });
    let flows: Vec<UdpSocket> = (0..LIVE).map(|_| connected(calm, to)).collect();
    // Who is refused stays refused; what a full queue has lost is said again.
    let exchange = |flows: &[UdpSocket]| {
        for flow in flows {
            flow.set_read_timeout(Some(PATIENCE / 10)).unwrap();
            let answered = (0..10).any(|_| {
                flow.send(b"one").unwrap();
                flow.recv(&mut [0; 16]).is_ok_and(|len| len == 3)
            });
            assert!(answered, "no answer");
        }
    };
    exchange(&flows);

    // Each datagram is a flow of its own, to a port on which nobody listens.
    for from in 20_000..20_000 + SOCKETS {
        let shouting = greedy.run(|| UdpSocket::bind((greedy.namespace[0], from))).unwrap();
        for port in 1_000..1_000 + PORTS {
            let _ = shouting.send_to(b"x", (to.ip(), port));
        }
        // The table is what is tested, not the queue before user space.
        settled(&lab.nodes).await;
        exchange(&flows[usize::from(from) % LIVE..][..1]);
        if node.counter("drop_table_full").await > 0 {
            break;
        }
    }
    until("the greedy one is refused", || async { node.counter("drop_table_full").await > 0 }).await;
    exchange(&flows);
    let late = connected(calm, to);
    exchange(std::slice::from_ref(&late));
    late.send(b"end").unwrap();
    tokio::task::spawn_blocking(move || served.join()).await.unwrap().unwrap();
}

/// Waits until the nodes have dealt with what was sent.
async fn settled(nodes: &[Node; 2]) {
    let counted = || async {
        let [a, b] = [nodes[0].counters().await, nodes[1].counters().await];
        a.iter().chain(&b).map(|(_, value)| value).sum::<u64>()
    };
    let mut before = counted().await;
    loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = counted().await;
        if now == before {
            return;
        }
        before = now;
    }
}

/// Each instance with an account of its own, as the service table gives them.
fn accounted(mut delta: TableDelta) -> TableDelta {
    let mut accounts: Vec<u32> = delta.endpoints.iter().map(|(_, endpoint)| endpoint.ifindex).collect();
    accounts.sort_unstable();
    accounts.dedup();
    for (_, endpoint) in &mut delta.endpoints {
        endpoint.account = 1 + accounts.iter().position(|ifindex| *ifindex == endpoint.ifindex).unwrap() as u16;
    }
    delta
}

/// TCP and UDP are told within a moment.
async fn refused(node: &Node, client: &Instance, to: SocketAddr) {
    let netns = client.run(node_engine::netns::Netns::current).unwrap();
    let begin = Instant::now();
    let connect = tokio::task::spawn_blocking(move || netns.run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap());
    let error = connect.await.unwrap().expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}; {:?}", node.counters().await);
    let socket = connected(client, to);
    socket.send(b"who is there?").unwrap();
    let error = tokio::task::spawn_blocking(move || socket.recv(&mut [0; 16]).expect_err("nobody")).await.unwrap();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}");
    assert!(begin.elapsed() < PATIENCE / 2, "{:?}", begin.elapsed());
}

fn connection(client: &Instance, server: &Instance, to: SocketAddr, family: usize) -> (TcpStream, TcpStream) {
    let listener = server.run(|| TcpListener::bind((server.namespace[family], PORT))).unwrap();
    let stream = client.run(|| TcpStream::connect_timeout(&to, PATIENCE)).expect("connected");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let (served, _) = listener.accept().unwrap();
    served.set_read_timeout(Some(PATIENCE)).unwrap();
    (stream, served)
}

fn connected(client: &Instance, to: SocketAddr) -> UdpSocket {
    let family = usize::from(to.is_ipv6());
    let own: IpAddr = client.namespace[family];
    let socket = client.run(|| UdpSocket::bind((own, 0))).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    client.run(|| socket.connect(to)).unwrap();
    socket
}

fn emptied(generation: u32) -> Slot {
    Slot { generation, ..Slot::default() }
}

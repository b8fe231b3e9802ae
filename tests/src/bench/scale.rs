//! How much there may be of everything: flows, and changes of the tables under traffic.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use netmanager_common::abi::Slot;
use node_engine::netmanager::datapath::TableDelta;
use serde::Serialize;

use super::case::{Case, Ground};
use super::goals::Outcome;
use super::mode::Mode;
use super::overlay::{Kind, OURS, Overlay, Sizes, absent};
use super::programs;
use super::report::median;
use super::rig::{Rig, VXLAN};

/// Of one measurement.
const TIME: Duration = Duration::from_millis(400);

/// One figure of scale, beside its goal.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    pub name: String,
    pub unit: &'static str,
    pub value: f64,
    pub goal: f64,
    /// The goal is a least, not a most.
    pub at_least: bool,
}

impl Measured {
    pub fn outcome(&self) -> Outcome {
        let good = if self.at_least { self.value >= self.goal } else { self.value <= self.goal };
        if good { Outcome::Reached } else { Outcome::Short }
    }

    fn at_least(name: impl Into<String>, unit: &'static str, value: f64, goal: f64) -> Self {
        Self { name: name.into(), unit, value, goal, at_least: true }
    }

    fn at_most(name: impl Into<String>, unit: &'static str, value: f64, goal: f64) -> Self {
        Self { name: name.into(), unit, value, goal, at_least: false }
    }
}

/// All of them, each as soon as it is known.
///
/// # Errors
/// Where the datapath cannot be built, or carries nothing.
pub fn run(measured: &mut Vec<Measured>) -> Result<()> {
    let (rate, live) = programs::new_flows()?;
    measured.push(Measured::at_least("new flows a second and core", "1/s", rate, 1e6));
    measured.push(Measured::at_least("flows live meanwhile, none of them lost", "flows", live as f64, 65_536.0));
    measured.extend(updates()?);
    large_tables(measured)
}

/// The speed with the tables of a large cluster, as a part of that with small ones.
fn large_tables(measured: &mut Vec<Measured>) -> Result<()> {
    const LARGE: Sizes = Sizes { services: 100_000, instances: 1_000_000 };
    const ROUNDS: usize = 7;
    let small = Mode::of_size("small", Sizes { services: OURS, instances: 0 })?;
    let large = Mode::of_size("large", LARGE)?;
    for case in [Case::TcpStream, Case::TcpRequests, Case::Connects, Case::SmallUdp] {
        let mut ratios = Vec::new();
        for round in 0..ROUNDS {
            // There and back: a drift of the machine favours nobody.
            let order = if round % 2 == 0 { [&small, &large] } else { [&large, &small] };
            let samples = order.map(|mode| mode.measure(case, TIME));
            let [first, second] = samples;
            let (first, second) = (first?.value, second?.value);
            ratios.push(if round % 2 == 0 { second / first } else { first / second });
        }
        let name = format!("{} with {} services and {} instances", case.name(), LARGE.services, LARGE.instances);
        measured.push(Measured::at_least(name, "of small", median(ratios).unwrap_or(0.0), 0.97));
    }
    Ok(())
}

/// Instances change while packets flow.
fn updates() -> Result<[Measured; 2]> {
    const UPDATES: u32 = 10_000;
    let rig = Rig::new("updates", Ground::PASS, Ground::USUAL_MTU - VXLAN)?;
    let sizes = Sizes { services: 2 * OURS, instances: UPDATES };
    let overlay = Overlay::new(&rig, Kind::Framed, sizes, Ground::USUAL_MTU)?;
    let [client, server] = &rig.sides;
    let traffic =
        Datagrams::start(&client.container_netns(), &server.container_netns(), &overlay.service().to_string())?;
    let deltas = (0..UPDATES).map(|number| {
        let slot = Slot { generation: 3, ..absent(UPDATES - number) };
        TableDelta { slots: vec![(10 + number, slot)], ..TableDelta::default() }
    });
    let time = overlay.apply(deltas.collect())?;
    let (sent, lost) = traffic.stop()?;
    anyhow::ensure!(sent > 100, "only {sent} datagrams were sent meanwhile");
    Ok([
        Measured::at_most(format!("{UPDATES} changes of instances, each by itself"), "s", time.as_secs_f64(), 1.0),
        Measured::at_most(format!("of {sent} packets meanwhile were lost"), "packets", lost as f64, 0.0),
    ])
}

/// Datagrams from one namespace to the other, counted at both ends.
struct Datagrams {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    sender: thread::JoinHandle<Result<u64>>,
    receiver: thread::JoinHandle<Result<()>>,
}

const PORT: u16 = 5301;

impl Datagrams {
    fn start(from: &Path, to: &Path, target: &str) -> Result<Self> {
        let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ready, started) = std::sync::mpsc::channel();
        let receiver = {
            let (to, stop, received) = (to.to_owned(), Arc::clone(&stop), Arc::clone(&received));
            thread::spawn(move || {
                let socket = socket_in(&to, &format!("0.0.0.0:{PORT}"))?;
                socket.set_read_timeout(Some(Duration::from_millis(100)))?;
                let _ = ready.send(());
                let mut buffer = [0; 64];
                // What is still on its way when the sender stops is waited for once.
                let mut quiet = false;
                while !(quiet && stop.load(Ordering::Relaxed)) {
                    quiet = socket.recv(&mut buffer).is_err();
                    received.fetch_add((!quiet).into(), Ordering::Relaxed);
                }
                Ok(())
            })
        };
        started.recv_timeout(Duration::from_secs(3)).context("the receiver does not start")?;
        let sender = {
            let (from, target, stop) = (from.to_owned(), format!("{target}:{PORT}"), Arc::clone(&stop));
            thread::spawn(move || {
                let socket = socket_in(&from, "0.0.0.0:0")?;
                socket.connect(target)?;
                let mut sent = 0;
                while !stop.load(Ordering::Relaxed) {
                    socket.send(&[7; 16])?;
                    sent += 1;
                    thread::sleep(Duration::from_micros(50));
                }
                Ok(sent)
            })
        };
        Ok(Self { stop, received, sender, receiver })
    }

    /// Sent, and lost on the way.
    fn stop(self) -> Result<(u64, u64)> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        self.receiver.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
        Ok((sent, sent.saturating_sub(self.received.load(Ordering::Relaxed))))
    }
}

fn socket_in(netns: &Path, address: &str) -> Result<UdpSocket> {
    let netns = std::fs::File::open(netns)?;
    nix::sched::setns(netns.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET)?;
    UdpSocket::bind(address).with_context(|| format!("cannot bind {address}"))
}

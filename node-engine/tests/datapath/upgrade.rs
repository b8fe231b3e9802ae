//! A start over what another version has left: tables of another size are to the pins what rows of another layout are.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use aya::maps::{Array, Map, MapData};
use aya::programs::{SchedClassifier, TcAttachType};
use netmanager_common::MAX_SLOTS;
use netmanager_common::abi::Config;
use netmanager_common::addr::Addr;
use node_engine::config::DatapathChoice::Ebpf;
use node_engine::netmanager::datapath::{Capacity, Change, Snapshot, outlook};

use super::lab::Node;
use super::newcomers::{Newcome, Newcomers};
use super::pings::Pings;
use super::{PORT, SERVICES, exchange, ready};

const LARGER: u32 = 2 * MAX_SLOTS;
const UPGRADES: usize = 6;

/// Each node in turn, six times there and back, between two packets of a flow each millisecond: none is lost, and each flow stays with
/// its instance, also one that begins meanwhile, and where a daemon died amid its start.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root"]
async fn a_change_of_tables_costs_no_flow_a_packet() {
    let mut lab = ready(Ebpf).await;
    let to = SocketAddr::new(SERVICES[0].parse().unwrap(), PORT);
    let pings = Pings::begin(&lab, to).await;
    let newcomers = Newcomers::begin(&lab, to);
    for turn in 0..UPGRADES {
        for index in 0..2 {
            let before = rows(&lab.nodes[index]).await;
            lab.nodes[index].stop().await;
            let (old, new) = if turn % 2 == 0 { (MAX_SLOTS, LARGER) } else { (LARGER, MAX_SLOTS) };
            let cut_short = Cut::of(turn + index);
            cut_short.make(&lab.nodes[index], old, new);
            lab.nodes[index].underlay.capacity = Capacity::of(new).unwrap();
            lab.nodes[index].start(Ebpf).await;
            assert_eq!(rows(&lab.nodes[index]).await, before, "{cut_short:?}: rows are taken over");
            assert_eq!(versions(&lab.nodes[index]), [name(new)], "{cut_short:?}");
            let mut full = lab.full(index, SERVICES.map(|name| name.parse().unwrap()));
            full.services.retain(|(address, ..)| *address != Addr::from(to.ip()));
            full.services
                .extend(super::lab::service(to.ip(), 1, 2, if index == 0 { &[1, 2] } else { &[5, 6] }).services);
            lab.nodes[index].reconcile(full).await;
            lab.nodes[index].attach_all().await;
        }
    }
    let (newcome, pinged) = tokio::task::spawn_blocking(|| (newcomers.finish(), pings.finish())).await.unwrap();
    println!(
        "{} take-overs by other tables, {} datagrams, {} lost, the longest round trip {:?}; {newcome:?}",
        2 * UPGRADES,
        pinged.sent,
        pinged.lost,
        pinged.longest
    );
    assert_eq!(newcome, Newcome { moved: 0, lost: 0, ..newcome }, "flows that began meanwhile");
    assert!(newcome.flows > 100, "{newcome:?}");
    assert!(pinged.sent > 100 && pinged.lost == 0, "{} of {} were lost", pinged.lost, pinged.sent);
}

/// Everything but flows, in order.
async fn rows(node: &Node) -> Snapshot {
    let mut rows = node.call(|datapath| async move { datapath.snapshot().await }).await.unwrap();
    rows.services.sort_by_key(|(address, _)| address.0);
    rows.endpoints.sort_by_key(|(address, _)| address.0);
    assert!(!rows.services.is_empty() && !rows.endpoints.is_empty() && !rows.slots.is_empty());
    rows
}

/// What a daemon that died amid its start has left.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// It did not.
    No,
    /// Maps that are not filled.
    Empty,
    /// Everything copied, as it was then.
    Stale,
}

impl Cut {
    fn of(number: usize) -> Self {
        [Self::No, Self::Empty, Self::Stale][number % 3]
    }

    fn make(self, node: &Node, old: u32, new: u32) {
        let maps = node.underlay.pin_dir.join(name(new)).join("maps");
        match self {
            Self::No => {}
            Self::Empty => fs::create_dir_all(maps).unwrap(),
            Self::Stale => {
                fs::create_dir_all(&maps).unwrap();
                // A row of another time, that would be in the way.
                let mut config = Array::<_, Config>::create(1, 0).unwrap();
                config.set(0, configuration(node, old), 0).unwrap();
                config.pin(maps.join("CONFIG")).unwrap();
            }
        }
    }
}

/// Programs that do not do what they should are taken back, and those of before go on over the tables of before.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root"]
async fn a_take_over_that_does_not_carry_goes_back() {
    let mut lab = ready(Ebpf).await;
    let to = SocketAddr::new(SERVICES[0].parse().unwrap(), PORT);
    exchange(&lab.nodes[0].instances[0], &lab.nodes[1].instances[0], to).await;
    lab.nodes[0].stop().await;
    let right = configuration(&lab.nodes[0], MAX_SLOTS);
    // Nobody's address is a service's any more: then nothing is carried.
    let wrong = Config { service_v4: Addr::v4([192, 0, 2, 0]), ..right };
    configure(&lab.nodes[0], &wrong);
    let before = programs(&lab.nodes[0]);
    lab.nodes[0].underlay.capacity = Capacity::of(LARGER).unwrap();
    let error = lab.nodes[0].try_start(Ebpf).await.expect_err("it carries nothing");
    assert!(error.contains("were put back") && error.contains("says Pass"), "{error}");
    assert_eq!(programs(&lab.nodes[0]), before, "the programs of before are at their places");
    assert_eq!(versions(&lab.nodes[0]), [name(MAX_SLOTS)], "nothing else is left");
    configure(&lab.nodes[0], &right);
    exchange(&lab.nodes[0].instances[0], &lab.nodes[1].instances[0], to).await;

    // The same programs are no worse than those of before: what is wrong is written anew.
    configure(&lab.nodes[0], &wrong);
    lab.nodes[0].underlay.capacity = Capacity::USUAL;
    lab.nodes[0].start(Ebpf).await;
    assert_ne!(programs(&lab.nodes[0]), before, "others of the same");
    let full = lab.full(0, SERVICES.map(|name| name.parse().unwrap()));
    lab.nodes[0].reconcile(full).await;
    exchange(&lab.nodes[0].instances[0], &lab.nodes[1].instances[0], to).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root"]
async fn what_would_change_is_known_before() {
    let lab = ready(Ebpf).await;
    let node = &lab.nodes[0];
    let look = |slots| node.netns().run(|| outlook(&node.underlay.pin_dir, Capacity::of(slots).unwrap())).unwrap();
    let same = look(MAX_SLOTS);
    assert_eq!((same.pinned.as_deref(), same.own.as_str(), same.rows), (Some("v3"), "v3", Some(Vec::new())));
    assert!(same.programs.iter().all(|(_, change)| *change == Change::Same), "{:?}", same.programs);
    let other = look(LARGER);
    assert_eq!((other.pinned.as_deref(), other.own, other.rows), (Some("v3"), name(LARGER), Some(Vec::new())));
    assert_eq!(versions(node), ["v3"], "a look changes nothing");
    let nowhere = node.netns().run(|| outlook(&node.underlay.pin_dir.join("none"), Capacity::USUAL)).unwrap();
    assert_eq!(nowhere.pinned, None);
    assert!(nowhere.programs.iter().all(|(_, change)| *change == Change::New), "{:?}", nowhere.programs);
}

fn name(slots: u32) -> String {
    let version = netmanager_common::ABI_VERSION;
    if slots == MAX_SLOTS { format!("v{version}") } else { format!("v{version}_{slots}") }
}

fn versions(node: &Node) -> Vec<String> {
    let entries = fs::read_dir(&node.underlay.pin_dir).unwrap().map(|entry| entry.unwrap().file_name());
    let names = entries.map(|name| name.into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name.starts_with('v')).collect();
    names.sort();
    names
}

/// The programs at each interface.
fn programs(node: &Node) -> Vec<u32> {
    let at = |name: &str| SchedClassifier::query_tcx(name, TcAttachType::Ingress).unwrap().1;
    let all = node.netns().run(|| ["host1", "host2", "wire"].map(at)).unwrap();
    all.into_iter().flatten().map(|program| program.id()).collect()
}

fn pin(node: &Node, slots: u32) -> PathBuf {
    node.underlay.pin_dir.join(name(slots)).join("maps/CONFIG")
}

fn map(node: &Node, slots: u32) -> Array<MapData, Config> {
    MapData::from_pin(pin(node, slots)).and_then(Map::from_map_data).and_then(Array::try_from).unwrap()
}

fn configuration(node: &Node, slots: u32) -> Config {
    map(node, slots).get(&0, 0).unwrap()
}

fn configure(node: &Node, config: &Config) {
    map(node, MAX_SLOTS).set(0, config, 0).unwrap();
}

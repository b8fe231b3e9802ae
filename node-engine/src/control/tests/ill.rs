//! Brokers that are away for days, and those that acknowledge late or never: what is said waits within bounds, and nobody waits for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use tokio::time::{Instant, sleep};

use super::broker::{Broker, Seen};
use super::flow::{NODE, online, topic};
use super::manager::Manager;
use super::*;

/// Hears statuses until each of these services has had one; how often each.
async fn statuses(broker: &mut Broker, count: usize) -> BTreeMap<String, u32> {
    let mut heard = BTreeMap::new();
    broker
        .see("all statuses", |seen| {
            if let Seen::Published { topic: on, payload } = seen
                && on == topic("job")
            {
                let document: serde_json::Value = serde_json::from_str(&payload).unwrap();
                *heard.entry(document["sname"].as_str().unwrap().to_owned()).or_default() += 1;
            }
            (heard.len() == count).then_some(())
        })
        .await;
    heard
}

/// In paused time, of which a day passes as fast as what is done in it. Full size: `NODE_ENGINE_TEST_AWAY_HOURS=72`.
#[tokio::test]
async fn a_broker_that_is_away_for_days_costs_samples_and_no_status() {
    const INSTANCES: u64 = 300;
    let (mut broker, manager, mut running) = online().await;
    broker.switches.refuse.store(true, Ordering::Relaxed);
    broker.hang_up();
    running.disconnected().await;
    let (away, begin) = (Duration::from_secs(3_600 * size("NODE_ENGINE_TEST_AWAY_HOURS", 6)), Instant::now());
    tokio::time::pause();
    for number in 0.. {
        if begin.elapsed() >= away && number >= INSTANCES {
            break;
        }
        running.say(status(&format!("s{}", number % INSTANCES), Status::Failed)).await;
        running.say(Report::Node(Box::default())).await;
        // Registrations are repeated; somebody has to take them.
        while running.commands.try_recv().is_ok() {}
        sleep(Duration::from_secs(60)).await;
    }
    tokio::time::resume();
    broker.switches.refuse.store(false, Ordering::Relaxed);
    let back = Instant::now();
    let heard = statuses(&mut broker, INSTANCES as usize).await;
    assert!(back.elapsed() < Duration::from_secs(7), "said {:?} after the broker was back", back.elapsed());
    assert!(heard.values().all(|times| *times == 1), "the last of each, once: {heard:?}");
    running.connected().await;
    assert!(manager.registrations() > 1, "it may have been forgotten meanwhile");
    running.end().await;
}

/// Late by less than the silence that is taken for death, and then never. Full size: `NODE_ENGINE_TEST_REPORTS=200000`, which alone also
/// looks at the memory of the process.
#[tokio::test]
async fn acknowledgements_that_come_late_or_never_hold_up_nobody() {
    const INSTANCES: u64 = 500;
    let mut broker = Broker::start().await;
    let manager = Manager::start(broker.port, true).await;
    let mut cluster = Cluster::new(config(manager.port), node());
    cluster.silence = Duration::from_millis(400);
    let mut running = run(cluster);
    running.connected().await;
    broker.switches.late.store(300, Ordering::Relaxed);
    for number in 0..INSTANCES {
        running.say(status(&format!("s{number}"), Status::Failed)).await;
    }
    broker.publish(&topic("control/deploy"), job("web"));
    assert_eq!(running.deploy().await.id, instance("web"), "orders do not wait");
    statuses(&mut broker, INSTANCES as usize).await;

    broker.switches.keep_acks.store(true, Ordering::Relaxed);
    let (usual, full) = (5_000, size("NODE_ENGINE_TEST_REPORTS", 0));
    let (before, began) = (resident(), Instant::now());
    let mut said = BTreeSet::new();
    for number in 0..full.max(usual) {
        let name = format!("t{}", number % 2_000);
        running.say(status(&name, Status::Failed)).await;
        running.say(Report::Node(Box::default())).await;
        said.insert(name);
    }
    let took = began.elapsed();
    running.disconnected().await;
    let grown = resident().saturating_sub(before);
    println!(
        "{} reports to a broker that acknowledges none: taken in {took:?}, {} KiB more",
        full.max(usual),
        grown >> 10
    );
    assert!(full == 0 || grown <= 16 << 20, "{} KiB more", grown >> 10);
    broker.switches.keep_acks.store(false, Ordering::Relaxed);
    broker.switches.late.store(0, Ordering::Relaxed);
    let heard = async {
        let mut heard = BTreeSet::new();
        while !said.is_subset(&heard) {
            let (name, _) = broker.status(NODE).await;
            heard.extend(name.split('.').nth(2).map(ToOwned::to_owned));
        }
    };
    timeout(LONG, heard).await.expect("every last status is said");
    running.end().await;
}

/// Bytes of memory that this process has in use.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or_default();
    pages * 4_096
}

//! Bytes are spent where something is to be told, and counted by what they are for.

use tokio::sync::watch;

use super::broker::{Broker, Seen};
use super::manager::Manager;
use super::*;
use crate::config::ReportChoice;

const NODE: &str = "6b034ec446528056c08b89ae";

fn usage_of(cpu_percent: f64) -> Report {
    Report::Node(Box::new(NodeUsage {
        cpu_percent,
        cpus_logical: 4,
        memory_available_mib: 4000,
        ..NodeUsage::default()
    }))
}

#[tokio::test]
async fn what_has_hardly_changed_is_not_told_and_everything_told_is_counted() {
    let mut broker = Broker::start().await;
    let manager = Manager::start(broker.port, true).await;
    let (sending, sent) = watch::channel(Sent::default());
    let mut running = run(Cluster::new(config(manager.port), node()).telling(ReportChoice::Changes, sending));
    broker.connection().await;
    running.connected().await;

    let sample = Sample {
        device: "bme280".into(),
        kind: DeviceKind::Iio,
        time: std::time::UNIX_EPOCH,
        readings: vec![Reading { channel: "temp".into(), unit: Unit::Celsius, value: 21.5 }],
    };
    running.say(usage_of(10.0)).await;
    let first = broker.message(&format!("nodes/{NODE}/information")).await;
    // Neither of these is worth a message; the third is, and comes after both would have.
    running.say(usage_of(12.0)).await;
    running.say(usage_of(9.0)).await;
    running.say(usage_of(40.0)).await;
    let mut passed = Vec::new();
    broker
        .see("the jump", |seen| {
            if let Seen::Published { topic, payload } = seen {
                passed.push((topic, payload));
            }
            passed.last().is_some_and(|(_, payload)| payload.contains("\"cpu_percent\":40.0")).then_some(())
        })
        .await;
    assert_eq!(passed.len(), 1, "{passed:?}");
    assert!(!first.contains("free_cores") && first.len() < 120, "one dialect: {first}");

    running.say(Report::Sensor(Box::new(sample))).await;
    let told = broker.message(&format!("nodes/{NODE}/sensors/bme280")).await;
    assert!(told.contains(r#""channel":"temp","value":21.5,"unit":"celsius""#), "{told}");
    running.say(status("a", Status::Dead)).await;
    broker.message(&format!("nodes/{NODE}/job")).await;

    let counted = *sent.borrow();
    let volume = |purpose| counted.on(counted.day, purpose);
    assert_eq!(volume(Purpose::Information).messages, 2);
    let topic = format!("nodes/{NODE}/information").len();
    let bytes = first.len() + passed[0].1.len() + 2 * topic;
    assert_eq!(volume(Purpose::Information).bytes, bytes as u64, "topics count too");
    assert_eq!((volume(Purpose::Sensors).messages, volume(Purpose::Job).messages), (1, 1));
    assert_eq!(volume(Purpose::Resources), Volume::default());
    assert!(counted.day > 20_000, "days since 1970");
    running.end().await;
}

#[tokio::test]
async fn what_nobody_is_there_for_is_given_up_and_counted() {
    let (sending, mut sent) = watch::channel(Sent::default());
    let running = run(Cluster::new(config(1), node()).telling(ReportChoice::Full, sending));
    for cpu_percent in [10.0, 20.0, 30.0] {
        running.say(usage_of(cpu_percent)).await;
    }
    let counted = timeout(LONG, sent.wait_for(|sent| sent.dropped == 3)).await.expect("in time").is_ok();
    assert!(counted);
    running.end().await;
}

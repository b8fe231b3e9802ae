//! Half a minute of `cargo xtask soak`: faults and operations at random under traffic.

use std::time::Duration;

use lab::node::Datapath;
use lab::soak::{self, Kind, Options};

#[test]
#[ignore = "needs root"]
fn ebpf() {
    let options = Options { length: Duration::from_secs(30), seed: 7, datapath: Datapath::Ebpf, ..Options::default() };
    let report = soak::run(&options).expect("a laboratory");
    report.verdict().expect("all is well again after each fault");
    assert!(report.faults >= 3, "{report:?}");
}

/// Daemons that lay out the kernel's tables otherwise take over from each other, some of them dying amid that, under as many datagrams
/// of 1,000 flows as are answered: nothing is lost, nothing comes twice, no connection is moved.
#[test]
#[ignore = "needs root"]
fn upgrades_lose_nothing() {
    let options = Options {
        length: Duration::from_secs(60),
        seed: 3,
        only: Some(Kind::Upgrade),
        times: Some(4),
        ..Options::default()
    };
    let report = soak::run(&options).expect("a laboratory");
    report.verdict().expect("nobody notices");
    assert_eq!(report.faults, 4, "{report:?}");
}

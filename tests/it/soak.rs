//! Half a minute of `cargo xtask soak`: faults and operations at random under traffic.

use std::time::Duration;

use lab::node::Datapath;
use lab::soak::{self, Options};

#[test]
#[ignore = "needs root"]
fn ebpf() {
    let options = Options { length: Duration::from_secs(30), seed: 7, datapath: Datapath::Ebpf, ..Options::default() };
    let report = soak::run(&options).expect("a laboratory");
    report.verdict().expect("all is well again after each fault");
    assert!(report.faults >= 3, "{report:?}");
}

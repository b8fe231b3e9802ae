//! Half a minute of `cargo xtask soak`: faults and operations at random under traffic.

use std::time::Duration;

use lab::node::Datapath;
use lab::soak::line::{self, Line};
use lab::soak::{self, Kind, Options, steps};
use lab::topology::{Lab, Plan};

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

/// Some of the steps at which a daemon may die or fail; all of them are `cargo xtask soak --only steps`.
#[test]
#[ignore = "needs root"]
fn a_daemon_that_fails_at_a_step_puts_it_right() {
    let chosen = [
        (false, "prepare-done", "kill"),
        (false, "attach", "error"),
        (true, "stop-done", "kill"),
        (true, "veth", "panic"),
    ];
    let mut cases = steps::cases();
    cases.retain(|case| chosen.contains(&(case.deletes, case.point.as_str(), case.act)));
    assert_eq!(cases.len(), chosen.len());
    let options = Options { length: Duration::from_secs(120), seed: 51, ..Options::default() };
    let report = steps::run(&options, cases).expect("a laboratory");
    report.verdict().expect("what is, is what is wanted");
    assert_eq!(report.faults as usize, chosen.len(), "{report:?}");
}

/// One of the lines to a broker that `cargo xtask soak --only line-…` has.
#[test]
#[ignore = "needs root"]
fn commands_get_through_a_bad_line() {
    let lab = Lab::start(&Plan::new(1, Datapath::Auto)).expect("a laboratory");
    let said = line::suffer(&lab, 0, Line::Loses5, "amid").expect("they get through");
    println!("{}: {said}", Line::Loses5.name());
}

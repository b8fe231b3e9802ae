//! The laboratory itself: what every other scenario stands on.

use lab::host::{Docker, Host};
use lab::image;
use lab::lan::{Lan, address, address_v6};
use lab::scratch::Scratch;

#[test]
#[ignore = "needs root"]
fn hosts_reach_each_other_over_the_switch_and_leave_nothing() {
    let scratch = Scratch::new().expect("a scratch directory");
    let directory = scratch.path().to_owned();
    let lan = Lan::new().expect("a switch");
    let hosts: Vec<Host> = std::thread::scope(|scope| {
        let boots: Vec<_> = ["a", "b"]
            .into_iter()
            .map(|name| scope.spawn(|| Host::boot(&scratch, name, Docker::Yes).expect("a host")))
            .collect();
        boots.into_iter().map(|boot| boot.join().expect("it boots")).collect()
    });
    for (host, number) in hosts.iter().zip(1..) {
        lan.plug(host, number).expect("a cable");
        image::load(host).expect("the image");
    }
    for to in [address(2), address_v6(2)] {
        hosts[0].run(&format!("ping -c1 -W2 {to}")).expect("the other host answers");
    }
    lan.set_link(2, false).expect("unplugged");
    hosts[0].run(&format!("ping -c1 -W1 {}", address(2))).expect_err("nobody answers");

    hosts[0].run(&format!("docker run -d --name web --network none {}", image::PROBE)).expect("a container");
    let answer = hosts[0].run("docker exec web probe get 127.0.0.1:80 3").expect("it serves");
    assert!(answer.contains(r#""failed":0"#), "{answer}");
    let init = hosts[0].pid();
    drop(hosts);
    drop(scratch);
    assert!(!directory.exists());
    assert!(!std::path::Path::new(&format!("/proc/{init}")).exists());
}

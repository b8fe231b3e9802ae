//! Who uses a service hears of instances that come and go, and no established flow is moved.

use std::time::Duration;

use lab::cluster::Deploy;
use lab::node::Datapath;
use lab::topology::{Lab, Plan};
use lab::wait::until_true;

each_datapath!(peers_see_instances_come_and_go, a_moved_service_answers_all_the_while);

const LIMIT: Duration = Duration::from_secs(20);

fn peers_see_instances_come_and_go(datapath: Datapath) {
    let lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let client = lab.deploy(&Deploy { name: "client", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    let first = lab.deploy(&Deploy { name: "web", on: Some("node-b"), ..Deploy::default() }, 1).expect("it runs");
    let to = first[0].service_address(false).expect("a service address");
    let answering = || lab.within(&client[0], |client| client.get(to, 20));
    assert_eq!(answering().expect("answers").answers.len(), 1);

    let mut stream = lab.within(&client[0], |client| client.stream(to, 6.0)).expect("a stream");
    lab.deploy(&Deploy { name: "web", on: Some("node-a"), ..Deploy::default() }, 2).expect("a second one");
    until_true("both instances answer", LIMIT, || answering().map(|gets| gets.answers.len() == 2)).expect("seen");
    stream.advances(Duration::from_secs(3)).expect("the old flow stays where it was");
    stream.finish().expect("to its end");

    lab.cluster.delete("web#0").expect("deleted");
    lab.cluster.running("web", 1).expect("one is left");
    until_true("the deleted one is forgotten", LIMIT, || {
        let gets = answering()?;
        Ok(gets.failed == 0 && gets.answers.len() == 1)
    })
    .expect("seen");
    lab.cluster.delete("web").expect("deleted");
    lab.cluster.running("web", 0).expect("none is left");
    until_true("nobody answers", LIMIT, || Ok(lab.within(&client[0], |client| client.get(to, 1))?.failed == 1))
        .expect("seen");
}

fn a_moved_service_answers_all_the_while(datapath: Datapath) {
    let lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let client = lab.deploy(&Deploy { name: "client", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    let web = lab.deploy(&Deploy { name: "web", on: Some("node-b"), ..Deploy::default() }, 1).expect("it runs");
    let to = web[0].service_address(false).expect("a service address");
    let get = |count| lab.within(&client[0], |client| client.get(to, count)).expect("the probe ends");
    assert_eq!(get(1).failed, 0);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let (mut requests, mut failed) = (0, 0);
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let gets = get(20);
                // The replacement is in the table before its program listens, as in the reference: whoever is sent there
                // then is refused at once, and asks again. Nobody waits for an answer that does not come.
                assert!(gets.failed == 0 || gets.error.contains("refused"), "{gets:?}");
                assert!(gets.failed < gets.requests, "nobody answers: {gets:?}");
                (requests, failed) = (requests + gets.requests, failed + gets.failed);
            }
            (requests, failed)
        });
        lab.cluster.relocate("web#0", "node-a").expect("moved");
        let moved = until_true("the service has moved", Duration::from_secs(40), || {
            let rows = lab.cluster.running("web", 1)?;
            Ok(rows[0].node == "node-a")
        });
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        moved.expect("moved");
        let (requests, failed) = asking.join().expect("no panic");
        assert!(failed * 10 < requests, "{failed} of {requests} requests failed");
    });
    assert_eq!(get(20).failed, 0);
}

//! What a node keeps, when the disk under it is damaged or full.

use std::time::{Duration, Instant};

use lab::cluster::Deploy;
use lab::node::{Datapath, Node};
use lab::topology::{Lab, Plan};
use lab::wait::until_true;

each_datapath!(damaged_files_cost_nothing_that_runs);

fn state(node: &Node) -> String {
    node.host.directory().join("state").display().to_string()
}

/// Everything that the daemon reads at its start, at once.
fn damaged_files_cost_nothing_that_runs(datapath: Datapath) {
    let mut lab = Lab::start(&Plan::new(1, datapath)).expect("a laboratory");
    let web = lab.deploy(&Deploy { name: "web", replicas: 2, ..Deploy::default() }, 2).expect("they run");
    let pids = |lab: &Lab| [0, 1].map(|number| lab.nodes[0].container_pid(&web[number]).expect("a process"));
    let before = pids(&lab);
    lab.nodes[0].kill().expect("killed");
    let state = state(&lab.nodes[0]);
    let damage = format!(
        "cd {state}
         dd if=/dev/urandom of=desired.redb bs=512 seek=1 count=24 conv=notrunc 2>/dev/null
         printf '{{\"format\":' > state.json
         cd /run/node-engine
         for file in leases journal $(find . -path './tables/*' -type f); do
             test -f $file && dd if=/dev/urandom of=$file bs=64 seek=1 count=2 conv=notrunc 2>/dev/null
         done
         ls leases journal"
    );
    lab.nodes[0].host.shell(&damage).expect("damaged");
    let began = Instant::now();
    lab.nodes[0].start_and_join().expect("it starts, and is in the cluster again");
    lab.cluster.running("web", 2).expect("both are reported");
    let took = began.elapsed();
    assert_eq!(pids(&lab), before, "nothing that runs was touched\n{}", lab.nodes[0].log());
    assert!(took < Duration::from_secs(10), "all was made anew after {took:?} only");
    let aside = lab.nodes[0].host.shell(&format!("ls {state}")).expect("a list");
    for kept in ["desired.redb.corrupt-1", "state.json.corrupt-1"] {
        assert!(aside.contains(kept), "{kept} is kept aside: {aside}");
    }
    // And what comes then is done as ever.
    lab.cluster.delete("web#0").expect("deleted");
    lab.cluster.running("web", 1).expect("one is left");
    assert_eq!(lab.nodes[0].container_pid(&web[1]).expect("a process"), before[1]);
}

#[test]
#[ignore = "needs root"]
fn a_full_disk_refuses_with_the_reason_and_heals() {
    let mut lab = Lab::prepare(&Plan::new(1, Datapath::Auto)).expect("a laboratory");
    let state = state(&lab.nodes[0]);
    let mount = format!("mkdir -p {state} && mount -t tmpfs -o size=8m none {state}");
    lab.nodes[0].host.shell(&mount).expect("a small disk");
    lab.nodes[0].start_and_join().expect("it starts");
    let web = lab.deploy(&Deploy { name: "web", ..Deploy::default() }, 1).expect("it runs");
    let before = lab.nodes[0].container_pid(&web[0]).expect("a process");

    lab.nodes[0].host.shell(&format!("! dd if=/dev/zero of={state}/filler bs=4k 2>/dev/null")).expect("filled");
    lab.cluster.deploy(&Deploy { name: "late", ..Deploy::default() }).expect("asked for");
    until_true("it is refused with the reason", Duration::from_secs(30), || {
        Ok(lab.cluster.instances()?.iter().any(|row| row.short() == "late" && row.detail.contains("No space left")))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{:?}\n{}", lab.cluster.instances(), lab.nodes[0].log()));
    assert_eq!(lab.nodes[0].container_pid(&web[0]).expect("a process"), before, "what runs goes on");

    lab.nodes[0].host.shell(&format!("rm {state}/filler")).expect("room again");
    let began = Instant::now();
    until_true("the disk is written to again", Duration::from_secs(10), || {
        Ok(lab.nodes[0].log_has("the desired state is on the disk again"))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", lab.nodes[0].log()));
    lab.cluster.running("late", 1).expect("it runs in the end");
    println!("healed: runs {:?} after there was room", began.elapsed());
    assert_eq!(lab.nodes[0].container_pid(&web[0]).expect("a process"), before);
    lab.nodes[0].still_runs().expect("the same daemon all the while");
}

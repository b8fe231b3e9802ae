use lab::bench::load::*;
use lab::bench::rig::*;
use std::time::Duration;
fn main() -> anyhow::Result<()> {
    let mut set: nix::sched::CpuSet = nix::sched::CpuSet::new();
    set.set(1)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?;
    for wire in [Wire::Pass, Wire::Seg] {
        let direct = Rig::new("dir", wire, 1500)?;
        let d = direct.direct(wire)?;
        let routed = Rig::new("rt", wire, 1500)?;
        let r = routed.route()?;
        let vx = Rig::new("vx", wire, 1450)?;
        let v = vx.vxlan()?;
        let dn = Rig::new("dn", wire, 1450)?;
        dn.vxlan()?;
        let n = dn.dnat(1000)?;
        for case in Case::ALL {
            for (name, rig, t) in
                [("direct", &direct, d), ("routed", &routed, r), ("vxlan", &vx, v), ("vxlan+dnat", &dn, n)]
            {
                let ends =
                    Ends { client: rig.sides[0].container_netns(), server: rig.sides[1].container_netns(), target: t };
                let s = measure(case, &ends, Duration::from_millis(1000));
                println!("{} {} {name}: {s:?}", wire.name(), case.name());
            }
        }
    }
    Ok(())
}

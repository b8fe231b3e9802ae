//! Scenarios: whole clusters on one machine, with real containers and real packets. They need root, Docker and time, so a plain
//! `cargo test` passes them by; `cargo xtask test` runs them all. Those about the overlay run once for each datapath.

/// Makes a test of each function for each datapath.
macro_rules! each_datapath {
    ($($scenario:ident),+ $(,)?) => {
        mod ebpf {
            $(#[test]
            #[ignore = "needs root"]
            fn $scenario() {
                super::$scenario(lab::node::Datapath::Ebpf);
            })+
        }
        mod tun {
            $(#[test]
            #[ignore = "needs root"]
            fn $scenario() {
                super::$scenario(lab::node::Datapath::Tun);
            })+
        }
    };
}

mod bad_input;
mod balance;
mod deploy;
mod edges;
mod framing;
mod furniture;
mod generations;
mod ground;
mod health;
mod look;
mod miss;
mod names;
mod overlay;
mod paths;
mod ports;
mod process;
mod restart;
mod standalone;
mod survive;
mod underlay;
mod unikernel;
mod uninstall;
mod update;
mod view;

//! Scenarios: whole clusters on one machine, with real containers and real packets. They need root, Docker and time, so a plain
//! `cargo test` passes them by; `cargo xtask test` runs them all. Those about the overlay run once for each datapath.

/// Makes a test of each function for each rung of the datapath. Of those for programs as old kernels know them a plain `cargo xtask test`
/// runs a few, `--rung ebpf-plain` all.
macro_rules! each_datapath {
    ($($scenario:ident),+ $(,)?) => {
        each_datapath!(@ ebpf Ebpf: $($scenario),+);
        each_datapath!(@ plain Plain: $($scenario),+);
        each_datapath!(@ tun Tun: $($scenario),+);
    };
    (@ $module:ident $datapath:ident: $($scenario:ident),+) => {
        mod $module {
            $(#[test]
            #[ignore = "needs root"]
            fn $scenario() {
                super::$scenario(lab::node::Datapath::$datapath);
            })+
        }
    };
}

mod alike;
mod bad_input;
mod balance;
mod containerd;
mod deploy;
mod edges;
mod framing;
mod furniture;
mod generations;
mod ground;
mod health;
mod ladder;
mod look;
mod miss;
mod names;
mod overlay;
mod paths;
mod podman;
mod ports;
mod process;
mod restart;
mod soak;
mod standalone;
mod storage;
mod survive;
mod underlay;
mod unikernel;
mod uninstall;
mod update;
mod view;
mod wasm;

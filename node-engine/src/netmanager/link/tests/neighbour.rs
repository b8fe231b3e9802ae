use std::net::UdpSocket;

use super::*;

#[test]
#[ignore = "needs root"]
fn who_was_looked_for_without_a_carrier_is_found_with_it() {
    let host = Host::new("nbr");
    let namespace = &host.namespace;
    let neighbours = || namespace.exec("ip -4 neigh show dev lk-up");
    // By itself the kernel would ask again in an hour.
    namespace.write("net/ipv4/neigh/lk-up/retrans_time_ms", "3600000");
    let host = &host;
    host.links(|links| async move {
        let seen = |words: &'static str| async move {
            for _ in 0..500 {
                if neighbours().contains(words) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            panic!("never {words}: {}", neighbours());
        };
        for _ in 0..3 {
            host.outside.exec("ip link set lk-out down");
            wait_until("the carrier is gone", || namespace.exec("ip link show lk-up").contains("NO-CARRIER"));
            namespace.within(|| {
                let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
                socket.send_to(b"are you there", (OUTSIDE_V4, 9)).expect("sent, for all that anybody knows");
            });
            seen("INCOMPLETE").await;
            host.outside.exec("ip link set lk-out up");
            seen("lladdr").await;
        }
        drop(links);
    });
}

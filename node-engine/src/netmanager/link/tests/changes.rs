use tokio::time::timeout;

use super::*;

#[test]
#[ignore = "needs root"]
fn a_burst_of_changes_is_told_once_and_none_is_lost_between_two_questions() {
    let host = Host::new("chg");
    let namespace = &host.namespace;
    host.links(|links| async move {
        let told = |seconds| timeout(Duration::from_secs(seconds), links.changed());
        while timeout(Duration::from_millis(300), links.changed()).await.is_ok() {}

        for number in 10..20 {
            namespace.exec(&format!("ip addr add 192.0.2.{number}/24 dev lk-up"));
        }
        // Nobody has asked meanwhile.
        tokio::time::sleep(Duration::from_millis(200)).await;
        told(5).await.expect("the burst");
        assert!(timeout(Duration::from_millis(300), links.changed()).await.is_err(), "told twice");

        namespace.exec("ip route add 198.51.100.0/24 dev lk-up");
        told(5).await.expect("a route");
        namespace.exec("ip link set lk-up down");
        // Told by nf_tables alone.
        while timeout(Duration::from_millis(300), links.changed()).await.is_ok() {}
        namespace.exec("nft add table ip somebody");
        told(5).await.expect("a table");
        namespace.exec("nft flush ruleset");
        told(5).await.expect("a flush");
        namespace.exec("ip link set lk-up mtu 1400");
        // A question that is given up takes no answer with it.
        let _ = timeout(Duration::from_millis(10), links.changed()).await;
        told(5).await.expect("a link");
    });
}

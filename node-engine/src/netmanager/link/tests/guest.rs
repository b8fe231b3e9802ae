use super::*;

/// A namespace in place of a machine, at the other end of what its host calls `tap0`.
fn with_guest(instance: &Namespace) -> Namespace {
    let guest = Namespace::new("guest");
    instance.exec(&format!("ip link add tap0 type veth peer name eth0 netns {}", guest.name));
    guest.exec("ip addr add 192.168.1.2/30 dev eth0");
    guest.exec("ip link set eth0 up");
    guest.exec("ip route add default via 192.168.1.1");
    guest
}

#[test]
#[ignore = "needs root"]
fn a_guest_behind_an_instance_is_the_instance_to_everybody_else() {
    let host = Host::new("guest");
    let instance = Namespace::new("in");
    let guest = with_guest(&instance);
    let path = &instance.path;
    let attach = || {
        host.links(|links| async move {
            links.ensure_bridge(SUBNET).await.expect("bridge");
            links.attach(&id(0), path, SUBNET, FIRST).await.expect("attached");
        });
    };
    attach();
    let _server = Server::start(&guest, 8080);
    assert_eq!(ask(&host.namespace, FIRST.v4.into(), 8080).expect("the guest answers"), IpAddr::V4(GATEWAY.v4));
    let listening = Server::start(&host.namespace, 9090);
    let seen = ask(&guest, GATEWAY.v4.into(), 9090).expect("the host answers");
    assert_eq!(seen, IpAddr::V4(FIRST.v4), "the guest speaks as its instance");
    drop(listening);
    guest.exec("ping -c 1 -W 2 10.18.0.1");

    let before = instance.snapshot();
    attach();
    let after = instance.snapshot();
    assert_eq!(before.len(), after.len(), "attaching again adds nothing");
    ask(&host.namespace, FIRST.v4.into(), 8080).expect("the guest still answers");
}

#[test]
#[ignore = "needs root"]
fn an_instance_without_a_guest_gets_none_of_its_network() {
    let host = Host::new("alone");
    let instance = host.with_instance();
    assert!(!instance.exec("ip -br link").contains("virbr0"));
    assert_eq!(instance.read("net/ipv4/ip_forward"), "0");
}

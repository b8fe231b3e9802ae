//! Where fuzzers begin: something of every kind that is understood at a door.

use netmanager_common::testing::{Direction, UPSTREAM, cases};

use super::NODE;
use crate::netmanager::datapath::sheet_sample;
use crate::runtime::unikernel;

pub(super) fn packets() -> Vec<Vec<u8>> {
    let direction = |direction| match direction {
        Direction::Outbound(_) => 0,
        Direction::Inbound(outer) => 1 + u8::from(outer == UPSTREAM),
    };
    cases().into_iter().map(|case| [&[direction(case.direction)][..], &case.packet].concat()).collect()
}

pub(super) fn dns_questions() -> Vec<Vec<u8>> {
    let question = |labels: &[&str], kind: u8| {
        let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in labels {
            bytes.push(label.len() as u8);
            bytes.extend(label.as_bytes());
        }
        bytes.extend([0, 0, kind, 0, 1]);
        bytes
    };
    vec![
        question(&["web", "test", "default", "app", "edge"], 1),
        question(&["closest", "web", "test", "default", "app", "edge"], 28),
        question(&["0", "0", "30", "10", "in-addr", "arpa"], 12),
        question(&["example", "com"], 1),
    ]
}

pub(super) const DEPLOY: &str = r#"{"app_name":"app","virtualization":"container","memory":100,"vcpus":1,"vgpus":0,"storage":0,
"image":"docker.io/library/nginx:alpine","port":"8080:80;53:53/udp","cmd":["a","b"],"environment":["A=b"],"one_shot":false,"privileged":false,
"addresses":{"rr_ip":"10.30.55.55"},"RR_ip":"10.30.55.55","job_name":"app.default.web.test","_id":"64b0000000000000000000aa",
"vm_images":["http://a/k.tar.gz"],"arch":["amd64"],"volumes":null,"platform":"linux/amd64","instance_list":[{"instance_number":0,"status":null}],"instance_number":0}"#;
pub(super) const DEPLOY_FIRST_GENERATION: &str = r#"{"_id":"x","system_job_id":"y","job_name":"app.default.web.test","image":"i","image_runtime":"docker","port":80,
"commands":["c"],"requirements":{"cpu":1,"memory":100},"instance_list":[{"instance_number":2,"worker_id":"6b034ec446528056c08b89ae","namespace_ip":""}]}"#;
pub(super) const DELETE: &str =
    r#"{"job_name":"app.default.web.test","virtualization":"container","instance_number":0}"#;
pub(super) const COMMON: &str = r#"{"command":"deploy","job":{"id":"1","name":"app.default.web.test","image":"i","technology":"docker"},"cluster":["c"],"worker":["w"]}"#;
pub(super) const TABLE: &str = r#"{"app_name":"app.default.web.test","instance_list":[{"cluster_id":"c","worker_id":"w","instance_number":0,"instance_ip":"10.30.0.0",
"instance_ip_v6":"fdff::","namespace_ip":"10.18.0.2","namespace_ip_v6":"fc00::2","host_ip":"10.1.1.1","host_port":50103,"service_ip":[
{"IpType":"RR","Address":"10.30.55.55","Address_v6":"fdff:2000::"},{"IpType":"instance_ip","Address":"10.30.0.0","Address_v6":"fdff::"}]},{"instance_number":1}],
"query_key":"app.default.web.test"}"#;
pub(super) const SUBNET: &str = r#"{"address":"10.18.0.64","addressv6":"fc00::100"}"#;
pub(super) const DEPLOYED: &str = r#"{"appname":"app.default.web.test","status":"DEPLOYED","instance_number":0,"nsip":"10.18.0.2","nsipv6":"fc00::2","host_port":"50103","host_ip":"192.0.2.11"}"#;
pub(super) const QUERY: &str = r#"{"sname":"","sip":"10.30.55.55"}"#;
pub(super) const ANSWER: &str =
    r#"{"id":"6b034ec446528056c08b89ae","MQTT_BROKER_PORT":"10003","SUBNETWORK":"172.18.0.0"}"#;
pub(super) const REGISTRATION: &str = r#"{"host":"w","ip":"192.0.2.11","port":"3000","node_port":50011,"technology":["docker"],"virtualization":["docker"],"memory":4000,"vcpus":4,"architecture":"amd64"}"#;
pub(super) const JOB: &str =
    r#"{"sname":"app.default.web.test","status":"CREATED","status_detail":"","instance":0,"publicip":"192.0.2.11"}"#;
pub(super) const RESOURCES: &str = r#"{"services":[{"cpu_percent":"1.5","memory_percent":"0.2","disk":"1000","logs":"hello","job_name":"app.default.web.test","virtualization":"docker","instance":0}]}"#;
pub(super) const INFORMATION: &str = r#"{"cpu_percent":7.5,"vcpus":4,"memory_percent":20.0,"memory":4000,"cpu":1,"free_cores":3.5,"memory_free_in_MB":2310.5,"ip":"192.0.2.11"}"#;
pub(super) const TOPICS: [&str; 5] = [
    "nodes/6b034ec446528056c08b89ae/control/deploy",
    "nodes/6b034ec446528056c08b89ae/net/tablequery/result",
    "nodes/6b034ec446528056c08b89ae/net/service/deployed",
    "nodes/6b034ec446528056c08b89ae/jobs/resources",
    "jobs/app.default.web.test/updates_available",
];
pub(super) const TYPED: [&str; 6] =
    ["web", "web#0", "app.default.web.default#12", "app.default.web.test.instance.0", NODE, "8080:80/tcp;53:53/udp;9"];
pub(super) const SOCKETIO: [&str; 3] = [
    "0{\"sid\":\"weeVbizfpwE-68z-AAAB\",\"upgrades\":[\"websocket\"],\"pingInterval\":25000,\"pingTimeout\":20000,\"maxPayload\":1000000}",
    "42/init,[\"sc1\",{\"hello-edge\":\"please send your node info\"}]\u{1e}40/init,{\"sid\":\"a\"}",
    "42/init,[\"sc2\",\"{\\\"id\\\":\\\"x\\\"}\"]",
];
pub(super) const HELLO: [u8; 20] = [0x9e, 0x6e, 1, 1, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 0xc3, 0xb8];
pub(super) const CONFIG: &str = "name = \"n\"\n[cluster]\nhost = \"h\"\nport = 10100\n[network]\ndatapath = \"tun\"\ntunnel_port = 50103\nframing = false\n";
pub(super) const LEASES: &str = "node-engine leases 1\nsubnet 10.18.0.64 fc00::100\nlease app.ns.web.ns.instance.0 10.18.0.66 fc00::102 own=10.30.0.0,fdff:: ports=8080:80/tcp inode=4026532281 netns=/proc/17/ns/net\n";

pub(super) const RECORDS: [&str; 5] = [
    r#"{"sequence":7,"given":["6b034ec446528056c08b89ae",9],"document":"{}"}"#,
    r#"{"sequence":8,"document":"{}","ended":["FAILED","no image"]}"#,
    r#"{"sequence":9}"#,
    "10.18.0.2 fc00::2",
    r#"[{"number":0,"namespace":["10.18.0.2","fc00::2"],"instance":["10.30.0.0",null],"host":"10.1.1.1","host_port":50103,"weight":1,"services":[["RR","10.30.55.55"]]}]"#,
];
pub(super) const STATE: &str = r#"{"format":1,"identity":{"cluster":"c","node":"6b034ec446528056c08b89ae"},"subnets":{"6b034ec446528056c08b89ae":{"v4":"10.18.0.64","v6":"fc00::100"}}}"#;
pub(super) const JOURNAL: &str = "boot boot\n+ link ne-bridge\n+ address ne-bridge 10.18.0.65 26\n+ route tun0 10.30.0.0 16\n\
+ sysctl net/ipv4/ip_forward 1 0\n+ table ip\n+ rules ip6 filter FORWARD\n- link ne-bridge\n+ link %C3%A4%20b\n";
pub(super) const LAYOUT: &str = "FLOWS 40 source:0:16,destination:16:16,source_port:32:2,destination_port:34:2,protocol:36:4 \
56 slot:0:4,generation:4:4,seen:8:4\nPEERS 4 slot:0:4 24 host:0:16,port:16:2\n";
pub(super) const LAUNCH: &str = "program=/bin/sh\0argument=-c\0environment=A=b\0directory=/\0user=1\0group=2\0host_name=i\0\
mount=ro\u{1f}/c\u{1f}/a b\0resolver=nameserver 10.0.0.1\n\0netns=/run/netns/x\0control_group=/g\0memory_events=\0log=/l\0log_limit=7\0";
pub(super) const MODULE_ORDER: [&str; 3] = [
    "argument=m\0environment=A=b\0port=80\0root=/r\0memory_mib=7\0user=1\0group=2\0",
    "memory",
    "failed trap: of a kind",
];
pub(super) const IMAGES: [&str; 5] = [
    r#"{"manifests":[{"digest":"sha256:aa","platform":{"os":"linux","architecture":"arm","variant":"v7"}},{"digest":"sha256:bb"}]}"#,
    r#"{"config":{"digest":"sha256:cc"}}"#,
    r#"{"os":"linux","architecture":"amd64","config":{"User":"1","Env":["A=b"],"Entrypoint":["/a"],"Cmd":["b"],"WorkingDir":"/","StopSignal":"SIGINT"},"rootfs":{"diff_ids":["sha256:aa","sha256:bb"]}}"#,
    "ghcr.io/a/b_c:1.2-x@sha256:00",
    r#"{"ociVersion":"1.0.2","process":{"user":{"uid":0,"gid":0},"args":["a"],"env":["A=b"],"cwd":"/"},"mounts":[{"type":"bind","source":"/a","destination":"/b"}],"linux":{"resources":{"cpu":{"quota":100000},"memory":{"limit":1}},"devices":[{"path":"/dev/fuse"}]}}"#,
];
pub(super) const PLACES: [&str; 7] = [
    "nginx",
    "docker.io/library/nginx:alpine",
    "host:5000/a@sha256:00",
    "[fd00::1]:5000/x",
    "https://a/k.tar.gz#sha256=2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    "file:///a/b",
    r#"{"auths":{"ghcr.io":{"auth":"dTpw"},"ghcr.io/team":{"username":"team","password":"a:b"},"https://ghcr.io":{"identitytoken":"t"}}}"#,
];
pub(super) const HANDLERS: &str = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata]\n\
runtime_type = \"io.containerd.kata.v2\"\n[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.crun.options]\nBinaryName = \"/usr/bin/crun\"\n";
pub(super) const ACCOUNTS: [&str; 2] =
    ["web:audio\nroot:x:0:0::/:/bin/sh\nweb:x:1000:100:w:/:/bin/sh\naudio:x:29:web,other\n", "77\n"];
pub(super) const POSITIONS: [&str; 3] = [
    "$GPGGA,123519,4807.038,N,01131.000,E,1,08,0.9,545.4,M,46.9,M,,*47\n$GPRMC,123519,A,4807.038,N,01131.000,E,022.4,084.4,230394,003.1,W*6A",
    r#"{"class":"TPV","mode":3,"lat":48.5,"lon":-11.25,"altMSL":500.5,"speed":1.5}"#,
    r#"{"class":"TPV","mode":1}"#,
];
pub(super) const REQUESTS: [&str; 7] = [
    "tail=10&follow=true",
    "replicas=2&on=node",
    "service=web&instance=web%230&limit=5",
    "past=7&follow=false",
    r#"{"service":"web","replicas":2}"#,
    r#"{"instance":"web#0","node":"n"}"#,
    r#"{"run":{"command":["sh"],"terminal":{"columns":80,"rows":24}}}"#,
];
pub(super) const CLUSTER: &str = r#"{"cluster_id":"c","next_subnet":1,"next_service_v4":"10.30.0.5","next_round_robin_v6":"fdff:2000::3",
"next_instance_v6":"fdff::3","orders":7,"nodes":[{"id":"6b034ec446528056c08b89ae","host":"w","subnet":["10.18.0.0","fc00::"],"address":"192.0.2.11","port":"50103","architecture":"amd64","technologies":["docker"]}],
"services":[{"job":"j","document":"{\"job_name\":\"app.default.web.test\",\"image\":\"i\"}","round_robin":["10.30.0.1","fdff:2000::1"],"policies":[],"next_number":1,
"instances":[{"number":0,"address":["10.30.0.2","fdff::1"],"phase":"running","detail":"","node":"6b034ec446528056c08b89ae","deployed":{"namespace_v4":"10.18.0.2","namespace_v6":"fc00::2","host":"192.0.2.11","host_port":50103},"pin":null,"replaces":null}]}]}"#;
pub(super) const GREETINGS: [&str; 2] = [
    r#"/init,["cs1","{\"host\":\"w\",\"ip\":\"192.0.2.11\",\"port\":\"3000\",\"technology\":[\"docker\"]}"]"#,
    r#"/init?a=b,7["cs1",{"host":"w"}]"#,
];
pub(super) const MESSAGES: &str = concat!(
    "nodes/6b034ec446528056c08b89ae/information\n{\"cpu\":7.5,\"memory\":20.0,\"virtualization\":[\"docker\"]}\u{1e}",
    "nodes/6b034ec446528056c08b89ae/net/subnet\n{\"METHOD\":\"GET\"}\u{1e}",
    "nodes/6b034ec446528056c08b89ae/job\n{\"sname\":\"app.default.web.test\",\"status\":\"CREATED\",\"instance\":0}\u{1e}",
    "nodes/6b034ec446528056c08b89ae/net/tablequery/request\n{\"sname\":\"app.default.web.test\",\"sip\":\"\"}",
);

/// The smallest command there is, and a component.
pub(super) fn modules() -> Vec<Vec<u8>> {
    let command: &[u8] = b"\0asm\x01\0\0\0\x01\x04\x01\x60\0\0\x03\x02\x01\0\x05\x03\x01\0\x01\x07\x13\x02\x06memory\x02\0\x06_start\0\0\x0a\x04\x01\x02\0\x0b";
    vec![command.to_vec(), b"\0asm\x0d\0\x01\0".to_vec()]
}

pub(super) fn archives() -> Vec<Vec<u8>> {
    vec![unikernel::sample()]
}

pub(super) fn rows() -> Vec<Vec<u8>> {
    vec![sheet_sample()]
}

/// A rule's attributes, and an entry of the older filter.
pub(super) fn rules() -> Vec<Vec<u8>> {
    let mut entry = vec![0; 152];
    entry[16..20].copy_from_slice(b"edge");
    entry[88..90].copy_from_slice(&112_u16.to_ne_bytes());
    entry[90..92].copy_from_slice(&152_u16.to_ne_bytes());
    entry[144..148].copy_from_slice(&(-2_i32).to_ne_bytes());
    vec![vec![8, 0, 1, 0, b'a', 0, 0, 0, 12, 0, 2, 0x80, 8, 0, 1, 0, 0, 0, 0, 1], entry]
}

/// A packet, and the same in two fragments; each behind its length.
pub(super) fn fragments() -> Vec<Vec<u8>> {
    let fragment = |id: u8, at: u8, more: u8, data: &[u8]| {
        let len = 20 + data.len() as u8;
        let header = [0x45, 0, 0, len, 0, id, more << 5, at, 64, 17, 0, 0, 10, 18, 0, 2, 10, 30, 0, 1];
        [&[0, len][..], &header, data].concat()
    };
    let two = [fragment(1, 0, 1, b"01234567"), fragment(1, 1, 0, b"89")].concat();
    let other_way = [fragment(2, 1, 0, b"89"), fragment(2, 0, 1, b"01234567")].concat();
    let six = |at: u8, data: &[u8]| {
        let mut packet = vec![0, 48 + data.len() as u8, 0x60, 0, 0, 0, 0, 8 + data.len() as u8, 44, 64];
        packet.extend([0xfc; 32]);
        packet.extend([17, 0, 0, at, 0, 0, 0, 1]);
        packet.extend(data);
        packet
    };
    vec![two, other_way, [six(1, b"01234567"), six(8, b"89")].concat()]
}

//! Server and client over a real socket, with a node and a cluster that live in memory.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use super::client::{Client, ClientError};
use super::*;
use crate::api::dto::{ClusterInstance, ClusterNode};
use crate::model::ServiceName;
use crate::standalone::{ClusterApiError, Target};

/// A node with the instances it was given; logs say what was asked.
#[derive(Default)]
pub(super) struct MemoryNode {
    pub(super) instances: Vec<InstanceId>,
    /// It never says how it fares.
    pub(super) silent: bool,
}

#[async_trait]
impl NodeApi for MemoryNode {
    async fn status(&self) -> dto::Status {
        dto::Status { version: "1.2.3".into(), running: self.instances.len(), ..dto::Status::default() }
    }

    async fn instances(&self) -> Result<Vec<dto::Instance>, NodeApiError> {
        let instance = |id: &InstanceId| dto::Instance {
            service: id.service.to_string(),
            number: id.number,
            ..dto::Instance::default()
        };
        Ok(self.instances.iter().map(instance).collect())
    }

    async fn explain(&self, instance: InstanceId) -> Result<dto::Explanation, NodeApiError> {
        if !self.instances.contains(&instance) {
            return Err(NodeApiError::UnknownInstance(instance));
        }
        Ok(dto::Explanation { number: instance.number, wanted: "run".into(), ..dto::Explanation::default() })
    }

    async fn logs(&self, instance: InstanceId, tail: usize) -> Result<Vec<u8>, NodeApiError> {
        if !self.instances.contains(&instance) {
            return Err(NodeApiError::UnknownInstance(instance));
        }
        Ok(format!("{tail} of {instance}\u{1b}").into_bytes())
    }

    async fn metrics(&self) -> Result<crate::metrics::Snapshot, NodeApiError> {
        if self.silent {
            std::future::pending::<()>().await;
        }
        Ok(crate::metrics::Snapshot::default())
    }

    async fn flows(&self, choice: NetChoice) -> Result<dto::net::Page<dto::net::Flow>, NodeApiError> {
        let (name, number) = choice.instance.unwrap_or_default();
        let flow =
            dto::net::Flow { client: name, client_port: 7, instance: format!("{number:?}"), ..Default::default() };
        Ok(dto::net::Page { total: choice.limit, rows: vec![flow] })
    }

    async fn services(&self, choice: NetChoice) -> Result<dto::net::Page<dto::net::Service>, NodeApiError> {
        let service = dto::net::Service { service: choice.service.unwrap_or_default(), ..Default::default() };
        Ok(dto::net::Page { total: choice.limit, rows: vec![service] })
    }

    async fn peers(&self) -> Result<Vec<dto::net::Peer>, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    async fn switch(&self, choice: DatapathChoice) -> Result<dto::net::Datapath, NodeApiError> {
        Ok(dto::net::Datapath { datapath: format!("{choice:?}"), reason: String::new() })
    }

    async fn counters(&self) -> Result<Vec<dto::net::Counter>, NodeApiError> {
        Ok(vec![dto::net::Counter { name: "drop_spoofed".into(), count: 3, ..Default::default() }])
    }
}

/// A cluster that keeps what was deployed, under the name the description consists of.
#[derive(Default)]
struct MemoryCluster {
    instances: Mutex<Vec<(InstanceId, String)>>,
    services: Mutex<BTreeSet<ServiceName>>,
}

#[async_trait]
impl ClusterApi for MemoryCluster {
    async fn deploy(
        &self,
        document: Vec<u8>,
        replicas: Option<u32>,
        on: Option<String>,
    ) -> Result<Vec<InstanceId>, ClusterApiError> {
        let text = String::from_utf8_lossy(&document).into_owned();
        let refused = |error: crate::model::InvalidName| ClusterApiError::Document { reason: error.to_string() };
        let service: ServiceName = text.trim().parse().map_err(refused)?;
        let number = |number| InstanceId { service: service.clone(), number };
        let new: Vec<_> = (0..replicas.unwrap_or(1)).map(number).collect();
        let on = on.unwrap_or_default();
        self.instances.lock().unwrap().extend(new.iter().map(|instance| (instance.clone(), on.clone())));
        self.services.lock().unwrap().insert(service);
        Ok(new)
    }

    async fn delete(&self, target: Target) -> Result<Vec<InstanceId>, ClusterApiError> {
        let meant = |instance: &InstanceId| match &target {
            Target::Service(service) => instance.service == *service,
            Target::Instance(one) => instance == one,
        };
        let mut held = self.instances.lock().unwrap();
        let gone: Vec<_> = held.iter().map(|(instance, _)| instance).filter(|one| meant(one)).cloned().collect();
        held.retain(|(instance, _)| !meant(instance));
        match target {
            Target::Service(service) if !self.services.lock().unwrap().remove(&service) => {
                Err(ClusterApiError::UnknownService(service))
            }
            Target::Instance(instance) if gone.is_empty() => Err(ClusterApiError::UnknownInstance(instance)),
            Target::Service(_) | Target::Instance(_) => Ok(gone),
        }
    }

    async fn replicate(&self, service: ServiceName, replicas: u32) -> Result<Vec<InstanceId>, ClusterApiError> {
        self.instances.lock().unwrap().retain(|(instance, _)| instance.service != service);
        self.deploy(service.to_string().into_bytes(), Some(replicas), None).await
    }

    async fn move_instance(&self, instance: InstanceId, node: String) -> Result<InstanceId, ClusterApiError> {
        let mut held = self.instances.lock().unwrap();
        let found = held.iter_mut().find(|(one, _)| *one == instance);
        found.ok_or_else(|| ClusterApiError::UnknownInstance(instance.clone()))?.1 = node;
        Ok(instance)
    }

    async fn nodes(&self) -> Result<Vec<ClusterNode>, ClusterApiError> {
        Ok(vec![ClusterNode { name: "edge-1".into(), active: true, ..ClusterNode::default() }])
    }

    async fn instances(&self) -> Result<Vec<ClusterInstance>, ClusterApiError> {
        let held = self.instances.lock().unwrap();
        let instance = |(id, node): &(InstanceId, String)| ClusterInstance {
            service: id.service.to_string(),
            number: id.number,
            node: node.clone(),
            ..ClusterInstance::default()
        };
        Ok(held.iter().map(instance).collect())
    }

    async fn services(&self) -> Result<Vec<ServiceName>, ClusterApiError> {
        Ok(self.services.lock().unwrap().iter().cloned().collect())
    }
}

struct Daemon {
    client: Client,
    drain: Drain,
    served: JoinHandle<std::io::Result<()>>,
    _lock: RunLock,
    dir: tempfile::TempDir,
}

fn daemon(cluster: Result<Arc<dyn ClusterApi>, String>, instances: &[&str]) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let lock = RunLock::take(dir.path()).unwrap();
    let instances = instances.iter().map(|text| text.parse().unwrap()).collect();
    let node = MemoryNode { instances, silent: false };
    let drain = Drain::new(Duration::from_secs(5));
    let served = tokio::spawn(serve(lock.listen().unwrap(), Api { node: Arc::new(node), cluster }, drain.clone()));
    Daemon { client: Client::new(&lock.socket()).unwrap(), drain, served, _lock: lock, dir }
}

fn a_cluster() -> Result<Arc<dyn ClusterApi>, String> {
    Ok(Arc::new(MemoryCluster::default()))
}

fn selector(text: &str) -> Selector {
    text.parse().unwrap()
}

fn refusal<T: fmt::Debug>(answer: Result<T, ClientError>) -> String {
    match answer {
        Err(ClientError::Refused(words)) => words,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

const WEB: &str = "app.default.web.default";

#[tokio::test]
async fn the_node_is_asked() {
    let daemon = daemon(Err("c.example".into()), &["app.default.web.default.instance.0", "a.b.db.d.instance.4"]);
    let status = daemon.client.status().await.unwrap();
    assert_eq!((status.version.as_str(), status.running), ("1.2.3", 2));
    assert_eq!(daemon.client.instances().await.unwrap().len(), 2);
    for (name, tail, want) in [
        ("web#0", Some(7), "7 of app.default.web.default.instance.0\u{1b}"),
        ("db", None, "65536 of a.b.db.d.instance.4\u{1b}"),
        ("a.b.db.d.instance.4", Some(usize::MAX), "4194304 of a.b.db.d.instance.4\u{1b}"),
    ] {
        assert_eq!(daemon.client.logs(&selector(name), tail).await.unwrap(), want.as_bytes());
    }
    let unknown = refusal(daemon.client.logs(&selector("web#3"), None).await);
    assert_eq!(unknown, "no instance app.default.web.default.instance.3 on this node");
    let nothing = "nothing here is called cache; the full name of a service is such as app.default.cache.default";
    assert_eq!(refusal(daemon.client.logs(&selector("cache"), None).await), nothing);
}

#[tokio::test]
async fn a_node_of_another_cluster_refuses_to_deploy_and_says_where() {
    let daemon = daemon(Err("c.example".into()), &[]);
    let want = "this node belongs to the cluster at c.example; deploy there";
    assert_eq!(refusal(daemon.client.deploy(WEB.into(), None, None).await), want);
    assert_eq!(refusal(daemon.client.delete(&selector("web")).await), want);
    assert_eq!(refusal(daemon.client.replicate(&selector("web"), 2).await), want);
    assert_eq!(refusal(daemon.client.move_instance(&selector("web#0"), "n").await), want);
    assert_eq!(refusal(daemon.client.nodes().await), want);
    assert_eq!(refusal(daemon.client.cluster_instances().await), want);
}

#[tokio::test]
async fn a_cluster_is_asked_by_short_names() {
    let daemon = daemon(a_cluster(), &[]);
    let client = &daemon.client;
    let deployed = client.deploy(WEB.into(), Some(2), Some("edge 1&2".into())).await.unwrap();
    assert_eq!(deployed.instances, ["app.default.web.default.instance.0", "app.default.web.default.instance.1"]);
    assert_eq!(client.cluster_instances().await.unwrap()[1].node, "edge 1&2");
    assert_eq!(client.nodes().await.unwrap()[0].name, "edge-1");

    let which = refusal(client.move_instance(&selector("web"), "edge-2").await);
    assert_eq!(which, "web has 2 instances: say which of web#0, web#1");
    client.move_instance(&selector("web#1"), "edge-2").await.unwrap();
    assert_eq!(client.cluster_instances().await.unwrap()[1].node, "edge-2");

    assert_eq!(client.replicate(&selector("web"), 3).await.unwrap().instances.len(), 3);
    let one = refusal(client.replicate(&selector("web#1"), 3).await);
    assert_eq!(one, "web#1 is one instance: name the service to replicate");

    client.deploy("other.x.web.y".into(), None, None).await.unwrap();
    let which = refusal(client.delete(&selector("web")).await);
    assert_eq!(which, "web is the name of several services: say which of app.default.web.default, other.x.web.y");
    assert_eq!(client.delete(&selector("app.default.web.default#1")).await.unwrap().instances.len(), 1);
    assert_eq!(client.delete(&selector(WEB)).await.unwrap().instances.len(), 2);
    assert_eq!(refusal(client.delete(&selector(WEB)).await), "no service app.default.web.default in this cluster");
    let refused = refusal(client.deploy("nonsense".into(), None, None).await);
    assert!(refused.starts_with("the description is refused: "), "{refused}");
}

#[tokio::test]
async fn a_service_without_instances_is_asked_by_its_short_name_too() {
    let daemon = daemon(a_cluster(), &[]);
    let client = &daemon.client;
    client.deploy(WEB.into(), None, None).await.unwrap();
    assert!(client.replicate(&selector("web"), 0).await.unwrap().instances.is_empty());
    let none = refusal(client.move_instance(&selector("web"), "edge-2").await);
    assert_eq!(none, "app.default.web.default has no instance here");
    assert_eq!(client.replicate(&selector("web"), 2).await.unwrap().instances.len(), 2);
    client.replicate(&selector("web"), 0).await.unwrap();
    assert!(client.delete(&selector("web")).await.unwrap().instances.is_empty());
    let gone = refusal(client.delete(&selector("web")).await);
    assert!(gone.starts_with("nothing here is called web; ") && gone.ends_with(WEB), "{gone}");
}

#[tokio::test]
async fn what_is_too_long_or_malformed_is_refused_and_harms_nothing() {
    let daemon = daemon(a_cluster(), &[]);
    let long = vec![b'x'; LARGEST_BODY + 1];
    assert_eq!(refusal(daemon.client.deploy(long, None, None).await), "the body is longer than 64 KiB");
    for request in [
        "GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n",
        "POST /status HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
        "POST /cluster/move HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}",
        "POST /cluster/deploy?replicas=x HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
        "DELETE /cluster/instances/..%2f..%2fetc HTTP/1.1\r\nhost: x\r\n\r\n",
        "GET /instances/%ff%fe/logs HTTP/1.1\r\nhost: x\r\n\r\n",
        "\0\0\0\r\n\r\n",
    ] {
        let answer = raw(daemon.dir.path(), request).await;
        assert!(answer.starts_with("HTTP/1.1 4"), "{request:?} was answered {answer:?}");
    }
    daemon.client.status().await.unwrap();
}

#[tokio::test]
async fn serving_ends_with_the_drain() {
    let daemon = daemon(a_cluster(), &[]);
    daemon.client.status().await.unwrap();
    daemon.drain.begin();
    tokio::time::timeout(Duration::from_secs(10), daemon.served).await.unwrap().unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_address_for_metrics_that_is_taken_is_tried_until_it_is_free() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, drain) = (taken.local_addr().unwrap(), Drain::new(Duration::from_secs(5)));
    let serving = tokio::spawn(metrics::serve(address, Arc::new(MemoryNode::default()), drain.clone()));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!serving.is_finished());
    drop(taken);
    tokio::time::sleep(Duration::from_secs(60)).await;
    tokio::time::resume();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("node_engine_cluster_connected 0.0"), "{answer}");
    drain.begin();
    tokio::time::timeout(Duration::from_secs(10), serving).await.unwrap().unwrap();
}

async fn raw(run_dir: &Path, request: &str) -> String {
    let mut stream = tokio::net::UnixStream::connect(run_dir.join("api.sock")).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn tables_of_the_overlay_are_asked_for_by_name_and_limit() {
    let daemon = daemon(Err("elsewhere".into()), &[]);
    let choice = |service: Option<&str>, instance: Option<&str>, limit| dto::net::Choice {
        service: service.map(str::to_owned),
        instance: instance.map(str::to_owned),
        limit,
    };
    let page = daemon.client.services(&choice(Some("app.default.web.default"), None, None)).await.unwrap();
    assert_eq!((page.total, page.rows[0].service.as_str()), (100, "app.default.web.default"));
    let page = daemon.client.flows(&choice(None, Some("web#2"), Some(usize::MAX))).await.unwrap();
    assert_eq!((page.total, page.rows[0].client.as_str()), (65_536, "web"), "the limit has a limit");
    assert_eq!(page.rows[0].instance, "Some(2)");
    for wrong in [choice(Some("web#1"), None, None), choice(None, Some("no name!"), None)] {
        assert!(matches!(daemon.client.flows(&wrong).await, Err(ClientError::Refused(_))), "{wrong:?}");
    }
    let refused = daemon.client.peers().await.unwrap_err();
    assert!(refused.to_string().contains("--no-node"), "{refused}");
    assert_eq!(daemon.client.counters().await.unwrap()[0].count, 3);
    assert_eq!(daemon.client.switch("ebpf-plain").await.unwrap().datapath, "EbpfPlain");
    assert!(daemon.client.switch("magic").await.unwrap_err().to_string().contains("one of auto"));
}

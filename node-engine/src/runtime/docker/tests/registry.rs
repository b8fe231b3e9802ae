//! Images from registries that want credentials, from mirrors, by digest, and never in the clear. The registry is the smallest that a
//! Docker daemon takes for one.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

const NAME: &str = "team/app";
/// `robot:secret`.
const BASIC: &str = "Basic cm9ib3Q6c2VjcmV0";
/// Not a loopback address, whatever interface has it.
const ELSEWHERE: &str = "198.51.100.77";

struct Registry {
    address: SocketAddr,
    digest: String,
    manifests_read: Arc<AtomicUsize>,
    _serve: AbortOnDropHandle<()>,
}

struct Content {
    documents: BTreeMap<String, (&'static str, Vec<u8>)>,
    locked: bool,
    manifests_read: Arc<AtomicUsize>,
}

impl Registry {
    /// Holds one image of one program, of which `forged` is another digest's answer.
    async fn serve(host: &str, locked: bool, salt: &str) -> Self {
        let layer = pause::root_fs(salt.as_bytes()).expect("a layer");
        let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        let config = serde_json::json!({
            "architecture": architecture, "os": "linux", "config": {"Cmd": ["/pause"]},
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]}
        });
        let config = config.to_string().into_bytes();
        let described = |kind: &str, bytes: &[u8]| serde_json::json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "size": bytes.len(), "digest": digest(bytes)});
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": described("config.v1+json", &config), "layers": [described("layer.v1.tar", &layer)]
        });
        let manifest = manifest.to_string().into_bytes();
        let digest_of_manifest = digest(&manifest);
        let documents = BTreeMap::from([
            (format!("manifests/{digest_of_manifest}"), (MANIFEST, manifest.clone())),
            (format!("manifests/{}", forged()), (MANIFEST, manifest.clone())),
            ("manifests/1".to_owned(), (MANIFEST, manifest)),
            (format!("blobs/{}", digest(&config)), (BLOB, config)),
            (format!("blobs/{}", digest(&layer)), (BLOB, layer)),
        ]);
        let listener = TcpListener::bind((host, 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let manifests_read = Arc::new(AtomicUsize::new(0));
        let content = Arc::new(Content { documents, locked, manifests_read: manifests_read.clone() });
        let serve = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, content.clone()));
            }
        });
        Self { address, digest: digest_of_manifest, manifests_read, _serve: AbortOnDropHandle::new(serve) }
    }

    fn image(&self) -> String {
        format!("{}/{NAME}:1", self.address)
    }

    fn read(&self) -> usize {
        self.manifests_read.load(Ordering::Relaxed)
    }
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const BLOB: &str = "application/octet-stream";

fn digest(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

/// A digest that is not that of what the registry gives for it.
fn forged() -> String {
    format!("sha256:{}", "0".repeat(64))
}

/// One request to a connection.
async fn answer(mut stream: TcpStream, content: Arc<Content>) -> Option<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() > 16_384 || stream.read_buf(&mut request).await.ok()? == 0 {
            return None;
        }
        // What a server without TLS says to who begins with it.
        if request.first() == Some(&0x16) {
            stream.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n").await.ok()?;
            return stream.shutdown().await.ok();
        }
    }
    let request = String::from_utf8(request).ok()?;
    let mut words = request.split(' ');
    let (method, path) = (words.next()?, words.next()?);
    let allowed = !content.locked
        || request.lines().any(|line| {
            line.split_once(": ")
                .is_some_and(|(name, value)| name.eq_ignore_ascii_case("authorization") && value == BASIC)
        });
    let document = path.strip_prefix(&format!("/v2/{NAME}/")).and_then(|name| content.documents.get(name));
    let (status, header, body) = match document {
        _ if !allowed => ("401 Unauthorized", "WWW-Authenticate: Basic realm=\"test\"\r\n".to_owned(), &b"{}"[..]),
        _ if path == "/v2/" => ("200 OK", String::new(), &b"{}"[..]),
        None => ("404 Not Found", String::new(), &b"{}"[..]),
        Some((kind, bytes)) => {
            if *kind == MANIFEST {
                content.manifests_read.fetch_add(1, Ordering::Relaxed);
            }
            ("200 OK", format!("Content-Type: {kind}\r\n"), bytes.as_slice())
        }
    };
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\n{header}Content-Length: {length}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.ok()?;
    if method != "HEAD" {
        stream.write_all(body).await.ok()?;
    }
    stream.shutdown().await.ok()
}

fn credentials(dir: &tempfile::TempDir, registry: &str) -> Registries {
    let path = dir.path().join("auth.json");
    let text = serde_json::json!({"auths": {registry: {"auth": BASIC.trim_start_matches("Basic ")}}});
    fs::write(&path, text.to_string()).expect("write");
    Registries { credentials: Some(path), ..Registries::default() }
}

fn spec(number: u32, image: String) -> InstanceSpec {
    InstanceSpec { image, ..bare(number) }
}

async fn forget(runtime: &DockerRuntime, spec: &InstanceSpec, image: &str) {
    runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
    assert_gone(runtime, &spec.id).await;
    let removed =
        docker(runtime).await.remove_image(image, None::<bollard::query_parameters::RemoveImageOptions>, None).await;
    removed.expect("the image was there under this name");
}

#[tokio::test]
#[ignore = "needs docker"]
async fn a_registry_is_shown_the_credentials_that_the_node_has_for_it() {
    let _up = DAEMON.read().await;
    let registry = Registry::serve("127.0.0.1", true, "locked").await;
    let dir = tempfile::tempdir().expect("a directory");
    let spec = spec(90, registry.image());

    for stranger in [Registries::default(), credentials(&dir, "other.example")] {
        let runtime = with_registries(stranger).await;
        let error = runtime.prepare(&spec).await.expect_err("without credentials");
        assert!(matches!(&error, RuntimeError::Image { image, .. } if *image == spec.image), "{error}");
        assert!(error.to_string().contains("no basic auth credentials"), "{error}");
    }
    let runtime = with_registries(credentials(&dir, &registry.address.to_string())).await;
    runtime.prepare(&spec).await.expect("with credentials");
    forget(&runtime, &spec, &spec.image).await;
}

#[tokio::test]
#[ignore = "needs docker"]
async fn a_digest_is_what_the_registry_gives_or_nothing() {
    let _up = DAEMON.read().await;
    let registry = Registry::serve("127.0.0.1", false, "digest").await;
    let runtime = runtime().await;
    let pinned = spec(91, format!("{}/{NAME}@{}", registry.address, registry.digest));
    runtime.prepare(&pinned).await.expect("as it says");
    forget(&runtime, &pinned, &pinned.image).await;

    let forged = spec(91, format!("{}/{NAME}@{}", registry.address, forged()));
    let error = runtime.prepare(&forged).await.expect_err("something else");
    assert!(matches!(error, RuntimeError::Image { .. }) && registry.read() > 1, "{error}");
    assert_gone(&runtime, &forged.id).await;
}

#[tokio::test]
#[ignore = "needs docker"]
async fn mirrors_are_asked_in_order_and_what_they_gave_is_not_asked_for_again() {
    let _up = DAEMON.read().await;
    let registry = Registry::serve("127.0.0.1", false, "mirror").await;
    // Nobody listens there.
    let (registry_name, dead) = ("127.0.0.1:2", "127.0.0.1:1");
    let mirrors = |places: &[String]| Registries {
        mirrors: [(registry_name.to_owned(), places.to_vec())].into(),
        credentials: None,
    };
    let runtime = with_registries(mirrors(&[dead.into(), registry.address.to_string()])).await;
    for reference in [format!("{NAME}:1"), format!("{NAME}@{}", registry.digest)] {
        let spec = spec(92, format!("{registry_name}/{reference}"));
        runtime.prepare(&spec).await.expect("from the second mirror");
        let read = registry.read();
        assert!(read > 0);
        runtime.prepare(&spec).await.expect("what is there");
        assert_eq!(registry.read(), read, "it was not asked again");
        forget(&runtime, &spec, &format!("{}/{reference}", registry.address)).await;
    }

    let nobody = with_registries(mirrors(&[dead.into()])).await;
    let spec = spec(92, format!("{registry_name}/{NAME}:1"));
    let error = nobody.prepare(&spec).await.expect_err("nobody has it").to_string();
    assert!(
        error.contains(&format!("{dead}/{NAME}:1: ")) && error.contains(&format!("{registry_name}/{NAME}:1: ")),
        "{error}"
    );
}

/// A registry elsewhere that speaks HTTP alone, as one does that somebody else answers for.
#[tokio::test]
#[ignore = "needs docker"]
async fn a_registry_elsewhere_is_never_read_in_the_clear() {
    let _up = DAEMON.read().await;
    let address = |change| {
        let status = Command::new("ip").args(["address", change, &format!("{ELSEWHERE}/32"), "dev", "lo"]).status();
        assert!(status.expect("ip runs").success());
    };
    address("add");
    let registry = Registry::serve(ELSEWHERE, false, "clear").await;
    let runtime = runtime().await;
    let spec = spec(93, registry.image());
    let prepared = runtime.prepare(&spec).await;
    address("del");
    let error = prepared.expect_err("not without TLS").to_string();
    assert!(error.contains("HTTP response to HTTPS client"), "{error}");
    assert_eq!(registry.read(), 0);
}

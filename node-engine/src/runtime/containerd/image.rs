//! Images: present in our namespace, or pulled into it by `ctr`, which comes with containerd and knows registries.

use std::fs::File;
use std::io::Write;
use std::process::Stdio;

use nix::pty::openpty;
use serde::Deserialize;
use tokio::process::Command;
use tonic::Status;

use super::api::images::{self, Descriptor, Got};
use super::api::snapshots::{self, Snapshot};
use super::api::{Empty, Named, introspection};
use super::client::{Client, not_found};
use crate::runtime::RuntimeError;
use crate::runtime::registries::{self, Credentials, Registries, nowhere};

/// Of what a pull says, the last line is the reason.
const PULLER: &str = "ctr";
/// What fits into one line that is typed, with room to spare.
const LONGEST_PASSWORD: usize = 4000;

/// An image that is here and unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) name: String,
    pub(super) digest: String,
    pub(super) config: Process,
    /// Name of the snapshot that has all its layers; empty for one without.
    pub(super) root: String,
}

/// What an image says of its process (OCI image specification, `config`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Process {
    pub(super) user: Option<String>,
    pub(super) env: Option<Vec<String>>,
    pub(super) entrypoint: Option<Vec<String>>,
    pub(super) cmd: Option<Vec<String>>,
    pub(super) working_dir: Option<String>,
    pub(super) stop_signal: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Config {
    os: Option<String>,
    architecture: Option<String>,
    config: Option<Process>,
    rootfs: Layers,
}

#[derive(Debug, Deserialize)]
struct Layers {
    diff_ids: Option<Vec<String>>,
}

/// An image for one platform, or a list of such.
#[derive(Debug, Deserialize)]
struct Manifest {
    config: Option<Content>,
    manifests: Option<Vec<Content>>,
}

#[derive(Debug, Deserialize)]
struct Content {
    digest: String,
    platform: Option<Platform>,
}

#[derive(Debug, Deserialize)]
struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

/// Why an image that has a name cannot be used as it is.
enum Absent {
    /// A pull may help.
    Here(&'static str),
    Failed(RuntimeError),
}

/// Makes sure that the image is there for this platform. Dropped at any point, it leaves nothing but layers already pulled.
pub(super) async fn ensure(
    client: &Client,
    registries: &Registries,
    snapshotter: &str,
    reference: &str,
    platform: Option<&str>,
) -> Result<Image, RuntimeError> {
    let sources = registries.sources(reference)?;
    let own = format!("linux/{}", architecture());
    let wanted = platform.unwrap_or(&own);
    // What was pulled from a mirror has the mirror's name; the registry's own is looked for first.
    for source in sources.iter().rev() {
        match find(client, snapshotter, source, wanted).await {
            Ok(image) => return Ok(image),
            Err(Absent::Failed(error)) => return Err(error),
            Err(Absent::Here(why)) => tracing::debug!(image = source, platform, why, "it has to be pulled"),
        }
    }
    let mut said = Vec::new();
    for source in sources {
        match pull(client, registries, snapshotter, &source, platform).await {
            Ok(()) => {
                return find(client, snapshotter, &source, wanted).await.map_err(|absent| match absent {
                    Absent::Failed(error) => error,
                    Absent::Here(why) => RuntimeError::Image { image: source, reason: format!("after the pull {why}") },
                });
            }
            Err(RuntimeError::Image { reason, .. }) => {
                if source != reference {
                    tracing::warn!(image = source, reason, "a mirror does not have the image; the next is tried");
                }
                said.push((source, reason));
            }
            Err(error) => return Err(error),
        }
    }
    Err(nowhere(reference, &said))
}

/// The snapshotter that containerd works with here: overlayfs where the file system allows it.
pub(super) async fn snapshotter(client: &Client) -> Result<&'static str, RuntimeError> {
    let filter = super::api::Names { names: vec!["type==io.containerd.snapshotter.v1".into()] };
    let plugins: introspection::Plugins = client
        .call(introspection::PLUGINS, filter)
        .await
        .map_err(|status| client.failed("ask for plugins", &status))?;
    let works = |name: &&str| plugins.plugins.iter().any(|plugin| plugin.id == *name && plugin.error.is_none());
    ["overlayfs", "native"].into_iter().find(works).ok_or_else(|| RuntimeError::Step {
        step: "look for a snapshotter",
        reason: "neither overlayfs nor native works in this containerd".into(),
    })
}

async fn find(client: &Client, snapshotter: &str, reference: &str, platform: &str) -> Result<Image, Absent> {
    let failed = |status: Status| Absent::Failed(client.failed("look for the image", &status));
    let full = full_name(reference);
    let mut found = None;
    for name in [reference, &full] {
        match client.call::<_, Got>(images::GET, Named { name: name.to_owned() }).await {
            Ok(got) => found = got.image.and_then(|image| Some((image.name, image.target?))),
            Err(status) if not_found(&status) => {}
            Err(status) => return Err(failed(status)),
        }
        if found.is_some() {
            break;
        }
    }
    let Some((name, Descriptor { digest, .. })) = found else { return Err(Absent::Here("it is not here")) };
    let read = async |digest: &str| match client.read(digest).await {
        Ok(content) => Ok(content),
        Err(status) if not_found(&status) => Err(Absent::Here("a part of it is not here")),
        Err(status) => Err(failed(status)),
    };
    let odd = |what: &str| {
        Absent::Failed(RuntimeError::Image { image: reference.into(), reason: format!("its {what} cannot be read") })
    };
    let mut manifest: Manifest = parsed(&read(&digest).await?).ok_or_else(|| odd("manifest"))?;
    if let Some(manifests) = manifest.manifests {
        let fit = manifests.iter().find(|one| one.platform.as_ref().is_some_and(|has| has.fits(platform)));
        let fit = fit.or(manifests.first().filter(|one| manifests.len() == 1 && one.platform.is_none()));
        let Some(fit) = fit else { return Err(Absent::Here("it is here for other platforms")) };
        manifest = parsed(&read(&fit.digest).await?).ok_or_else(|| odd("manifest"))?;
    }
    let config = manifest.config.ok_or_else(|| odd("manifest"))?;
    let config: Config = parsed(&read(&config.digest).await?).ok_or_else(|| odd("configuration"))?;
    let has = Platform {
        os: config.os.unwrap_or_default(),
        architecture: config.architecture.unwrap_or_default(),
        variant: None,
    };
    if !has.fits(platform) {
        return Err(Absent::Here("it is here for another platform"));
    }
    let root = chain(&config.rootfs.diff_ids.unwrap_or_default());
    if !root.is_empty() {
        let snapshot = Snapshot { snapshotter: snapshotter.into(), key: root.clone(), ..Snapshot::default() };
        match client.call::<_, Empty>(snapshots::STAT, snapshot).await {
            Ok(_) => {}
            Err(status) if not_found(&status) => return Err(Absent::Here("it is not unpacked")),
            Err(status) => return Err(failed(status)),
        }
    }
    Ok(Image { name, digest, config: config.config.unwrap_or_default(), root })
}

/// Over TLS, registries at a loopback address excepted: nothing that `ctr` reads by itself says otherwise.
async fn pull(
    client: &Client,
    registries: &Registries,
    snapshotter: &str,
    reference: &str,
    platform: Option<&str>,
) -> Result<(), RuntimeError> {
    let failed = |reason: String| RuntimeError::Image { image: reference.into(), reason };
    let credentials = registries.credentials(reference)?;
    tracing::info!(image = reference, platform, authenticated = credentials.is_some(), "pulling");
    let mut command = Command::new(PULLER);
    command.arg("--address").arg(client.socket()).args(["--namespace", client.namespace(), "images", "pull"]);
    command.args(["--snapshotter", snapshotter]).args(platform.into_iter().flat_map(|name| ["--platform", name]));
    let _terminal = match credentials {
        None => {
            command.stdin(Stdio::null());
            None
        }
        Some(credentials) => Some(typed(&mut command, &credentials).map_err(failed)?),
    };
    // What was asked for and is not waited for any more ends.
    let ended = command.arg(full_name(reference)).kill_on_drop(true).output().await;
    let ended =
        ended.map_err(|error| failed(format!("{PULLER}, which comes with containerd, does not run: {error}")))?;
    if ended.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ended.stderr);
    let last = said.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no reason was given");
    Err(failed(last.strip_prefix("ctr: ").unwrap_or(last).to_owned()))
}

/// A command line is everybody's to read, so the password is typed: `ctr` asks for the one of a user who is named without. The
/// terminal is kept for as long as it may read.
fn typed(command: &mut Command, credentials: &Credentials) -> Result<File, String> {
    let Credentials::Password { user, password } = credentials else {
        let reason = "its credentials are an identity token, which ctr takes on its command line alone, where everybody reads it";
        return Err(reason.into());
    };
    if user.is_empty() || user.contains(':') || password.is_empty() {
        return Err("its credentials have no user or no password".into());
    }
    if password.len() > LONGEST_PASSWORD || password.contains(char::is_control) {
        return Err("its password cannot be typed".into());
    }
    let pair = openpty(None, None).map_err(|error| format!("a terminal for ctr: {error}"))?;
    let mut keyboard = File::from(pair.master);
    keyboard.write_all(format!("{password}\n").as_bytes()).map_err(|error| format!("a terminal for ctr: {error}"))?;
    command.arg(format!("--user={user}")).stdin(Stdio::from(pair.slave));
    Ok(keyboard)
}

impl Platform {
    /// Whether it is `os/architecture[/variant]`. Where the variant is not told it is the usual one.
    fn fits(&self, wanted: &str) -> bool {
        let mut wanted = wanted.split('/');
        let variant = |wanted: &str| self.variant.as_deref().is_none_or(|variant| variant == wanted);
        wanted.next() == Some(self.os.as_str())
            && wanted.next().is_none_or(|wanted| wanted == self.architecture)
            && wanted.next().is_none_or(variant)
    }
}

fn parsed<'a, T: Deserialize<'a>>(content: &'a [u8]) -> Option<T> {
    serde_json::from_slice(content).ok()
}

/// The name of the snapshot that has these layers, the lowest first (OCI image specification, ChainID).
fn chain(layers: &[String]) -> String {
    let mut layers = layers.iter();
    let Some(lowest) = layers.next() else { return String::new() };
    layers.fold(lowest.clone(), |below, layer| format!("sha256:{}", sha256(&format!("{below} {layer}"))))
}

pub(super) fn sha256(text: &str) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// As images name it.
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// With registry and tag: `nginx` is `docker.io/library/nginx:latest`.
fn full_name(reference: &str) -> String {
    let (registry, path) = registries::parts(reference);
    let tagged = path.contains('@') || path.rsplit('/').next().is_some_and(|last| last.contains(':'));
    format!("{registry}/{path}{}", if tagged { "" } else { ":latest" })
}

/// What a registry says of an image: a list, a manifest, a configuration; for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(bytes: &[u8]) {
    if let Some(manifest) = parsed::<Manifest>(bytes) {
        for content in manifest.manifests.iter().flatten() {
            let _ = content.platform.as_ref().is_some_and(|has| has.fits("linux/arm/v7"));
        }
    }
    if let Some(config) = parsed::<Config>(bytes) {
        let layers = config.rootfs.diff_ids.unwrap_or_default();
        assert_eq!(chain(&layers).is_empty(), layers.first().is_none_or(|layer| layers.len() == 1 && layer.is_empty()));
    }
    if let Ok(reference) = std::str::from_utf8(bytes)
        && registries::check(reference).is_ok()
    {
        let full = full_name(reference);
        assert_eq!(full_name(&full), full, "a whole name is whole");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_whole_as_docker_does() {
        for (reference, expected) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:alpine", "docker.io/library/nginx:alpine"),
            ("docker.io/nginx", "docker.io/library/nginx:latest"),
            ("lab/probe:1", "docker.io/lab/probe:1"),
            ("host:5000/a", "host:5000/a:latest"),
            ("localhost/a:1", "localhost/a:1"),
            ("ghcr.io/a/b@sha256:00", "ghcr.io/a/b@sha256:00"),
        ] {
            assert_eq!(full_name(reference), expected, "{reference}");
        }
        for bad in ["", "-x", "--all", "/a", "../x", "a b", "a\n", "ä", &"a".repeat(600)] {
            assert!(registries::check(bad).is_err(), "{bad:?}");
        }
        assert!(registries::check("ghcr.io/a/b_c:1.2-x@sha256:00").is_ok());
    }

    #[test]
    fn layers_have_one_name() {
        let layer = |digit: &str| format!("sha256:{}", digit.repeat(64));
        assert_eq!(chain(&[]), "");
        assert_eq!(chain(&[layer("a")]), layer("a"));
        let two = format!("sha256:{}", sha256(&format!("{} {}", layer("a"), layer("b"))));
        assert_eq!(chain(&[layer("a"), layer("b")]), two);
        assert_eq!(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn platforms_fit_by_what_they_say() {
        let has = |variant: Option<&str>| Platform {
            os: "linux".into(),
            architecture: "arm".into(),
            variant: variant.map(str::to_owned),
        };
        assert!(
            has(None).fits("linux/arm/v7") && has(Some("v7")).fits("linux/arm/v7") && has(Some("v7")).fits("linux/arm")
        );
        assert!(!has(Some("v6")).fits("linux/arm/v7") && !has(None).fits("linux/arm64") && !has(None).fits("windows"));
    }

    #[test]
    fn a_configuration_may_say_little() {
        let text =
            br#"{"architecture":"amd64","os":"linux","config":{"Cmd":["/bin/sh"],"Entrypoint":null,"Labels":null},
                       "rootfs":{"type":"layers","diff_ids":null},"history":[]}"#;
        let config: Config = parsed(text).expect("read");
        let process = config.config.expect("a process");
        assert_eq!((process.cmd, process.entrypoint), (Some(vec!["/bin/sh".to_owned()]), None));
        assert!(parsed::<Config>(b"[]").is_none());
    }
}

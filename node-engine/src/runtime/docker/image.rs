//! Images: present or pulled; and the sandbox image, which is made here.

use std::net::IpAddr;

use bollard::Docker;
use bollard::auth::DockerCredentials;
use bollard::errors::Error;
use bollard::models::RegistryServiceConfig;
use bollard::query_parameters::{CreateImageOptions, RemoveImageOptions};
use futures_util::TryStreamExt;

use super::client::{Client, not_found};
use crate::runtime::registries::{self, Credentials, Registries};
use crate::runtime::{RuntimeError, pause};

/// Carries a version: another program gets another name.
/// `localhost` is no registry: Podman, which takes any other name without one for its usual registry's, finds what was imported.
pub(super) const PAUSE: &str = "localhost/node-engine/pause:1";

/// Makes sure that the image is there for this platform, and says under which name. Dropped at any point, it leaves nothing but layers
/// already pulled.
pub(super) async fn ensure(
    client: &Client,
    registries: &Registries,
    reference: &str,
    platform: Option<&str>,
) -> Result<String, RuntimeError> {
    let sources = registries.sources(reference)?;
    let docker = client.get().await?;
    // What was pulled from a mirror has the mirror's name; the registry's own is looked for first.
    for source in sources.iter().rev() {
        match docker.inspect_image(source).await {
            Ok(image) => {
                let has = [image.os.as_deref(), image.architecture.as_deref()];
                if platform.is_none_or(|platform| fits(platform, has)) {
                    return Ok(source.clone());
                }
            }
            Err(error) if not_found(&error) => {}
            Err(error) => return Err(client.failed("look for the image", error)),
        }
    }
    let info = docker.info().await.map_err(|error| client.failed("ask for the registries", error))?;
    let configured = info.registry_config.unwrap_or_default();
    let mut reasons = Vec::new();
    for source in sources {
        match pull(client, &docker, registries, &configured, &source, platform).await {
            Ok(()) => return Ok(source),
            Err(RuntimeError::Image { reason, .. }) => {
                if source != reference {
                    tracing::warn!(image = source, reason, "a mirror does not have the image; the next is tried");
                }
                reasons.push((source, reason));
            }
            Err(error) => return Err(error),
        }
    }
    Err(registries::nowhere(reference, &reasons))
}

/// Makes sure that the sandbox image is there.
pub(super) async fn ensure_pause(client: &Client) -> Result<(), RuntimeError> {
    let docker = client.get().await?;
    match docker.inspect_image(PAUSE).await {
        Ok(_) => return Ok(()),
        Err(error) if not_found(&error) => {}
        Err(error) => return Err(client.failed("look for the sandbox image", error)),
    }
    let version = docker.version().await.map_err(|error| client.failed("ask for the version", error))?;
    let architecture = version.arch.unwrap_or_default();
    let program = pause::program(&architecture).ok_or_else(|| RuntimeError::Refused {
        what: "sandbox image",
        reason: format!("there is no sandbox program for {architecture:?}"),
    })?;
    let root_fs = pause::root_fs(&program)
        .map_err(|error| RuntimeError::Step { step: "make the sandbox image", reason: error.to_string() })?;
    // With its tag: Podman does not look at one beside it.
    let options =
        CreateImageOptions { from_src: Some("-".into()), repo: Some(PAUSE.into()), ..CreateImageOptions::default() };
    let import = docker.create_image(Some(options), Some(bollard::body_full(root_fs.into())), None);
    let import = import.try_for_each(|_| async { Ok(()) }).await;
    import.map_err(|error| client.failed("import the sandbox image", error))
}

/// Removes the sandbox image. That it is not there is a success.
pub(super) async fn remove_pause(client: &Client) -> Result<(), RuntimeError> {
    let docker = client.get().await?;
    match docker.remove_image(PAUSE, None::<RemoveImageOptions>, None).await {
        Err(error) if !not_found(&error) => Err(client.failed("remove the sandbox image", error)),
        _ => Ok(()),
    }
}

async fn pull(
    client: &Client,
    docker: &Docker,
    registries: &Registries,
    configured: &RegistryServiceConfig,
    reference: &str,
    platform: Option<&str>,
) -> Result<(), RuntimeError> {
    let credentials = registries.credentials(reference)?;
    if insecure(configured, registries::registry(reference)) {
        if credentials.is_some() {
            let reason = "Docker is configured to take this registry's word without TLS, and there the credentials would be sent for \
                          everybody to read; remove it from `insecure-registries` or from the credentials"
                .into();
            return Err(RuntimeError::Image { image: reference.into(), reason });
        }
        tracing::warn!(
            image = reference,
            "Docker is configured to pull from this registry without TLS (insecure-registries)"
        );
    }
    tracing::info!(image = reference, platform, authenticated = credentials.is_some(), "pulling");
    let (name, tag) = split(reference);
    let options = CreateImageOptions {
        from_image: Some(name.into()),
        tag: Some(tag.into()),
        platform: platform.unwrap_or_default().into(),
        ..CreateImageOptions::default()
    };
    let progress = docker.create_image(Some(options), None, credentials.map(shown));
    progress.try_for_each(|_| async { Ok(()) }).await.map_err(|error| match error {
        // The registry's own words.
        Error::DockerResponseServerError { message: reason, .. } | Error::DockerStreamError { error: reason } => {
            RuntimeError::Image { image: reference.into(), reason }
        }
        error => client.failed("pull", error),
    })
}

fn shown(credentials: Credentials) -> DockerCredentials {
    match credentials {
        Credentials::Password { user, password } => {
            DockerCredentials { username: Some(user), password: Some(password), ..DockerCredentials::default() }
        }
        Credentials::IdentityToken(token) => {
            DockerCredentials { identitytoken: Some(token), ..DockerCredentials::default() }
        }
    }
}

/// Does Docker take the registry without TLS, though it is on another machine?
fn insecure(config: &RegistryServiceConfig, registry: &str) -> bool {
    let host = registry.rsplit_once(':').filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()));
    let host = host.map_or(registry, |(host, _)| host).trim_matches(['[', ']']);
    let address = host.parse::<IpAddr>().ok();
    if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
        return false;
    }
    let named = config
        .index_configs
        .iter()
        .flatten()
        .any(|(name, index)| index.secure == Some(false) && (name == registry || name == host));
    let within = |cidr: &String| {
        let network =
            cidr.split_once('/').and_then(|(network, bits)| Some((network.parse().ok()?, bits.parse().ok()?)));
        network.zip(address).is_some_and(|((network, bits), address)| contains(network, bits, address))
    };
    named || config.insecure_registry_cidrs.iter().flatten().any(within)
}

fn contains(network: IpAddr, bits: u32, address: IpAddr) -> bool {
    let (network, address, width) = match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => (u32::from(network).into(), u32::from(address).into(), 32),
        (IpAddr::V6(network), IpAddr::V6(address)) => (u128::from(network), u128::from(address), 128),
        _ => return false,
    };
    bits <= width && (network ^ address).checked_shr(width - bits).unwrap_or(0) == 0
}

/// Name and tag or digest. Without either, Docker would pull every tag there is.
fn split(reference: &str) -> (&str, &str) {
    if let Some(digest) = reference.split_once('@') {
        return digest;
    }
    match reference.rsplit_once(':') {
        // A colon before the last slash belongs to the registry's port.
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (reference, "latest"),
    }
}

/// Whether an image's system and architecture are those of `os/architecture[/variant]`.
fn fits(platform: &str, has: [Option<&str>; 2]) -> bool {
    platform.split('/').zip(has).all(|(wanted, has)| has == Some(wanted))
}

#[cfg(test)]
mod tests {
    use bollard::models::IndexInfo;

    use super::*;

    #[test]
    fn references_are_split_into_name_and_tag() {
        for (reference, expected) in [
            ("nginx", ("nginx", "latest")),
            ("nginx:alpine", ("nginx", "alpine")),
            ("docker.io/library/nginx:alpine", ("docker.io/library/nginx", "alpine")),
            ("host:5000/a/b", ("host:5000/a/b", "latest")),
            ("host:5000/a/b:1", ("host:5000/a/b", "1")),
            ("a/b@sha256:00ff", ("a/b", "sha256:00ff")),
            ("a/b:1@sha256:00ff", ("a/b:1", "sha256:00ff")),
        ] {
            assert_eq!(split(reference), expected, "{reference}");
        }
    }

    #[test]
    fn a_registry_without_tls_is_known_for_one() {
        let index = |secure| IndexInfo { secure: Some(secure), ..IndexInfo::default() };
        let config = RegistryServiceConfig {
            insecure_registry_cidrs: Some(vec![
                "127.0.0.0/8".into(),
                "10.1.0.0/16".into(),
                "fd00::/8".into(),
                "?".into(),
            ]),
            index_configs: Some([("near:5000".into(), index(false)), ("docker.io".into(), index(true))].into()),
            ..RegistryServiceConfig::default()
        };
        for bad in ["near:5000", "10.1.2.3", "10.1.2.3:5000", "[fd00::1]:5000"] {
            assert!(insecure(&config, bad), "{bad}");
        }
        for good in
            ["docker.io", "near:5001", "10.2.0.1:5000", "127.0.0.1:5000", "localhost:5000", "[fe80::1]", "[::1]:5000"]
        {
            assert!(!insecure(&config, good), "{good}");
        }
        assert!(contains([0, 0, 0, 0].into(), 0, [9, 9, 9, 9].into()) && !contains([0; 4].into(), 33, [0; 4].into()));
    }

    #[test]
    fn a_local_image_counts_only_for_its_platform() {
        let has = [Some("linux"), Some("arm64")];
        assert!(fits("linux/arm64", has) && fits("linux/arm64/v8", has) && fits("linux", has));
        assert!(!fits("linux/amd64", has) && !fits("linux/arm64", [None, None]));
    }
}

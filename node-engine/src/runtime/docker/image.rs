//! Images: present or pulled; and the sandbox image, which is made here.

use bollard::Docker;
use bollard::errors::Error;
use bollard::query_parameters::{CreateImageOptions, RemoveImageOptions};
use futures_util::TryStreamExt;

use super::client::{Client, not_found};
use crate::runtime::{RuntimeError, pause};

/// Carries a version: another program gets another name.
/// `localhost` is no registry: Podman, which takes any other name without one for its usual registry's, finds what was imported.
pub(super) const PAUSE: &str = "localhost/node-engine/pause:1";

const LONGEST_REFERENCE: usize = 512;

/// Makes sure that the image is there for this platform. Dropped at any point, it leaves nothing but layers already pulled.
pub(super) async fn ensure(client: &Client, reference: &str, platform: Option<&str>) -> Result<(), RuntimeError> {
    check(reference)?;
    let docker = client.get().await?;
    match docker.inspect_image(reference).await {
        Ok(image) => {
            let has = [image.os.as_deref(), image.architecture.as_deref()];
            if platform.is_none_or(|platform| fits(platform, has)) {
                return Ok(());
            }
        }
        Err(error) if not_found(&error) => {}
        Err(error) => return Err(client.failed("look for the image", error)),
    }
    pull(client, &docker, reference, platform).await
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

async fn pull(client: &Client, docker: &Docker, reference: &str, platform: Option<&str>) -> Result<(), RuntimeError> {
    tracing::info!(image = reference, platform, "pulling");
    let (name, tag) = split(reference);
    let options = CreateImageOptions {
        from_image: Some(name.into()),
        tag: Some(tag.into()),
        platform: platform.unwrap_or_default().into(),
        ..CreateImageOptions::default()
    };
    let progress = docker.create_image(Some(options), None, None);
    progress.try_for_each(|_| async { Ok(()) }).await.map_err(|error| match error {
        // The registry's own words.
        Error::DockerResponseServerError { message: reason, .. } | Error::DockerStreamError { error: reason } => {
            RuntimeError::Image { image: reference.into(), reason }
        }
        error => client.failed("pull", error),
    })
}

/// The characters of a reference, and no way out of the path of a request.
fn check(reference: &str) -> Result<(), RuntimeError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:/@+".contains(&byte);
    let starts = reference.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'[');
    if !starts || reference.len() > LONGEST_REFERENCE || !reference.bytes().all(plain) || reference.contains("..") {
        let shown: String = reference.chars().take(80).collect();
        return Err(RuntimeError::Refused { what: "image", reason: format!("{shown:?} is not an image reference") });
    }
    Ok(())
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
    fn what_is_no_reference_never_reaches_the_daemon() {
        for good in ["nginx", "ghcr.io/a/b_c:1.2-x", "a@sha256:00", "host:5000/a"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "/a", "../containers/x", "a/../b", "a b", "a\n", "a?x=1", "a#b", "ä", &"a".repeat(600)] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_local_image_counts_only_for_its_platform() {
        let has = [Some("linux"), Some("arm64")];
        assert!(fits("linux/arm64", has) && fits("linux/arm64/v8", has) && fits("linux", has));
        assert!(!fits("linux/amd64", has) && !fits("linux/arm64", [None, None]));
    }
}

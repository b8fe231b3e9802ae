//! Where images come from: the mirrors of a registry, and what this node shows to each.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::RuntimeError;

/// The registry of an image that names none.
const USUAL: &str = "docker.io";
/// Names under which `docker login` keeps the credentials of the usual registry.
const USUAL_ALIASES: [&str; 3] = ["index.docker.io", "https://index.docker.io/v1/", "registry-1.docker.io"];
const LONGEST_REFERENCE: usize = 512;
/// A file of credentials is not longer.
const LONGEST_FILE: u64 = 1 << 20;

/// The registries as the node's configuration has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registries {
    /// By registry, in the order in which they are tried. A mirror is `HOST[:PORT][/PREFIX]`.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// A file as `docker login` and `podman login` write it (containers-auth.json(5)). Read at every pull, so that what rotates is followed.
    pub credentials: Option<PathBuf>,
}

/// What a registry is shown.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    Password { user: String, password: String },
    IdentityToken(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password { .. }",
            Self::IdentityToken(_) => "IdentityToken(..)",
        })
    }
}

impl Registries {
    /// Under which names the image may be had: from each mirror of its registry, then from the registry itself.
    ///
    /// # Errors
    /// `Refused` for what is not a reference.
    pub fn sources(&self, reference: &str) -> Result<Vec<String>, RuntimeError> {
        check(reference)?;
        let (registry, path) = parts(reference);
        let mirrors = self.mirrors.get(registry).into_iter().flatten();
        let mut sources: Vec<_> = mirrors.map(|mirror| format!("{mirror}/{path}")).collect();
        sources.push(reference.to_owned());
        Ok(sources)
    }

    /// What the registry of this reference is shown.
    ///
    /// # Errors
    /// `Image` where there is a file of credentials and it cannot be read: an anonymous try would only hide that.
    pub fn credentials(&self, reference: &str) -> Result<Option<Credentials>, RuntimeError> {
        let Some(path) = &self.credentials else { return Ok(None) };
        found(path, reference).map_err(|reason| RuntimeError::Image {
            image: reference.into(),
            reason: format!("the registries' credentials in {}: {reason}", path.display()),
        })
    }
}

/// None of the sources has the image: what each of them said.
pub fn nowhere(reference: &str, said: &[(String, String)]) -> RuntimeError {
    let reason = match said {
        [(_, reason)] => reason.clone(),
        said => said.iter().map(|(source, reason)| format!("{source}: {reason}")).collect::<Vec<_>>().join("; "),
    };
    RuntimeError::Image { image: reference.into(), reason }
}

/// The registry of a reference.
pub fn registry(reference: &str) -> &str {
    parts(reference).0
}

/// The characters of a reference, and no way out of the path of a request.
///
/// # Errors
/// `Refused`.
pub fn check(reference: &str) -> Result<(), RuntimeError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:/@+[]".contains(&byte);
    let starts = reference.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'[');
    if !starts || reference.len() > LONGEST_REFERENCE || !reference.bytes().all(plain) || reference.contains("..") {
        let shown: String = reference.chars().take(80).collect();
        return Err(RuntimeError::Refused { what: "image", reason: format!("{shown:?} is not an image reference") });
    }
    Ok(())
}

/// A mirror, or a registry that has one: `HOST[:PORT][/PREFIX]`, without a scheme, as that is the runtime's to choose.
pub fn is_place(text: &str) -> bool {
    check(text).is_ok() && !text.ends_with('/') && !text.contains("//") && !text.contains('@') && is_host(first(text))
}

/// Registry and path of a reference: `nginx` is `docker.io` and `library/nginx`.
pub fn parts(reference: &str) -> (&str, std::borrow::Cow<'_, str>) {
    match reference.split_once('/') {
        Some((host, path)) if is_host(host) => match path.contains('/') || host != USUAL {
            true => (host, path.into()),
            false => (host, format!("library/{path}").into()),
        },
        Some(_) => (USUAL, reference.into()),
        None => (USUAL, format!("library/{reference}").into()),
    }
}

/// What stands before the first slash is a host where it has a dot or a port, or is this machine; else it is part of a name.
fn is_host(text: &str) -> bool {
    text.contains(['.', ':']) || text == "localhost"
}

fn first(text: &str) -> &str {
    text.split('/').next().unwrap_or(text)
}

#[derive(Deserialize)]
struct AuthFile {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    /// `USER:PASSWORD` in base64.
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

fn found(path: &Path, reference: &str) -> Result<Option<Credentials>, String> {
    named(&read(path).map_err(|error| error.to_string())?, reference)
}

/// Of the text of a file of credentials.
fn named(text: &str, reference: &str) -> Result<Option<Credentials>, String> {
    let file: AuthFile = serde_json::from_str(text).map_err(|error| {
        // The error of a parser may quote what it stumbled over.
        format!("is not JSON as `docker login` writes it (line {}, column {})", error.line(), error.column())
    })?;
    let (registry, path) = parts(reference);
    let name = path.split(['@', ':']).next().unwrap_or_default();
    // The longest part of the name that has an entry: containers-auth.json(5).
    let mut place = format!("{registry}/{name}");
    loop {
        if let Some(auth) = file.auths.get(&place) {
            return auth.credentials().map(Some);
        }
        match place.rfind('/') {
            Some(slash) => place.truncate(slash),
            None => break,
        }
    }
    let aliases = [format!("https://{registry}"), format!("https://{registry}/v1/"), format!("https://{registry}/v2/")];
    let usual = USUAL_ALIASES.into_iter().filter(|_| registry == USUAL);
    let auth = aliases.iter().map(String::as_str).chain(usual).find_map(|name| file.auths.get(name));
    auth.map(Auth::credentials).transpose()
}

fn read(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?.take(LONGEST_FILE).read_to_string(&mut text)?;
    Ok(text)
}

impl Auth {
    fn credentials(&self) -> Result<Credentials, String> {
        if !self.identitytoken.is_empty() {
            return Ok(Credentials::IdentityToken(self.identitytoken.clone()));
        }
        if !self.username.is_empty() {
            return Ok(Credentials::Password { user: self.username.clone(), password: self.password.clone() });
        }
        if self.auth.is_empty() {
            return Err("an entry is empty: the password is in a credential helper, which this file only names".into());
        }
        let pair = STANDARD.decode(self.auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = pair.as_deref().and_then(|pair| pair.trim_end_matches('\0').split_once(':'));
        let (user, password) = pair.ok_or("an entry's `auth` is not USER:PASSWORD in base64")?;
        Ok(Credentials::Password { user: user.into(), password: password.into() })
    }
}

/// Names of images and of where they come from, and a file of credentials, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(text: &str) {
    let _ = named(text, "ghcr.io/team/x:1");
    if check(text).is_ok() {
        let (registry, path) = parts(text);
        assert!(!registry.is_empty() && !text.contains(".."));
        assert_eq!(parts(&format!("{registry}/{path}")), (registry, path), "a whole name is whole");
    }
    assert!(!is_place(text) || check(text).is_ok());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(user: &str, password: &str) -> Option<Credentials> {
        Some(Credentials::Password { user: user.into(), password: password.into() })
    }

    #[test]
    fn mirrors_come_before_their_registry_and_no_other() {
        let mirrors =
            |name: &str, mirrors: &[&str]| (name.to_owned(), mirrors.iter().map(|m| (*m).to_owned()).collect());
        let registries = Registries {
            mirrors: [mirrors("docker.io", &["near:5000", "far.example/hub"]), mirrors("ghcr.io", &["near:5000/ghcr"])]
                .into(),
            credentials: None,
        };
        for (reference, sources) in [
            ("nginx", &["near:5000/library/nginx", "far.example/hub/library/nginx", "nginx"][..]),
            (
                "docker.io/nginx:1",
                &["near:5000/library/nginx:1", "far.example/hub/library/nginx:1", "docker.io/nginx:1"],
            ),
            ("a/b@sha256:00", &["near:5000/a/b@sha256:00", "far.example/hub/a/b@sha256:00", "a/b@sha256:00"]),
            ("ghcr.io/a/b:1", &["near:5000/ghcr/a/b:1", "ghcr.io/a/b:1"]),
            ("quay.io/a/b:1", &["quay.io/a/b:1"]),
            ("localhost/a:1", &["localhost/a:1"]),
        ] {
            assert_eq!(registries.sources(reference).expect("a reference"), sources, "{reference}");
        }
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for good in ["nginx", "ghcr.io/a/b_c:1.2-x", "a@sha256:00", "host:5000/a"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "/a", "../containers/x", "a/../b", "a b", "a\n", "a?x=1", "a#b", "ä", &"a".repeat(600)] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_place_is_a_host_and_perhaps_a_prefix() {
        for good in ["near:5000", "far.example", "far.example/hub/x", "localhost", "[fd00::1]:5000"] {
            assert!(is_place(good), "{good}");
        }
        for bad in
            ["", "near", "https://near:5000", "near:5000/", "near:5000//x", "user@far.example", "far.example/../x"]
        {
            assert!(!is_place(bad), "{bad}");
        }
    }

    #[test]
    fn the_longest_name_with_an_entry_counts() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("auth.json");
        std::fs::write(
            &path,
            r#"{"auths":{
                "ghcr.io":{"auth":"dTpw"},
                "ghcr.io/team":{"username":"team","password":"a:b"},
                "https://index.docker.io/v1/":{"auth":"aHViOnNlY3JldA=="},
                "near:5000":{"auth":"","identitytoken":"t"},
                "empty.example":{},
                "bad.example":{"auth":"?"}},
              "credHelpers":{"x.example":"y"},"HttpHeaders":{}}"#,
        )
        .expect("write");
        let registries = Registries { credentials: Some(path.clone()), ..Registries::default() };
        for (reference, expected) in [
            ("ghcr.io/other/x:1", password("u", "p")),
            ("ghcr.io/team/x:1", password("team", "a:b")),
            ("ghcr.io/teams/x:1", password("u", "p")),
            ("nginx", password("hub", "secret")),
            ("docker.io/a/b@sha256:00", password("hub", "secret")),
            ("near:5000/a", Some(Credentials::IdentityToken("t".into()))),
            ("near:5001/a", None),
        ] {
            assert_eq!(registries.credentials(reference).expect("readable"), expected, "{reference}");
        }
        for (reference, reason) in [("empty.example/a", "credential helper"), ("bad.example/a", "USER:PASSWORD")] {
            let error = registries.credentials(reference).expect_err(reference).to_string();
            assert!(error.contains(reason) && error.contains("auth.json"), "{error}");
        }
        std::fs::write(&path, r#"{"auths":{"a.example":"secret"}}"#).expect("write");
        let error = registries.credentials("nginx").expect_err("no JSON of that kind").to_string();
        assert!(error.contains("docker login") && !error.contains("secret"), "{error}");
        std::fs::remove_file(&path).expect("remove");
        let error = registries.credentials("nginx").expect_err("no file").to_string();
        assert!(error.contains("auth.json") && error.contains("No such file"), "{error}");
    }

    #[test]
    fn credentials_are_not_written_anywhere() {
        let shown = format!("{:?} {:?}", password("user", "secret"), Credentials::IdentityToken("secret".into()));
        assert!(!shown.contains("secret") && !shown.contains("user"), "{shown}");
    }
}

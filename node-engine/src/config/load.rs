//! Reads the sources, weakest first, through the one table of settings.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Config;
use super::nearest::nearest;
use super::settings::{Draft, SETTINGS, Setting};

/// Read when no other file is named; may be missing.
pub const DEFAULT_FILE: &str = "/etc/node-engine/config.toml";

/// Variables of ours that are not settings of the daemon.
const OTHER_VARIABLES: [&str; 5] =
    ["NODE_ENGINE_BINARY", "NODE_ENGINE_CONFIG", "NODE_ENGINE_EBPF_OBJECT", "NODE_ENGINE_LOG", "NODE_ENGINE_SOCKET"];

/// Where the configuration comes from.
#[derive(Debug)]
pub struct Sources {
    /// `None`: [`DEFAULT_FILE`], if it is there.
    pub file: Option<PathBuf>,
    pub environment: BTreeMap<String, String>,
    pub flags: Vec<Flag>,
}

/// What was typed for a setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flag {
    /// As typed, such as `--tunnel-port`.
    pub name: &'static str,
    /// The key that it sets.
    pub key: &'static str,
    pub value: String,
}

/// A configuration, and what about its sources is odd but not wrong.
#[derive(Debug)]
pub struct Loaded {
    pub config: Config,
    pub warnings: Vec<String>,
}

/// Where a value stood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    File { path: PathBuf, key: &'static str },
    Environment(&'static str),
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, key } => write!(f, "{}: {key}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => f.write_str(name),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read {}: {source}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} line {line}: {reason}", .path.display())]
    Syntax { path: PathBuf, line: usize, reason: String },
    #[error("{}: there is no setting `{key}`; did you mean `{nearest}`?", .path.display())]
    Unknown { path: PathBuf, key: String, nearest: &'static str },
    #[error("{origin}: {value:?} {expected}")]
    Value { origin: Origin, value: String, expected: String },
    #[error("{0}")]
    Conflict(&'static str),
    #[error(
        "no cluster is configured: pass --cluster HOST, or set `host` under [cluster] in {DEFAULT_FILE}, \
         or start a cluster of one machine with `node-engine standalone`"
    )]
    NoCluster,
}

/// Where the service's variables are, beside its configuration.
pub const ENVIRONMENT_FILE: &str = "/etc/node-engine/environment";

/// The variable that Docker's own client goes by. It is there for others as well, or in the shell of whoever removes a daemon that never
/// saw it: the file counts more.
const DOCKER_HOST: &str = "DOCKER_HOST";

/// Applies the sources to the defaults.
///
/// # Errors
/// If a source cannot be read, or says what no setting can mean. Nothing is half-applied.
pub fn load(sources: &Sources) -> Result<Loaded, ConfigError> {
    let mut draft = Draft::new(host_name());
    let mut warnings = unknown_variables(&sources.environment);
    warnings.extend(apply_docker_host(&mut draft, &sources.environment));
    let path = sources.file.as_deref().unwrap_or(Path::new(DEFAULT_FILE));
    if let Some(text) = read(path, sources.file.is_some())? {
        apply_file(&mut draft, path, &text)?;
    }
    apply_environment(&mut draft, &sources.environment)?;
    for setting in SETTINGS {
        for flag in sources.flags.iter().filter(|flag| flag.key == setting.key) {
            apply(&mut draft, setting, &flag.value, || Origin::Flag(flag.name))?;
        }
    }
    let config = draft.finish().map_err(ConfigError::Conflict)?;
    Ok(Loaded { config, warnings })
}

/// What a configuration file of this text means, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn load_text(text: &str) -> Result<Config, ConfigError> {
    let mut draft = Draft::new("node".into());
    apply_file(&mut draft, Path::new("config.toml"), text)?;
    draft.finish().map_err(ConfigError::Conflict)
}

impl Config {
    /// The configuration of a daemon, which needs a cluster.
    ///
    /// # Errors
    /// If no cluster is configured.
    pub fn with_cluster(self) -> Result<Self, ConfigError> {
        if self.cluster.host.is_empty() { Err(ConfigError::NoCluster) } else { Ok(self) }
    }
}

fn read(path: &Path, must_exist: bool) -> Result<Option<String>, ConfigError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => Ok(None),
        Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
    }
}

fn apply_file(draft: &mut Draft, path: &Path, text: &str) -> Result<(), ConfigError> {
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let before = text.get(..error.span().map_or(0, |span| span.start)).unwrap_or("");
        let line = before.matches('\n').count() + 1;
        ConfigError::Syntax { path: path.to_owned(), line, reason: error.message().to_owned() }
    })?;
    let mut values = BTreeMap::new();
    for (key, value) in table {
        match value {
            toml::Value::Table(inner) => {
                values.extend(inner.into_iter().map(|(name, value)| (format!("{key}.{name}"), value)));
            }
            value => {
                values.insert(key, value);
            }
        }
    }
    if let Some(key) = values.keys().find(|key| SETTINGS.iter().all(|setting| setting.key != key.as_str())) {
        let nearest = nearest(key, SETTINGS.iter().map(|setting| setting.key)).unwrap_or_default();
        return Err(ConfigError::Unknown { path: path.to_owned(), key: key.clone(), nearest });
    }
    for setting in SETTINGS {
        let Some(value) = values.get(setting.key) else { continue };
        let origin = || Origin::File { path: path.to_owned(), key: setting.key };
        let text = match value {
            toml::Value::String(text) => text.clone(),
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Boolean(truth) => truth.to_string(),
            other => {
                let expected = "is not a text, a whole number or a truth value".to_owned();
                return Err(ConfigError::Value { origin: origin(), value: other.to_string(), expected });
            }
        };
        apply(draft, setting, &text, origin)?;
    }
    Ok(())
}

/// An empty variable is an unset one, as scripts have it.
fn apply_environment(draft: &mut Draft, environment: &BTreeMap<String, String>) -> Result<(), ConfigError> {
    for setting in SETTINGS {
        let set = |name: &&&'static str| environment.get(**name).is_some_and(|value| !value.is_empty());
        let Some(name) = setting.environment.iter().find(set) else { continue };
        apply(draft, setting, &environment[*name], || Origin::Environment(name))?;
    }
    Ok(())
}

/// What of it cannot be used is said.
fn apply_docker_host(draft: &mut Draft, environment: &BTreeMap<String, String>) -> Option<String> {
    let value = environment.get(DOCKER_HOST).filter(|value| !value.is_empty())?;
    let setting = SETTINGS.iter().find(|setting| setting.key == "runtime.docker_host")?;
    let refused = apply(draft, setting, value, || Origin::Environment(DOCKER_HOST)).err()?;
    Some(format!("left out: {refused}"))
}

fn apply(draft: &mut Draft, setting: &Setting, text: &str, origin: impl FnOnce() -> Origin) -> Result<(), ConfigError> {
    (setting.set)(draft, text).map_err(|expected| ConfigError::Value {
        origin: origin(),
        value: text.chars().take(80).collect(),
        expected,
    })
}

/// Not an error: other programs may name variables as we do.
fn unknown_variables(environment: &BTreeMap<String, String>) -> Vec<String> {
    let known = || SETTINGS.iter().flat_map(|setting| setting.environment.iter().copied()).chain(OTHER_VARIABLES);
    environment
        .keys()
        .filter(|name| name.starts_with("NODE_ENGINE_") && known().all(|known| known != name.as_str()))
        .map(|name| {
            let nearest = nearest(name, known()).unwrap_or_default();
            format!("environment variable {name} is not a setting; did you mean {nearest}?")
        })
        .collect()
}

/// The variables in a file as systemd reads them (`EnvironmentFile=`); none where it cannot be read.
pub fn environment_file(path: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';']));
    let variables = lines.filter_map(|line| line.split_once('=')).map(|(name, value)| {
        let value = value.trim();
        let quoted = |quote| value.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
        (name.trim().to_owned(), quoted('"').or_else(|| quoted('\'')).unwrap_or(value).to_owned())
    });
    variables.collect()
}

/// The name of the machine in this UTS namespace.
fn host_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .ok()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".into())
}

#[cfg(test)]
mod tests;

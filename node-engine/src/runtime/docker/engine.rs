//! What it is that speaks as Docker does, and what it takes without holding it.

use bollard::models::{SystemInfo, SystemVersion};

/// Told by Podman of its own version.
const PODMAN: &str = "Podman Engine";

/// Docker, or Podman; as root, or as somebody else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Engine {
    version: String,
    pub(super) podman: bool,
    pub(super) rootless: bool,
    /// Limits that it takes and does not hold.
    unlimited: Vec<&'static str>,
}

impl Engine {
    /// `owner` is whose its socket is: not every version of Podman says that it runs as somebody else than root.
    pub(super) fn of(version: &SystemVersion, info: &SystemInfo, owner: u32) -> Self {
        let limits = [("memory", info.memory_limit), ("CPU", info.cpu_cfs_quota)];
        Self {
            version: version.version.clone().unwrap_or_default(),
            podman: version.components.iter().flatten().any(|component| component.name == PODMAN),
            rootless: owner != 0 || info.security_options.iter().flatten().any(|option| option == "name=rootless"),
            unlimited: limits.into_iter().filter(|(_, held)| *held == Some(false)).map(|(limit, _)| limit).collect(),
        }
    }

    /// Docker as root looks at its own means when it starts. Whatever else answers may not run a single container.
    pub(super) fn is_plain_docker(&self) -> bool {
        !self.podman && !self.rootless
    }

    pub(super) fn announce(&self, socket: &str) {
        let name = if self.podman { "Podman" } else { "Docker" };
        tracing::info!(
            engine = name,
            version = self.version,
            rootless = self.rootless,
            socket,
            "a container engine answers"
        );
        if !self.unlimited.is_empty() {
            let limits = self.unlimited.join(" and ");
            tracing::warn!(limits, socket, "this engine takes such limits and does not hold them");
        }
    }
}

#[cfg(test)]
mod tests {
    use bollard::models::SystemVersionComponents;

    use super::*;

    #[test]
    fn an_engine_is_known_by_what_it_says() {
        let version = |component: &str| SystemVersion {
            version: Some("4.3.1".into()),
            components: Some(vec![SystemVersionComponents {
                name: component.into(),
                version: String::new(),
                details: None,
            }]),
            ..SystemVersion::default()
        };
        let (plain, info) = (SystemVersion::default(), SystemInfo::default());
        assert!(Engine::of(&plain, &info, 0).is_plain_docker(), "one that says nothing");
        let podman = Engine::of(&version("Podman Engine"), &info, 0);
        assert!(Engine::of(&plain, &info, 1000).rootless);
        assert!(podman.podman && !podman.rootless && !podman.is_plain_docker() && podman.version == "4.3.1");
        let rootless = SystemInfo {
            security_options: Some(vec!["name=seccomp,profile=default".into(), "name=rootless".into()]),
            memory_limit: Some(false),
            cpu_cfs_quota: Some(false),
            ..SystemInfo::default()
        };
        let rootless = Engine::of(&version("Engine"), &rootless, 0);
        assert!(rootless.rootless && !rootless.podman && !rootless.is_plain_docker());
        assert_eq!(rootless.unlimited, ["memory", "CPU"]);
    }
}

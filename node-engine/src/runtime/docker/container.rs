//! The two containers of an instance, as Docker is asked for them: the sandbox, which holds the network namespace, and the workload,
//! which joins it.

use std::collections::HashMap;
use std::path::Path;

use bollard::models::{
    ContainerCreateBody, DeviceMapping, DeviceRequest, HostConfig, HostConfigLogConfig, Mount, MountType,
    RestartPolicy, RestartPolicyNameEnum,
};

use super::image::PAUSE;
use crate::model::{InstanceId, InstanceSpec};
use crate::runtime::{pause, surroundings};

pub(super) const LABEL_INSTANCE: &str = "node-engine.instance";
pub(super) const LABEL_DOCUMENT: &str = "node-engine.document";
pub(super) const LABEL_ROLE: &str = "node-engine.role";
pub(super) const ROLE_SANDBOX: &str = "sandbox";
pub(super) const ROLE_WORKLOAD: &str = "workload";

/// Docker accepts no smaller limit.
const LEAST_MEMORY_MIB: u64 = 6;

pub(super) fn workload_name(instance: &InstanceId) -> String {
    instance.to_string()
}

pub(super) fn sandbox_name(instance: &InstanceId) -> String {
    format!("{instance}.sandbox")
}

pub(super) fn sandbox(spec: &InstanceSpec, dns: Vec<String>) -> ContainerCreateBody {
    let extra_hosts: Vec<_> =
        surroundings::known_hosts().into_iter().map(|(address, name)| format!("{name}:{address}")).collect();
    ContainerCreateBody {
        hostname: Some(surroundings::host_name(&spec.id)),
        image: Some(PAUSE.into()),
        entrypoint: Some(vec![pause::PATH.into()]),
        labels: Some(labels(spec, ROLE_SANDBOX)),
        host_config: Some(HostConfig {
            network_mode: Some("none".into()),
            // The workload takes over host name, resolver and known hosts with the network.
            dns: Some(dns),
            extra_hosts: Some(extra_hosts).filter(|hosts| !hosts.is_empty()),
            cap_drop: Some(vec!["ALL".into()]),
            readonly_rootfs: Some(true),
            log_config: Some(HostConfigLogConfig { typ: Some("none".into()), config: None }),
            restart_policy: Some(never()),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}

/// `cpus` is what the machine has: a limit that is none of it is not asked for, since Docker refuses larger ones.
pub(super) fn workload(spec: &InstanceSpec, sandbox: &str, cpus: u32) -> ContainerCreateBody {
    let memory = spec.limits.memory_mib.map(|limit| to_i64(limit.max(LEAST_MEMORY_MIB).saturating_mul(1 << 20)));
    let gpus = DeviceRequest {
        driver: Some("nvidia".into()),
        count: Some(i64::from(spec.limits.vgpus)),
        capabilities: Some(vec![vec!["gpu".into()]]),
        ..DeviceRequest::default()
    };
    let fuse = spec.privileged.then(|| mapped(Path::new("/dev/fuse")));
    let granted = spec.devices.iter().flat_map(|device| &device.nodes).map(|node| mapped(node));
    let devices: Vec<DeviceMapping> = fuse.into_iter().chain(granted).collect();
    let cdi: Vec<String> =
        spec.devices.iter().filter(|device| device.is_cdi()).map(|device| device.name.clone()).collect();
    let cdi = (!cdi.is_empty()).then(|| DeviceRequest {
        driver: Some("cdi".into()),
        device_ids: Some(cdi),
        ..DeviceRequest::default()
    });
    let requests: Vec<DeviceRequest> = (spec.limits.vgpus > 0).then_some(gpus).into_iter().chain(cdi).collect();
    let log_options = [("max-size", "10m"), ("max-file", "2")];
    // An entry point of its own also takes the place of the image's command.
    let (entrypoint, arguments) = match spec.command.split_first() {
        Some((program, arguments)) if !spec.beside_entrypoint => (Some(vec![program.clone()]), arguments),
        _ => (None, spec.command.as_slice()),
    };
    ContainerCreateBody {
        image: Some(spec.image.clone()),
        entrypoint,
        cmd: (!arguments.is_empty()).then(|| arguments.to_vec()),
        user: spec.user.clone(),
        working_dir: spec.directory.clone(),
        // To the engine, too, a name alone takes away what the image says of it.
        env: Some(surroundings::environment(spec).chain(surroundings::unset(spec)).collect()),
        labels: Some(labels(spec, ROLE_WORKLOAD)),
        host_config: Some(HostConfig {
            network_mode: Some(format!("container:{sandbox}")),
            nano_cpus: spec.limits.vcpus.filter(|vcpus| *vcpus < cpus).map(|vcpus| i64::from(vcpus) * 1_000_000_000),
            memory,
            // The same value for memory and swap together: no swap.
            memory_swap: memory,
            devices: Some(devices).filter(|devices| !devices.is_empty()),
            device_requests: Some(requests).filter(|requests| !requests.is_empty()),
            storage_opt: spec.limits.storage_mib.map(|mib| HashMap::from([("size".into(), format!("{mib}M"))])),
            mounts: (!spec.mounts.is_empty()).then(|| spec.mounts.iter().map(bound).collect()),
            log_config: Some(HostConfigLogConfig {
                typ: Some("json-file".into()),
                config: Some(log_options.map(|(name, value)| (name.to_owned(), value.to_owned())).into()),
            }),
            restart_policy: Some(never()),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}

fn bound(mount: &crate::model::Mount) -> Mount {
    Mount {
        typ: Some(MountType::BIND),
        source: Some(mount.source.to_string_lossy().into_owned()),
        target: Some(mount.target.clone()),
        read_only: Some(mount.read_only),
        ..Mount::default()
    }
}

/// Below the same name in the container, wherever the node keeps its devices.
fn mapped(node: &Path) -> DeviceMapping {
    let host = node.to_string_lossy().into_owned();
    let inside = host.rsplit_once("/dev/").map_or_else(|| host.clone(), |(_, name)| format!("/dev/{name}"));
    DeviceMapping { path_on_host: Some(host), path_in_container: Some(inside), cgroup_permissions: Some("rwm".into()) }
}

fn labels(spec: &InstanceSpec, role: &str) -> HashMap<String, String> {
    let labels =
        [(LABEL_INSTANCE, spec.id.to_string()), (LABEL_DOCUMENT, spec.document.to_string()), (LABEL_ROLE, role.into())];
    labels.map(|(name, value)| (name.to_owned(), value)).into()
}

fn never() -> RestartPolicy {
    RestartPolicy { name: Some(RestartPolicyNameEnum::NO), maximum_retry_count: None }
}

fn to_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::model::{Limits, Technology};

    pub(in crate::runtime::docker) fn spec(number: u32) -> InstanceSpec {
        let id = InstanceId { service: "app.default.web.test".parse().expect("a good name"), number };
        InstanceSpec {
            image: "bb:1".into(),
            document: "{\"a\":1}".into(),
            ..InstanceSpec::new(id, Technology::Container)
        }
    }

    #[test]
    fn limits_and_devices_are_asked_for_only_where_given() {
        let bare = workload(&spec(3), "sandbox", 4);
        let host = bare.host_config.expect("a host config");
        assert_eq!((host.nano_cpus, host.memory, host.memory_swap, &host.devices), (None, None, None, &None));
        assert_eq!((host.device_requests, bare.cmd), (None, None));
        assert_eq!(host.privileged, None);
        assert_eq!(bare.env, Some(vec!["HOSTNAME=instance-3".to_owned()]));

        let limits = Limits { vcpus: Some(2), memory_mib: Some(100), vgpus: 1, ..Limits::default() };
        let full = workload(&InstanceSpec { limits, privileged: true, ..spec(3) }, "sandbox", 4);
        let host = full.host_config.expect("a host config");
        assert_eq!((host.nano_cpus, host.memory), (Some(2_000_000_000), Some(100 << 20)));
        assert_eq!(host.memory_swap, host.memory);
        assert_eq!(host.privileged, None, "privileged adds a device and no more");
        assert_eq!(host.devices.map(|devices| devices.len()), Some(1));
        assert_eq!(host.device_requests.map(|requests| requests[0].count), Some(Some(1)));
    }

    #[test]
    fn a_command_is_all_that_runs_unless_it_is_of_the_first_generation() {
        let words = |words: &[&str]| Some(words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>());
        let command = vec!["sh".to_owned(), "-c".into(), "true".into()];
        let whole = InstanceSpec { command, ..spec(3) };
        let asked = workload(&whole, "sandbox", 4);
        assert_eq!((asked.entrypoint, asked.cmd), (words(&["sh"]), words(&["-c", "true"])));
        let asked = workload(&InstanceSpec { beside_entrypoint: true, ..whole }, "sandbox", 4);
        assert_eq!((asked.entrypoint, asked.cmd), (None, words(&["sh", "-c", "true"])));
        let asked = workload(&spec(3), "sandbox", 4);
        assert_eq!((asked.entrypoint, asked.cmd), (None, None));
    }

    #[test]
    fn granted_devices_are_below_the_same_name_inside() {
        let grant = |name: &str, nodes: &[&str]| crate::model::DeviceGrant {
            name: name.into(),
            nodes: nodes.iter().map(Into::into).collect(),
        };
        let devices = vec![
            grant("usb", &["/dev/bus/usb/001/012"]),
            grant("x", &["/tree/dev/iio:device0"]),
            grant("v.com/gpu=0", &[]),
        ];
        let host = workload(&InstanceSpec { devices, ..spec(0) }, "s", 4).host_config.expect("a host config");
        let mapped = host.devices.expect("devices").into_iter();
        let mapped: Vec<_> =
            mapped.map(|device| (device.path_on_host.unwrap(), device.path_in_container.unwrap())).collect();
        let own = |host: &str, inside: &str| (host.to_owned(), inside.to_owned());
        assert_eq!(
            mapped,
            [own("/dev/bus/usb/001/012", "/dev/bus/usb/001/012"), own("/tree/dev/iio:device0", "/dev/iio:device0")]
        );
        let requests = host.device_requests.expect("a request");
        assert_eq!(
            (requests[0].driver.as_deref(), requests[0].device_ids.as_deref()),
            (Some("cdi"), Some(&["v.com/gpu=0".to_owned()][..]))
        );
    }

    #[test]
    fn limits_that_docker_would_refuse_are_brought_into_its_range() {
        let limits = Limits { vcpus: Some(64), memory_mib: Some(1), ..Limits::default() };
        let host = workload(&InstanceSpec { limits, ..spec(0) }, "s", 4).host_config.expect("a host config");
        assert_eq!((host.nano_cpus, host.memory), (None, Some(6 << 20)));
        let limits = Limits { memory_mib: Some(u64::MAX), ..Limits::default() };
        let host = workload(&InstanceSpec { limits, ..spec(0) }, "s", 4).host_config.expect("a host config");
        assert_eq!(host.memory, Some(i64::MAX));
    }
}

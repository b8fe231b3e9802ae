//! What Docker knows of a container, in the words of every runtime.

use bollard::models::{ContainerInspectResponse, DeviceRequest};

use crate::model::InstanceDetails;

pub(super) fn of(container: ContainerInspectResponse) -> InstanceDetails {
    let state = container.state.unwrap_or_default();
    let config = container.config.unwrap_or_default();
    let host = container.host_config.unwrap_or_default();
    let running = state.running == Some(true);
    let program = container.path.filter(|path| !path.is_empty());
    let (started, ended) = (time(state.started_at), time(state.finished_at));
    // A container that runs again still knows when it ended last.
    let ended = if running { String::new() } else { ended };
    InstanceDetails {
        handle: container.id.unwrap_or_default(),
        image_id: container.image.unwrap_or_default(),
        pid: state.pid.filter(|pid| running && *pid > 0).and_then(|pid| pid.try_into().ok()),
        command: program.into_iter().chain(container.args.unwrap_or_default()).collect(),
        environment: config.env.unwrap_or_default().iter().map(|entry| name_of(entry)).collect(),
        working_directory: config.working_dir.unwrap_or_default(),
        user: config.user.unwrap_or_default(),
        // Zero is how Docker says "none".
        cpus: host.nano_cpus.filter(|limit| *limit > 0).map(|limit| limit as f64 / 1e9),
        memory_bytes: host.memory.and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit > 0),
        gpus: host.device_requests.unwrap_or_default().iter().map(gpus).collect(),
        devices: host.devices.unwrap_or_default().into_iter().filter_map(|device| device.path_on_host).collect(),
        mounts: container.mounts.unwrap_or_default().into_iter().map(mount).collect(),
        created: time(container.created),
        exit_code: state.exit_code.filter(|_| !ended.is_empty()),
        out_of_memory: state.oom_killed.unwrap_or(false),
        started,
        ended,
    }
}

/// Docker writes the year 1 for what has not happened.
fn time(text: Option<String>) -> String {
    text.filter(|text| !text.starts_with("0001-")).unwrap_or_default()
}

fn name_of(variable: &str) -> String {
    variable.split('=').next().unwrap_or_default().to_owned()
}

fn mount(mount: bollard::models::MountPoint) -> String {
    format!("{}:{}", mount.source.unwrap_or_default(), mount.destination.unwrap_or_default())
}

fn gpus(request: &DeviceRequest) -> String {
    match (&request.device_ids, request.count) {
        (Some(ids), _) if !ids.is_empty() => ids.join(","),
        (_, Some(-1)) => "all".into(),
        (_, count) => format!("any {}", count.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use bollard::models::{ContainerConfig, ContainerState, HostConfig};

    use super::*;

    #[test]
    fn values_of_variables_are_not_told_and_what_has_not_happened_is_empty() {
        let config = ContainerConfig { env: Some(vec!["TOKEN=secret".into(), "A=".into()]), ..Default::default() };
        let host = HostConfig { nano_cpus: Some(1_500_000_000), memory: Some(0), ..Default::default() };
        let state = |running, pid, ended: &str| ContainerState {
            running: Some(running),
            pid: Some(pid),
            exit_code: Some(0),
            finished_at: Some(ended.into()),
            ..Default::default()
        };
        let of = |state| {
            of(ContainerInspectResponse {
                config: Some(config.clone()),
                host_config: Some(host.clone()),
                path: Some("/bin/sh".into()),
                args: Some(vec!["-c".into(), "true".into()]),
                state: Some(state),
                ..Default::default()
            })
        };
        let runs = of(state(true, 7, "2026-01-01T00:00:00Z"));
        assert_eq!(runs.environment, ["TOKEN", "A"]);
        assert_eq!((runs.cpus, runs.memory_bytes), (Some(1.5), None));
        assert_eq!(runs.command, ["/bin/sh", "-c", "true"]);
        assert_eq!((runs.pid, runs.exit_code, runs.ended.as_str()), (Some(7), None, ""));
        let prepared = of(state(false, 0, "0001-01-01T00:00:00Z"));
        assert_eq!((prepared.pid, prepared.exit_code, prepared.ended.as_str()), (None, None, ""));
        let ended = of(state(false, 0, "2026-01-01T00:00:00Z"));
        assert_eq!((ended.exit_code, ended.ended.as_str()), (Some(0), "2026-01-01T00:00:00Z"));
    }
}

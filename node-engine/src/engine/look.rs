//! A closer look at instances in the words of the local API.

use crate::api::dto::look;
use crate::model::{InstanceDetails, InstanceUsage};
use crate::workload::InstanceReport;

pub(super) fn inspection(report: InstanceReport) -> look::Inspection {
    let InstanceReport { info, spec, restarts, usage: used, details } = report;
    let (runtime, image_id, runtime_error) = match details {
        Ok(details) => {
            let image_id = details.image_id.clone();
            (Some(runtime(details)), image_id, String::new())
        }
        Err(error) => (None, String::new(), error.to_string()),
    };
    look::Inspection {
        service: info.id.service.to_string(),
        number: info.id.number,
        job: spec.job.clone(),
        technology: info.technology.to_string(),
        image: info.image,
        image_id,
        platform: spec.platform.clone().unwrap_or_default(),
        state: info.state.into(),
        detail: info.detail,
        restarts,
        one_shot: spec.one_shot,
        privileged: spec.privileged,
        address_v4: info.addresses.map(|addresses| addresses.v4.to_string()).unwrap_or_default(),
        address_v6: info.addresses.map(|addresses| addresses.v6.to_string()).unwrap_or_default(),
        ports: spec.ports.iter().map(ToString::to_string).collect(),
        limits: look::Limits { vcpus: spec.limits.vcpus, memory_mib: spec.limits.memory_mib, vgpus: spec.limits.vgpus },
        runtime,
        runtime_error,
        usage: used.as_ref().map(usage),
    }
}

fn runtime(details: InstanceDetails) -> look::Runtime {
    look::Runtime {
        handle: details.handle,
        pid: details.pid,
        command: details.command,
        environment: details.environment,
        working_directory: details.working_directory,
        user: details.user,
        cpus: details.cpus,
        memory_bytes: details.memory_bytes,
        gpus: details.gpus,
        devices: details.devices,
        mounts: details.mounts,
        created: details.created,
        started: details.started,
        ended: details.ended,
        exit_code: details.exit_code,
        out_of_memory: details.out_of_memory,
    }
}

pub(super) fn usage(usage: &InstanceUsage) -> look::Usage {
    let counters = &usage.counters;
    let seconds = |nanoseconds: Option<u64>| nanoseconds.map(|nanoseconds| nanoseconds as f64 / 1e9);
    look::Usage {
        instance: format!("{}#{}", usage.instance.service, usage.instance.number),
        technology: usage.technology.to_string(),
        cpu_percent: usage.cpu_percent,
        cpu_seconds: seconds(counters.cpu_nanoseconds),
        throttled_seconds: seconds(counters.throttled_nanoseconds),
        memory_bytes: usage.memory_bytes,
        memory_percent: usage.memory_percent,
        memory_peak_bytes: counters.memory_peak_bytes,
        memory_limit_bytes: counters.memory_limit_bytes,
        out_of_memory_kills: counters.out_of_memory_kills,
        processes: counters.processes,
        disk_bytes: usage.disk_bytes,
        read_bytes: counters.read_bytes,
        written_bytes: counters.written_bytes,
        received_bytes: counters.received_bytes,
        received_packets: counters.received_packets,
        sent_bytes: counters.sent_bytes,
        sent_packets: counters.sent_packets,
        dropped_packets: counters.dropped_packets,
    }
}

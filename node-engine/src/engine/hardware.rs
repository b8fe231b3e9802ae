//! What the machine is made of in the words of the local API.

use crate::api::dto::hardware;
use crate::model::{Device, Reading, Wear};
use crate::telemetry::hardware::{Disk, Gpu, Hardware, Network};

pub(super) fn told(found: Hardware, wear: &[Wear]) -> hardware::Hardware {
    hardware::Hardware {
        machine: found.machine,
        firmware: found.firmware,
        cpu: hardware::Cpu {
            model: found.cpu.model,
            architecture: found.cpu.architecture,
            logical: found.cpu.logical,
            physical: found.cpu.physical,
            max_mhz: found.cpu.max_mhz,
        },
        memory_bytes: found.memory_bytes,
        disks: found.disks.into_iter().map(|disk| told_disk(disk, wear)).collect(),
        networks: found.networks.into_iter().map(network).collect(),
        gpus: found.gpus.into_iter().map(gpu).collect(),
        devices: found.devices.into_iter().map(|(device, readings)| attached(device, readings)).collect(),
    }
}

fn told_disk(disk: Disk, wear: &[Wear]) -> hardware::Disk {
    let worn = wear.iter().find(|wear| wear.device == disk.name);
    hardware::Disk {
        name: disk.name,
        model: disk.model,
        size_bytes: disk.size_bytes,
        rotational: disk.rotational,
        removable: disk.removable,
        life_used_percent: worn.map(|wear| wear.used_percent),
    }
}

fn network(network: Network) -> hardware::Network {
    hardware::Network {
        name: network.name,
        driver: network.driver,
        address: network.address,
        state: network.state,
        mtu: network.mtu,
        speed_mbit: network.speed_mbit,
    }
}

fn gpu(gpu: Gpu) -> hardware::Gpu {
    let usage = gpu.usage.as_ref();
    // A driver that tells of no memory tells nothing of it.
    let memory = usage.filter(|usage| usage.memory_total_mib > 0);
    hardware::Gpu {
        name: gpu.name,
        vendor: gpu.vendor,
        driver: gpu.driver,
        place: gpu.place,
        id: gpu.id,
        usage_percent: usage.map(|usage| usage.usage_percent),
        memory_total_mib: memory.map(|usage| usage.memory_total_mib),
        memory_used_mib: memory.map(|usage| usage.memory_used_mib),
        temperature_celsius: usage.map(|usage| usage.temperature_celsius).filter(|value| *value != 0.0),
    }
}

fn attached(device: Device, readings: Vec<Reading>) -> hardware::Device {
    let reading = |reading: Reading| hardware::Reading {
        channel: reading.channel,
        value: reading.value,
        unit: reading.unit.word().into(),
    };
    hardware::Device {
        name: device.name,
        kind: device.kind.word().into(),
        description: device.description,
        id: device.id,
        nodes: device.nodes.iter().map(|node| node.display().to_string()).collect(),
        readings: readings.into_iter().map(reading).collect(),
    }
}

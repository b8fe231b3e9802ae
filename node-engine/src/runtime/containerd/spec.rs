//! A container as an OCI runtime is told of it (OCI runtime specification, `config.json`): what the description asks for, over what the
//! image says, within what Docker would give it.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::image::Process;
use crate::model::{InstanceDetails, InstanceSpec, Limits, Mount};
use crate::runtime::user::Accounts;
use crate::runtime::{RuntimeError, surroundings};

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const PERIOD_MICROSECONDS: u64 = 100_000;
/// OCI runtimes need so much to start anything.
const LEAST_MEMORY_MIB: u64 = 6;
/// What Docker leaves to the superuser of a container.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What is asked for, before the image's accounts are known.
#[derive(Debug)]
pub(super) struct Order<'a> {
    pub(super) spec: &'a InstanceSpec,
    pub(super) image: &'a Process,
    /// Below the root of control groups.
    pub(super) control_group: &'a str,
    /// The kernel of this node counts swap.
    pub(super) swap: bool,
    /// Files of the node that everything in it finds: `/etc/hosts` and the like.
    pub(super) files: &'a [Mount],
}

/// What this runtime cannot give is refused before anything is made.
pub(super) fn check(spec: &InstanceSpec) -> Result<(), RuntimeError> {
    let refused = |what, reason: &str| Err(RuntimeError::Refused { what, reason: reason.into() });
    if spec.limits.storage_mib.is_some() {
        return refused("storage", "containerd does not bound what a container writes; ask for docker or a volume");
    }
    if spec.limits.vgpus > 0 {
        return refused("vgpus", "GPUs are given to containers of docker alone");
    }
    if let Some(device) = spec.devices.iter().find(|device| device.is_cdi()) {
        let reason = format!("{} is described by CDI, which containers of docker alone are given", device.name);
        return Err(RuntimeError::Refused { what: "devices", reason });
    }
    Ok(())
}

/// What runs: the description's, or else the image's.
pub(super) fn command(spec: &InstanceSpec, image: &Process) -> Result<Vec<String>, RuntimeError> {
    let arguments = if spec.command.is_empty() { image.cmd.clone().unwrap_or_default() } else { spec.command.clone() };
    let whole = !spec.command.is_empty() && !spec.beside_entrypoint;
    let entrypoint = image.entrypoint.iter().flatten().filter(|_| !whole);
    let command: Vec<_> = entrypoint.cloned().chain(arguments).collect();
    if command.first().is_none_or(String::is_empty) {
        let reason = "neither the image nor the description says what to run".into();
        return Err(RuntimeError::Refused { what: "cmd", reason });
    }
    Ok(command)
}

impl Order<'_> {
    /// Whose process it is: `user` of the description, else of the image.
    pub(super) fn user(&self) -> &str {
        let own = self.image.user.as_deref().filter(|user| !user.is_empty());
        self.spec.user.as_deref().or(own).unwrap_or("0")
    }

    /// The whole document.
    pub(super) fn document(&self, accounts: &Accounts) -> Result<Vec<u8>, RuntimeError> {
        self.value(accounts).map(|document| document.to_string().into())
    }

    fn value(&self, accounts: &Accounts) -> Result<Value, RuntimeError> {
        let user = accounts.resolve(self.user()).map_err(|reason| RuntimeError::Refused { what: "user", reason })?;
        let devices = self.devices()?;
        let rules: Vec<_> = devices
            .iter()
            .map(|node| json!({"allow": true, "type": node["type"], "major": node["major"], "minor": node["minor"], "access": "rwm"}))
            .collect();
        let mut resources = limits(self.spec.limits, self.swap);
        resources["devices"] = std::iter::once(json!({"allow": false, "access": "rwm"})).chain(rules).collect();
        let namespaces: Vec<_> =
            ["pid", "ipc", "uts", "mount", "network"].iter().map(|kind| json!({"type": kind})).collect();
        Ok(json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": user.0, "gid": user.1, "additionalGids": accounts.memberships(user.0)},
                "args": command(self.spec, self.image)?,
                "env": self.environment(),
                "cwd": self.directory(),
                "capabilities": capabilities(user.0),
                "oomScoreAdj": 0,
            },
            "root": {"path": "rootfs"},
            "hostname": surroundings::host_name(&self.spec.id),
            "mounts": self.mounts(),
            "linux": {
                "cgroupsPath": self.control_group,
                "namespaces": namespaces,
                "resources": resources,
                "devices": devices,
                "maskedPaths": MASKED,
                "readonlyPaths": READ_ONLY,
            },
        }))
    }

    /// The image's, and over them the description's.
    fn environment(&self) -> Vec<String> {
        let name = |variable: &str| variable.split('=').next().unwrap_or_default().to_owned();
        let given: Vec<_> = surroundings::environment(self.spec).collect();
        let over: Vec<_> = given.iter().map(|variable| name(variable)).chain(surroundings::unset(self.spec)).collect();
        let kept = |variable: &&String| !over.contains(&name(variable));
        let mut all: Vec<_> = self.image.env.iter().flatten().filter(kept).cloned().collect();
        all.extend(given.iter().cloned());
        if !all.iter().any(|variable| variable.starts_with("PATH=")) {
            all.push(PATH.into());
        }
        all
    }

    fn directory(&self) -> &str {
        let own = self.image.working_dir.as_deref().filter(|directory| !directory.is_empty());
        self.spec.directory.as_deref().or(own).unwrap_or("/")
    }

    fn mounts(&self) -> Vec<Value> {
        let kernel = [
            ("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"][..]),
            ("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            (
                "/dev/pts",
                "devpts",
                "devpts",
                &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            ),
            ("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            ("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            ("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            ("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]),
        ];
        let kernel = kernel.iter().map(|(target, kind, source, options)| {
            json!({"destination": target, "type": kind, "source": source, "options": options})
        });
        kernel.chain(self.files.iter().chain(&self.spec.mounts).map(bound)).collect()
    }

    /// Device nodes of the host below the same name inside, wherever the node keeps them. `privileged` adds one and no more.
    fn devices(&self) -> Result<Vec<Value>, RuntimeError> {
        let fuse = self.spec.privileged.then(|| PathBuf::from("/dev/fuse"));
        let granted = self.spec.devices.iter().flat_map(|device| &device.nodes).cloned();
        fuse.into_iter().chain(granted).map(|node| device(&node)).collect()
    }
}

/// Of a document as containerd keeps it, the process for one more command: the same user, environment and rights.
pub(super) fn beside(document: &[u8], command: &[String], terminal: bool) -> Vec<u8> {
    let mut process = Some(read(document)["process"].take()).filter(Value::is_object).unwrap_or_else(|| json!({}));
    process["args"] = command.into();
    process["terminal"] = terminal.into();
    process.to_string().into()
}

/// What the document tells a person.
pub(super) fn details(document: &[u8]) -> InstanceDetails {
    let document = read(document);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let (process, linux) = (&document["process"], &document["linux"]);
    let cpu = &linux["resources"]["cpu"];
    let bind = |mount: &&Value| mount["type"] == "bind";
    InstanceDetails {
        command: list(&process["args"]).iter().map(text).collect(),
        environment: list(&process["env"])
            .iter()
            .map(|variable| text(variable).split('=').next().unwrap_or_default().to_owned())
            .collect(),
        working_directory: text(&process["cwd"]),
        user: format!("{}:{}", process["user"]["uid"], process["user"]["gid"]),
        cpus: cpu["quota"].as_f64().map(|quota| quota / PERIOD_MICROSECONDS as f64),
        memory_bytes: linux["resources"]["memory"]["limit"].as_u64(),
        devices: list(&linux["devices"]).iter().map(|device| text(&device["path"])).collect(),
        mounts: list(&document["mounts"])
            .iter()
            .filter(bind)
            .map(|mount| format!("{}:{}", text(&mount["source"]), text(&mount["destination"])))
            .collect(),
        ..InstanceDetails::default()
    }
}

/// What is no document tells nothing.
fn read(document: &[u8]) -> Value {
    serde_json::from_slice(document).ok().filter(Value::is_object).unwrap_or_else(|| json!({}))
}

fn limits(limits: Limits, swap: bool) -> Value {
    let mut resources = json!({});
    if let Some(vcpus) = limits.vcpus {
        resources["cpu"] = json!({"quota": u64::from(vcpus) * PERIOD_MICROSECONDS, "period": PERIOD_MICROSECONDS});
    }
    if let Some(mib) = limits.memory_mib {
        let bytes = i64::try_from(mib.max(LEAST_MEMORY_MIB).saturating_mul(1 << 20)).unwrap_or(i64::MAX);
        resources["memory"] = json!({"limit": bytes});
        if swap {
            // The same value for memory and swap together: no swap.
            resources["memory"]["swap"] = bytes.into();
        }
    }
    resources
}

/// Another user than the superuser has none, and could get those of a program that has them.
fn capabilities(user: u32) -> Value {
    let own: &[&str] = if user == 0 { &CAPABILITIES } else { &[] };
    json!({"bounding": CAPABILITIES, "effective": own, "permitted": own})
}

fn bound(mount: &Mount) -> Value {
    let access = if mount.read_only { "ro" } else { "rw" };
    json!({"destination": mount.target, "type": "bind", "source": mount.source.to_string_lossy(),
           "options": ["rbind", "rprivate", access]})
}

fn device(node: &Path) -> Result<Value, RuntimeError> {
    let refused = |reason: String| RuntimeError::Refused { what: "devices", reason };
    let found = std::fs::metadata(node).map_err(|error| refused(format!("{}: {error}", node.display())))?;
    let kind = match found.file_type() {
        kind if kind.is_char_device() => "c",
        kind if kind.is_block_device() => "b",
        _ => return Err(refused(format!("{} is no device", node.display()))),
    };
    let host = node.to_string_lossy();
    let inside = host.rsplit_once("/dev/").map_or_else(|| host.to_string(), |(_, name)| format!("/dev/{name}"));
    let (major, minor) = (nix::sys::stat::major(found.rdev()), nix::sys::stat::minor(found.rdev()));
    Ok(json!({"path": inside, "type": kind, "major": major, "minor": minor, "fileMode": found.mode() & 0o7777,
              "uid": found.uid(), "gid": found.gid()}))
}

/// A document of a container, as containerd gives it back, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(bytes: &[u8]) {
    let _ = details(bytes);
    let process = beside(bytes, &["sh".to_owned()], true);
    assert_eq!(read(&process)["args"][0], "sh", "it is the command that is asked for");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{DeviceGrant, InstanceId, Technology};

    fn spec() -> InstanceSpec {
        let id: InstanceId = "app.default.web.test.instance.3".parse().expect("an id");
        InstanceSpec::new(id, Technology::Container)
    }

    fn image() -> Process {
        let words = |words: &[&str]| Some(words.iter().map(|&word| word.to_owned()).collect());
        Process {
            user: Some("web".into()),
            env: words(&["PATH=/bin", "A=image"]),
            entrypoint: words(&["/entry"]),
            cmd: words(&["serve"]),
            working_dir: Some("/srv".into()),
            stop_signal: None,
        }
    }

    fn accounts() -> Accounts {
        let (passwd, groups) = ("web:x:1000:100::/:/bin/sh\n".into(), "video:x:44:web\n".into());
        Accounts { passwd, groups, place: "in the image", lone_group: Some(0) }
    }

    fn document(spec: &InstanceSpec, image: &Process) -> Result<Value, RuntimeError> {
        let files = [Mount { source: "/run/hosts".into(), target: "/etc/hosts".into(), read_only: false }];
        Order { spec, image, control_group: "/edge/containerd/x", swap: true, files: &files }.value(&accounts())
    }

    #[test]
    fn the_image_decides_what_the_description_leaves_open() {
        let made = document(&spec(), &image()).expect("good");
        let process = &made["process"];
        assert_eq!(process["args"], json!(["/entry", "serve"]));
        assert_eq!(process["env"], json!(["PATH=/bin", "A=image", "HOSTNAME=instance-3"]));
        assert_eq!((&process["cwd"], &made["hostname"]), (&json!("/srv"), &json!("instance-3")));
        assert_eq!(process["user"], json!({"uid": 1000, "gid": 100, "additionalGids": [44]}));
        assert_eq!(process["capabilities"]["effective"], json!([]), "not the superuser");
        assert_eq!(process["capabilities"]["bounding"].as_array().map(Vec::len), Some(14));
        let resources = &made["linux"]["resources"];
        assert_eq!((&resources["cpu"], &resources["memory"]), (&Value::Null, &Value::Null));
        assert_eq!(resources["devices"], json!([{"allow": false, "access": "rwm"}]), "devices are denied first");

        let over = InstanceSpec {
            command: vec!["other".into()],
            environment: vec!["A=own".into(), "HOSTNAME=x".into()],
            user: Some("0:7".into()),
            directory: Some("/".into()),
            ..spec()
        };
        let made = document(&over, &image()).expect("good");
        let process = &made["process"];
        assert_eq!(process["args"], json!(["other"]));
        assert_eq!(process["env"], json!(["PATH=/bin", "A=own", "HOSTNAME=x"]));
        assert_eq!(process["user"], json!({"uid": 0, "gid": 7, "additionalGids": []}));
        assert_eq!(process["capabilities"]["effective"].as_array().map(Vec::len), Some(14));

        let first_generation = InstanceSpec { beside_entrypoint: true, environment: vec!["A".into()], ..over };
        let made = document(&first_generation, &image()).expect("good");
        assert_eq!(made["process"]["args"], json!(["/entry", "other"]));
        assert_eq!(made["process"]["env"], json!(["PATH=/bin", "HOSTNAME=instance-3"]), "a name alone takes it away");
    }

    #[test]
    fn limits_mounts_and_devices_are_handed_on() {
        let limits = Limits { vcpus: Some(2), memory_mib: Some(64), ..Limits::default() };
        let mounts = vec![Mount { source: "/srv/v".into(), target: "/data".into(), read_only: true }];
        let devices = vec![DeviceGrant { name: "null".into(), nodes: vec!["/dev/null".into()] }];
        let made = document(&InstanceSpec { limits, mounts, devices, ..spec() }, &image()).expect("good");
        let linux = &made["linux"];
        assert_eq!(linux["resources"]["cpu"], json!({"quota": 200_000, "period": 100_000}));
        assert_eq!(linux["resources"]["memory"], json!({"limit": 64 << 20, "swap": 64 << 20}));
        assert_eq!(
            (&linux["devices"][0]["path"], &linux["devices"][0]["major"], &linux["devices"][0]["minor"]),
            (&json!("/dev/null"), &json!(1), &json!(3))
        );
        assert_eq!(linux["resources"]["devices"][1]["allow"], json!(true));
        let bytes = made.to_string();
        let told = details(bytes.as_bytes());
        assert_eq!(told.mounts, ["/run/hosts:/etc/hosts", "/srv/v:/data"]);
        assert_eq!((told.cpus, told.memory_bytes, told.environment.len()), (Some(2.0), Some(64 << 20), 3));
        let exec = read(&beside(bytes.as_bytes(), &["sh".into()], true));
        assert_eq!(
            (&exec["args"], &exec["terminal"], &exec["user"]["uid"]),
            (&json!(["sh"]), &json!(true), &json!(1000))
        );
    }

    #[test]
    fn what_cannot_be_given_is_refused() {
        let storage = Limits { storage_mib: Some(1), ..Limits::default() };
        let gpu = Limits { vgpus: 1, ..Limits::default() };
        let cdi = vec![DeviceGrant { name: "v.com/gpu=0".into(), nodes: Vec::new() }];
        for bad in [
            InstanceSpec { limits: storage, ..spec() },
            InstanceSpec { limits: gpu, ..spec() },
            InstanceSpec { devices: cdi, ..spec() },
        ] {
            assert!(matches!(check(&bad), Err(RuntimeError::Refused { .. })), "{bad:?}");
        }
        assert!(check(&spec()).is_ok());
        let nobody = InstanceSpec { user: Some("nobody-here".into()), ..spec() };
        let file = vec![DeviceGrant { name: "x".into(), nodes: vec!["/etc/passwd".into()] }];
        for (bad, reason) in [(nobody, "in the image"), (InstanceSpec { devices: file, ..spec() }, "is no device")] {
            let error = document(&bad, &image()).expect_err("refused");
            assert!(error.to_string().contains(reason), "{error}");
        }
        assert!(document(&spec(), &Process::default()).is_err(), "nothing to run");
    }
}

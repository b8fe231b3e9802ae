//! Volumes and added files of a job document.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::deploy::DeployFault;
use super::json::{Malformed, Members, excerpt};
use crate::model::{AddedFile, InstanceSpec, VolumeRequest};

const MAX_VOLUMES: usize = 64;
const MAX_FILES: usize = 64;
const DEFAULT_MODE: u32 = 0o644;

#[derive(Debug, Serialize)]
pub(super) struct VolumeDocument {
    volume_id: String,
    csi_driver: String,
    mount_path: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    config: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
pub(super) struct FileDocument {
    path: String,
    content: String,
    mode: String,
}

pub(super) fn volumes(members: &Members<'_>) -> Result<Vec<VolumeRequest>, DeployFault> {
    let volumes: Result<Vec<_>, _> = members.objects("volumes")?.iter().map(volume).collect();
    let volumes = volumes?;
    if volumes.len() > MAX_VOLUMES {
        return Err(DeployFault::Volume { id: String::new(), reason: "more than 64 volumes" });
    }
    let mut paths = BTreeSet::new();
    match volumes.iter().find(|volume| !paths.insert(volume.mount_path.as_str())) {
        Some(twice) => Err(DeployFault::Volume { id: twice.id.clone(), reason: "another volume is mounted there" }),
        None => Ok(volumes),
    }
}

fn volume(members: &Members<'_>) -> Result<VolumeRequest, DeployFault> {
    let id = members.said("volume_id")?.ok_or(Malformed::Missing("volume_id"))?;
    let wrong = |reason| DeployFault::Volume { id: excerpt(id.as_bytes()), reason };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if id.len() > 128 || id == "." || id == ".." || !id.bytes().all(plain) {
        return Err(wrong("its id is not 1 to 128 letters, digits, `.`, `_`, `-`"));
    }
    let driver = members.said("csi_driver")?.ok_or(Malformed::Missing("csi_driver"))?;
    if driver.len() > 128 || !driver.bytes().all(|byte| plain(byte) || byte == b'/') {
        return Err(wrong("its driver is not the name of one"));
    }
    let mount_path = members.said("mount_path")?.unwrap_or_else(|| format!("/mnt/csi/{id}"));
    if !is_path(&mount_path) {
        return Err(wrong("its mount path is not an absolute path without `..`"));
    }
    let config = members.object("config")?.map(|config| config.entries()).transpose()?.unwrap_or_default();
    Ok(VolumeRequest { id, driver, mount_path, config })
}

/// Workers of the reference system never look at this member: what is no list of files with a path is nothing here either.
pub(super) fn files(members: &Members<'_>) -> Result<Vec<AddedFile>, DeployFault> {
    let entries = members.objects("added_files").unwrap_or_default();
    let files: Result<Vec<_>, _> = entries.iter().filter(|entry| entry.has("path")).map(file).collect();
    let files = files?;
    if files.len() > MAX_FILES {
        return Err(DeployFault::AddedFile { path: String::new(), reason: "more than 64 files" });
    }
    Ok(files)
}

fn file(members: &Members<'_>) -> Result<AddedFile, DeployFault> {
    let path = members.said("path")?.ok_or(Malformed::Missing("path"))?;
    let wrong = |reason| DeployFault::AddedFile { path: excerpt(path.as_bytes()), reason };
    if !is_path(&path) || path.ends_with('/') {
        return Err(wrong("it is not the absolute path of a file without `..`"));
    }
    let mode = match members.said("mode")? {
        None => DEFAULT_MODE,
        Some(text) => {
            let mode = u32::from_str_radix(&text, 8).ok().filter(|mode| *mode <= 0o777);
            mode.ok_or_else(|| wrong("its mode is not three or four octal digits"))?
        }
    };
    let content = members.text("content")?.unwrap_or_default();
    Ok(AddedFile { path, content, mode })
}

fn is_path(path: &str) -> bool {
    path.starts_with('/')
        && path.len() <= 4096
        && !path.contains(char::is_control)
        && path.split('/').all(|part| part != "..")
}

impl VolumeDocument {
    pub(super) fn of(spec: &InstanceSpec) -> Vec<Self> {
        let document = |volume: &VolumeRequest| Self {
            volume_id: volume.id.clone(),
            csi_driver: volume.driver.clone(),
            mount_path: volume.mount_path.clone(),
            config: volume.config.iter().cloned().collect(),
        };
        spec.volumes.iter().map(document).collect()
    }
}

impl FileDocument {
    pub(super) fn of(spec: &InstanceSpec) -> Vec<Self> {
        let document = |file: &AddedFile| Self {
            path: file.path.clone(),
            content: file.content.clone(),
            mode: format!("{:04o}", file.mode),
        };
        spec.files.iter().map(document).collect()
    }
}

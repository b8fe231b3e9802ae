//! What an instance is given beside its image: volumes, files, and what becomes of both, mounts.

use std::path::PathBuf;

/// A volume as a description asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRequest {
    /// Known to the driver; a plain file name.
    pub id: String,
    /// Name of the driver, such as `csi.oakestra.io/hostpath`.
    pub driver: String,
    /// Absolute.
    pub mount_path: String,
    /// Handed to the driver as it is.
    pub config: Vec<(String, String)>,
}

/// A file that the description carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddedFile {
    /// Absolute.
    pub path: String,
    pub content: String,
    /// Permission bits.
    pub mode: u32,
}

/// A file or directory of the node that an instance sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub source: PathBuf,
    /// Absolute, inside the instance.
    pub target: String,
    pub read_only: bool,
}

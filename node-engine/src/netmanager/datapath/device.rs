//! The TUN device: what the kernel routes to service addresses, as packets with the header that says how much of them is still to be
//! done (see `offload`). Persistent, so that its index, addresses and routes outlive the process.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::{ioctl_read_bad, ioctl_readwrite_bad, ioctl_write_int_bad};
use tun_rs::DeviceBuilder;

use super::{DatapathError, Underlay};

ioctl_read_bad!(get_interface, libc::TUNGETIFF, libc::ifreq);
ioctl_write_int_bad!(set_offload, libc::TUNSETOFFLOAD);
ioctl_readwrite_bad!(get_mtu, libc::SIOCGIFMTU, libc::ifreq);
ioctl_readwrite_bad!(get_flags, libc::SIOCGIFFLAGS, libc::ifreq);

/// Attached to the device, and its only reader.
#[derive(Debug)]
pub(super) struct TunDevice {
    file: File,
    ifindex: u32,
    /// It takes datagrams that are still to be cut (Linux 6.2).
    udp_gso: bool,
}

impl TunDevice {
    /// Makes the device, or attaches to the one of an earlier run.
    ///
    /// # Errors
    /// `Unsupported` where there is no TUN driver or no permission for it.
    pub(super) fn open(underlay: &Underlay) -> Result<Self, DatapathError> {
        let mtu = u16::try_from(underlay.mtu).map_err(|_| DatapathError::Step {
            step: "make TUN device",
            reason: format!("MTU {} is too large", underlay.mtu),
        })?;
        let builder = DeviceBuilder::new().name(&underlay.tun_name).mtu(mtu).enable(true).with(|options| {
            options.offload(true);
        });
        let device = builder.build_sync().map_err(|error| DatapathError::Unsupported {
            what: "make TUN device",
            reason: match error.raw_os_error() {
                _ if !Path::new("/dev/net/tun").exists() => {
                    "/dev/net/tun is missing: load the kernel module tun".into()
                }
                Some(libc::EPERM) => "not permitted: CAP_NET_ADMIN is needed".into(),
                Some(libc::EBUSY) => format!("{} is in use by another process", underlay.tun_name),
                _ => format!("{}: {error}", underlay.tun_name),
            },
        })?;
        let step = |step, error: io::Error| DatapathError::Step { step, reason: error.to_string() };
        device.persist().map_err(|error| step("keep TUN device", error))?;
        device.set_nonblocking(true).map_err(|error| step("read TUN device without waiting", error))?;
        let ifindex = device.if_index().map_err(|error| step("find TUN device", error))?;
        let udp_gso = device.udp_gso();
        let fd = device.as_fd().try_clone_to_owned().map_err(|error| step("hold TUN device", error))?;
        Ok(Self { file: fd.into(), ifindex, udp_gso })
    }

    /// Goes on with what an earlier run was attached by; packets wait in it.
    ///
    /// # Errors
    /// It is not attached to such a device, or to one that [`Self::open`] would change.
    pub(super) fn adopt(fd: OwnedFd, underlay: &Underlay) -> io::Result<Self> {
        let mut request = empty_request();
        // SAFETY: the kernel writes one `ifreq`, which is ours.
        unsafe { get_interface(fd.as_raw_fd(), &raw mut request) }?;
        let name: Vec<u8> = request.ifr_name.iter().map_while(|byte| (*byte != 0).then_some(*byte as u8)).collect();
        // SAFETY: TUNGETIFF has filled in the flags.
        let kind = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if name != underlay.tun_name.as_bytes() || kind & (wanted | libc::IFF_TAP | libc::IFF_MULTI_QUEUE) != wanted {
            return Err(io::Error::other("it is another device"));
        }
        let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        // SAFETY: as above; the name in it is the device's.
        let mtu = unsafe {
            get_mtu(any.as_raw_fd(), &raw mut request)?;
            request.ifr_ifru.ifru_mtu
        };
        // SAFETY: as above.
        let flags = unsafe {
            get_flags(any.as_raw_fd(), &raw mut request)?;
            request.ifr_ifru.ifru_flags
        };
        if u32::try_from(mtu) != Ok(underlay.mtu) || libc::c_int::from(flags) & libc::IFF_UP == 0 {
            return Err(io::Error::other("it has another MTU, or is down"));
        }
        let tcp = (libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6) as libc::c_int;
        let udp = (libc::TUN_F_USO4 | libc::TUN_F_USO6) as libc::c_int;
        // SAFETY: the argument is a number.
        let udp_gso = match unsafe { set_offload(fd.as_raw_fd(), tcp | udp) } {
            Ok(_) => true,
            // SAFETY: as above.
            Err(_) => unsafe { set_offload(fd.as_raw_fd(), tcp) }.map(|_| false)?,
        };
        let ifindex = if_nametoindex(underlay.tun_name.as_str())?;
        Ok(Self { file: fd.into(), ifindex, udp_gso })
    }

    pub(super) const fn ifindex(&self) -> u32 {
        self.ifindex
    }

    pub(super) const fn udp_gso(&self) -> bool {
        self.udp_gso
    }

    /// One packet with its header; `WouldBlock` where none waits.
    pub(super) fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// One packet with its header, in pieces.
    pub(super) fn send_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        (&self.file).write_vectored(pieces)
    }
}

impl AsFd for TunDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn empty_request() -> libc::ifreq {
    libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_ifindex: 0 } }
}

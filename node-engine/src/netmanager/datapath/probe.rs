//! Sockets for datagrams that nobody may cut, by which paths are measured. Nothing is read from them: answers go to the tunnel's port.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use rustix::net::sockopt::{Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover};

/// One for each family that the kernel has.
#[derive(Debug)]
pub(super) struct ProbeSockets {
    v4: UdpSocket,
    v6: Option<UdpSocket>,
}

impl ProbeSockets {
    pub(super) fn open() -> io::Result<Self> {
        let v4 = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        v4.set_nonblocking(true)?;
        // Whatever the kernel has heard of the path: it is asked anew.
        set_ip_mtu_discover(&v4, Ipv4PathMtuDiscovery::PROBE)?;
        let v6 = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).ok();
        if let Some(v6) = &v6 {
            v6.set_nonblocking(true)?;
            set_ipv6_mtu_discover(v6, Ipv6PathMtuDiscovery::PROBE)?;
        }
        Ok(Self { v4, v6 })
    }

    /// An error where it is too long for the first link already.
    pub(super) fn send(&self, payload: &[u8], to: SocketAddr) -> io::Result<()> {
        let socket = match (to, &self.v6) {
            (SocketAddr::V4(_), _) => &self.v4,
            (SocketAddr::V6(_), Some(v6)) => v6,
            (SocketAddr::V6(_), None) => return Err(io::ErrorKind::AddrNotAvailable.into()),
        };
        // An empty datagram would end the process of a peer of the reference system.
        if payload.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        socket.send_to(payload, to).map(drop)
    }
}

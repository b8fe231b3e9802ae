//! The UDP socket of the tunnel: every packet between two nodes that the kernel programs do not carry themselves.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket as StdSocket};
use std::os::fd::AsRawFd;

use netmanager_common::abi::Peer;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, bind, setsockopt, socket, sockopt,
};
use tokio::net::UdpSocket;

use super::DatapathError;

/// Room for what arrives while the proxy is busy elsewhere; the reference system's size.
const BUFFER: usize = 4 << 20;

/// A socket on the tunnel port, for both families where the kernel has both.
#[derive(Debug)]
pub(super) struct TunnelSocket {
    socket: UdpSocket,
    family: AddressFamily,
}

impl TunnelSocket {
    pub(super) fn open(port: u16) -> Result<Self, DatapathError> {
        let v6 = SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0));
        let v4 = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port));
        let opened = match Self::bind(AddressFamily::Inet6, &v6) {
            // Kernels without IPv6, and those where it is disabled.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
                Self::bind(AddressFamily::Inet, &v4)
            }
            other => other,
        };
        opened.map_err(|error| DatapathError::Step {
            step: "bind tunnel socket",
            reason: match error.kind() {
                io::ErrorKind::AddrInUse => format!("UDP port {port} is taken: is another node agent running?"),
                _ => format!("UDP port {port}: {error}"),
            },
        })
    }

    fn bind(family: AddressFamily, address: &dyn SockaddrLike) -> io::Result<Self> {
        let fd = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
        if family == AddressFamily::Inet6 {
            setsockopt(&fd, sockopt::Ipv6V6Only, &false)?;
        }
        // Beyond the limit of net.core only for the privileged; smaller buffers cost packets, not function.
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &BUFFER);
        let _ = setsockopt(&fd, sockopt::SndBufForce, &BUFFER);
        bind(fd.as_raw_fd(), address)?;
        Ok(Self { socket: UdpSocket::from_std(StdSocket::from(fd))?, family })
    }

    pub(super) async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    pub(super) async fn writable(&self) -> io::Result<()> {
        self.socket.writable().await
    }

    /// A datagram and its sender, an IPv4 sender as such.
    pub(super) fn try_recv(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let (len, from) = self.socket.try_recv_from(buffer)?;
        Ok((len, SocketAddr::new(from.ip().to_canonical(), from.port())))
    }

    /// Carries a packet to a peer. Never sends an empty datagram: it would end the process of a peer of the reference system.
    pub(super) fn try_send(&self, packet: &[u8], peer: &Peer) -> io::Result<()> {
        let to = SocketAddr::new(peer.host.into(), u16::from_be_bytes(peer.port));
        let sent = self.socket.try_send_to(refuse_empty(packet)?, self.destination(to))?;
        debug_assert_eq!(sent, packet.len());
        Ok(())
    }

    /// Sends a datagram when there is room for it.
    pub(super) async fn send(&self, payload: &[u8], to: SocketAddr) -> io::Result<()> {
        self.socket.send_to(refuse_empty(payload)?, self.destination(to)).await.map(drop)
    }

    /// The address in the socket's own family.
    fn destination(&self, to: SocketAddr) -> SocketAddr {
        match to.ip() {
            IpAddr::V4(v4) if self.family == AddressFamily::Inet6 => {
                SocketAddr::new(v4.to_ipv6_mapped().into(), to.port())
            }
            _ => to,
        }
    }
}

fn refuse_empty(payload: &[u8]) -> io::Result<&[u8]> {
    if payload.is_empty() { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(payload) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use netmanager_common::addr::Addr;

    use super::*;

    #[tokio::test]
    async fn both_families_meet_in_one_socket() {
        let tunnel = TunnelSocket::open(0).unwrap();
        let port = tunnel.socket.local_addr().unwrap().port();
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(peer) = UdpSocket::bind(local).await else { continue };
            let address = peer.local_addr().unwrap();

            peer.send_to(b"in", (address.ip(), port)).await.unwrap();
            let mut buffer = [0; 16];
            let (len, from) = receive(&tunnel, &mut buffer).await;
            assert_eq!((&buffer[..len], from), (&b"in"[..], address));

            let row = Peer { host: Addr::from(address.ip()), port: address.port().to_be_bytes(), ..Peer::default() };
            tunnel.writable().await.unwrap();
            tunnel.try_send(b"out", &row).unwrap();
            assert_eq!(peer.recv(&mut buffer).await.unwrap(), 3);
        }
    }

    #[tokio::test]
    async fn never_an_empty_datagram() {
        let tunnel = TunnelSocket::open(0).unwrap();
        let to: SocketAddr = "127.0.0.1:9".parse().unwrap();
        assert_eq!(tunnel.send(&[], to).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let row = Peer { host: Addr::from(to.ip()), port: [0, 9], ..Peer::default() };
        assert_eq!(tunnel.try_send(&[], &row).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    async fn receive(tunnel: &TunnelSocket, buffer: &mut [u8]) -> (usize, SocketAddr) {
        tokio::time::timeout(Duration::from_secs(5), async {
            loop {
                tunnel.readable().await.unwrap();
                match tunnel.try_recv(buffer) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other.unwrap(),
                }
            }
        })
        .await
        .expect("nothing arrived")
    }
}

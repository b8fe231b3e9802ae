//! The UDP socket of the tunnel: every packet between two nodes that the kernel programs do not carry themselves.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use netmanager_common::abi::Peer;
use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn, SockaddrIn6,
    SockaddrLike, SockaddrStorage, bind, getsockname, getsockopt, recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover};

use super::DatapathError;

/// Room for what arrives while the proxy is busy elsewhere; the reference system's size.
const BUFFER: usize = 4 << 20;

/// What one read brings: datagrams of one sender, all but the last of length `stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Received {
    pub(super) len: usize,
    pub(super) stride: usize,
    /// An IPv4 sender as such.
    pub(super) from: SocketAddr,
}

/// A socket on the tunnel port, for both families where the kernel has both.
#[derive(Debug)]
pub(super) struct TunnelSocket {
    socket: UdpSocket,
    family: AddressFamily,
}

impl TunnelSocket {
    /// `merged`: let the kernel hand over several datagrams in one read. Not where a program at the uplink reads them first: it would
    /// meet several in one, too.
    pub(super) fn open(port: u16, merged: bool) -> Result<Self, DatapathError> {
        let v6 = SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0));
        let v4 = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port));
        let opened = match Self::bind(AddressFamily::Inet6, &v6, merged) {
            // Kernels without IPv6, and those where it is disabled.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
                Self::bind(AddressFamily::Inet, &v4, merged)
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

    /// Goes on with the socket of an earlier run, in which datagrams wait.
    ///
    /// # Errors
    /// It is none at this port, or not for the families that [`Self::open`] would take.
    pub(super) fn adopt(fd: OwnedFd, port: u16, merged: bool) -> io::Result<Self> {
        let at = getsockname::<SockaddrStorage>(fd.as_raw_fd())?;
        let v4_alone = at.as_sockaddr_in().is_some();
        let bound = at.as_sockaddr_in().map(|at| at.port()).or_else(|| at.as_sockaddr_in6().map(|at| at.port()));
        let datagrams = getsockopt(&fd, sockopt::SockType)? == SockType::Datagram;
        if !datagrams || bound != Some(port) {
            return Err(io::Error::other("it is no socket at this port"));
        }
        let v6 = SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0));
        if v4_alone && Self::bind(AddressFamily::Inet6, &v6, merged).is_ok() {
            return Err(io::Error::other("the kernel has IPv6 since"));
        }
        let family = if v4_alone { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let socket = Self { socket: UdpSocket::from(fd), family };
        socket.merge(merged);
        Ok(socket)
    }

    fn bind(family: AddressFamily, address: &dyn SockaddrLike, merged: bool) -> io::Result<Self> {
        let fd = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
        if family == AddressFamily::Inet6 {
            setsockopt(&fd, sockopt::Ipv6V6Only, &false)?;
        }
        // Beyond the limit of net.core only for the privileged; smaller buffers cost packets, not function.
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &BUFFER);
        let _ = setsockopt(&fd, sockopt::SndBufForce, &BUFFER);
        // Whoever sends a packet in fragments gets it carried whole, and the underlay may cut it again; how much goes through at once is
        // found out by datagrams that must not be cut.
        set_ip_mtu_discover(&fd, Ipv4PathMtuDiscovery::DONT)?;
        if family == AddressFamily::Inet6 {
            set_ipv6_mtu_discover(&fd, Ipv6PathMtuDiscovery::DONT)?;
        }
        bind(fd.as_raw_fd(), address)?;
        let socket = Self { socket: UdpSocket::from(fd), family };
        socket.merge(merged);
        Ok(socket)
    }

    /// See [`Self::open`].
    pub(super) fn merge(&self, merged: bool) {
        // Linux 5.0; without it each read brings one datagram.
        let _ = setsockopt(&self.socket, sockopt::UdpGroSegment, &merged);
    }

    /// Where the kernel tells what it has merged; one for every reader.
    pub(super) fn control_buffer() -> Vec<u8> {
        cmsg_space!(i32)
    }

    pub(super) fn try_recv(&self, buffer: &mut [u8], control: &mut [u8]) -> io::Result<Received> {
        let mut slices = [IoSliceMut::new(buffer)];
        let fd = self.socket.as_raw_fd();
        let message = recvmsg::<SockaddrStorage>(fd, &mut slices, Some(control), MsgFlags::empty())?;
        let merged = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::UdpGroSegments(stride) => usize::try_from(stride).ok(),
            _ => None,
        });
        let from = message.address.as_ref().and_then(sender).ok_or(io::ErrorKind::InvalidData)?;
        let stride = merged.unwrap_or(message.bytes).max(1);
        Ok(Received { len: message.bytes, stride, from })
    }

    /// Carries `count` packets, pieced together of `slices`, to a peer in one call. All but the last are of length `stride`, which may be
    /// shorter. Returns how many were taken. Never sends an empty datagram: it would end the process of a peer of the reference system.
    pub(super) fn try_send_many(&self, slices: &[IoSlice<'_>], count: usize, stride: usize, peer: &Peer) -> u64 {
        let to = SockaddrStorage::from(self.destination(address(peer)));
        match self.try_send(slices, (count > 1).then_some(stride), &to) {
            Ok(()) => count as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock || count == 1 => 0,
            // A path too narrow for them, or a device without checksums: one by one the kernel can still do it.
            Err(_) => {
                apart(slices, stride).filter(|datagram| self.try_send(datagram, None, &to).is_ok()).count() as u64
            }
        }
    }

    fn try_send(&self, slices: &[IoSlice<'_>], stride: Option<usize>, to: &SockaddrStorage) -> io::Result<()> {
        if slices.iter().all(|slice| slice.is_empty()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let size = stride.map(u16::try_from).transpose().map_err(|_| io::ErrorKind::InvalidInput)?;
        let cut = size.as_ref().map(ControlMessage::UdpGsoSegments);
        sendmsg(self.socket.as_raw_fd(), slices, cut.as_slice(), MsgFlags::empty(), Some(to))?;
        Ok(())
    }

    /// Sends a control datagram.
    pub(super) fn send(&self, payload: &[u8], to: SocketAddr) -> io::Result<()> {
        if payload.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.socket.send_to(payload, self.destination(to)).map(drop)
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

fn address(peer: &Peer) -> SocketAddr {
    SocketAddr::new(peer.host.into(), u16::from_be_bytes(peer.port))
}

fn sender(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
    let any = v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())))?;
    Some(SocketAddr::new(any.ip().to_canonical(), any.port()))
}

/// The slices of each datagram: as many as make `stride` bytes.
fn apart<'a, 'b>(mut slices: &'a [IoSlice<'b>], stride: usize) -> impl Iterator<Item = &'a [IoSlice<'b>]> {
    std::iter::from_fn(move || {
        let mut len = 0;
        let whole = slices.iter().position(|slice| {
            len += slice.len();
            len >= stride
        });
        let (datagram, rest) = slices.split_at(whole.map_or(slices.len(), |last| last + 1));
        slices = rest;
        (!datagram.is_empty()).then_some(datagram)
    })
}

impl AsFd for TunnelSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use netmanager_common::addr::Addr;

    use super::super::batch::Batch;
    use super::*;

    #[test]
    fn both_families_meet_in_one_socket() {
        let tunnel = TunnelSocket::open(0, true).unwrap();
        let port = tunnel.socket.local_addr().unwrap().port();
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(peer) = UdpSocket::bind(local) else { continue };
            let address = peer.local_addr().unwrap();

            peer.send_to(b"in", (address.ip(), port)).unwrap();
            let mut buffer = [0; 16];
            let received = receive(&tunnel, &mut buffer);
            assert_eq!(
                (&buffer[..received.len], received),
                (&b"in"[..], Received { len: 2, stride: 2, from: address })
            );

            let row = Peer { host: Addr::from(address.ip()), port: address.port().to_be_bytes(), ..Peer::default() };
            assert_eq!(tunnel.try_send_many(&[IoSlice::new(b"out")], 1, 3, &row), 1);
            assert_eq!(peer.recv(&mut buffer).unwrap(), 3);
        }
    }

    #[test]
    fn many_packets_go_and_come_in_one_call() {
        let (from, to) = (TunnelSocket::open(0, true).unwrap(), TunnelSocket::open(0, true).unwrap());
        let port = to.socket.local_addr().unwrap().port();
        let peer = Peer { host: Addr::v4([127, 0, 0, 1]), port: port.to_be_bytes(), ..Peer::default() };
        let packets: Vec<u8> = (0..100_000).map(|i| (i / 1000) as u8).collect();
        let mut batch = Batch::default();
        for at in 0..99 {
            batch.add(1, &peer, at * 1000..(at + 1) * 1000);
        }
        batch.add(1, &peer, 99_000..99_500);
        assert_eq!(batch.flush(&packets, &from), (100, 0));

        let mut buffer = vec![0; 65_535];
        let (mut bytes, mut reads) = (Vec::new(), 0);
        while bytes.len() < 99_500 {
            let received = receive(&to, &mut buffer);
            assert_eq!(received.stride.min(received.len), received.len.min(1000));
            bytes.extend_from_slice(&buffer[..received.len]);
            reads += 1;
        }
        assert!(bytes == packets[..99_500]);
        assert!(reads < 100, "{reads} reads for 100 datagrams");
    }

    #[test]
    fn a_call_that_is_refused_is_made_datagram_by_datagram() {
        let pieces: [&[u8]; 5] = [b"ab", b"cd", b"efgh", b"i", b"j"];
        let slices = pieces.map(IoSlice::new);
        let lens: Vec<usize> =
            apart(&slices, 4).map(|datagram| datagram.iter().map(|slice| slice.len()).sum()).collect();
        assert_eq!(lens, [4, 4, 2]);
    }

    #[test]
    fn never_an_empty_datagram() {
        let tunnel = TunnelSocket::open(0, true).unwrap();
        let to: SocketAddr = "127.0.0.1:9".parse().unwrap();
        assert_eq!(tunnel.send(&[], to).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let row = Peer { host: Addr::from(to.ip()), port: [0, 9], ..Peer::default() };
        assert_eq!(tunnel.try_send_many(&[IoSlice::new(&[])], 1, 0, &row), 0);
        assert_eq!(tunnel.try_send_many(&[], 0, 1000, &row), 0);
    }

    fn receive(tunnel: &TunnelSocket, buffer: &mut [u8]) -> Received {
        let begin = Instant::now();
        loop {
            match tunnel.try_recv(buffer, &mut TunnelSocket::control_buffer()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    assert!(begin.elapsed() < Duration::from_secs(5), "nothing arrived");
                    std::thread::yield_now();
                }
                other => return other.unwrap(),
            }
        }
    }
}

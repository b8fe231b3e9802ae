//! What a restarted daemon must know of its instances before the cluster answers: their addresses, namespaces and ports, and the
//! subnet they are from. One text file in the run directory, so a reboot forgets it together with the namespaces.
//!
//! ```text
//! node-engine leases 1
//! subnet 10.18.0.64 fc00::100
//! lease app.ns.web.ns.instance.0 10.18.0.66 fc00::102 own=10.30.0.0,fdff:: ports=8080:80/tcp inode=4026532281 netns=/proc/17/ns/net
//! ```
//!
//! `own` and `ports` may be empty, `inode` 0. The namespace's path comes last and may hold blanks.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::model::{Addresses, FamilyPair, InstanceId, PortMapping, Protocol, Subnet};

const HEAD: &str = "node-engine leases 1";
/// More than any node can lease; a longer file is not ours.
const MAX_FILE: u64 = 4 << 20;

/// What is kept of one connected instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptLease {
    pub instance: InstanceId,
    pub addresses: Addresses,
    /// Its instance addresses, as far as the cluster has told them.
    pub own: FamilyPair,
    pub ports: Vec<PortMapping>,
    /// Tells whether `netns` still leads to the same namespace; 0 where it is not known.
    pub inode: u64,
    pub netns: PathBuf,
}

/// The content of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leases {
    pub subnet: Option<Subnet>,
    pub leases: Vec<KeptLease>,
}

#[derive(Debug, thiserror::Error)]
pub enum LeaseFileError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} line {line} is not a lease; the file is kept as {kept}")]
    Content { path: PathBuf, line: usize, kept: PathBuf },
}

impl Leases {
    /// The text of the file. A lease whose path cannot be written as a line is left out.
    pub fn encode(&self) -> String {
        let mut text = format!("{HEAD}\n");
        if let Some(Subnet { v4, v6 }) = self.subnet {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "subnet {v4} {v6}");
        }
        for lease in &self.leases {
            let Some(netns) = lease.netns.to_str().filter(|path| is_line(path)) else { continue };
            let own = lease.own.v4.map(IpAddr::from).into_iter().chain(lease.own.v6.map(IpAddr::from));
            let own: Vec<String> = own.map(|address| address.to_string()).collect();
            let ports: Vec<String> = lease.ports.iter().map(PortMapping::to_string).collect();
            let Addresses { v4, v6 } = lease.addresses;
            let (instance, own, ports, inode) = (&lease.instance, own.join(","), ports.join(","), lease.inode);
            let _ = writeln!(text, "lease {instance} {v4} {v6} own={own} ports={ports} inode={inode} netns={netns}");
        }
        text
    }

    /// # Errors
    /// The number of the first line that cannot be read.
    pub fn decode(text: &str) -> Result<Self, usize> {
        let mut leases = Self::default();
        let mut lines = (1..).zip(text.lines());
        match lines.next() {
            Some((_, HEAD)) => {}
            _ => return Err(1),
        }
        for (number, line) in lines {
            match line.split_once(' ') {
                Some(("subnet", rest)) => leases.subnet = Some(subnet(rest).ok_or(number)?),
                Some(("lease", rest)) => leases.leases.push(lease(rest).ok_or(number)?),
                _ => return Err(number),
            }
        }
        Ok(leases)
    }

    /// Reads the file; one that is not there is empty. One that cannot be understood is set aside.
    pub fn read(path: &Path) -> Result<Self, LeaseFileError> {
        let io = |source| LeaseFileError::Io { path: path.to_owned(), source };
        let text = match std::fs::metadata(path).map(|meta| meta.len()) {
            Ok(length) if length > MAX_FILE => String::new(),
            Ok(_) => String::from_utf8_lossy(&std::fs::read(path).map_err(io)?).into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(io(error)),
        };
        Self::decode(&text).map_err(|line| {
            let kept = path.with_extension("bad");
            match std::fs::rename(path, &kept) {
                Ok(()) => LeaseFileError::Content { path: path.to_owned(), line, kept },
                Err(source) => LeaseFileError::Io { path: path.to_owned(), source },
            }
        })
    }

    /// Replaces the file in one step: a crash leaves the old one or the new one.
    pub fn write(&self, path: &Path) -> Result<(), LeaseFileError> {
        let io = |source| LeaseFileError::Io { path: path.to_owned(), source };
        let draft = path.with_extension("new");
        let mut file = std::fs::File::create(&draft).map_err(io)?;
        file.write_all(self.encode().as_bytes()).map_err(io)?;
        file.sync_all().map_err(io)?;
        std::fs::rename(&draft, path).map_err(io)
    }
}

/// What else ends a line to some reader would be read as something else than it was written as.
fn is_line(path: &str) -> bool {
    !path.contains(['\n', '\r'])
}

fn subnet(text: &str) -> Option<Subnet> {
    let (v4, v6) = text.split_once(' ')?;
    Some(Subnet { v4: v4.parse().ok()?, v6: v6.parse().ok()? })
}

fn lease(text: &str) -> Option<KeptLease> {
    let mut words = text.splitn(7, ' ');
    let instance = words.next()?.parse().ok()?;
    let addresses = Addresses { v4: words.next()?.parse().ok()?, v6: words.next()?.parse().ok()? };
    let own = addresses_of(words.next()?.strip_prefix("own=")?)?;
    let ports = list(words.next()?.strip_prefix("ports=")?, port)?;
    let inode = words.next()?.strip_prefix("inode=")?.parse().ok()?;
    let netns = words.next()?.strip_prefix("netns=").filter(|path| is_line(path))?.into();
    Some(KeptLease { instance, addresses, own, ports, inode, netns })
}

fn addresses_of(text: &str) -> Option<FamilyPair> {
    let mut pair = FamilyPair::default();
    for address in list(text, |word| IpAddr::from_str(word).ok())? {
        match address {
            IpAddr::V4(v4) => pair.v4 = Some(v4),
            IpAddr::V6(v6) => pair.v6 = Some(v6),
        }
    }
    Some(pair)
}

fn port(text: &str) -> Option<PortMapping> {
    let (ports, protocol) = text.split_once('/')?;
    let (host, container) = ports.split_once(':')?;
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    Some(PortMapping { host: host.parse().ok()?, container: container.parse().ok()?, protocol })
}

fn list<T>(text: &str, item: impl Fn(&str) -> Option<T>) -> Option<Vec<T>> {
    text.split(',').filter(|word| !word.is_empty()).map(item).collect()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn full() -> Leases {
        Leases {
            subnet: Some(Subnet { v4: Ipv4Addr::new(10, 18, 0, 64), v6: "fc00::100".parse().unwrap() }),
            leases: vec![
                KeptLease {
                    instance: "app.ns.web.ns.instance.0".parse().unwrap(),
                    addresses: Addresses { v4: Ipv4Addr::new(10, 18, 0, 66), v6: "fc00::102".parse().unwrap() },
                    own: FamilyPair {
                        v4: Some(Ipv4Addr::new(10, 30, 0, 0)),
                        v6: Some(Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, 0, 0)),
                    },
                    ports: vec![
                        PortMapping { host: 8080, container: 80, protocol: Protocol::Tcp },
                        PortMapping { host: 53, container: 53, protocol: Protocol::Udp },
                    ],
                    inode: 4_026_532_281,
                    netns: "/run/my name spaces/a b".into(),
                },
                KeptLease {
                    instance: "app.ns.db.ns.instance.12".parse().unwrap(),
                    addresses: Addresses { v4: Ipv4Addr::new(10, 18, 0, 67), v6: "fc00::103".parse().unwrap() },
                    own: FamilyPair::default(),
                    ports: vec![],
                    inode: 0,
                    netns: "/proc/17/ns/net".into(),
                },
            ],
        }
    }

    #[test]
    fn reads_what_it_writes() {
        assert_eq!(Leases::decode(&full().encode()), Ok(full()));
        assert_eq!(Leases::decode(&Leases::default().encode()), Ok(Leases::default()));
        assert!(full().encode().contains(
            "lease app.ns.web.ns.instance.0 10.18.0.66 fc00::102 own=10.30.0.0,fdff:: ports=8080:80/tcp,53:53/udp inode=4026532281 netns=/run/my"
        ));
    }

    #[test]
    fn path_with_a_line_break_is_not_written() {
        let mut leases = full();
        leases.leases[0].netns = "/run/a\nlease x".into();
        assert_eq!(Leases::decode(&leases.encode()).unwrap().leases, full().leases[1..]);
    }

    #[test]
    fn file_is_replaced_whole_and_a_bad_one_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("leases");
        assert_eq!(Leases::read(&path).unwrap(), Leases::default());
        full().write(&path).unwrap();
        assert_eq!(Leases::read(&path).unwrap(), full());
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("lease app.ns.db", "lease app..db")).unwrap();
        let Err(LeaseFileError::Content { line: 4, kept, .. }) = Leases::read(&path) else { panic!("a bad line") };
        assert!(kept.exists() && !path.exists());
        assert_eq!(Leases::read(&path).unwrap(), Leases::default());
        assert!(full().write(&dir.path().join("none/leases")).is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text: String, cut in 0usize..400, flip in 0usize..400) {
            let _ = Leases::decode(&text);
            let mut good = full().encode().into_bytes();
            let place = flip % good.len();
            good[place] ^= 1 << (flip % 7);
            good.truncate(cut.min(good.len()));
            let _ = Leases::decode(&String::from_utf8_lossy(&good));
        }
    }
}

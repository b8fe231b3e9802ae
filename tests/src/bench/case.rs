//! What is measured, on what ground, and which figures come of it.

use std::path::PathBuf;

use std::net::IpAddr;

use super::rig::Wire;

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    TcpStream,
    /// Four of them, on two cores.
    TcpStreams,
    TcpRequests,
    UdpRequests,
    Connects,
    SmallUdp,
}

impl Case {
    pub const ALL: [Self; 6] =
        [Self::TcpStream, Self::TcpStreams, Self::TcpRequests, Self::UdpRequests, Self::Connects, Self::SmallUdp];

    pub fn name(self) -> &'static str {
        self.rate().name
    }

    /// The figure that the case is about.
    pub fn rate(self) -> Figure {
        match self {
            Self::TcpStream => figure::TCP_STREAM,
            Self::TcpStreams => figure::TCP_STREAMS,
            Self::TcpRequests => figure::TCP_RR,
            Self::UdpRequests => figure::UDP_RR,
            Self::Connects => figure::CONNECTS,
            Self::SmallUdp => figure::UDP_SMALL,
        }
    }

    /// The cores that all of it runs on. One is the rule: two make a single TCP flow slower here (interrupts between them are dear)
    /// and reorder it.
    pub fn cores(self) -> &'static [usize] {
        if self == Self::TcpStreams { &[0, 1] } else { &[0] }
    }

    /// Half and 99 % of the round trips take no longer than this.
    fn latencies(self) -> Option<[Figure; 2]> {
        match self {
            Self::TcpRequests => Some([figure::TCP_RR_P50, figure::TCP_RR_P99]),
            Self::UdpRequests => Some([figure::UDP_RR_P50, figure::UDP_RR_P99]),
            Self::Connects => Some([figure::CONNECTS_P50, figure::CONNECTS_P99]),
            Self::TcpStream | Self::TcpStreams | Self::SmallUdp => None,
        }
    }

    /// All figures of one measurement.
    pub fn figures(self, sample: &Sample) -> Vec<(Figure, f64)> {
        let mut figures = vec![(self.rate(), sample.value)];
        if self == Self::TcpStream && sample.value > 0.0 {
            figures.push((figure::CPU, sample.busy / sample.value));
        }
        if let Some([p50, p99]) = self.latencies() {
            figures.extend([(p50, sample.p50), (p99, sample.p99)]);
        }
        figures
    }
}

/// A number that is compared between modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figure {
    pub name: &'static str,
    pub unit: &'static str,
    pub better: &'static str,
}

pub mod figure {
    use super::Figure;

    const HIGHER: &str = "higher";
    const LOWER: &str = "lower";

    const fn new(name: &'static str, unit: &'static str, better: &'static str) -> Figure {
        Figure { name, unit, better }
    }

    pub const TCP_STREAM: Figure = new("tcp_stream", "Gbit/s", HIGHER);
    pub const TCP_STREAMS: Figure = new("tcp_streams_4", "Gbit/s", HIGHER);
    pub const TCP_RR: Figure = new("tcp_rr", "1/s", HIGHER);
    pub const UDP_RR: Figure = new("udp_rr", "1/s", HIGHER);
    pub const CONNECTS: Figure = new("connect_request_close", "1/s", HIGHER);
    pub const UDP_SMALL: Figure = new("udp_small", "packets/s", HIGHER);
    /// Seconds of a core that a gigabit of the stream costs, both ends and everything between them.
    pub const CPU: Figure = new("cpu_per_gigabit", "s/Gbit", LOWER);
    /// How much more four streams on two cores carry than one on one.
    pub const SCALING: Figure = new("tcp_scaling", "times", HIGHER);
    pub const TCP_RR_P50: Figure = new("tcp_rr_p50", "µs", LOWER);
    pub const TCP_RR_P99: Figure = new("tcp_rr_p99", "µs", LOWER);
    pub const UDP_RR_P50: Figure = new("udp_rr_p50", "µs", LOWER);
    pub const UDP_RR_P99: Figure = new("udp_rr_p99", "µs", LOWER);
    pub const CONNECTS_P50: Figure = new("connect_p50", "µs", LOWER);
    pub const CONNECTS_P99: Figure = new("connect_p99", "µs", LOWER);
}

/// Where it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ground {
    pub wire: Wire,
    pub mtu: u32,
}

impl Ground {
    pub const USUAL_MTU: u32 = 1500;
    pub const PASS: Self = Self { wire: Wire::Pass, mtu: Self::USUAL_MTU };
    pub const SEG: Self = Self { wire: Wire::Seg, mtu: Self::USUAL_MTU };
    /// With the frames of a data centre.
    pub const PASS_JUMBO: Self = Self { wire: Wire::Pass, mtu: 9000 };
    pub const SEG_JUMBO: Self = Self { wire: Wire::Seg, mtu: 9000 };

    /// What is put after a figure's name where this is not the usual ground.
    pub fn suffix(self) -> &'static str {
        match (self.wire, self.mtu) {
            (Wire::Pass, Self::USUAL_MTU) => "",
            (Wire::Seg, Self::USUAL_MTU) => ":seg",
            (Wire::Pass, _) => ":jumbo",
            (Wire::Seg, _) => ":seg:jumbo",
        }
    }
}

/// Who talks to whom.
#[derive(Clone, Debug)]
pub struct Ends {
    pub client: PathBuf,
    pub server: PathBuf,
    /// What the client connects to, one after the other; the server listens on every address.
    pub targets: Vec<IpAddr>,
}

/// One measurement.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// The case's rate, in its unit.
    pub value: f64,
    /// Microseconds; 0 where the case has no round trips.
    pub p50: f64,
    pub p99: f64,
    /// Of the cores' time, the part that was spent working, in cores.
    pub busy: f64,
}

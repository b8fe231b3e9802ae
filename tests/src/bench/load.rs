//! Traffic between two namespaces, made and counted by threads of this process: a stream, requests and responses, connections, small
//! datagrams. Every loop ends by a clock.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    TcpStream,
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
        match self {
            Self::TcpStream => "tcp_stream",
            Self::TcpStreams => "tcp_streams_4",
            Self::TcpRequests => "tcp_rr",
            Self::UdpRequests => "udp_rr",
            Self::Connects => "connect_request_close",
            Self::SmallUdp => "udp_small",
        }
    }

    pub fn unit(self) -> &'static str {
        match self {
            Self::TcpStream | Self::TcpStreams => "Gbit/s",
            Self::TcpRequests | Self::UdpRequests | Self::Connects => "1/s",
            Self::SmallUdp => "packets/s",
        }
    }
}

/// Who talks to whom.
#[derive(Clone, Debug)]
pub struct Ends {
    pub client: PathBuf,
    pub server: PathBuf,
    /// What the client connects to; the server listens on every address.
    pub target: IpAddr,
}

/// One measurement.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// In the case's unit.
    pub value: f64,
    /// Microseconds; 0 where the case has no round trips.
    pub p50: f64,
    pub p99: f64,
}

const PORT: u16 = 5201;
const PATIENCE: Duration = Duration::from_secs(3);
const STREAMS: usize = 4;

/// Runs one case for `time`.
///
/// # Errors
/// Where the two ends do not reach each other.
pub fn measure(case: Case, ends: &Ends, time: Duration) -> Result<Sample> {
    let stop = Arc::new(AtomicBool::new(false));
    let (ready, started) = mpsc::channel();
    let server = {
        let (netns, stop) = (ends.server.clone(), Arc::clone(&stop));
        thread::spawn(move || -> Result<u64> {
            enter(&netns)?;
            serve(case, &ready, &stop)
        })
    };
    if started.recv_timeout(PATIENCE).is_err() {
        return Err(server.join().map_or_else(
            |_| anyhow::anyhow!("the server panicked"),
            |result| match result {
                Err(error) => error,
                Ok(_) => anyhow::anyhow!("the server did not start"),
            },
        ));
    }
    let client = {
        let ends = ends.clone();
        thread::spawn(move || -> Result<Sample> {
            enter(&ends.client)?;
            drive(case, SocketAddr::new(ends.target, PORT), time)
        })
    };
    let sample = client.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
    stop.store(true, Ordering::Relaxed);
    let received = server.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    let mut sample = sample.with_context(|| format!("{} to {}", case.name(), ends.target))?;
    match case {
        Case::TcpStream | Case::TcpStreams => sample.value = received as f64 * 8.0 / 1e9 / time.as_secs_f64(),
        Case::SmallUdp => sample.value = received as f64 / time.as_secs_f64(),
        _ => {}
    }
    Ok(sample)
}

fn enter(netns: &PathBuf) -> Result<()> {
    let file = std::fs::File::open(netns).with_context(|| format!("cannot open {}", netns.display()))?;
    nix::sched::setns(file.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET).context("cannot enter a namespace")
}

/// Serves until told to stop; returns the bytes (streams) or datagrams received.
fn serve(case: Case, ready: &mpsc::Sender<()>, stop: &Arc<AtomicBool>) -> Result<u64> {
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PORT);
    match case {
        Case::UdpRequests | Case::SmallUdp => {
            let socket = UdpSocket::bind(any).context("cannot bind the server")?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            let _ = ready.send(());
            Ok(serve_udp(&socket, case == Case::UdpRequests, stop))
        }
        _ => {
            let listener = TcpListener::bind(any).context("cannot bind the server")?;
            listener.set_nonblocking(true)?;
            let _ = ready.send(());
            serve_tcp(case, &listener, stop)
        }
    }
}

fn serve_udp(socket: &UdpSocket, answer: bool, stop: &AtomicBool) -> u64 {
    let mut buffer = [0; 2048];
    let mut received = 0;
    while !stop.load(Ordering::Relaxed) {
        if let Ok((len, from)) = socket.recv_from(&mut buffer) {
            received += 1;
            if answer {
                let _ = socket.send_to(&buffer[..len], from);
            }
        }
    }
    received
}

fn serve_tcp(case: Case, listener: &TcpListener, stop: &Arc<AtomicBool>) -> Result<u64> {
    let mut workers = Vec::new();
    let mut connections = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((mut stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                connections += 1;
                if case == Case::Connects {
                    let mut byte = [0; 1];
                    stream.set_read_timeout(Some(PATIENCE))?;
                    if stream.read_exact(&mut byte).is_ok() {
                        let _ = stream.write_all(&byte);
                    }
                } else {
                    workers.push(thread::spawn(move || drain(stream, case == Case::TcpRequests)));
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => wait_readable(listener),
            Err(error) => bail!("accept: {error}"),
        }
    }
    let bytes = workers.into_iter().filter_map(|worker| worker.join().ok()).sum();
    Ok(if case == Case::Connects { connections } else { bytes })
}

/// At most a tenth of a second.
fn wait_readable(listener: &TcpListener) {
    let mut poll = [nix::poll::PollFd::new(listener.as_fd(), nix::poll::PollFlags::POLLIN)];
    let _ = nix::poll::poll(&mut poll, 100_u8);
}

fn drain(mut stream: TcpStream, answer: bool) -> u64 {
    let mut buffer = vec![0; 256 * 1024];
    let mut received = 0;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return received,
            Ok(len) => {
                received += len as u64;
                if answer && stream.write_all(&buffer[..len]).is_err() {
                    return received;
                }
            }
        }
    }
}

fn drive(case: Case, target: SocketAddr, time: Duration) -> Result<Sample> {
    match case {
        Case::TcpStream => stream(target, time).map(|()| Sample::default()),
        Case::TcpStreams => {
            let netns = PathBuf::from("/proc/thread-self/ns/net");
            let here = std::fs::File::open(&netns)?;
            let workers: Vec<_> = (0..STREAMS)
                .map(|_| {
                    let here = here.try_clone();
                    thread::spawn(move || -> Result<()> {
                        nix::sched::setns(here?.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET)?;
                        stream(target, time)
                    })
                })
                .collect();
            for worker in workers {
                worker.join().map_err(|_| anyhow::anyhow!("a stream panicked"))??;
            }
            Ok(Sample::default())
        }
        Case::TcpRequests => {
            let mut stream = connect(target)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            round_trips(time, || {
                let mut byte = [1; 1];
                stream.write_all(&byte)?;
                stream.read_exact(&mut byte)
            })
        }
        Case::UdpRequests => {
            let socket = udp(target)?;
            socket.set_read_timeout(Some(Duration::from_millis(500)))?;
            round_trips(time, || {
                let mut byte = [1; 1];
                socket.send(&byte)?;
                socket.recv(&mut byte).map(drop)
            })
        }
        Case::Connects => round_trips(time, || {
            let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut byte = [1; 1];
            stream.write_all(&byte)?;
            stream.read_exact(&mut byte)?;
            // The client closes with a reset, so that its ports do not run out in TIME_WAIT.
            nix::sys::socket::setsockopt(
                &stream,
                nix::sys::socket::sockopt::Linger,
                &libc::linger { l_onoff: 1, l_linger: 0 },
            )
            .map_err(std::io::Error::from)
        }),
        Case::SmallUdp => {
            let socket = udp(target)?;
            let payload = [7; 64 - 28];
            let end = Instant::now() + time;
            while Instant::now() < end {
                for _ in 0..64 {
                    // A full queue is what a flood meets.
                    let _ = socket.send(&payload);
                }
            }
            Ok(Sample::default())
        }
    }
}

fn connect(target: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, PATIENCE).context("cannot connect")?;
    stream.set_nodelay(true)?;
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::TcpCongestion, &"cubic".into())
        .context("cannot choose cubic")?;
    Ok(stream)
}

fn udp(target: SocketAddr) -> Result<UdpSocket> {
    let any: SocketAddr = if target.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    Ok(socket)
}

fn stream(target: SocketAddr, time: Duration) -> Result<()> {
    let mut stream = connect(target)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let buffer = vec![7; 128 * 1024];
    let end = Instant::now() + time;
    while Instant::now() < end {
        stream.write_all(&buffer).context("the stream broke")?;
    }
    Ok(())
}

fn round_trips(time: Duration, mut trip: impl FnMut() -> std::io::Result<()>) -> Result<Sample> {
    let begin = Instant::now();
    let mut latencies = Vec::with_capacity(1 << 16);
    let mut lost = 0;
    while begin.elapsed() < time {
        let sent = Instant::now();
        match trip() {
            Ok(()) => latencies.push(sent.elapsed().as_secs_f64() * 1e6),
            Err(error) if lost < 3 && matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => lost += 1,
            Err(error) => return Err(error).context("a request got no answer"),
        }
    }
    if latencies.is_empty() {
        bail!("no request got an answer");
    }
    let value = latencies.len() as f64 / begin.elapsed().as_secs_f64();
    latencies.sort_by(f64::total_cmp);
    let quantile = |part: f64| latencies[((latencies.len() - 1) as f64 * part) as usize];
    Ok(Sample { value, p50: quantile(0.5), p99: quantile(0.99) })
}

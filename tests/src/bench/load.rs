//! Traffic between two namespaces, made and counted by threads of this process: a stream, requests and responses, connections, small
//! datagrams. Every loop ends by a clock.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::time::{TimeVal, TimeValLike};

use super::case::{Case, Ends, Sample};
use super::cores::{Watch, pin_thread};

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
    let watch = Watch::start(case.cores())?;
    let client = {
        let ends = ends.clone();
        thread::spawn(move || -> Result<Sample> {
            enter(&ends.client)?;
            let targets: Vec<_> = ends.targets.iter().map(|target| SocketAddr::new(*target, PORT)).collect();
            drive(case, &targets, time)
        })
    };
    let sample = client.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
    let busy = watch.read()?;
    stop.store(true, Ordering::Relaxed);
    let received = server.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    let mut sample = sample.with_context(|| format!("{} to {}", case.name(), ends.targets[0]))?;
    sample.busy = busy;
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
            choose_cubic(&listener)?;
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
                    let core = core(case, workers.len());
                    workers.push(thread::spawn(move || {
                        // Unpinned it is as right, and less steady.
                        let _ = pin_thread(core);
                        drain(stream, case == Case::TcpRequests)
                    }));
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

/// The core of a stream's both ends: what one end sends is taken in on the same core, and no flow is reordered.
fn core(case: Case, stream: usize) -> usize {
    let cores = case.cores();
    cores[stream % cores.len()]
}

fn drive(case: Case, targets: &[SocketAddr], time: Duration) -> Result<Sample> {
    let target = targets[0];
    match case {
        Case::TcpStream => stream(connect(target)?, time).map(|()| Sample::default()),
        Case::TcpStreams => {
            // Connected here, one after the other: a thread of its own would have to enter the namespace again.
            let streams: Vec<TcpStream> = (0..STREAMS).map(|_| connect(target)).collect::<Result<_>>()?;
            let work = |(number, connection): (usize, TcpStream)| {
                thread::spawn(move || -> Result<()> {
                    pin_thread(core(case, number))?;
                    stream(connection, time)
                })
            };
            for worker in streams.into_iter().enumerate().map(work).collect::<Vec<_>>() {
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
        Case::Connects => {
            let mut targets = targets.iter().cycle();
            round_trips(time, || connect_request_close(targets.next().copied().unwrap_or(target)))
        }
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

fn connect_request_close(target: SocketAddr) -> std::io::Result<()> {
    let mut stream = connect_cubic(target)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut byte = [1; 1];
    stream.write_all(&byte)?;
    stream.read_exact(&mut byte)?;
    // The client closes with a reset, so that its ports do not run out in TIME_WAIT.
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger).map_err(std::io::Error::from)
}

fn connect(target: SocketAddr) -> Result<TcpStream> {
    let stream = connect_cubic(target).context("cannot connect")?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn connect_cubic(target: SocketAddr) -> std::io::Result<TcpStream> {
    use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt};
    let family = if target.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    choose_cubic(&socket)?;
    // Also the patience of `connect`.
    socket::setsockopt(&socket, sockopt::SendTimeout, &TimeVal::seconds(PATIENCE.as_secs() as i64))?;
    socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(target))?;
    Ok(socket.into())
}

/// Before the connection is made: what other algorithms have begun to pace by timers stays paced, and the timers would be measured.
fn choose_cubic(socket: &impl AsFd) -> std::io::Result<()> {
    nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::TcpCongestion, &"cubic".into())?;
    Ok(())
}

fn udp(target: SocketAddr) -> Result<UdpSocket> {
    let any: SocketAddr = if target.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    Ok(socket)
}

fn stream(mut stream: TcpStream, time: Duration) -> Result<()> {
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
    Ok(Sample { value, p50: quantile(0.5), p99: quantile(0.99), busy: 0.0 })
}

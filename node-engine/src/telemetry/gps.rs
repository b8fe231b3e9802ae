//! Where the node is: from a gpsd (its JSON protocol, gpsd_json(5)) or from a receiver that speaks NMEA 0183 on a serial line.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::OFlag;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::config::GpsSource;
use crate::drain::Drain;
use crate::model::{Channel, Device, DeviceKind, Reading, Unit};

/// The one device of its kind.
pub(super) const NAME: &str = "gps";
/// A source that is silent for so long has failed: both kinds speak every second.
const SILENCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_secs(5);
/// Longer lines are no sentences of either protocol.
const LONGEST: usize = 16 * 1024;
const KNOT: f64 = 1852.0 / 3600.0;

/// A position, as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fix {
    /// Degrees, north and east positive.
    pub latitude: f64,
    pub longitude: f64,
    /// Metres above mean sea level.
    pub altitude: Option<f64>,
    /// Metres a second over ground.
    pub speed: Option<f64>,
}

impl Fix {
    pub(super) fn readings(&self) -> Vec<Reading> {
        let told = [
            ("latitude", Unit::Degrees, Some(self.latitude)),
            ("longitude", Unit::Degrees, Some(self.longitude)),
            ("altitude", Unit::Metres, self.altitude),
            ("speed", Unit::MetresPerSecond, self.speed),
        ];
        let told = told.into_iter().filter_map(|(channel, unit, value)| {
            Some(Reading { channel: channel.into(), unit, value: value.filter(|value| value.is_finite())? })
        });
        told.collect()
    }
}

/// As it stands in the list of what is attached.
pub(super) fn device(source: &GpsSource) -> Device {
    let (description, nodes) = match source {
        GpsSource::Gpsd(address) => (format!("gpsd at {address}"), Vec::new()),
        GpsSource::Nmea(path) => (format!("NMEA receiver at {}", path.display()), vec![path.clone()]),
    };
    let channels: Vec<Channel> = Vec::new();
    Device { name: NAME.into(), kind: DeviceKind::Gps, description, id: String::new(), nodes, channels }
}

/// Until the drain begins; a source that fails is tried again for ever.
pub(super) async fn run(source: GpsSource, fixes: watch::Sender<Option<Fix>>, drain: Drain) {
    let mut complained = false;
    loop {
        let followed = async {
            match &source {
                GpsSource::Gpsd(address) => follow_gpsd(address, &fixes).await,
                GpsSource::Nmea(path) => follow_nmea(path.clone(), &fixes).await,
            }
        };
        let error = tokio::select! {
            _ = drain.wait() => return,
            followed = followed => followed.err(),
        };
        // A position that nobody confirms is none.
        let lost = fixes.send_replace(None).is_some();
        if !complained || lost {
            let reason = error.map_or_else(|| "it has ended".to_owned(), |error| error.to_string());
            tracing::warn!(?source, reason, "the position is not known, trying again for ever");
            complained = true;
        }
        tokio::select! {
            _ = drain.wait() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

async fn follow_gpsd(address: &str, fixes: &watch::Sender<Option<Fix>>) -> io::Result<()> {
    let mut stream = timeout(SILENCE, TcpStream::connect(address)).await.map_err(|_| silent())??;
    stream.write_all(b"?WATCH={\"enable\":true,\"json\":true};\n").await?;
    lines(stream, |line| {
        if let Some(fix) = gpsd(line) {
            fixes.send_replace(fix);
        }
    })
    .await
}

async fn follow_nmea(path: PathBuf, fixes: &watch::Sender<Option<Fix>>) -> io::Result<()> {
    let mut receiver = Nmea::default();
    lines(open(&path)?, |line| {
        if receiver.take(line) {
            fixes.send_replace(receiver.fix);
        }
    })
    .await
}

/// A serial line that is waited for without a thread: whoever sits in read(2) sits there for as long as the receiver is silent.
fn open(path: &Path) -> io::Result<pipe::Receiver> {
    // Nor does it become this daemon's terminal, whose hang-up would be the daemon's end.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let line = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    // It is read like a pipe.
    pipe::Receiver::from_file_unchecked(line).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => io::Error::new(error.kind(), "it is a file and no device"),
        _ => error,
    })
}

async fn lines(from: impl AsyncRead + Unpin, mut take: impl FnMut(&str)) -> io::Result<()> {
    let mut reader = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut limited = tokio::io::AsyncReadExt::take(&mut reader, LONGEST as u64);
        let length = timeout(SILENCE, limited.read_until(b'\n', &mut line)).await.map_err(|_| silent())??;
        if length == 0 {
            return Ok(());
        }
        take(String::from_utf8_lossy(&line).trim());
    }
}

fn silent() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("it has said nothing for {} s", SILENCE.as_secs()))
}

#[derive(Deserialize)]
struct Report {
    class: String,
    /// 2 and 3: a position, and with an altitude.
    #[serde(default)]
    mode: u8,
    lat: Option<f64>,
    lon: Option<f64>,
    #[serde(rename = "altMSL")]
    altitude: Option<f64>,
    /// The same in older versions.
    alt: Option<f64>,
    speed: Option<f64>,
}

/// `None` for what says nothing of the position, `Some(None)` for "not known".
fn gpsd(line: &str) -> Option<Option<Fix>> {
    let report: Report = serde_json::from_str(line).ok()?;
    if report.class != "TPV" {
        return None;
    }
    let fix = report.lat.zip(report.lon).filter(|_| report.mode >= 2).map(|(latitude, longitude)| Fix {
        latitude,
        longitude,
        altitude: report.altitude.or(report.alt).filter(|_| report.mode >= 3),
        speed: report.speed,
    });
    Some(fix)
}

/// What a receiver has said so far: the position comes with one sentence, the speed with another.
#[derive(Debug, Default)]
struct Nmea {
    fix: Option<Fix>,
}

impl Nmea {
    /// Takes in one sentence. Returns whether it was about the position and whole.
    fn take(&mut self, line: &str) -> bool {
        let Some(fields) = sentence(line) else { return false };
        let field = |index: usize| fields.get(index).copied().unwrap_or_default();
        // The first two letters say which satellites.
        match field(0).get(2..) {
            Some("GGA") if field(6) != "0" && !field(6).is_empty() => {
                let place = degrees(field(2), field(3)).zip(degrees(field(4), field(5)));
                let speed = self.fix.and_then(|fix| fix.speed);
                self.fix = place.map(|(latitude, longitude)| Fix {
                    latitude,
                    longitude,
                    altitude: field(9).parse().ok(),
                    speed,
                });
                true
            }
            Some("GGA") => {
                self.fix = None;
                true
            }
            Some("RMC") => {
                if let Some(fix) = &mut self.fix {
                    fix.speed = field(7).parse::<f64>().ok().map(|knots| knots * KNOT);
                }
                true
            }
            _ => false,
        }
    }
}

/// The fields between `$` and `*`, if the sum of both is right.
fn sentence(line: &str) -> Option<Vec<&str>> {
    let (body, sum) = line.strip_prefix('$')?.split_once('*')?;
    let expected = u8::from_str_radix(sum.get(..2)?, 16).ok()?;
    let actual = body.bytes().fold(0, |sum, byte| sum ^ byte);
    (actual == expected).then(|| body.split(',').collect())
}

/// `ddmm.mmmm` and a half of the globe.
fn degrees(number: &str, half: &str) -> Option<f64> {
    let value: f64 = number.parse().ok()?;
    let whole = (value / 100.0).trunc();
    let degrees = whole + (value - whole * 100.0) / 60.0;
    match half {
        "N" | "E" => Some(degrees),
        "S" | "W" => Some(-degrees),
        _ => None,
    }
}

/// What a gpsd or a receiver says, line by line, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(text: &str) {
    let mut receiver = Nmea::default();
    for line in text.lines() {
        let told = gpsd(line).flatten().or_else(|| receiver.take(line).then_some(receiver.fix).flatten());
        for reading in told.iter().flat_map(Fix::readings) {
            assert!(reading.value.is_finite());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GGA: &str = "$GPGGA,123519,4807.038,N,01131.000,E,1,08,0.9,545.4,M,46.9,M,,*47";
    const RMC: &str = "$GPRMC,123519,A,4807.038,N,01131.000,E,022.4,084.4,230394,003.1,W*6A";

    fn near(left: f64, right: f64) -> bool {
        (left - right).abs() < 1e-6
    }

    #[test]
    fn sentences_add_up_to_a_fix() {
        let mut receiver = Nmea::default();
        assert!(receiver.take(GGA) && receiver.take(RMC));
        let fix = receiver.fix.unwrap();
        assert!(near(fix.latitude, 48.1173) && near(fix.longitude, 11.516_667), "{fix:?}");
        assert!(near(fix.altitude.unwrap(), 545.4) && near(fix.speed.unwrap(), 11.523_556), "{fix:?}");
        let channels: Vec<_> =
            fix.readings().into_iter().map(|reading| (reading.channel, reading.unit.word())).collect();
        assert_eq!(channels.len(), 4);
        assert_eq!(channels[3], ("speed".to_owned(), "metres_per_second"));

        for bad in ["", "$", "garbage", &GGA.replace("*47", "*48"), &GGA[..40], "$GPGSV,1,1,00*79", "$GPGGA*\u{fc}"] {
            assert!(!receiver.take(bad), "{bad:?}");
        }
        assert_eq!(receiver.fix, Some(fix), "what is damaged changes nothing");
        let lost = "$GPGGA,123520,,,,,0,00,,,M,,M,,";
        let sum = lost[1..].bytes().fold(0, |sum, byte| sum ^ byte);
        assert!(receiver.take(&format!("{lost}*{sum:02X}")));
        assert_eq!(receiver.fix, None);
    }

    #[test]
    fn gpsd_tells_of_positions_among_other_things() {
        let tpv = r#"{"class":"TPV","mode":3,"lat":48.5,"lon":-11.25,"altMSL":500.5,"speed":1.5,"epx":3.0}"#;
        let fix = Fix { latitude: 48.5, longitude: -11.25, altitude: Some(500.5), speed: Some(1.5) };
        assert_eq!(gpsd(tpv), Some(Some(fix)));
        assert_eq!(gpsd(r#"{"class":"TPV","mode":1}"#), Some(None));
        assert_eq!(gpsd(r#"{"class":"VERSION","release":"3.22"}"#), None);
        assert_eq!(gpsd("nonsense"), None);
    }

    /// The other end of a serial line, and where this one is.
    fn receiver() -> (std::fs::File, PathBuf) {
        let line = nix::pty::openpty(None, None).unwrap();
        let path = nix::unistd::ttyname(&line.slave).unwrap();
        // The line hangs up when nobody has it open.
        std::mem::forget(line.slave);
        (line.master.into(), path)
    }

    #[tokio::test]
    async fn a_receiver_on_a_serial_line_is_heard() {
        use std::io::Write;
        let (mut master, path) = receiver();
        let (fixes, mut fix) = watch::channel(None);
        let drain = Drain::new(Duration::from_secs(1));
        let task = tokio::spawn(run(GpsSource::Nmea(path), fixes, drain.clone()));
        master.write_all(format!("{GGA}\r\n").as_bytes()).unwrap();
        let known = timeout(Duration::from_secs(30), fix.wait_for(Option::is_some)).await.unwrap().unwrap().unwrap();
        assert!(near(known.latitude, 48.1173), "{known:?}");
        drain.begin();
        task.await.unwrap();
    }

    /// Each try would sit in a thread for ever, until none is left for anything else.
    #[test]
    fn a_silent_receiver_holds_no_thread() {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().start_paused(true).max_blocking_threads(1).build().unwrap();
        let (_master, path) = receiver();
        let free = runtime.block_on(async {
            let drain = Drain::new(Duration::from_secs(1));
            let task = tokio::spawn(run(GpsSource::Nmea(path), watch::channel(None).0, drain.clone()));
            tokio::time::sleep(20 * SILENCE).await;
            let (tell, told) = std::sync::mpsc::channel();
            tokio::task::spawn_blocking(move || tell.send(()));
            let free = told.recv_timeout(Duration::from_secs(5));
            drain.begin();
            task.await.unwrap();
            free
        });
        runtime.shutdown_background();
        assert_eq!(free, Ok(()));
    }

    #[tokio::test]
    async fn a_file_is_no_receiver() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = open(file.path()).map(drop).unwrap_err();
        assert!(error.to_string().contains("no device"), "{error}");
    }

    #[tokio::test]
    async fn a_gpsd_that_goes_takes_the_position_with_it_and_is_asked_again() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (fixes, mut fix) = watch::channel(None);
        let drain = Drain::new(Duration::from_secs(1));
        let source = GpsSource::Gpsd(listener.local_addr().unwrap().to_string());
        let task = tokio::spawn(run(source, fixes, drain.clone()));
        let wait = Duration::from_secs(30);

        let (mut stream, _) = timeout(wait, listener.accept()).await.unwrap().unwrap();
        let mut asked = String::new();
        BufReader::new(&mut stream).read_line(&mut asked).await.unwrap();
        assert!(asked.contains("\"enable\":true"), "{asked}");
        stream.write_all(b"{\"class\":\"TPV\",\"mode\":2,\"lat\":1.0,\"lon\":2.0}\n").await.unwrap();
        let known = timeout(wait, fix.wait_for(Option::is_some)).await.unwrap().unwrap().unwrap();
        assert_eq!((known.latitude, known.longitude, known.altitude), (1.0, 2.0, None));
        drop(stream);
        timeout(wait, fix.wait_for(Option::is_none)).await.unwrap().unwrap();
        timeout(wait, listener.accept()).await.unwrap().unwrap();
        drain.begin();
        task.await.unwrap();
    }
}

//! How the settings of telemetry are read.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::{GpsSource, ReportChoice, SensorChoice};

/// Where a gpsd listens unless told otherwise.
const GPSD_PORT: u16 = 2947;

pub(super) fn reports(text: &str) -> Result<ReportChoice, String> {
    match text {
        "full" => Ok(ReportChoice::Full),
        "changes" => Ok(ReportChoice::Changes),
        _ => Err("is not one of full, changes".into()),
    }
}

/// `off`, `all`, or names separated by commas.
pub(super) fn sensors(text: &str) -> Result<SensorChoice, String> {
    match text {
        "off" => return Ok(SensorChoice::Off),
        "all" => return Ok(SensorChoice::All),
        _ => {}
    }
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
    if names.iter().any(|name| name.is_empty() || name.len() > 64 || !name.bytes().all(plain)) {
        return Err("is not off, all, or names of sensors joined by `,` (see `node-engine hardware`)".into());
    }
    Ok(SensorChoice::Named(names))
}

pub(super) fn pace(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.trim_end_matches('s').parse().map_err(|_| "is not a number of seconds")?;
    if (0.1..=86_400.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("is not between 0.1 and 86400 seconds".into())
    }
}

/// `off`, `gpsd`, `HOST:PORT` of a gpsd, or the path of a receiver.
pub(super) fn gps(text: &str) -> Result<Option<GpsSource>, String> {
    let expected = "is not off, gpsd, HOST:PORT of a gpsd, or the path of a receiver such as /dev/ttyACM0";
    match text {
        "off" => Ok(None),
        "gpsd" => Ok(Some(GpsSource::Gpsd(format!("127.0.0.1:{GPSD_PORT}")))),
        path if path.starts_with('/') => Ok(Some(GpsSource::Nmea(PathBuf::from(path)))),
        address => {
            let (host, port) = address.rsplit_once(':').ok_or(expected)?;
            let good = !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0);
            if good { Ok(Some(GpsSource::Gpsd(address.to_owned()))) } else { Err(expected.into()) }
        }
    }
}

/// `off`, or `ADDRESS:PORT`.
pub(super) fn metrics(text: &str) -> Result<Option<SocketAddr>, String> {
    if text == "off" {
        return Ok(None);
    }
    let address: SocketAddr = text.parse().map_err(|_| "is not off or ADDRESS:PORT such as 127.0.0.1:9640")?;
    Ok(Some(address))
}

/// `off`, or the URL of a collector; one without a path means the usual one.
pub(super) fn otlp(text: &str) -> Result<Option<String>, String> {
    if text == "off" {
        return Ok(None);
    }
    let expected = "is not off or the URL of a collector such as http://127.0.0.1:4318";
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://")).ok_or(expected)?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    if host.is_empty() || text.contains(|letter: char| letter.is_whitespace() || letter.is_control()) {
        return Err(expected.into());
    }
    let whole = if path.is_empty() { format!("{}/v1/metrics", text.trim_end_matches('/')) } else { text.to_owned() };
    Ok(Some(whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_every_other_refused() {
        assert_eq!(sensors("all"), Ok(SensorChoice::All));
        assert_eq!(sensors("bme280, w1-28-ff"), Ok(SensorChoice::Named(vec!["bme280".into(), "w1-28-ff".into()])));
        for bad in ["", "a,,b", "A", "a/b", "#"] {
            assert!(sensors(bad).is_err(), "{bad:?}");
        }
        assert_eq!(pace("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(pace("30s"), Ok(Duration::from_secs(30)));
        for bad in ["", "0", "-1", "nan", "1e9", "soon"] {
            assert!(pace(bad).is_err(), "{bad:?}");
        }
        assert_eq!(gps("gpsd"), Ok(Some(GpsSource::Gpsd("127.0.0.1:2947".into()))));
        assert_eq!(gps("/dev/ttyACM0"), Ok(Some(GpsSource::Nmea("/dev/ttyACM0".into()))));
        for bad in ["", "here", "host:", ":1", "host:0"] {
            assert!(gps(bad).is_err(), "{bad:?}");
        }
        assert_eq!(metrics("off"), Ok(None));
        assert_eq!(metrics("[::1]:9640"), Ok(Some("[::1]:9640".parse().unwrap())));
        assert!(metrics("9640").is_err() && metrics("localhost:1").is_err());
        assert_eq!((otlp("off"), otlp("https://c/x")), (Ok(None), Ok(Some("https://c/x".into()))));
        for bare in ["http://[::1]:4318", "http://[::1]:4318/"] {
            assert_eq!(otlp(bare), Ok(Some("http://[::1]:4318/v1/metrics".into())));
        }
        for bad in ["", "on", "127.0.0.1:4318", "http://", "http:///x", "http://a b"] {
            assert!(otlp(bad).is_err(), "{bad:?}");
        }
        assert_eq!((reports("full"), reports("changes")), (Ok(ReportChoice::Full), Ok(ReportChoice::Changes)));
        assert!(reports("none").is_err());
    }
}

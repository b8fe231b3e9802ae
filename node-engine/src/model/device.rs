//! What is attached to the node: sensors, cameras, serial lines, buses.

use std::path::PathBuf;
use std::time::SystemTime;

/// Something attached, found by the kernel's own description of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Device {
    /// Unique on this node: `[a-z0-9._-]`, so that it can be part of a topic. The same as long as the same things are attached.
    pub name: String,
    pub kind: DeviceKind,
    /// What it calls itself.
    pub description: String,
    /// What tells it from others of its kind wherever it is plugged in, such as `0403:6001:A50285BI`; empty where it has nothing of
    /// that kind.
    pub id: String,
    /// Its nodes below `/dev`: what an instance is given with it.
    pub nodes: Vec<PathBuf>,
    /// What can be read from it.
    pub channels: Vec<Channel>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DeviceKind {
    /// Industrial I/O: accelerometers, light, pressure, converters.
    Iio,
    #[default]
    Hwmon,
    Thermal,
    OneWire,
    Power,
    Gps,
    Camera,
    Serial,
    I2c,
    Spi,
    Gpio,
    Usb,
    Can,
}

impl DeviceKind {
    pub fn word(self) -> &'static str {
        match self {
            Self::Iio => "iio",
            Self::Hwmon => "hwmon",
            Self::Thermal => "thermal",
            Self::OneWire => "1-wire",
            Self::Power => "power",
            Self::Gps => "gps",
            Self::Camera => "camera",
            Self::Serial => "serial",
            Self::I2c => "i2c",
            Self::Spi => "spi",
            Self::Gpio => "gpio",
            Self::Usb => "usb",
            Self::Can => "can",
        }
    }
}

/// One value of a device: (`raw` + `offset`) × `scale`, in `unit`.
#[derive(Clone, Debug, PartialEq)]
pub struct Channel {
    pub name: String,
    pub unit: Unit,
    /// The file that holds the raw number.
    pub path: PathBuf,
    pub offset: f64,
    pub scale: f64,
}

/// Base units, as metrics have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Unit {
    Celsius,
    Volts,
    Amperes,
    Watts,
    Joules,
    Percent,
    RevolutionsPerMinute,
    MetresPerSecondSquared,
    RadiansPerSecond,
    Teslas,
    Pascals,
    Lux,
    Metres,
    MetresPerSecond,
    Degrees,
    Hertz,
    Ohms,
    /// A bare number: a state, a count, what the device does not say the unit of.
    One,
}

impl Unit {
    pub fn word(self) -> &'static str {
        match self {
            Self::Celsius => "celsius",
            Self::Volts => "volts",
            Self::Amperes => "amperes",
            Self::Watts => "watts",
            Self::Joules => "joules",
            Self::Percent => "percent",
            Self::RevolutionsPerMinute => "rpm",
            Self::MetresPerSecondSquared => "metres_per_second_squared",
            Self::RadiansPerSecond => "radians_per_second",
            Self::Teslas => "teslas",
            Self::Pascals => "pascals",
            Self::Lux => "lux",
            Self::Metres => "metres",
            Self::MetresPerSecond => "metres_per_second",
            Self::Degrees => "degrees",
            Self::Hertz => "hertz",
            Self::Ohms => "ohms",
            Self::One => "1",
        }
    }
}

/// What a channel said.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    pub channel: String,
    pub unit: Unit,
    pub value: f64,
}

/// What a device said at one time.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub device: String,
    pub kind: DeviceKind,
    pub time: SystemTime,
    pub readings: Vec<Reading>,
}

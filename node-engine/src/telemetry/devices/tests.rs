use super::super::roots::Roots;
use super::*;

fn found() -> (fixture::Fixture, Vec<Device>) {
    let fixture = fixture();
    let devices = scan(&fixture);
    (fixture, devices)
}

fn get<'a>(devices: &'a [Device], name: &str) -> &'a Device {
    devices.iter().find(|device| device.name == name).unwrap_or_else(|| {
        let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
        panic!("no {name} in {names:?}")
    })
}

#[test]
fn a_board_with_one_of_everything_is_described() {
    let (_fixture, devices) = found();
    let told: Vec<_> = devices.iter().map(|device| (device.name.as_str(), device.kind.word())).collect();
    assert_eq!(
        told,
        [
            ("bat0", "power"),
            ("bme280", "iio"),
            ("can0", "can"),
            ("coretemp", "hwmon"),
            ("coretemp-2", "hwmon"),
            ("cpu-thermal", "thermal"),
            ("gpiochip0", "gpio"),
            ("gpu-therm", "thermal"),
            ("i2c-1", "i2c"),
            ("ina226", "hwmon"),
            ("lsm6dso", "iio"),
            ("spi0.0", "spi"),
            ("ttyama0", "serial"),
            ("ttyusb0", "serial"),
            ("usb-1-1", "usb"),
            ("usb-1-2", "usb"),
            ("video0", "camera"),
            ("w1-28-0316a2795aff", "1-wire"),
            ("w1-29-00000012ab34", "1-wire"),
        ]
    );
    for (name, description, id) in [
        ("ttyusb0", "FTDI FT232R USB UART", "0403:6001:A50285BI"),
        ("ttyama0", "serial line (uart-pl011)", ""),
        ("video0", "Webcam C270", "046d:0825:1A2B3C"),
        ("usb-1-1", "Logitech Webcam C270", "046d:0825:1A2B3C"),
        ("i2c-1", "bcm2835 (i2c@7e804000) with ina226@0040, bme280@0076", ""),
        ("spi0.0", "mcp2515", ""),
        ("can0", "CAN bus (mcp251x), up", ""),
        ("w1-28-0316a2795aff", "thermometer DS18B20", "28-0316a2795aff"),
        ("bat0", "Battery ACME", ""),
    ] {
        let device = get(&devices, name);
        assert_eq!((device.description.as_str(), device.id.as_str()), (description, id), "{name}");
    }
}

#[test]
fn values_are_in_base_units() {
    let (_fixture, devices) = found();
    let values = |name: &str| -> Vec<(String, &str, f64)> {
        let readings = read(get(&devices, name)).into_iter();
        readings.map(|reading| (reading.channel, reading.unit.word(), (reading.value * 1e9).round() / 1e9)).collect()
    };
    let own = |rows: &[(&str, &'static str, f64)]| -> Vec<(String, &str, f64)> {
        rows.iter().map(|(channel, unit, value)| ((*channel).to_owned(), *unit, *value)).collect()
    };
    assert_eq!(
        values("bme280"),
        own(&[("humidityrelative", "percent", 40.5), ("pressure", "pascals", 101_325.0), ("temp", "celsius", 21.34),])
    );
    // (100 + 6400) × 3.90625 thousandths of a degree; the scale of one axis is that of its kind, unless it has its own.
    assert_eq!(
        values("lsm6dso"),
        own(&[
            ("accel_x", "metres_per_second_squared", 10.0),
            ("magn_x", "teslas", 0.0001),
            ("temp", "celsius", 25.390_625),
        ])
    );
    assert_eq!(
        values("coretemp"),
        own(&[("fan1", "rpm", 1200.0), ("Package id 0", "celsius", 45.0), ("temp2", "celsius", 44.0)])
    );
    assert_eq!(values("coretemp-2"), own(&[("temp1", "celsius", -3.5)]));
    assert_eq!(
        values("ina226"),
        own(&[
            ("curr1", "amperes", 0.812),
            ("humidity1", "percent", 51.25),
            ("in1", "volts", 5.021),
            ("power1", "watts", 4.075),
        ])
    );
    assert_eq!(values("w1-28-0316a2795aff"), own(&[("temperature", "celsius", 23.125)]));
    assert_eq!(
        values("bat0"),
        own(&[("capacity", "percent", 87.0), ("voltage_now", "volts", 12.5), ("temp", "celsius", 30.1)])
    );
}

#[test]
fn an_instance_is_given_the_nodes_that_are_there() {
    let (fixture, devices) = found();
    for (name, nodes) in [
        ("ttyusb0", vec!["ttyUSB0"]),
        ("video0", vec!["video0"]),
        ("usb-1-2", vec!["bus/usb/001/012"]),
        ("i2c-1", vec!["i2c-1"]),
        ("bme280", vec!["iio:device0"]),
        ("lsm6dso", vec![]),
        ("can0", vec![]),
    ] {
        let nodes: Vec<_> = nodes.into_iter().map(|node| fixture.dev.join(node)).collect();
        assert_eq!(get(&devices, name).nodes, nodes, "{name}");
    }
}

#[test]
fn what_cannot_be_read_is_left_out_and_what_goes_is_gone() {
    let (fixture, devices) = found();
    fixture.write("sys/class/hwmon/hwmon0/temp1_input", "N/A\n");
    let left: Vec<_> = read(get(&devices, "coretemp")).into_iter().map(|reading| reading.channel).collect();
    assert_eq!(left, ["fan1", "temp2"]);
    fixture.remove("sys/class/hwmon/hwmon0");
    assert_eq!(read(get(&devices, "coretemp")), []);
    let after = scan(&fixture);
    assert_eq!(after.len(), devices.len() - 1);
    assert!(after.iter().all(|device| device.name != "coretemp-2"), "the other one has the name now");
}

/// Its monitor is among those of the board.
#[test]
fn a_thermometer_on_a_wire_is_told_of_once() {
    let (fixture, devices) = found();
    let thermometers = |devices: &[Device]| -> Vec<String> {
        let names = devices.iter().map(|device| device.name.clone());
        names.filter(|name| name.starts_with("w1")).collect()
    };
    assert_eq!(thermometers(&devices), ["w1-28-0316a2795aff", "w1-29-00000012ab34"]);
    assert_eq!(read(get(&devices, "w1-28-0316a2795aff")).len(), 1);
    // As a kernel before 5.8 has it.
    std::fs::remove_file(fixture.sys.join("bus/w1/devices/28-0316a2795aff/temperature")).unwrap();
    let older = scan(&fixture);
    assert_eq!(thermometers(&older), ["w1-28-0316a2795aff", "w1-29-00000012ab34", "w1_slave_temp"]);
    assert_eq!(read(get(&older, "w1-28-0316a2795aff")), []);
    assert_eq!(read(get(&older, "w1_slave_temp")).len(), 1);
}

#[test]
fn names_are_fit_for_topics_and_unique() {
    let named = named(["A b/c#+", "", "x", "x", "x", "ü"].iter().map(|name| device(DeviceKind::Usb, *name, "")));
    let mut names: Vec<&str> = named.iter().map(|device| device.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["-", "a-b-c--", "unnamed", "x", "x-2", "x-3"]);
}

/// Whatever this machine has: every description holds.
#[test]
fn this_machines_own_devices_are_described() {
    let devices = scan(&Roots::default());
    for device in &devices {
        assert!(!device.name.is_empty() && plain(&device.name) == device.name, "{device:?}");
        for reading in read(device) {
            assert!(reading.value.is_finite(), "{device:?}: {reading:?}");
            if reading.unit == Unit::Celsius {
                assert!((-80.0..200.0).contains(&reading.value), "{device:?}: {reading:?}");
            }
        }
    }
    let count = |kind: DeviceKind| devices.iter().filter(|device| device.kind == kind).count();
    let zones = std::fs::read_dir("/sys/class/thermal").into_iter().flatten().flatten();
    let zones = zones.filter(|zone| zone.file_name().to_string_lossy().starts_with("thermal_zone")).count();
    assert_eq!(count(DeviceKind::Thermal), zones.min(MOST_DEVICES));
}

//! Devices that vendors describe for container engines (CDI), and GPUs. What is asked for reaches Docker, and what Docker cannot give
//! is told in its words.

use super::*;
use crate::model::DeviceGrant;

/// Where Docker looks for descriptions unless it is told otherwise.
const DESCRIPTIONS: &str = "/var/run/cdi";

#[tokio::test]
#[ignore = "needs docker"]
async fn a_described_device_is_given_and_one_that_is_not_there_fails_the_start() {
    let _up = DAEMON.read().await;
    let runtime = runtime().await;
    let info = docker(&runtime).await.info().await.expect("info");
    let reads =
        info.cdi_spec_dirs.unwrap_or_default().iter().any(|directory| Path::new(directory) == Path::new(DESCRIPTIONS));
    let description = Path::new(DESCRIPTIONS).join(format!("node-engine-test-{}.json", std::process::id()));
    let toy = serde_json::json!({
        "cdiVersion": "0.6.0", "kind": "vendor.example/toy",
        "devices": [{"name": "0", "containerEdits": {
            "env": ["TOY=given"], "deviceNodes": [{"path": "/dev/toy", "hostPath": "/dev/zero"}]
        }}]
    });
    fs::create_dir_all(DESCRIPTIONS).expect("a directory");
    fs::write(&description, toy.to_string()).expect("a description");
    let asked = |number, name: &str, vgpus| InstanceSpec {
        devices: Some(name).filter(|name| !name.is_empty()).into_iter().map(named).collect(),
        limits: Limits { vgpus, ..Limits::default() },
        ..shell(number, "echo $TOY; test -c /dev/toy && exit 7")
    };
    let fails = async |spec: InstanceSpec| {
        let failed = match runtime.prepare(&spec).await {
            Ok(_) => runtime.start(&spec.id).await,
            Err(error) => Err(error),
        };
        runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
        failed.expect_err("it is not there").to_string()
    };
    let toy = asked(140, "vendor.example/toy=0", 0);
    if reads {
        run(&runtime, &toy).await;
        let exit = exited(&runtime).await;
        assert_eq!((exit.instance, exit.code), (toy.id.clone(), 7));
        assert_eq!(runtime.logs(&toy.id, 100).await.expect("logs"), b"given\n");
        runtime.stop(&toy.id, Duration::ZERO).await.expect("stop");
        let error = fails(asked(141, "vendor.example/none=0", 0)).await;
        assert!(error.contains("vendor.example/none=0"), "{error}");
    } else {
        let error = fails(toy).await;
        assert!(error.contains("cdi"), "{error}");
    }
    let error = fails(asked(142, "", 1)).await;
    assert!(["nvidia", "gpu"].iter().any(|word| error.contains(word)), "{error}");
    fs::remove_file(description).expect("removed");
}

fn named(name: &str) -> DeviceGrant {
    DeviceGrant { name: name.into(), ..DeviceGrant::default() }
}

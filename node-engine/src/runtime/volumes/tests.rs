use std::sync::{Arc, Mutex};

use hyper::body::Incoming;
use hyper::http;
use tokio::sync::Semaphore;
use tokio::time::{Duration, sleep, timeout};
use tonic::Status;
use tonic::body::Body;

use super::csi::{Capabilities, NodeCapability, Nothing, PluginInfo, Rpc};
use super::host_path::{listen, with};
use super::*;

const FAKE: &str = "csi.example/fake";

/// What a driver was asked, in words.
type Calls = Arc<Mutex<Vec<String>>>;

/// A driver that wants volumes staged, mounts nothing, and refuses the volume `bad`.
fn fake(socket: &Path, name: &'static str) -> (Calls, AbortOnDropHandle<()>) {
    let (calls, _, driver) = slow(socket, name, Semaphore::MAX_PERMITS);
    (calls, driver)
}

/// One that stages and unstages only so many times, and more as permits are added.
fn slow(socket: &Path, name: &'static str, permits: usize) -> (Calls, Arc<Semaphore>, AbortOnDropHandle<()>) {
    let (calls, gate) = (Calls::default(), Arc::new(Semaphore::new(permits)));
    let (noted, passed) = (calls.clone(), gate.clone());
    let serving = listen(socket, move |request| {
        let (calls, gate) = (noted.clone(), passed.clone());
        async move {
            let asked = match request.uri().path() {
                csi::STAGE => "asked to stage",
                csi::UNSTAGE => "asked to unstage",
                _ => "",
            };
            if !asked.is_empty() && gate.available_permits() == 0 {
                calls.lock().expect("notes").push(asked.into());
                gate.acquire().await.expect("it stays open").forget();
            }
            answer(request, calls, name).await
        }
    });
    (calls, gate, AbortOnDropHandle::new(tokio::spawn(serving.expect("a socket"))))
}

async fn answer(request: http::Request<Incoming>, calls: Calls, name: &'static str) -> http::Response<Body> {
    let note = move |text: String| calls.lock().expect("notes").push(text);
    let last =
        |path: &str| Path::new(path).file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    match request.uri().path() {
        csi::PROBE => with(request, |Nothing {}| Ok(Nothing {})).await,
        csi::PLUGIN_INFO => {
            with(request, move |Nothing {}| Ok(PluginInfo { name: name.into(), version: "1".into() })).await
        }
        csi::CAPABILITIES => {
            let capability = NodeCapability { rpc: Some(Rpc { kind: 1 }) };
            with(request, |Nothing {}| Ok(Capabilities { capabilities: vec![capability] })).await
        }
        csi::STAGE => {
            with(request, move |asked: Stage| {
                note(format!("stage {} {:?}", asked.volume, asked.context.get("size")));
                Ok(Nothing {})
            })
            .await
        }
        csi::PUBLISH => {
            with(request, move |asked: Publish| {
                if asked.volume == "bad" {
                    return Err(Status::not_found("there is no such volume"));
                }
                assert!(Path::new(&asked.staging_path).is_dir() && asked.capability == csi::capability());
                std::fs::create_dir(&asked.target_path).expect("its parent is there");
                note(format!("publish {}", asked.volume));
                Ok(Nothing {})
            })
            .await
        }
        csi::UNPUBLISH => {
            with(request, move |asked: Undo| {
                note(format!("unpublish {}", last(&asked.path)));
                Ok(Nothing {})
            })
            .await
        }
        csi::UNSTAGE => {
            with(request, move |asked: Undo| {
                note(format!("unstage {}", last(&asked.path)));
                Ok(Nothing {})
            })
            .await
        }
        _ => Status::unimplemented("unknown").into_http(),
    }
}

fn volume(id: &str, driver: &str) -> VolumeRequest {
    VolumeRequest {
        id: id.into(),
        driver: driver.into(),
        mount_path: format!("/mnt/{id}"),
        config: vec![("size".into(), "1".into())],
    }
}

fn instance(number: u32) -> InstanceId {
    format!("a.b.c.d.instance.{number}").parse().expect("an id")
}

#[tokio::test]
async fn a_volume_is_staged_once_and_unstaged_with_its_last_user() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("fake.sock");
    let (calls, _driver) = fake(&socket, FAKE);
    let open = || {
        Volumes::new(BTreeMap::from([(FAKE.to_owned(), socket.clone())]), None, dir.path(), dir.path())
            .map(Arc::new)
            .expect("volumes")
    };
    let volumes = open();
    assert_eq!(volumes.answering().await, [(FAKE.to_owned(), socket.clone())]);
    let mounts = volumes.publish(&instance(0), &[volume("data", FAKE)]).await.expect("published");
    assert_eq!((mounts.len(), mounts[0].target.as_str()), (1, "/mnt/data"));
    assert!(mounts[0].source.is_dir());
    volumes.publish(&instance(1), &[volume("data", FAKE)]).await.expect("published");
    // A later run knows of them what is there.
    drop(volumes);
    let volumes = open();
    volumes.unpublish(&instance(0)).await.expect("undone");
    volumes.unpublish(&instance(0)).await.expect("undone already");
    volumes.unpublish(&instance(1)).await.expect("undone");
    let staged = "stage data Some(\"1\")";
    assert_eq!(
        *calls.lock().expect("notes"),
        [staged, "publish data", staged, "publish data", "unpublish data", "unpublish data", "unstage data"]
    );
    assert!(names_in(&dir.path().join("csi/publish/csi.example~fake")).is_empty());
}

#[tokio::test]
async fn what_a_driver_cannot_give_is_told_in_its_words() {
    let dir = tempfile::tempdir().expect("a directory");
    let (socket, liar) = (dir.path().join("fake.sock"), dir.path().join("liar.sock"));
    let (calls, _driver) = fake(&socket, FAKE);
    let (_, _liar) = fake(&liar, "somebody");
    let drivers = BTreeMap::from([
        (FAKE.to_owned(), socket),
        ("csi.example/liar".to_owned(), liar),
        ("csi.example/away".to_owned(), dir.path().join("nobody.sock")),
    ]);
    let volumes = Arc::new(Volumes::new(drivers, None, dir.path(), dir.path()).expect("volumes"));
    assert_eq!(volumes.answering().await.len(), 1);
    for (volume, reason) in [
        (volume("bad", FAKE), "volume bad of csi.example/fake: there is no such volume"),
        (
            volume("x", "csi.example/none"),
            "has no driver \"csi.example/none\"; it has csi.example/away, csi.example/fake",
        ),
        (volume("x", "csi.example/liar"), "calls itself \"somebody\""),
        (volume("x", "csi.example/away"), "csi.example/away at"),
    ] {
        let error = volumes.publish(&instance(0), &[volume]).await.expect_err(reason).to_string();
        assert!(error.contains(reason), "{error}");
    }
    volumes.unpublish(&instance(0)).await.expect("half of it is undone");
    assert_eq!(*calls.lock().expect("notes"), ["stage bad Some(\"1\")", "unpublish bad", "unstage bad"]);
    assert!(!volumes.staging(FAKE, "bad").exists() && volumes.held_by(&instance(0)).is_empty());
}

/// Volumes of one driver that stages nothing until it may.
fn held_up(dir: &Path, permits: usize) -> (Arc<Volumes>, Calls, Arc<Semaphore>, AbortOnDropHandle<()>) {
    let socket = dir.join("fake.sock");
    let (calls, gate, driver) = slow(&socket, FAKE, permits);
    let volumes = Volumes::new(BTreeMap::from([(FAKE.to_owned(), socket)]), None, dir, dir).expect("volumes");
    (Arc::new(volumes), calls, gate, driver)
}

async fn until_asked(calls: &Calls, call: &str) {
    let asked = async {
        while !calls.lock().expect("notes").iter().any(|noted| noted == call) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(20), asked).await.expect(call);
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_is_undone() {
    let dir = tempfile::tempdir().expect("a directory");
    let (volumes, calls, gate, _driver) = held_up(dir.path(), 0);
    let (owner, wanted) = (instance(0), [volume("data", FAKE)]);
    tokio::select! {
        published = volumes.publish(&owner, &wanted) => panic!("{published:?}"),
        () = until_asked(&calls, "asked to stage") => {}
    }
    let undoing = tokio::spawn({
        let volumes = volumes.clone();
        async move { volumes.unpublish(&instance(0)).await }
    });
    gate.add_permits(2);
    undoing.await.expect("no panic").expect("undone");
    let done: Vec<_> = calls.lock().expect("notes").iter().filter(|call| !call.starts_with("asked")).cloned().collect();
    assert_eq!(done, ["stage data Some(\"1\")", "publish data", "unpublish data", "unstage data"]);
    assert!(!volumes.staging(FAKE, "data").exists() && volumes.held_by(&owner).is_empty());
}

#[tokio::test]
async fn nothing_is_staged_while_it_is_unstaged_for_another() {
    let dir = tempfile::tempdir().expect("a directory");
    let (volumes, calls, gate, _driver) = held_up(dir.path(), 0);
    gate.add_permits(1);
    volumes.publish(&instance(0), &[volume("data", FAKE)]).await.expect("published");
    gate.forget_permits(1);
    let unpublishing = tokio::spawn({
        let volumes = volumes.clone();
        async move { volumes.unpublish(&instance(0)).await }
    });
    until_asked(&calls, "asked to unstage").await;
    let wanted = [volume("data", FAKE)];
    let (next, other) = (instance(1), [volume("other", FAKE)]);
    let publishing = volumes.publish(&next, &wanted);
    tokio::pin!(publishing);
    // Long enough for a driver in the same process to be asked.
    let waited = timeout(Duration::from_millis(300), &mut publishing).await;
    assert!(waited.is_err() && !calls.lock().expect("notes").iter().any(|call| call == "asked to stage"));
    gate.add_permits(100);
    volumes.publish(&instance(2), &other).await.expect("another volume waits for nobody");
    unpublishing.await.expect("no panic").expect("undone");
    publishing.await.expect("published");
    assert!(volumes.staging(FAKE, "data").is_dir());
    let calls = calls.lock().expect("notes");
    let at = |wanted: &str| calls.iter().rposition(|call| call == wanted);
    assert!(at("unstage data") < at("stage data Some(\"1\")"), "{calls:?}");
}

#[tokio::test]
#[ignore = "needs root"]
async fn the_bundled_driver_keeps_what_is_written() {
    let dir = tempfile::tempdir().expect("a directory");
    let kept = dir.path().join("volumes");
    let volumes = Arc::new(Volumes::new(BTreeMap::new(), Some(&kept), dir.path(), dir.path()).expect("volumes"));
    assert_eq!(volumes.answering().await.len(), 1);
    for (number, expected) in [(0, ""), (1, "0")] {
        let mounts = volumes.publish(&instance(number), &[volume("data", HOST_PATH)]).await.expect("published");
        volumes.publish(&instance(number), &[volume("data", HOST_PATH)]).await.expect("again");
        let file = mounts[0].source.join("file");
        assert_eq!(fs::read_to_string(&file).unwrap_or_default(), expected);
        fs::write(&file, number.to_string()).expect("written");
        volumes.unpublish(&instance(number)).await.expect("undone");
        assert!(!mounts[0].source.exists());
    }
    assert_eq!(fs::read_to_string(kept.join("data/file")).expect("kept"), "1");
    let error = volumes.publish(&instance(0), &[volume("../x", HOST_PATH)]).await.expect_err("no name");
    assert!(error.to_string().contains("cannot name one"), "{error}");
    volumes.unpublish(&instance(0)).await.expect("undone");
}

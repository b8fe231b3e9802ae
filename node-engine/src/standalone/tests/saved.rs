use std::time::Duration;

use super::super::address::AddressPlan;
use super::super::core::Core;
use super::super::documents;
use super::super::inventory::{Deployed, NodeFacts};
use super::super::saved::{Saved, text};
use crate::model::{NodeId, Query, Status};

const NOW: Duration = Duration::from_secs(100);

fn id(text: &str) -> NodeId {
    text.parse().unwrap()
}

fn load(saved: &Saved) -> Core {
    saved.load(AddressPlan::default(), id("fresh"), |document| documents::request(document.as_bytes()).ok())
}

/// Two nodes, a service with one instance in every state that is kept.
fn cluster() -> Core {
    let mut core = Core::new(id("cluster"), AddressPlan::default());
    let facts = NodeFacts { technologies: ["docker".into()].into(), ..NodeFacts::default() };
    for name in ["a", "b"] {
        core.register(name, facts.clone(), id(name)).unwrap();
        core.information(&id(name), NodeFacts::default(), NOW);
        core.subnet_request(&id(name), NOW);
    }
    let request = documents::request(
        br#"{"job_name":"app.default.web.test","image":"nginx","addresses":{"policies":["sticky"]}}"#,
    )
    .unwrap();
    let instances = core.deploy(request, 4, None, "job".into(), NOW).unwrap();
    let report = |core: &mut Core, nth: usize, status| {
        for node in ["a", "b"] {
            core.report(&id(node), &instances[nth], status, "", NOW);
        }
    };
    report(&mut core, 0, Status::Running);
    report(&mut core, 1, Status::Completed);
    report(&mut core, 2, Status::Failed);
    let deployed = Deployed {
        namespace_v4: "10.18.0.2".parse().unwrap(),
        namespace_v6: None,
        host: "192.0.2.1".parse().unwrap(),
        host_port: 50103,
    };
    for node in ["a", "b"] {
        core.deployed(&id(node), &instances[0], deployed, NOW);
    }
    core
}

#[test]
fn what_is_saved_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let saved = Saved::in_directory(directory.path()).unwrap();
    let core = cluster();
    saved.store(&text(&core)).unwrap();
    let mut again = load(&saved);
    assert_eq!(text(&again), text(&core));
    let query = Query::Name("app.default.web.test".parse().unwrap());
    assert_eq!(again.table(query.clone()), core.table(query));
    assert!(again.take_effects().messages.is_empty(), "nobody is told what has not changed");
    again.register("c", NodeFacts::default(), id("c")).unwrap();
    let subnet = again.assign_subnet(&id("c")).unwrap();
    assert_eq!(subnet.v4.to_string(), "10.18.0.128");
}

#[test]
fn an_unreadable_state_is_kept_aside_and_its_predecessor_used() {
    let directory = tempfile::tempdir().unwrap();
    let saved = Saved::in_directory(directory.path()).unwrap();
    let mut core = cluster();
    saved.store(&text(&core)).unwrap();
    core.register("c", NodeFacts::default(), id("c")).unwrap();
    let lost = core.assign_subnet(&id("c")).unwrap();
    saved.store(&text(&core)).unwrap();
    std::fs::write(directory.path().join("cluster.json"), b"{\"cluster_id\":").unwrap();

    let mut again = load(&saved);
    assert_eq!(again.cluster_id, id("cluster"));
    again.register("d", NodeFacts::default(), id("d")).unwrap();
    assert_ne!(again.assign_subnet(&id("d")).unwrap(), lost, "a subnet that may have been given is not given again");
    assert!(directory.path().join("cluster.json.unreadable").exists());
}

#[test]
fn no_damage_to_the_file_is_a_panic() {
    let directory = tempfile::tempdir().unwrap();
    let saved = Saved::in_directory(directory.path()).unwrap();
    let whole = text(&cluster()).into_bytes();
    for nth in (0..whole.len()).step_by(7) {
        for damaged in [whole[..nth].to_vec(), [&whole[..nth], b"9", &whole[nth + 1..]].concat()] {
            std::fs::write(directory.path().join("cluster.json"), &damaged).unwrap();
            let mut core = load(&saved);
            core.tick(NOW);
            core.take_effects();
        }
    }
}

#[test]
fn a_full_or_missing_directory_is_an_error_that_says_where() {
    let directory = tempfile::tempdir().unwrap();
    let saved = Saved::in_directory(directory.path()).unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, b"").unwrap();
    assert!(Saved::in_directory(&file.join("below")).unwrap_err().to_string().contains("below"));
    drop(directory);
    assert!(saved.store("{}").unwrap_err().to_string().contains("cluster.json"));
}

use std::fs;

use proptest::prelude::*;

use super::super::record::{Fate, Given};
use super::*;
use crate::model::{FamilyPair, Policy, Query, SemanticAddress, TableRow};

fn id(number: u32) -> InstanceId {
    format!("app.default.web.test.instance.{number}").parse().unwrap()
}

fn given(node: &str, generation: u64) -> Option<Given> {
    Some(Given { node: node.parse().unwrap(), generation })
}

pub(super) fn deploy(number: u32, document: &str, given: Option<Given>) -> Order {
    Order { instance: id(number), document: Some(document.into()), given }
}

fn delete(number: u32, given: Option<Given>) -> Order {
    Order { instance: id(number), document: None, given }
}

fn answer(rows: u32) -> TableAnswer {
    let service: ServiceName = "app.default.db.test".parse().unwrap();
    let row = |number| TableRow {
        number,
        namespace: FamilyPair { v4: Some([10, 18, 0, 2].into()), v6: None },
        instance: FamilyPair { v4: Some([10, 30, 0, 1].into()), v6: Some("fdff::1".parse().unwrap()) },
        host: "192.0.2.7".parse().unwrap(),
        host_port: 50103,
        weight: 3,
        services: vec![SemanticAddress { policy: Policy::Closest, address: "10.30.9.9".parse().unwrap() }],
    };
    TableAnswer {
        query: Some(Query::Name(service.clone())),
        service: Some(service),
        rows: (0..rows).map(row).collect(),
    }
}

/// What is wanted, in words.
fn wanted(desired: &Desired) -> Vec<String> {
    let word = |(id, record): (&InstanceId, &Record)| match &record.fate {
        Fate::Run(document) => format!("{}:{document}", id.number),
        Fate::Ended { status, detail, .. } => format!("{}:{status} {detail}", id.number),
        Fate::Deleted => format!("{}:deleted", id.number),
    };
    desired.instances().map(word).collect()
}

#[test]
fn what_was_acknowledged_is_there_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut desired = Desired::open(dir.path());
    assert!(!desired.complete(), "nobody has looked around yet");
    let verdicts = desired.orders(&[deploy(0, "a", None), deploy(1, "b", None), delete(0, None), deploy(2, "c", None)]);
    assert_eq!(verdicts, [Verdict::New(1), Verdict::New(2), Verdict::New(3), Verdict::New(4)]);
    let addresses = Addresses { v4: [10, 18, 0, 2].into(), v6: "fc00::2".parse().unwrap() };
    let ended = Fact::Ended { instance: id(2), sequence: 4, status: Status::Failed, detail: "exit code 3".into() };
    desired.facts(vec![
        ended,
        Fact::Addresses(BTreeMap::from([(id(1), addresses)])),
        Fact::Service(answer(2).service.unwrap(), Some(answer(2))),
        Fact::LookedAround,
    ]);
    drop(desired);

    let mut desired = Desired::open(dir.path());
    assert!(desired.complete() && desired.behind().is_none() && desired.aside().is_none());
    assert_eq!(wanted(&desired), ["1:b", "2:FAILED exit code 3"]);
    assert_eq!(desired.addresses(), BTreeMap::from([(id(1), addresses)]));
    assert_eq!(desired.services(), [answer(2)]);
    // Counts go on where they were.
    assert_eq!(desired.orders(&[deploy(2, "c", None)]), [Verdict::New(5)]);
    desired.facts(vec![Fact::Service(answer(0).service.unwrap(), None), Fact::Addresses(BTreeMap::new())]);
    drop(desired);
    let desired = Desired::open(dir.path());
    assert_eq!((desired.services(), desired.addresses()), (vec![], BTreeMap::new()));
}

#[test]
fn repetitions_and_old_orders_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut desired = Desired::open(dir.path());
    let mut check = |order: Order, expected: Verdict, after: &[&str]| {
        assert_eq!(desired.orders(std::slice::from_ref(&order)), [expected], "{order:?}");
        assert_eq!(wanted(&desired), after, "{order:?}");
    };
    // A cluster that does not count: the order in which they come is theirs.
    check(deploy(0, "a", None), Verdict::New(1), &["0:a"]);
    check(deploy(0, "a", None), Verdict::Same(1), &["0:a"]);
    check(deploy(0, "b", None), Verdict::New(2), &["0:b"]);
    check(delete(0, None), Verdict::New(3), &[]);
    check(delete(0, None), Verdict::Same(0), &[]);
    // One that does.
    check(deploy(0, "a", given("one", 7)), Verdict::New(4), &["0:a"]);
    check(deploy(0, "b", given("one", 6)), Verdict::Old, &["0:a"]);
    check(delete(0, given("one", 6)), Verdict::Old, &["0:a"]);
    check(deploy(0, "a", given("one", 7)), Verdict::Same(4), &["0:a"]);
    check(delete(0, given("one", 8)), Verdict::New(5), &["0:deleted"]);
    check(deploy(0, "a", given("one", 7)), Verdict::Old, &["0:deleted"]);
    check(delete(0, given("one", 8)), Verdict::Same(5), &["0:deleted"]);
    // Another cluster's count says nothing about this one's.
    check(deploy(0, "c", given("two", 1)), Verdict::New(6), &["0:c"]);
    // A person's delete has no count and is the newest there is.
    check(delete(0, None), Verdict::New(7), &[]);
}

#[test]
fn what_has_ended_is_not_begun_again_by_the_same_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut desired = Desired::open(dir.path());
    desired.orders(&[deploy(0, "a", given("one", 1)), deploy(1, "b", None)]);
    let ended = |number, sequence| Fact::Ended {
        instance: id(number),
        sequence,
        status: Status::Completed,
        detail: String::new(),
    };
    desired.facts(vec![ended(0, 1), ended(1, 1)]);
    assert_eq!(wanted(&desired), ["0:COMPLETED ", "1:b"], "the end of another deployment is no news");
    assert_eq!(desired.orders(&[deploy(0, "a", given("one", 1))]), [Verdict::Over]);
    assert_eq!(desired.orders(&[deploy(0, "a", given("one", 2))]), [Verdict::New(3)]);
    desired.facts(vec![ended(0, 1)]);
    assert_eq!(wanted(&desired), ["0:a", "1:b"]);
    desired.facts(vec![Fact::Found { instance: id(0), document: "x".into() }]);
    desired.facts(vec![Fact::Found { instance: id(5), document: "x".into() }]);
    assert_eq!(wanted(&desired), ["0:a", "1:b", "5:x"]);
}

#[test]
fn a_disk_that_takes_nothing_refuses_deployments_and_loses_no_end() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    // A file where the directory should be, so that nothing can be made in it.
    fs::write(&state, "").unwrap();
    let mut desired = Desired::open(&state);
    assert!(desired.behind().is_some());
    let verdicts = desired.orders(&[deploy(0, "a", None), delete(1, given("one", 4))]);
    assert!(matches!(&verdicts[..], [Verdict::Refused(reason), Verdict::New(2)] if reason.contains("cannot write")));
    assert_eq!(wanted(&desired), ["1:deleted"]);

    fs::remove_file(&state).unwrap();
    fs::create_dir(&state).unwrap();
    desired.retry();
    assert_eq!(desired.behind(), None);
    assert_eq!(desired.orders(&[deploy(0, "a", None)]), [Verdict::New(3)]);
    drop(desired);
    assert_eq!(wanted(&Desired::open(&state)), ["0:a", "1:deleted"]);
}

/// A disk that is not there yet, or gives an error once, has lost nothing.
#[test]
fn what_could_not_be_read_at_the_start_is_not_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let [state, away] = ["state", "away"].map(|name| dir.path().join(name));
    fs::create_dir(&state).unwrap();
    let mut desired = Desired::open(&state);
    desired.orders(&[deploy(0, "a", None), deploy(1, "b", None), deploy(2, "c", None), delete(3, given("one", 4))]);
    let addresses = |last: u8| Addresses { v4: [10, 18, 0, last].into(), v6: format!("fc00::{last}").parse().unwrap() };
    desired.facts(vec![Fact::LookedAround, Fact::Addresses([(id(0), addresses(2)), (id(1), addresses(3))].into())]);
    drop(desired);

    fs::rename(&state, &away).unwrap();
    fs::write(&state, "").unwrap();
    let mut desired = Desired::open(&state);
    assert!(desired.behind().is_some() && wanted(&desired).is_empty());
    desired.facts(vec![
        Fact::Found { instance: id(2), document: "c2".into() },
        Fact::LookedAround,
        Fact::Addresses([(id(2), addresses(3))].into()),
    ]);
    desired.orders(&[delete(1, None)]);
    fs::remove_file(&state).unwrap();
    fs::rename(&away, &state).unwrap();
    desired.retry();
    assert_eq!(desired.behind(), None);
    assert_eq!(wanted(&desired), ["0:a", "2:c2", "3:deleted"]);
    assert!(desired.complete());
    assert_eq!(desired.addresses(), [(id(0), addresses(2)), (id(2), addresses(3))].into(), "none is given twice");
    drop(desired);
    let mut desired = Desired::open(&state);
    assert_eq!(wanted(&desired), ["0:a", "2:c2", "3:deleted"]);
    assert_eq!(desired.orders(&[deploy(3, "old", given("one", 3))]), [Verdict::Old]);
    let Verdict::New(next) = desired.orders(&[deploy(4, "d", None)])[0] else { panic!("it is new") };
    assert!(desired.instances().all(|(id, record)| id.number == 4 || record.sequence < next), "counts go on");
}

#[test]
fn blocks_that_cannot_be_read_are_lost_only_after_a_while() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = Desired::open(dir.path());
    before.orders(&[deploy(0, "a", None)]);
    drop(before);
    let unread = || {
        let mut desired = Desired::open(dir.path());
        (desired.book, desired.unread) = (Book::default(), Some(BTreeSet::new()));
        desired
    };
    let mut desired = unread();
    desired.give_up(Fault::Lost("input/output error".into()));
    assert!(desired.behind().is_some() && desired.aside().is_none());
    desired.retry();
    assert_eq!((wanted(&desired), desired.behind()), (vec!["0:a".to_owned()], None), "the disk was only asleep");
    drop(desired);

    let mut desired = unread();
    desired.unreadable = Instant::now().checked_sub(PATIENCE);
    desired.give_up(Fault::Lost("input/output error".into()));
    assert!(desired.aside().is_some(), "what cannot be read for so long never can");
    desired.retry();
    assert_eq!((desired.behind(), wanted(&desired).len()), (None, 0));
}

#[test]
fn a_damaged_file_is_kept_aside_and_what_is_wanted_is_then_unknown() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    fs::write(&path, b"this is no database").unwrap();
    let mut desired = Desired::open(dir.path());
    let aside = dir.path().join(format!("{FILE}.corrupt-1"));
    assert_eq!((desired.aside(), desired.complete()), (Some(aside.as_path()), false));
    assert_eq!(fs::read(&aside).unwrap(), b"this is no database");
    desired.orders(&[deploy(0, "a", None)]);
    drop(desired);
    // Still not: nobody has looked around since.
    let mut desired = Desired::open(dir.path());
    assert!(!desired.complete());
    desired.facts(vec![Fact::LookedAround]);
    drop(desired);
    assert!(Desired::open(dir.path()).complete());
}

#[test]
#[ignore = "needs root"]
fn a_full_disk_refuses_deployments_and_heals_by_itself() {
    use nix::mount::{MsFlags, mount, umount};
    let dir = tempfile::tempdir().unwrap();
    mount(Some("none"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some("size=8m")).unwrap();
    let mut desired = Desired::open(dir.path());
    assert_eq!(desired.orders(&[deploy(0, "a", None)]), [Verdict::New(1)]);
    let filler = dir.path().join("filler");
    fs::write(&filler, vec![1; 16 << 20]).unwrap_err();
    let large = "x".repeat(64 << 10);
    let refused = (1..500).find_map(|number| match &desired.orders(&[deploy(number, &large, None)])[0] {
        Verdict::Refused(reason) => Some((number, reason.clone())),
        verdict => {
            assert!(matches!(verdict, Verdict::New(_)));
            None
        }
    });
    let (number, reason) = refused.expect("the disk is full at last");
    assert!(reason.contains("No space left"), "{reason}");
    // What has to be done is done, and is not forgotten.
    assert!(matches!(desired.orders(&[delete(0, None)])[0], Verdict::New(_)));
    assert!(desired.behind().is_some());
    desired.retry();
    assert!(desired.behind().is_some());

    fs::remove_file(&filler).unwrap();
    desired.retry();
    assert_eq!(desired.behind(), None);
    assert!(matches!(desired.orders(&[deploy(number, "small", None)])[0], Verdict::New(_)));
    let before = wanted(&desired);
    drop(desired);
    assert_eq!(wanted(&Desired::open(dir.path())), before);
    assert!(!before.iter().any(|row| row.starts_with("0:")));
    umount(dir.path()).unwrap();
}

/// A hundred thousand orders, of which each tenth comes twice, at once or much later, and each tenth is overtaken by others: what is wanted
/// in the end is what the last order for each instance wants, also after a start in between.
#[test]
fn the_end_of_many_orders_is_what_the_last_ones_want() {
    const INSTANCES: u64 = 64;
    /// Orders that wait together become one commit.
    const TOGETHER: usize = 256;
    let orders = size("NODE_ENGINE_ORDERS", 100_000);
    let mut chance = Chance(7);
    let mut model: BTreeMap<u32, Option<String>> = BTreeMap::new();
    let mut sent = Vec::new();
    for generation in 1..=u64::from(orders) {
        let number = chance.below(INSTANCES) as u32;
        let document = (chance.below(3) > 0).then(|| format!("document {}", chance.below(5)));
        model.insert(number, document.clone());
        let order = Order { instance: id(number), document: document.map(Into::into), given: given("one", generation) };
        if chance.below(10) == 0 {
            let at = sent.len().saturating_sub(chance.below(1_000) as usize);
            // An earlier one comes again.
            let again = sent.get(at).cloned();
            sent.extend(again);
        }
        sent.push(order);
        if chance.below(10) == 0 {
            let (last, other) = (sent.len() - 1, sent.len().saturating_sub(1 + chance.below(20) as usize));
            sent.swap(last, other);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let mut desired = Desired::open(dir.path());
    let batches = sent.chunks(TOGETHER).count();
    for (number, batch) in sent.chunks(TOGETHER).enumerate() {
        if number == batches / 2 {
            drop(desired);
            desired = Desired::open(dir.path());
        }
        assert!(desired.orders(batch).iter().all(|verdict| !matches!(verdict, Verdict::Refused(_))));
    }
    let expected: Vec<String> = model
        .iter()
        .map(|(number, document)| format!("{number}:{}", document.as_deref().unwrap_or("deleted")))
        .collect();
    let sorted = |desired: &Desired| {
        let mut rows = wanted(desired);
        rows.sort_by_key(|row| row.split(':').next().and_then(|number| number.parse::<u32>().ok()));
        rows
    };
    assert_eq!(sorted(&desired), expected);
    drop(desired);
    assert_eq!(sorted(&Desired::open(dir.path())), expected);
}

/// The same numbers each time.
pub(super) struct Chance(pub(super) u64);

impl Chance {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        // Knuth, "MMIX": the upper bits are the good ones.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// How much of it, where somebody wants more or less than usual.
pub(super) fn size(variable: &str, usual: u32) -> u32 {
    std::env::var(variable).map_or(usual, |text| text.parse().expect("a number"))
}

#[test]
fn the_book_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let mut desired = Desired::open(dir.path());
    let orders: Vec<Order> = (0..5000).map(|number| delete(number, given("one", 1))).collect();
    desired.orders(&orders);
    assert_eq!(desired.instances().count(), 4096);
    assert!(desired.instances().all(|(id, _)| id.number >= 904), "the oldest are forgotten");
    let many = answer(70_000);
    desired.facts(vec![Fact::Service(many.service.clone().unwrap(), Some(many))]);
    assert_eq!(desired.services(), []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(size("NODE_ENGINE_TEST_DAMAGES", 64)))]
    /// Whatever is in the file, a start comes of it, and nothing that was not written.
    #[test]
    fn damage_never_panics_and_never_prevents_a_start(
        cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..40),
        length in any::<prop::sample::Index>(),
        truncate in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut desired = Desired::open(dir.path());
        desired.orders(&[deploy(0, "a", None), deploy(1, "b", given("one", 2)), delete(2, given("one", 3))]);
        desired.facts(vec![Fact::LookedAround]);
        let whole = wanted(&desired);
        drop(desired);
        let path = dir.path().join(FILE);
        let mut bytes = fs::read(&path).unwrap();
        for (at, value) in &cuts {
            // Most of the file is unused pages; what is used lies at its beginning.
            let at = at.index(bytes.len().min(64 << 10));
            bytes[at] = *value;
        }
        if truncate {
            bytes.truncate(length.index(bytes.len()));
        }
        fs::write(&path, &bytes).unwrap();
        let mut desired = Desired::open(dir.path());
        prop_assert!(desired.behind().is_none());
        let found = wanted(&desired);
        prop_assert!(found == whole || (found.is_empty() && !desired.complete()), "{found:?}");
        prop_assert_eq!(desired.orders(&[deploy(9, "z", None)]).len(), 1);
        drop(desired);
        prop_assert!(wanted(&Desired::open(dir.path())).contains(&"9:z".to_owned()));
    }
}

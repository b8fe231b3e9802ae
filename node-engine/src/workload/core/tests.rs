//! Rows of `event → effects`, and a world of random orders in which no promise may break.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::super::{Wanted, Wanting};
use super::*;
use crate::model::Limits;

/// A row: an event, and the effects it must have. See `event` and `text` for the words.
type Rows<'a> = &'a [(&'a str, &'a str)];

const UP: Rows =
    &[("deploy", "CREATING, prepare"), ("prepared", "attach"), ("attached", "start"), ("started", "CREATED")];

#[test]
fn a_deployment_goes_up_step_by_step_and_comes_down_again() {
    check(&[UP, &[("delete", "stop 10s"), ("stopped", "detach"), ("detached", "UNDEPLOYED"), ("is", "")]]);
    check(&[
        UP,
        &[("delete", "stop 10s"), ("stopped", "detach"), ("detached", "UNDEPLOYED"), ("delete", "UNDEPLOYED")],
    ]);
    check(&[&[("delete", "UNDEPLOYED"), ("is", "")]]);
}

#[test]
fn what_runs_as_described_is_left_alone() {
    check(&[UP, &[("deploy", "attach"), ("deploy", ""), ("attached", "CREATED"), ("is", "running")]]);
    check(&[&[
        ("deploy", "CREATING, prepare"),
        ("deploy", "CREATING"),
        ("prepared", "attach"),
        ("deploy", "CREATING"),
    ]]);
}

#[test]
fn another_description_replaces_the_instance() {
    check(&[
        UP,
        &[
            ("deploy b:1", "CREATING, stop 10s"),
            ("stopped", "detach"),
            ("detached", "CREATING, prepare b:1"),
            ("prepared", "attach"),
        ],
    ]);
    check(&[
        &[("deploy", "CREATING, prepare"), ("deploy b:1", "cancel, CREATING")],
        &[("prepared!", "stop 0s"), ("stopped", "CREATING, prepare b:1"), ("is", "preparing")],
    ]);
}

#[test]
fn every_failure_undoes_what_was_made_backwards_and_is_told_once() {
    check(&[&[
        ("deploy", "CREATING, prepare"),
        ("prepared!", "stop 0s"),
        ("stopped", "FAILED boom"),
        ("is", "failed: boom"),
    ]]);
    check(&[
        &[("deploy", "CREATING, prepare"), ("prepared", "attach"), ("attached!", "detach"), ("detached", "stop 0s")],
        &[("stopped", "FAILED boom"), ("is", "failed: boom")],
    ]);
    check(&[
        &[("deploy", "CREATING, prepare"), ("prepared", "attach"), ("attached", "start"), ("started!", "stop 0s log")],
        &[("stopped", "detach"), ("detached", "FAILED boom"), ("delete", "UNDEPLOYED"), ("is", "")],
    ]);
}

#[test]
fn a_failing_clean_up_is_told_and_tried_again() {
    check(&[
        &[("deploy", "CREATING, prepare"), ("prepared!", "stop 0s"), ("stopped!", "FAILED boom; clean-up: boom")],
        &[("+1", ""), ("+2", "stop 0s"), ("stopped!", ""), ("+5", ""), ("+6", "stop 0s"), ("stopped", "")],
        &[("is", "failed: boom; clean-up: boom"), ("deploy", "CREATING, prepare")],
    ]);
    // A copy that is wanted waits until the earlier one is really gone.
    check(&[
        &[("deploy", "CREATING, prepare"), ("prepared!", "stop 0s"), ("stopped!", "FAILED boom; clean-up: boom")],
        &[("deploy", "CREATING clean-up: boom"), ("+2", "stop 0s"), ("stopped", "CREATING, prepare")],
    ]);
    check(&[
        UP,
        &[("delete", "stop 10s"), ("stopped!", ""), ("+2", "stop 10s"), ("stopped", "detach")],
        &[("detached", "UNDEPLOYED")],
    ]);
}

#[test]
fn a_back_end_that_is_away_is_waited_for() {
    check(&[
        &[("deploy", "CREATING, prepare"), ("prepared?", ""), ("is", "preparing: away"), ("+2", "prepare")],
        &[("prepared", "attach"), ("attached?", ""), ("+4", "attach"), ("attached", "start"), ("started?", "")],
        &[("+6", "start"), ("started", "CREATED")],
    ]);
    check(&[
        &[("deploy", "CREATING, prepare"), ("prepared?", ""), ("+59", "CREATING away, prepare"), ("+60", "")],
        &[("prepared?", "stop 0s"), ("stopped", "FAILED away")],
    ]);
}

#[test]
fn creating_is_repeated_until_it_is_created() {
    check(&[
        &[("deploy", "CREATING, prepare"), ("+9", ""), ("+10", "CREATING"), ("+19", ""), ("+20", "CREATING")],
        &[("prepared", "attach"), ("+30", "CREATING"), ("attached", "start"), ("+40", "CREATING")],
        &[("started", "CREATED"), ("+50", ""), ("delete", "stop 10s"), ("+70", "")],
    ]);
}

#[test]
fn a_delete_cancels_in_order_and_has_the_last_word() {
    check(&[&[
        ("deploy", "CREATING, prepare"),
        ("delete", "cancel"),
        ("prepared!", "stop 0s"),
        ("stopped", "UNDEPLOYED"),
    ]]);
    check(&[&[
        ("deploy", "CREATING, prepare"),
        ("delete", "cancel"),
        ("prepared", "stop 0s"),
        ("stopped", "UNDEPLOYED"),
    ]]);
    check(&[
        &[("deploy", "CREATING, prepare"), ("prepared", "attach"), ("delete", ""), ("attached!", "detach")],
        &[("detached", "stop 0s"), ("stopped", "UNDEPLOYED"), ("is", "")],
    ]);
    check(&[
        &[("deploy", "CREATING, prepare"), ("prepared", "attach"), ("attached", "start"), ("delete", "")],
        &[("exit 1", ""), ("started", "stop 10s"), ("exit 143", ""), ("stopped", "detach"), ("detached", "UNDEPLOYED")],
    ]);
    // It failed, and before that could be told it was deleted: nothing but the answer to the delete.
    check(&[
        UP,
        &[("exit 1", "stop 0s log"), ("delete", ""), ("stopped", "detach"), ("detached", "UNDEPLOYED"), ("is", "")],
    ]);
}

#[test]
fn a_deployment_after_a_delete_waits_for_its_end() {
    check(&[
        UP,
        &[
            ("delete", "stop 10s"),
            ("deploy", "UNDEPLOYED, CREATING"),
            ("deploy b:1", "CREATING"),
            ("stopped", "detach"),
        ],
        &[("detached", "CREATING, prepare b:1"), ("prepared", "attach")],
    ]);
    check(&[
        UP,
        &[("delete", "stop 10s"), ("deploy", "UNDEPLOYED, CREATING"), ("delete", ""), ("stopped", "detach")],
        &[("detached", "UNDEPLOYED"), ("is", "")],
    ]);
}

#[test]
fn an_end_is_told_by_its_kind_after_the_clean_up() {
    for (deploy, exit, stop, told, is) in [
        ("deploy", "exit 0", "stop 5s log", "DEAD ended with exit code 0", "dead: ended with exit code 0"),
        ("deploy", "trap", "stop 0s log", "FAILED trap: x", "failed: trap: x"),
        ("deploy", "exit 3", "stop 0s log", "FAILED exit code 3", "failed: exit code 3"),
        ("deploy", "oom", "stop 0s log", "FAILED out of memory (limit 64 MiB)", "failed: out of memory (limit 64 MiB)"),
        ("deploy once", "exit 0", "stop 0s log", "COMPLETED", "completed"),
        ("deploy once", "exit 2", "stop 0s log", "FAILED exit code 2", "failed: exit code 2"),
    ] {
        check(&[
            &[(deploy, "CREATING, prepare"), ("prepared", "attach"), ("attached", "start"), ("started", "CREATED")],
            &[(exit, stop), ("stopped", "detach"), ("detached", told), ("is", is), (deploy, "CREATING, prepare")],
        ]);
    }
    // Faster than its own start.
    check(&[
        &[("deploy once", "CREATING, prepare"), ("prepared", "attach"), ("attached", "start"), ("exit 0", "")],
        &[("started", "CREATED, stop 0s log"), ("stopped", "detach"), ("detached", "COMPLETED")],
    ]);
    // News of an earlier copy.
    check(&[&[
        ("deploy", "CREATING, prepare"),
        ("exit 1", ""),
        ("prepared", "attach"),
        ("exit 1", ""),
        ("attached", "start"),
    ]]);
}

#[test]
fn only_what_this_node_has_is_deployed() {
    check(&[&[
        ("deploy wasm", "FAILED this node runs docker; \"wasm\" is not available here"),
        ("is", "failed: this node runs docker; \"wasm\" is not available here"),
        ("delete", "UNDEPLOYED"),
    ]]);
}

#[test]
fn what_an_earlier_run_left_is_adopted_or_cleaned_up() {
    adopting(&[("adopt running", "attach"), ("is", "running"), ("attached!", ""), ("is", "running: network: boom")]);
    adopting(&[("adopt running", "attach"), ("exit 1", ""), ("attached", "stop 0s log"), ("stopped", "detach")]);
    adopting(&[("adopt running", "attach"), ("attached?", ""), ("+2", "attach"), ("attached", "CREATED"), ("+60", "")]);
    // A description of a container is wish enough where nothing else is known.
    for state in ["adopt exit 7", "adopt incomplete"] {
        adopting(&[(state, "stop 10s"), ("stopped", "detach"), ("detached", "CREATING, prepare")]);
    }
    adopting(&[("adopt unreadable", "stop 0s log"), ("deploy", "CREATING"), ("stopped", "detach")]);
}

#[test]
fn commands_wait_until_it_is_known_what_runs() {
    adopting(&[("deploy", ""), ("adopt running", "attach"), ("attached", "CREATED"), ("is", "running")]);
    adopting(&[("delete", ""), ("adopt running", "stop 10s"), ("stopped", "detach"), ("detached", "UNDEPLOYED")]);
    adopting(&[("deploy", ""), ("adopt", "CREATING, prepare")]);
    adopting(&[
        ("deploy", ""),
        ("adopt incomplete", "stop 10s, CREATING"),
        ("stopped", "detach"),
        ("detached", "CREATING, prepare"),
    ]);
    // Not for ever: what turns up after that and is not in the way is still adopted.
    adopting(&[
        ("deploy", ""),
        ("+29", ""),
        ("+30", "CREATING, prepare"),
        ("adopt running", ""),
        ("prepared", "attach"),
    ]);
}

#[test]
fn what_is_wanted_is_brought_up_without_anybody_saying_so() {
    let lost = vec![wanted(spec(0), None)];
    planned(
        lost,
        &[
            ("is", "absent: the runtime for docker does not say what it holds: it was only just asked"),
            ("+3", ""),
            ("adopt", "CREATING, prepare"),
            // However long it takes: nobody else is told to run it.
            ("prepared?", ""),
            ("+200", "CREATING away, prepare"),
            ("prepared?", ""),
            ("+400", "CREATING away, prepare"),
            ("prepared", "attach"),
            ("attached?", ""),
            ("+600", "CREATING away, attach"),
        ],
    );
    // As it was described last, not as what is there was.
    planned(vec![wanted(spec(0), None)], &[("adopt running", "attach"), ("attached", "CREATED"), ("is", "running")]);
    let other = InstanceSpec { image: "b:1".into(), ..spec(0) };
    planned(
        vec![wanted(other, None)],
        &[("adopt running", "stop 10s"), ("stopped", "detach"), ("detached", "CREATING, prepare b:1")],
    );
    // What a power cut has ended.
    planned(
        vec![wanted(spec(0), None)],
        &[("adopt exit 137", "stop 10s"), ("stopped", "detach"), ("detached", "CREATING, prepare")],
    );
}

#[test]
fn what_is_not_wanted_goes_and_what_has_ended_stays_so() {
    planned(vec![], &[("adopt running", "stop 10s"), ("stopped", "detach"), ("detached", "UNDEPLOYED"), ("is", "")]);
    let once = InstanceSpec { one_shot: true, ..spec(0) };
    planned(
        vec![wanted(once.clone(), Some((Status::Completed, "")))],
        &[("adopt", ""), ("+60", ""), ("is", "completed")],
    );
    planned(
        vec![wanted(once.clone(), None)],
        &[("adopt exit 0", "stop 0s log"), ("stopped", "detach"), ("detached", "COMPLETED"), ("+60", "")],
    );
    planned(
        vec![wanted(once, None)],
        &[("adopt exit 137", "stop 0s log"), ("stopped", "detach"), ("detached", "FAILED exit code 137")],
    );
    let ended = vec![wanted(spec(0), Some((Status::Failed, "exit code 3")))];
    planned(ended, &[("adopt exit 3", "stop 0s log"), ("stopped", "detach"), ("detached", ""), ("+60", "")]);
}

#[test]
fn what_falls_is_raised_again_where_it_was_and_told_after_the_last_time() {
    raising(&[
        UP,
        &[
            ("exit 3", "CREATING exit code 3; restart 1 of 2 in 1 s"),
            ("is", "starting: exit code 3; restart 1 of 2 in 1 s"),
        ],
        &[
            ("+1", "start"),
            ("started", "CREATED"),
            ("exit 0", "CREATING ended with exit code 0; restart 2 of 2 in 2 s"),
        ],
        &[("exit 0", ""), ("+3", "start"), ("started", "CREATED"), ("oom", "stop 0s log"), ("stopped", "detach")],
        &[("detached", "FAILED out of memory (limit 64 MiB); given up after 2 restarts within 60 s"), ("+60", "")],
        &[("deploy", "CREATING, prepare")],
    ]);
    // Long ago does not count.
    raising(&[
        UP,
        &[("exit 3", "CREATING exit code 3; restart 1 of 2 in 1 s"), ("+1", "start"), ("started", "CREATED")],
        &[
            ("exit 3", "CREATING exit code 3; restart 2 of 2 in 2 s"),
            ("+3", "start"),
            ("started", "CREATED"),
            ("+90", ""),
        ],
        &[
            ("exit 3", "CREATING exit code 3; restart 1 of 2 in 1 s"),
            ("+100", "CREATING exit code 3; restart 1 of 2 in 1 s, start"),
        ],
    ]);
    // Where its sandbox has gone too, it is made anew; that is no second fall.
    raising(&[
        UP,
        &[("exit 137", "CREATING exit code 137; restart 1 of 2 in 1 s"), ("+1", "start"), ("started!", "stop 10s")],
        &[
            ("stopped", "detach"),
            ("detached", "CREATING, prepare"),
            ("prepared!", "CREATING boom; restart 2 of 2 in 2 s, stop 0s"),
        ],
        &[("stopped", "CREATING"), ("+2", ""), ("+3", "prepare"), ("prepared", "attach")],
    ]);
    // A delete ends that, and so does another description.
    raising(&[
        UP,
        &[("exit 3", "CREATING exit code 3; restart 1 of 2 in 1 s"), ("delete", "stop 10s"), ("stopped", "detach")],
        &[("detached", "UNDEPLOYED"), ("+60", ""), ("is", "")],
    ]);
    // What has never run is somebody else's to try.
    raising(&[&[("deploy", "CREATING, prepare"), ("prepared!", "stop 0s"), ("stopped", "FAILED boom"), ("+60", "")]]);
    raising(&[
        &[("deploy once", "CREATING, prepare"), ("prepared", "attach"), ("attached", "start"), ("started", "CREATED")],
        &[("exit 2", "stop 0s log"), ("stopped", "detach"), ("detached", "FAILED exit code 2")],
    ]);
}

#[test]
fn an_end_is_kept_with_the_command_that_wanted_it() {
    let mut core = adopted_core();
    let mut kept = Vec::new();
    for word in ["deploy", "prepared", "attached", "started", "exit 3", "stopped", "detached"] {
        let notes = core.handle(Duration::ZERO, event(word)).into_iter();
        kept.extend(notes.filter_map(|effect| if let Effect::Keep(note) = effect { Some(note) } else { None }));
    }
    let (instance, detail) = (spec(0).id, "exit code 3".to_owned());
    assert_eq!(kept, [Note::Ended { instance, sequence: 1, status: Status::Failed, detail }]);
    let found = core_after(&["adopt running"]);
    assert_eq!(found, [Note::Found { instance: spec(0).id, document: "earlier".into() }, Note::LookedAround]);
}

fn core_after(words: &[&str]) -> Vec<Note> {
    let mut core = core(Plan::default(), NEVER);
    let effects = words.iter().flat_map(|word| core.handle(Duration::ZERO, event(word))).collect::<Vec<_>>();
    effects.into_iter().filter_map(|effect| if let Effect::Keep(note) = effect { Some(note) } else { None }).collect()
}

#[test]
fn what_comes_when_nobody_waits_any_more_does_not_overtake_what_has_waited() {
    for (later, expected) in
        [("delete", "CREATING, prepare, cancel"), ("deploy b:1", "CREATING, prepare, cancel, CREATING")]
    {
        let mut core = core(Plan::default(), NEVER);
        assert_eq!(text(&core.handle(HOLD.saturating_sub(Duration::from_secs(1)), event("deploy"))), "");
        assert_eq!(text(&core.handle(HOLD, event(later))), expected);
        assert_eq!(text(&core.handle(HOLD, Event::Tick)), "", "{later}");
    }
}

#[test]
fn an_explanation_says_what_stands_in_the_way() {
    let mut core = core(Plan { wanted: vec![wanted(spec(0), None)], complete: true }, NEVER);
    let silent = Event::Silent { technology: Technology::Container, reason: "no Docker at /d".into() };
    core.handle(Duration::ZERO, silent);
    let told = core.explain(Duration::from_secs(4), &spec(0).id).expect("it is wanted");
    assert_eq!((told.wanted, told.sequence, told.state, told.wanted_for.as_secs()), (Wanting::Run, 7, "absent", 4));
    assert_eq!(told.reasons, ["the runtime for docker does not say what it holds: no Docker at /d"]);
    core.handle(Duration::from_secs(5), event("adopt"));
    core.handle(Duration::from_secs(6), event("prepared?"));
    let told = core.explain(Duration::from_secs(7), &spec(0).id).expect("it is there");
    assert_eq!(
        (told.state, told.state_for, told.next_try),
        ("preparing", Some(Duration::from_secs(2)), Some(Duration::from_secs(1)))
    );
    assert_eq!(told.reasons, ["away"]);
    assert_eq!(core.explain(Duration::ZERO, &spec(1).id), None);
}

#[test]
fn a_drain_ends_the_step_in_hand_and_leaves_or_stops() {
    check(&[UP, &[("drain leave", ""), ("is", "running, drained"), ("deploy b:1", ""), ("+60", "")]]);
    check(&[&[
        ("deploy", "CREATING, prepare"),
        ("drain leave", ""),
        ("is", "preparing"),
        ("prepared", ""),
        ("is", "attaching, drained"),
    ]]);
    check(&[
        UP,
        &[("drain stop", "stop 5s log"), ("deploy", ""), ("stopped", "detach"), ("is", "stopping")],
        &[("detached", "DEAD the node shuts down"), ("is", "dead: the node shuts down, drained")],
    ]);
    check(&[&[
        ("deploy", "CREATING, prepare"),
        ("drain stop", "cancel"),
        ("prepared!", "stop 0s"),
        ("stopped", "DEAD the node shuts down"),
    ]]);
}

#[test]
fn ended_instances_are_remembered_up_to_a_bound() {
    let mut core = adopted_core();
    for number in 0..ENDED as u32 + 5 {
        let spec = InstanceSpec { technology: Technology::Wasm, ..spec(number) };
        core.handle(Duration::ZERO, Event::Deploy(Box::new(spec), 1));
    }
    assert_eq!(core.list().len(), ENDED);
    assert_eq!(core.output(&spec(0).id), Output::Nowhere);
    assert_eq!(core.output(&spec(ENDED as u32).id), Output::Kept(Vec::new()));
}

#[test]
fn the_output_of_an_ended_instance_is_kept() {
    let (mut core, id) = (adopted_core(), spec(0).id);
    for (word, _) in UP {
        core.handle(Duration::ZERO, event(word));
    }
    assert_eq!(core.output(&id), Output::Runtime(Technology::Container));
    core.handle(Duration::ZERO, event("exit 1"));
    core.handle(Duration::ZERO, Event::Stopped { instance: id.clone(), result: Ok(b"last words".to_vec()) });
    core.handle(Duration::ZERO, event("detached"));
    assert_eq!(core.output(&id), Output::Kept(b"last words".to_vec()));
}

fn check(parts: &[Rows]) {
    play(adopted_core(), &parts.concat());
}

/// Of a first run, or of one that has lost what was wanted.
fn adopting(rows: Rows) {
    play(core(Plan::default(), NEVER), rows);
}

/// Of a run that knows all that is wanted.
fn planned(wanted: Vec<Wanted>, rows: Rows) {
    play(core(Plan { wanted, complete: true }, NEVER), rows);
}

fn wanted(spec: InstanceSpec, ended: Option<(Status, &str)>) -> Wanted {
    Wanted { spec, sequence: 7, ended: ended.map(|(status, why)| (status, why.to_owned())) }
}

/// Restarts up to twice in a minute.
fn raising(parts: &[Rows]) {
    let mut core = core(Plan::default(), Restarts { limit: 2, window: Duration::from_secs(60) });
    core.handle(Duration::ZERO, event("adopt"));
    play(core, &parts.concat());
}

const NEVER: Restarts = Restarts { limit: 0, window: Duration::from_secs(60) };

fn core(plan: Plan, policy: Restarts) -> Core {
    Core::new(vec![Technology::Container], plan, policy)
}

fn play(mut core: Core, rows: Rows) {
    let mut now = Duration::ZERO;
    for (index, (word, expected)) in rows.iter().enumerate() {
        let got = match word.strip_prefix('+') {
            _ if *word == "is" => is(&core),
            Some(seconds) => {
                now = Duration::from_secs(seconds.parse().expect("seconds"));
                text(&core.handle(now, Event::Tick))
            }
            None => text(&core.handle(now, event(word))),
        };
        assert_eq!(got, *expected, "row {index} ({word}) of {rows:#?}");
    }
}

fn adopted_core() -> Core {
    let mut core = core(Plan::default(), NEVER);
    assert_eq!(core.handle(Duration::ZERO, event("adopt")), [Effect::Keep(Note::LookedAround)]);
    core
}

fn is(core: &Core) -> String {
    let state = |info: &InstanceInfo| match info.detail.as_str() {
        "" => info.state.to_owned(),
        detail => format!("{}: {detail}", info.state),
    };
    let mut words: Vec<_> = core.list().iter().map(state).collect();
    if core.drained() {
        words.push("drained".into());
    }
    words.join(", ")
}

/// `!` is a failure for good, `?` one that may pass.
fn event(word: &str) -> Event {
    let instance = spec(0).id;
    match word {
        "deploy" => deploy(spec(0)),
        "deploy b:1" => deploy(InstanceSpec { image: "b:1".into(), ..spec(0) }),
        "deploy once" => deploy(InstanceSpec { one_shot: true, ..spec(0) }),
        "deploy wasm" => deploy(InstanceSpec { technology: Technology::Wasm, ..spec(0) }),
        "delete" => Event::Delete(instance),
        "trap" => Event::Exited { instance, code: 134, out_of_memory: false, reason: Some("trap: x".into()) },
        "oom" => Event::Exited { instance, code: 137, out_of_memory: true, reason: None },
        "drain leave" => Event::Drain { stop: false },
        "drain stop" => Event::Drain { stop: true },
        "adopt" => Event::Adopted { technology: Technology::Container, found: Vec::new() },
        "adopt running" => adopted(FoundState::Running { netns: "/net/0".into() }),
        "adopt incomplete" => adopted(FoundState::Incomplete),
        "adopt unreadable" => adopted(FoundState::Unreadable),
        _ => match (word.strip_prefix("exit "), word.strip_prefix("adopt exit ")) {
            (Some(code), _) => {
                Event::Exited { instance, code: code.parse().expect("a code"), out_of_memory: false, reason: None }
            }
            (_, Some(code)) => {
                adopted(FoundState::Exited { code: code.parse().expect("a code"), out_of_memory: false, reason: None })
            }
            _ => answer(word, instance),
        },
    }
}

fn deploy(spec: InstanceSpec) -> Event {
    Event::Deploy(Box::new(spec), 1)
}

fn answer(word: &str, instance: InstanceId) -> Event {
    let failure = match word.as_bytes().last() {
        Some(b'!') => Some(Failure { reason: "boom".into(), hope: Hope::None }),
        Some(b'?') => Some(Failure { reason: "away".into(), hope: Hope::Soon }),
        _ => None,
    };
    fn result<T>(value: T, failure: Option<Failure>) -> Result<T, Failure> {
        failure.map_or(Ok(value), Err)
    }
    match word.trim_end_matches(['!', '?']) {
        "prepared" => Event::Prepared { instance, result: result("/net/0".into(), failure) },
        "attached" => Event::Attached { instance, result: result(addresses(), failure) },
        "started" => Event::Started { instance, result: result((), failure) },
        "stopped" => Event::Stopped { instance, result: result(Vec::new(), failure) },
        "detached" => Event::Detached { instance, result: result((), failure) },
        _ => panic!("unknown word {word:?}"),
    }
}

fn adopted(state: FoundState) -> Event {
    // As it was described once: the cluster's document differs each time.
    let spec = InstanceSpec { document: "earlier".into(), ..spec(0) };
    Event::Adopted { technology: Technology::Container, found: vec![Found { spec, state }] }
}

fn text(effects: &[Effect]) -> String {
    let said = effects.iter().filter(|effect| !matches!(effect, Effect::Keep(_)));
    let words = said.map(|effect| match effect {
        Effect::Keep(_) => unreachable!("left out"),
        Effect::Prepare(spec) if spec.image == "a:1" => "prepare".into(),
        Effect::Prepare(spec) => format!("prepare {}", spec.image),
        Effect::CancelPrepare(_) => "cancel".into(),
        Effect::Attach { netns, .. } => {
            assert_eq!(netns.to_str(), Some("/net/0"));
            "attach".into()
        }
        Effect::Start { .. } => "start".into(),
        Effect::Stop { grace, keep_log, .. } => {
            format!("stop {}s{}", grace.as_secs(), if *keep_log { " log" } else { "" })
        }
        Effect::Detach(_) => "detach".into(),
        Effect::Report { status, detail, .. } => format!("{status} {detail}").trim().to_owned(),
    });
    words.collect::<Vec<String>>().join(", ")
}

fn addresses() -> Addresses {
    Addresses { v4: Ipv4Addr::new(10, 18, 0, 2), v6: Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 2) }
}

fn spec(number: u32) -> InstanceSpec {
    let id = InstanceId { service: "app.default.web.test".parse().expect("a good name"), number };
    InstanceSpec {
        job: "64b0000000000000000000aa".into(),
        image: "a:1".into(),
        limits: Limits { memory_mib: Some(64), ..Limits::default() },
        document: "now".into(),
        ..InstanceSpec::new(id, Technology::Container)
    }
}

/// What the random world does next, about one of three instances.
#[derive(Clone, Debug)]
enum Move {
    Deploy {
        number: u32,
        image: u8,
    },
    Delete {
        number: u32,
    },
    /// Answers the oldest effect under way but `skip`.
    Answer {
        skip: usize,
        outcome: u8,
    },
    Exit {
        number: u32,
        code: i64,
    },
    Wait {
        seconds: u64,
    },
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        2 => (0..3u32, 0..2u8).prop_map(|(number, image)| Move::Deploy { number, image }),
        2 => (0..3u32).prop_map(|number| Move::Delete { number }),
        8 => (0..3usize, 0..8u8).prop_map(|(skip, outcome)| Move::Answer { skip, outcome }),
        2 => (0..3u32, 0..2i64).prop_map(|(number, code)| Move::Exit { number, code }),
        1 => (1..40u64).prop_map(|seconds| Move::Wait { seconds }),
    ];
    proptest::collection::vec(one, 1..80)
}

/// Runtime and network as they really are, beside what the core believes.
#[derive(Default)]
struct World {
    now: Duration,
    under_way: Vec<Effect>,
    /// Number of the instance → its image, from the moment a prepare begins to the moment a stop has succeeded.
    made: BTreeMap<InstanceId, String>,
    attached: BTreeSet<InstanceId>,
    wanted: BTreeMap<InstanceId, String>,
}

impl World {
    fn apply(&mut self, core: &mut Core, event: Event) {
        for effect in core.handle(self.now, event) {
            let id = match &effect {
                Effect::Prepare(spec) => {
                    let earlier = self.made.insert(spec.id.clone(), spec.image.clone());
                    // A prepare may be repeated for the same description; for another one the earlier copy must be gone.
                    assert!(earlier.is_none_or(|image| image == spec.image), "two copies of {}", spec.id);
                    spec.id.clone()
                }
                Effect::Report { instance, status, .. } => {
                    let bad = matches!(status, Status::Failed | Status::Dead | Status::Completed);
                    assert!(!bad || self.wanted.contains_key(instance), "{status} after the delete of {instance}");
                    continue;
                }
                Effect::CancelPrepare(id) => {
                    let preparing = |effect: &Effect| matches!(effect, Effect::Prepare(spec) if spec.id == *id);
                    assert!(self.under_way.iter().any(preparing), "nothing to cancel for {id}");
                    continue;
                }
                Effect::Attach { instance, .. } => {
                    assert!(self.made.contains_key(instance), "attach of {instance}, which is not prepared");
                    self.attached.insert(instance.clone());
                    instance.clone()
                }
                Effect::Start { instance, .. } => {
                    assert!(self.attached.contains(instance), "start of {instance}, which has no network");
                    instance.clone()
                }
                Effect::Stop { instance, .. } | Effect::Detach(instance) => instance.clone(),
                Effect::Keep(Note::Ended { instance, .. }) => {
                    assert!(self.wanted.contains_key(instance), "the end of {instance}, which nobody wants, is kept");
                    continue;
                }
                Effect::Keep(_) => continue,
            };
            assert!(core.live.contains_key(&id), "{effect:?} for an unknown instance");
            assert!(!self.under_way.iter().any(|other| about(other) == id), "two effects of {id} at once");
            self.under_way.push(effect);
        }
    }

    fn answer(&mut self, core: &mut Core, index: usize, outcome: u8) {
        let failure = match outcome {
            0 => Some(Failure { reason: "boom".into(), hope: Hope::None }),
            1 => Some(Failure { reason: "away".into(), hope: Hope::Soon }),
            _ => None,
        };
        let effect = self.under_way.remove(index);
        let instance = about(&effect);
        let event = match effect {
            Effect::Prepare(_) => Event::Prepared { instance, result: failure.map_or(Ok("/net".into()), Err) },
            Effect::Attach { .. } => Event::Attached { instance, result: failure.map_or(Ok(addresses()), Err) },
            Effect::Start { .. } => Event::Started { instance, result: failure.map_or(Ok(()), Err) },
            Effect::Stop { .. } => {
                if failure.is_none() {
                    self.made.remove(&instance);
                }
                Event::Stopped { instance, result: failure.map_or(Ok(Vec::new()), Err) }
            }
            Effect::Detach(_) => {
                if failure.is_none() {
                    self.attached.remove(&instance);
                }
                Event::Detached { instance, result: failure.map_or(Ok(()), Err) }
            }
            Effect::CancelPrepare(_) | Effect::Report { .. } | Effect::Keep(_) => unreachable!("not answered"),
        };
        self.apply(core, event);
    }

    /// Everything succeeds from here on, until nothing happens any more.
    fn settle(&mut self, core: &mut Core) {
        for _ in 0..1000 {
            if self.under_way.is_empty() {
                self.now += Duration::from_secs(40);
                self.apply(core, Event::Tick);
            }
            if self.under_way.is_empty() {
                return;
            }
            self.answer(core, 0, u8::MAX);
        }
        panic!("it never comes to rest: {core:#?}");
    }
}

fn about(effect: &Effect) -> InstanceId {
    match effect {
        Effect::Prepare(spec) => spec.id.clone(),
        Effect::CancelPrepare(id) | Effect::Detach(id) => id.clone(),
        Effect::Attach { instance, .. }
        | Effect::Start { instance, .. }
        | Effect::Stop { instance, .. }
        | Effect::Report { instance, .. } => instance.clone(),
        Effect::Keep(_) => unreachable!("about a plan"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_events_leaves_two_copies_or_forgets_one(moves in moves(), restarts in 0..3u32) {
        let policy = Restarts { limit: restarts, window: Duration::from_secs(60) };
        let (mut core, mut world) = (core(Plan::default(), policy), World::default());
        core.handle(Duration::ZERO, event("adopt"));
        let mut sequence = 0;
        for step in moves {
            match step {
                Move::Deploy { number, image } => {
                    let spec = InstanceSpec { image: format!("image:{image}"), ..spec(number) };
                    world.wanted.insert(spec.id.clone(), spec.image.clone());
                    sequence += 1;
                    world.apply(&mut core, Event::Deploy(Box::new(spec), sequence));
                }
                Move::Delete { number } => {
                    world.wanted.remove(&spec(number).id);
                    world.apply(&mut core, Event::Delete(spec(number).id));
                }
                Move::Answer { skip, outcome } => {
                    if skip < world.under_way.len() {
                        world.answer(&mut core, skip, outcome);
                    }
                }
                Move::Exit { number, code } => {
                    let exited = Event::Exited { instance: spec(number).id, code, out_of_memory: false, reason: None };
                    world.apply(&mut core, exited);
                }
                Move::Wait { seconds } => {
                    world.now += Duration::from_secs(seconds);
                    world.apply(&mut core, Event::Tick);
                }
            }
        }
        world.settle(&mut core);
        let running: BTreeMap<_, _> = core.live.values().map(|live| (live.id().clone(), live.spec.image.clone())).collect();
        prop_assert_eq!(&running, &world.made, "what the core believes is what is");
        prop_assert_eq!(running.keys().collect::<Vec<_>>(), world.attached.iter().collect::<Vec<_>>());
        for (id, image) in &running {
            prop_assert!(core.runs(id), "{} is not on its way any more", id);
            prop_assert_eq!(world.wanted.get(id), Some(image), "{} runs as it was wanted last", id);
        }
        for id in world.wanted.keys().filter(|id| !running.contains_key(id)) {
            prop_assert!(core.ended.iter().any(|ended| ended.spec.id == *id), "{} is forgotten", id);
        }
    }
}

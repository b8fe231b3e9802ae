//! What a session does next, without a cluster.

use super::*;

fn session() -> Session {
    let cluster = ClusterConfig { host: "h".into(), port: None, tls: false, generation: None, mqtt_tls: None };
    let (facts, public_address, overlay_address) = (NodeFacts::default(), None, None);
    let http = http_client(false).expect("a client");
    let registrar = Registrar { http, cluster, facts, public_address, overlay_address, tunnel_port: 50103 };
    Session { up_since: Some(Instant::now()), ..Session::new(registrar, NodeUsage::default(), None, SILENCE) }
}

/// What is still to be sent is sent in the order subscriptions, ends of subscriptions.
#[tokio::test]
async fn an_interest_that_goes_and_comes_back_stays_subscribed() {
    let service: ServiceName = "app.default.web.test".parse().expect("a name");
    let topic = updates_topic(&service);
    let mut session = session();
    let say = |session: &mut Session, report: fn(ServiceName) -> Report| session.report(report(service.clone()));
    say(&mut session, Report::InterestAdd);
    assert_eq!(session.subscribe, [vec![topic.clone()]]);
    session.subscribe.clear();
    say(&mut session, Report::InterestRemove);
    assert_eq!(session.unsubscribe, std::slice::from_ref(&topic));
    say(&mut session, Report::InterestAdd);
    assert!(session.subscribe.is_empty() && session.unsubscribe.is_empty(), "the broker has it still");
    say(&mut session, Report::InterestRemove);
    session.unsubscribe.clear();

    say(&mut session, Report::InterestAdd);
    say(&mut session, Report::InterestRemove);
    assert!(session.subscribe.is_empty() && session.unsubscribe.is_empty(), "the broker never had it");
    say(&mut session, Report::InterestAdd);
    assert_eq!(session.subscribe, [vec![topic]]);
}

#[tokio::test]
async fn whoever_stops_waits_for_nothing_that_is_not_begun_any_more() {
    let mut session = session();
    let now = Instant::now();
    (session.register_at, session.connect_at) = (Some(now), Some(now));
    assert_eq!(session.wake_at(), now);
    session.deadline = Some(now + Duration::from_secs(20));
    assert_eq!(session.wake_at(), now + Duration::from_secs(20));
}

/// A connection that is made, and ends after so many seconds; what is told of it to the node.
async fn connection(session: &mut Session, seconds: u64, reason: &str) -> Vec<Command> {
    session.up();
    session.connected = true;
    tokio::time::advance(Duration::from_secs(seconds)).await;
    session.down(reason);
    session.inbox.drain(..).collect()
}

#[tokio::test(start_paused = true)]
async fn connections_that_do_not_last_are_complained_of_once() {
    let mut session = session();
    let generation = Generation::G4;
    session.identity =
        Some(NodeIdentity { id: "6b03".parse().expect("an id"), broker_port: 1, generation, subnet: None });
    session.register_at = None;
    let reasons = ["closed by peer", "reset by peer (os error 104)"];
    for (reason, number) in reasons.into_iter().cycle().zip(1..=10) {
        let told = connection(&mut session, 1, reason).await;
        assert!(matches!(told.as_slice(), [Command::Disconnected(text)] if text == reason), "{told:?}");
        assert_eq!(session.short_lived, number);
    }
    for reason in reasons {
        assert!(!session.link_complaints.is_new(&outline(reason), Instant::now()), "{reason}");
    }
    assert!(session.link_backoff.next() >= Duration::from_secs(LONGEST_RECONNECT) / 2);

    // One that lasts is a new beginning, also while it lasts.
    session.connect_at = None;
    session.up();
    assert_eq!(session.wake_at(), session.up_since.expect("it is up") + STABLE);
    tokio::time::advance(STABLE).await;
    session.advance();
    assert_eq!(session.short_lived, 0);
    assert!(session.link_backoff.next() <= Duration::from_secs(1));
    session.down("closed by peer");
    assert!(!session.link_complaints.is_new("closed by peer", Instant::now()), "it was said");
    assert!(session.link_complaints.is_new("another reason", Instant::now()));
}

#[tokio::test]
async fn trouble_is_told_when_it_is_another_than_before() {
    let mut session = session();
    for error in ["refused", "refused", "not known", "refused"] {
        session.trouble(error);
    }
    let told: Vec<&Command> = session.inbox.iter().collect();
    assert!(matches!(told.as_slice(), [Command::Trouble(last)] if last == "refused"), "{told:?}");
    session.inbox.clear();
    session.trouble("refused");
    assert!(session.inbox.is_empty());
    session.trouble(&"x".repeat(10 * LONGEST_TROUBLE));
    assert!(matches!(session.inbox.pop_front(), Some(Command::Trouble(text)) if text.len() == LONGEST_TROUBLE));
}

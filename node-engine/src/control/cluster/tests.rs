//! What a session does next, without a cluster.

use super::*;

fn session() -> Session {
    let cluster = ClusterConfig { host: "h".into(), port: None, tls: false, generation: None, mqtt_tls: None };
    let (facts, public_address) = (NodeFacts::default(), None);
    let http = http_client(false).expect("a client");
    let registrar = Registrar { http, cluster, facts, public_address, tunnel_port: 50103 };
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

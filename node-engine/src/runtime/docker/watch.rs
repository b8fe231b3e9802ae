//! Tells the ends of workloads: from Docker's event stream, and, after each time the stream was broken, from the list of containers,
//! so that an end nobody watched is told too. Events come in no order that could be relied on and are repeated after a reconnect;
//! `Running::take` makes each end be told once.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bollard::models::{ContainerSummaryStateEnum, EventMessage};
use bollard::query_parameters::{EventsOptions, ListContainersOptions};
use futures_util::StreamExt;
use tokio::sync::mpsc;

use super::Inner;
use super::client::{not_found, settled};
use super::container::{LABEL_ROLE, ROLE_WORKLOAD};
use crate::model::InstanceId;
use crate::runtime::{Exit, RuntimeError};

const BACK_OFF: Duration = Duration::from_millis(200);
const BACK_OFF_LONGEST: Duration = Duration::from_secs(1);
/// The code of a container that has gone without saying: as if killed.
const KILLED: i64 = 137;

/// Runs until it is aborted.
pub(super) async fn run(inner: Arc<Inner>, exits: mpsc::Sender<Exit>) {
    let mut delay = BACK_OFF;
    let mut away = false;
    loop {
        match follow(&inner, &exits, &mut away).await {
            Ok(()) => delay = BACK_OFF,
            Err(error) if !away => {
                tracing::warn!(%error, "Docker does not answer; containers go on, their ends are told when it is back");
                away = true;
            }
            Err(_) => {}
        }
        inner.client.forget();
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(BACK_OFF_LONGEST);
    }
}

/// One connection: what ended before it, then what ends while it lasts.
async fn follow(inner: &Inner, exits: &mpsc::Sender<Exit>, away: &mut bool) -> Result<(), RuntimeError> {
    let docker = inner.client.get().await?;
    // Events since before the list, so that none falls between the two.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    catch_up(inner, exits).await?;
    if std::mem::take(away) {
        tracing::info!("Docker answers again");
    }
    let filters = [
        ("type", vec!["container".to_owned()]),
        // Podman tells of `die` those who ask for `died`.
        ("event", vec!["die".to_owned(), "died".to_owned()]),
        ("label", vec![format!("{LABEL_ROLE}={ROLE_WORKLOAD}")]),
    ];
    let options = EventsOptions {
        since: Some(format!("{}.{:09}", since.as_secs(), since.subsec_nanos())),
        until: None,
        filters: Some(filters.map(|(name, values)| (name.to_owned(), values)).into()),
    };
    let mut events = Box::pin(docker.events(Some(options)));
    while let Some(event) = events.next().await {
        let event = event.map_err(|error| inner.client.failed("watch events", error))?;
        if let Some((container, code)) = died(event) {
            tell(inner, exits, &container, code).await;
        }
    }
    Ok(())
}

/// Compares what should run with what Docker says runs.
async fn catch_up(inner: &Inner, exits: &mpsc::Sender<Exit>) -> Result<(), RuntimeError> {
    let expected = inner.running.containers();
    if expected.is_empty() {
        return Ok(());
    }
    let docker = inner.client.get().await?;
    let options = ListContainersOptions {
        all: true,
        filters: Some(HashMap::from([("label".into(), vec![format!("{LABEL_ROLE}={ROLE_WORKLOAD}")])])),
        ..ListContainersOptions::default()
    };
    let listed = settled(|| docker.list_containers(Some(options.clone()))).await;
    let listed = listed.map_err(|error| inner.client.failed("list containers", error))?;
    let ended = |state| matches!(state, Some(ContainerSummaryStateEnum::EXITED | ContainerSummaryStateEnum::DEAD));
    let there: HashSet<_> =
        listed.into_iter().filter(|container| !ended(container.state)).filter_map(|container| container.id).collect();
    for container in expected.iter().filter(|container| !there.contains(*container)) {
        tell(inner, exits, container, None).await;
    }
    Ok(())
}

/// Tells an end unless it has been told or was asked for.
async fn tell(inner: &Inner, exits: &mpsc::Sender<Exit>, container: &str, code: Option<i64>) {
    let Some(instance) = inner.running.take(container) else { return };
    let state = match inner.client.get().await {
        Ok(docker) => match settled(|| docker.inspect_container(container, None)).await {
            Ok(found) => found.state,
            Err(error) => {
                if !not_found(&error) {
                    tracing::debug!(%instance, %error, "an ended container cannot be inspected");
                }
                None
            }
        },
        Err(_) => None,
    };
    let out_of_memory = state.as_ref().and_then(|state| state.oom_killed).unwrap_or(false);
    let code = code.or(state.and_then(|state| state.exit_code)).unwrap_or(KILLED);
    // The receiver lives as long as this task; a full queue makes the events wait in Docker's.
    let _ = exits.send(exit(inner, instance, code, out_of_memory)).await;
}

/// An end, with what is not known of it.
pub(super) fn exit(inner: &Inner, instance: InstanceId, code: i64, out_of_memory: bool) -> Exit {
    let unsaid = code == KILLED && !out_of_memory && inner.client.engine().podman;
    let reason =
        unsaid.then(|| format!("exit code {code}: killed, maybe for want of memory, which Podman does not tell"));
    Exit { instance, code, out_of_memory, reason }
}

/// Not every version of Podman says the code in its events.
fn died(event: EventMessage) -> Option<(String, Option<i64>)> {
    let actor = event.actor?;
    let code = actor.attributes.as_ref().and_then(|said| said.get("exitCode")?.parse().ok());
    Some((actor.id?, code))
}

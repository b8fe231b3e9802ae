//! A closer look at instances, and answers that go on: outputs that are followed, and what happens.

use std::convert::Infallible;
use std::time::UNIX_EPOCH;

use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::{Extension, Json};
use futures_util::StreamExt;
use futures_util::stream;
use tokio::sync::mpsc;

use super::Api;
use super::dto::hardware::Hardware;
use super::dto::look::{Event, EventsQuery, Inspection, Usage};
use super::routes::{Refused, instance_here};
use crate::drain::Drain;
use crate::{model, runtime};

/// Events of the past that are told where nobody says how many.
const USUAL_PAST: usize = 100;

pub(super) async fn inspect(State(api): State<Api>, Path(name): Path<String>) -> Result<Json<Inspection>, Refused> {
    let instance = instance_here(&api, &name).await?;
    Ok(Json(api.node.inspect(instance).await?))
}

pub(super) async fn hardware(State(api): State<Api>) -> Result<Json<Hardware>, Refused> {
    Ok(Json(api.node.hardware().await?))
}

pub(super) async fn stats(State(api): State<Api>) -> Result<Json<Vec<Usage>>, Refused> {
    Ok(Json(api.node.stats().await?))
}

/// One JSON document a line.
pub(super) async fn events(
    State(api): State<Api>,
    Extension(drain): Extension<Drain>,
    query: Result<Query<EventsQuery>, QueryRejection>,
) -> Result<Body, Refused> {
    let Query(query) = query?;
    let mut events = api.node.events(query.past.unwrap_or(USUAL_PAST)).await?;
    if !query.follow {
        let past: Vec<u8> = std::iter::from_fn(|| events.try_recv().ok()).flat_map(|event| line(&event)).collect();
        return Ok(past.into());
    }
    let lines = receiver(events).map(|event| Ok::<_, Infallible>(Bytes::from(line(&event))));
    Ok(Body::from_stream(lines.take_until(begun(drain))))
}

/// A body that ends with what is followed, or with the drain.
pub(super) fn stream(follow: runtime::Follow, drain: Drain) -> Body {
    Body::from_stream(receiver(follow).take_until(begun(drain)))
}

fn receiver<T: Send + 'static>(receiver: mpsc::Receiver<T>) -> impl stream::Stream<Item = T> + Send + 'static {
    stream::unfold(receiver, async |mut receiver| Some((receiver.recv().await?, receiver)))
}

async fn begun(drain: Drain) {
    drain.wait().await;
}

fn line(event: &model::Event) -> Vec<u8> {
    let since = event.time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let event = Event {
        time_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        about: event.kind.about().into(),
        subject: event.subject.clone(),
        event: event.kind.word().into(),
        detail: event.detail.clone(),
    };
    let mut line = serde_json::to_vec(&event).expect("plain data without maps of odd keys becomes JSON");
    line.push(b'\n');
    line
}

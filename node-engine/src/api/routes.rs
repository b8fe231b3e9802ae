//! What is asked and how it is answered. Every answer is JSON (logs are bytes), also the refusals.

use std::fmt;
use std::sync::Arc;

use axum::Extension;
use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use serde::de::DeserializeOwned;

use super::dto::{
    Changed, ClusterInstance, ClusterNode, DeployQuery, Explanation, Instance, LogsQuery, Move, Refusal, Replicate,
    Status, net,
};
use super::selector::Unresolved;
use super::{Api, LARGEST_BODY, NetChoice, NodeApiError, REQUEST_TIMEOUT, Selector, exec, look, metrics};
use crate::config::DatapathChoice;
use crate::drain::Drain;
use crate::model::{InstanceId, ServiceName};
use crate::standalone::{ClusterApi, ClusterApiError, Target};

/// Bytes of output that are given at most, and where nobody says how many.
const LONGEST_TAIL: usize = 4 << 20;
const USUAL_TAIL: usize = 64 << 10;
/// Rows of a table of the overlay, where nobody says how many and at most.
const USUAL_ROWS: usize = 100;
const MOST_ROWS: usize = 65_536;

/// Answers that have no end of their own end with the drain.
pub(super) fn router(api: Api, drain: Drain) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/instances", get(instances))
        .route("/instances/{instance}/logs", get(logs))
        .route("/instances/{instance}", get(look::inspect))
        .route("/instances/{instance}/exec", get(exec::open))
        .route("/stats", get(look::stats))
        .route("/events", get(look::events))
        .route("/hardware", get(look::hardware))
        .route("/metrics", get(metrics::metrics))
        .route("/instances/{instance}/explain", get(explain))
        .route("/net/flows", get(flows))
        .route("/net/services", get(services))
        .route("/net/peers", get(peers))
        .route("/net/counters", get(counters))
        .route("/net/datapath/{choice}", post(switch))
        .route("/cluster/deploy", post(deploy))
        .route("/cluster/instances", get(cluster_instances))
        .route("/cluster/instances/{target}", delete(take_down))
        .route("/cluster/replicate", post(replicate))
        .route("/cluster/move", post(move_instance))
        .route("/cluster/nodes", get(nodes))
        .fallback(async || Refused::new(StatusCode::NOT_FOUND, "the local API has no such path"))
        .method_not_allowed_fallback(async || Refused::new(StatusCode::METHOD_NOT_ALLOWED, "not with this method"))
        .layer(middleware::from_fn(within_time))
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .layer(Extension(drain))
        .with_state(api)
}

pub(super) async fn within_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let error = format!("no answer within {} s: is the machine overloaded?", REQUEST_TIMEOUT.as_secs());
            Refused::new(StatusCode::GATEWAY_TIMEOUT, error).into_response()
        }
    }
}

async fn status(State(api): State<Api>) -> Json<Status> {
    Json(api.node.status().await)
}

async fn instances(State(api): State<Api>) -> Result<Json<Vec<Instance>>, Refused> {
    Ok(Json(api.node.instances().await?))
}

async fn logs(
    State(api): State<Api>,
    Extension(drain): Extension<Drain>,
    Path(name): Path<String>,
    query: Result<Query<LogsQuery>, QueryRejection>,
) -> Result<Body, Refused> {
    let Query(query) = query?;
    let instance = instance_here(&api, &name).await?;
    let tail = query.tail.unwrap_or(USUAL_TAIL).min(LONGEST_TAIL);
    if query.follow {
        return Ok(look::stream(api.node.follow(instance, tail).await?, drain));
    }
    Ok(api.node.logs(instance, tail).await?.into())
}

/// The instance on this node that is meant.
pub(super) async fn instance_here(api: &Api, name: &str) -> Result<InstanceId, Refused> {
    let selector: Selector = parse(name)?;
    let known = api.node.instances().await?;
    let known = ids(known.iter().map(|known| (&known.service, known.number)));
    let service = one_service(&selector, known.iter().map(|instance| &instance.service))?;
    one_instance(&selector, service, &known)
}

async fn explain(State(api): State<Api>, Path(name): Path<String>) -> Result<Json<Explanation>, Refused> {
    let instance = instance_here(&api, &name).await?;
    Ok(Json(api.node.explain(instance).await?))
}

async fn flows(
    State(api): State<Api>,
    query: Result<Query<net::Choice>, QueryRejection>,
) -> Result<Json<net::Page<net::Flow>>, Refused> {
    Ok(Json(api.node.flows(net_choice(query?.0)?).await?))
}

async fn services(
    State(api): State<Api>,
    query: Result<Query<net::Choice>, QueryRejection>,
) -> Result<Json<net::Page<net::Service>>, Refused> {
    Ok(Json(api.node.services(net_choice(query?.0)?).await?))
}

async fn peers(State(api): State<Api>) -> Result<Json<Vec<net::Peer>>, Refused> {
    Ok(Json(api.node.peers().await?))
}

async fn counters(State(api): State<Api>) -> Result<Json<Vec<net::Counter>>, Refused> {
    Ok(Json(api.node.counters().await?))
}

async fn switch(State(api): State<Api>, Path(name): Path<String>) -> Result<Json<net::Datapath>, Refused> {
    let unknown = || Refused::new(StatusCode::BAD_REQUEST, "a datapath is one of auto, ebpf, ebpf-plain, tun");
    let choice = DatapathChoice::parse(&name).ok_or_else(unknown)?;
    Ok(Json(api.node.switch(choice).await?))
}

fn net_choice(typed: net::Choice) -> Result<NetChoice, Refused> {
    let service: Option<Selector> = typed.service.as_deref().map(parse).transpose()?;
    if let Some(instance) = service.as_ref().filter(|service| service.number.is_some()) {
        let hint = format!("{instance} is one instance: ask for it as such, or for its service");
        return Err(Refused::new(StatusCode::BAD_REQUEST, hint));
    }
    let instance: Option<Selector> = typed.instance.as_deref().map(parse).transpose()?;
    Ok(NetChoice {
        service: service.map(|selector| selector.name()),
        instance: instance.map(|selector| (selector.name(), selector.number)),
        limit: typed.limit.unwrap_or(USUAL_ROWS).min(MOST_ROWS),
    })
}

async fn deploy(
    State(api): State<Api>,
    query: Result<Query<DeployQuery>, QueryRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Changed>, Refused> {
    let cluster = cluster(&api)?;
    let Query(query) = query?;
    let body = body?;
    let deployed = cluster.deploy(body.into(), query.replicas, query.on).await?;
    Ok(changed(&deployed))
}

async fn take_down(State(api): State<Api>, Path(name): Path<String>) -> Result<Json<Changed>, Refused> {
    let cluster = cluster(&api)?;
    let selector: Selector = parse(&name)?;
    let service = one_service(&selector, &cluster.services().await?)?;
    let target = match selector.number {
        Some(number) => Target::Instance(InstanceId { service, number }),
        None => Target::Service(service),
    };
    Ok(changed(&cluster.delete(target).await?))
}

async fn replicate(State(api): State<Api>, body: Result<Bytes, BytesRejection>) -> Result<Json<Changed>, Refused> {
    let cluster = cluster(&api)?;
    let wanted: Replicate = json(&body?)?;
    let selector: Selector = parse(&wanted.service)?;
    if selector.number.is_some() {
        let hint = format!("{selector} is one instance: name the service to replicate");
        return Err(Refused::new(StatusCode::BAD_REQUEST, hint));
    }
    let service = one_service(&selector, &cluster.services().await?)?;
    Ok(changed(&cluster.replicate(service, wanted.replicas).await?))
}

async fn move_instance(State(api): State<Api>, body: Result<Bytes, BytesRejection>) -> Result<Json<Changed>, Refused> {
    let cluster = cluster(&api)?;
    let wanted: Move = json(&body?)?;
    let selector: Selector = parse(&wanted.instance)?;
    let service = one_service(&selector, &cluster.services().await?)?;
    let instance = one_instance(&selector, service, &cluster_ids(cluster).await?)?;
    Ok(changed(&[cluster.move_instance(instance, wanted.node).await?]))
}

async fn nodes(State(api): State<Api>) -> Result<Json<Vec<ClusterNode>>, Refused> {
    Ok(Json(cluster(&api)?.nodes().await?))
}

async fn cluster_instances(State(api): State<Api>) -> Result<Json<Vec<ClusterInstance>>, Refused> {
    Ok(Json(cluster(&api)?.instances().await?))
}

fn cluster(api: &Api) -> Result<&Arc<dyn ClusterApi>, Refused> {
    api.cluster.as_ref().map_err(|other| {
        Refused::new(StatusCode::CONFLICT, format!("this node belongs to the cluster at {other}; deploy there"))
    })
}

async fn cluster_ids(cluster: &Arc<dyn ClusterApi>) -> Result<Vec<InstanceId>, Refused> {
    let known = cluster.instances().await?;
    Ok(ids(known.iter().map(|known| (&known.service, known.number))))
}

fn ids<'a>(known: impl Iterator<Item = (&'a String, u32)>) -> Vec<InstanceId> {
    known.filter_map(|(service, number)| Some(InstanceId { service: service.parse().ok()?, number })).collect()
}

fn one_service<'a>(
    selector: &Selector,
    known: impl IntoIterator<Item = &'a ServiceName>,
) -> Result<ServiceName, Refused> {
    selector.service(known).map_err(|unresolved| match unresolved {
        Unresolved::Nothing => {
            let full = format!("app.default.{}.default", selector.name());
            let error = format!("nothing here is called {selector}; the full name of a service is such as {full}");
            Refused::new(StatusCode::NOT_FOUND, error)
        }
        Unresolved::Ambiguous(services) => {
            let names: Vec<_> = services.iter().map(ToString::to_string).collect();
            let error = format!("{selector} is the name of several services: say which of {}", names.join(", "));
            Refused::new(StatusCode::CONFLICT, error)
        }
    })
}

/// The number may be left out where the service has one instance.
fn one_instance(selector: &Selector, service: ServiceName, known: &[InstanceId]) -> Result<InstanceId, Refused> {
    let numbers: Vec<u32> =
        known.iter().filter(|instance| instance.service == service).map(|instance| instance.number).collect();
    match (selector.number, numbers.as_slice()) {
        (Some(number), _) => Ok(InstanceId { service, number }),
        (None, [number]) => Ok(InstanceId { service, number: *number }),
        (None, []) => Err(Refused::new(StatusCode::NOT_FOUND, format!("{service} has no instance here"))),
        (None, many) => {
            let names: Vec<_> = many.iter().map(|number| format!("{}#{number}", service.short())).collect();
            let error = format!("{selector} has {} instances: say which of {}", many.len(), names.join(", "));
            Err(Refused::new(StatusCode::CONFLICT, error))
        }
    }
}

fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, Refused> {
    text.parse().map_err(|error: T::Err| Refused::new(StatusCode::BAD_REQUEST, error.to_string()))
}

fn json<T: DeserializeOwned>(body: &Bytes) -> Result<T, Refused> {
    serde_json::from_slice(body)
        .map_err(|error| Refused::new(StatusCode::BAD_REQUEST, format!("the body is not what is asked for: {error}")))
}

fn changed(instances: &[InstanceId]) -> Json<Changed> {
    Json(Changed { instances: instances.iter().map(ToString::to_string).collect() })
}

/// An answer that says no, and why.
pub(super) struct Refused {
    status: StatusCode,
    error: String,
}

impl Refused {
    pub(super) fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self { status, error: error.into() }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.error)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.status, Json(Refusal { error: self.error })).into_response()
    }
}

impl From<NodeApiError> for Refused {
    fn from(error: NodeApiError) -> Self {
        let status = match error {
            NodeApiError::UnknownInstance(_) => StatusCode::NOT_FOUND,
            NodeApiError::NoNode | NodeApiError::Refused { .. } => StatusCode::CONFLICT,
            NodeApiError::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.to_string())
    }
}

impl From<ClusterApiError> for Refused {
    fn from(error: ClusterApiError) -> Self {
        let status = match error {
            ClusterApiError::Document { .. } | ClusterApiError::Limit { .. } => StatusCode::BAD_REQUEST,
            ClusterApiError::UnknownService(_)
            | ClusterApiError::UnknownInstance(_)
            | ClusterApiError::UnknownNode { .. } => StatusCode::NOT_FOUND,
            ClusterApiError::NoNode { .. } => StatusCode::CONFLICT,
            ClusterApiError::Save(_) => StatusCode::INSUFFICIENT_STORAGE,
            ClusterApiError::Random(_) => StatusCode::INTERNAL_SERVER_ERROR,
            ClusterApiError::Stopped => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.to_string())
    }
}

impl From<QueryRejection> for Refused {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text())
    }
}

impl From<BytesRejection> for Refused {
    fn from(rejection: BytesRejection) -> Self {
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            return Self::new(rejection.status(), format!("the body is longer than {} KiB", LARGEST_BODY / 1024));
        }
        Self::new(rejection.status(), rejection.body_text())
    }
}

/// The parts of a request that somebody writes: its query, its body, and a message to a command; for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn understand(text: &str) {
    use super::dto::look::{EventsQuery, ToCommand};
    let body = Bytes::copy_from_slice(text.as_bytes());
    let _ = json::<Replicate>(&body).and_then(|wanted| parse::<Selector>(&wanted.service));
    let _ = json::<Move>(&body).and_then(|wanted| parse::<Selector>(&wanted.instance));
    let _ = serde_json::from_str::<ToCommand>(text);
    let Ok(uri) = format!("/?{text}").parse::<axum::http::Uri>() else { return };
    let _ = (Query::<LogsQuery>::try_from_uri(&uri), Query::<DeployQuery>::try_from_uri(&uri));
    let _ = Query::<EventsQuery>::try_from_uri(&uri);
    if let Ok(Query(choice)) = Query::<net::Choice>::try_from_uri(&uri)
        && let Ok(choice) = net_choice(choice)
    {
        assert!(choice.limit <= MOST_ROWS);
    }
}

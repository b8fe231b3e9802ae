//! The bundled volume driver: a volume is a directory of this node, made when it is first asked for and kept when nobody uses it any
//! more. It speaks the same protocol as any other driver, so that there is one way to use a volume.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::http;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use prost::Message;
use tokio::net::UnixListener;
use tonic::body::Body;
use tonic::server::Grpc;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use super::csi::{self, Capabilities, Nothing, PluginInfo, Publish, Undo};
use super::is_plain;

/// As the reference system calls its sample of such a driver.
pub const NAME: &str = "csi.oakestra.io/hostpath";

/// After a connection that could not be taken.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves at the socket until the task is dropped. Volumes are directories below `volumes`.
pub(super) fn serve(socket: &Path, volumes: PathBuf) -> io::Result<impl Future<Output = ()> + Send + use<>> {
    listen(socket, move |request| answer(request, volumes.clone()))
}

/// Hands every call at the socket to `answer`.
pub(super) fn listen<F, R>(socket: &Path, answer: F) -> io::Result<impl Future<Output = ()> + Send + use<F, R>>
where
    F: Fn(http::Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = http::Response<Body>> + Send + 'static,
{
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    Ok(async move {
        loop {
            // Out of descriptors, most likely: they come back.
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            let answer = answer.clone();
            let service = service_fn(move |request| {
                let answered = answer(request);
                async move { Ok::<_, Infallible>(answered.await) }
            });
            let connection = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service);
            tokio::spawn(async move {
                // A client that hangs up has what it wanted.
                let _ = connection.await;
            });
        }
    })
}

async fn answer(request: http::Request<Incoming>, volumes: PathBuf) -> http::Response<Body> {
    match request.uri().path() {
        csi::PROBE => with(request, |Nothing {}| Ok(Nothing {})).await,
        csi::PLUGIN_INFO => {
            let info = PluginInfo { name: NAME.into(), version: env!("CARGO_PKG_VERSION").into() };
            with(request, |Nothing {}| Ok(info)).await
        }
        csi::CAPABILITIES => with(request, |Nothing {}| Ok(Capabilities::default())).await,
        csi::PUBLISH => with(request, move |asked: Publish| publish(&volumes, &asked).map(|()| Nothing {})).await,
        csi::UNPUBLISH => with(request, |asked: Undo| unpublish(&asked).map(|()| Nothing {})).await,
        _ => Status::unimplemented("this driver does not know the call").into_http(),
    }
}

pub(super) async fn with<Q, A>(
    request: http::Request<Incoming>,
    act: impl FnOnce(Q) -> Result<A, Status> + Clone + Send + 'static,
) -> http::Response<Body>
where
    Q: Message + Default + 'static,
    A: Message + 'static,
{
    let service = tower::service_fn(move |request: Request<Q>| {
        let act = act.clone();
        async move { act(request.into_inner()).map(Response::new) }
    });
    Grpc::new(ProstCodec::<A, Q>::default()).unary(service, request).await
}

fn publish(volumes: &Path, asked: &Publish) -> Result<(), Status> {
    if !is_plain(&asked.volume) {
        return Err(Status::invalid_argument(format!("{:?} cannot name a volume", asked.volume)));
    }
    let failed = |path: &Path, error: io::Error| Status::internal(format!("{}: {error}", path.display()));
    let (source, target) = (volumes.join(&asked.volume), Path::new(&asked.target_path));
    for directory in [source.as_path(), target] {
        fs::create_dir_all(directory).map_err(|error| failed(directory, error))?;
    }
    if is_mounted(target) {
        return Ok(());
    }
    let bound = mount(Some(&source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>);
    bound.map_err(|error| failed(target, error.into()))
}

fn unpublish(asked: &Undo) -> Result<(), Status> {
    let target = Path::new(&asked.path);
    let failed = |error: io::Error| Status::internal(format!("{}: {error}", target.display()));
    match umount2(target, MntFlags::MNT_DETACH) {
        // Not mounted, or not there: as it should be.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => return Err(failed(error.into())),
    }
    match fs::remove_dir(target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
        _ => Ok(()),
    }
}

fn is_mounted(target: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(1) == target.to_str())
}

// SPDX-License-Identifier: GPL-2.0

//! HTTP server. hyper speaks the protocol; this module bounds what a client can use.
//!
//! A connection serves one request and must end within a time limit. The number of connections is
//! limited; a new one beyond that closes the oldest. So a client that hangs, reads slowly or sends
//! without an end occupies one place for that time. At most two snapshots are read at once, as each
//! takes memory.

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::{self, SocketAddr},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use http_body_util::Full;
use hyper::{
    body::{Bytes, Incoming},
    header::{HeaderValue, ACCEPT, ALLOW, CONTENT_SECURITY_POLICY, CONTENT_TYPE},
    server::conn::http1,
    service::service_fn,
    Method, Request, Response, StatusCode,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime,
    sync::Semaphore,
    task::{self, AbortHandle},
    time,
};

use super::{exposition::Format, log};

/// Time limit for a connection in all.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Time limit for the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum size of a request's head, in bytes.
const HEAD: usize = 16 << 10;

/// Maximum number of connections. Each may hold a whole answer, some 10 MB on a large host.
const CONNECTIONS: usize = 32;

/// Maximum number of snapshots read at a time.
const SNAPSHOTS: usize = 2;

/// Pause after an error of accept(2), such as no more file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Content security policy. The page has no scripts, and loads nothing from elsewhere.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// Content-Type of messages.
const TEXT: &str = "text/plain; charset=utf-8";

/// Content to serve.
pub trait Site: Send + Sync + 'static {
    /// Return the content at `path` with its type, or `None` if there is nothing. `format` is the
    /// format of metrics that the client asks for. May take long: the server calls it on a thread
    /// for blocking work.
    fn content(&self, path: &str, format: Format) -> Option<(&'static str, String)>;
}

/// Serves a site that others hold as well.
impl<S: Site> Site for Arc<S> {
    fn content(&self, path: &str, format: Format) -> Option<(&'static str, String)> {
        S::content(self, path, format)
    }
}

/// Serve until the process ends, on a socket from systemd or else at `address`.
///
/// # Errors
///
/// Returns an error if the address cannot be used.
pub fn serve(site: impl Site, address: SocketAddr) -> anyhow::Result<ExitCode> {
    let listener = listener(address)?;
    let address = listener.local_addr().unwrap_or(address);
    log(&format!("serves at http://{address}/metrics"));
    serve_at(site, listener)
}

/// Serve on `listener` until the process ends.
///
/// # Errors
///
/// Returns an error if the server cannot start.
pub fn serve_at(site: impl Site, listener: net::TcpListener) -> anyhow::Result<ExitCode> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(SNAPSHOTS)
        .build()
        .context("cannot start the server")?;
    runtime.block_on(async {
        listener
            .set_nonblocking(true)
            .context("cannot start the server")?;
        let listener = TcpListener::from_std(listener).context("cannot start the server")?;
        accept(listener, Arc::new(site)).await
    })
}

/// Return the socket that systemd passed, or else a new one.
fn listener(address: SocketAddr) -> anyhow::Result<net::TcpListener> {
    let given = listenfd::ListenFd::from_env()
        .take_tcp_listener(0)
        .context(
        "the socket from systemd is not a TCP socket: set ListenStream=ADDRESS:PORT in its unit",
    )?;
    match given {
        Some(listener) => Ok(listener),
        None => net::TcpListener::bind(address).with_context(|| {
            format!("cannot listen at {address}: name another address or port by --listen")
        }),
    }
}

async fn accept(listener: TcpListener, site: Arc<impl Site>) -> anyhow::Result<ExitCode> {
    let snapshots = Arc::new(Semaphore::new(SNAPSHOTS));
    let mut connections: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            time::sleep(PAUSE).await;
            continue;
        };
        connections.retain(|connection| !connection.is_finished());
        if connections.len() >= CONNECTIONS {
            if let Some(oldest) = connections.pop_front() {
                oldest.abort();
            }
        }
        let connection = connection(stream, Arc::clone(&site), Arc::clone(&snapshots));
        let connection = task::spawn(time::timeout(TIMEOUT, connection));
        connections.push_back(connection.abort_handle());
    }
}

/// Serve one request.
async fn connection(stream: TcpStream, site: Arc<impl Site>, snapshots: Arc<Semaphore>) {
    let service = service_fn(|request| answer(request, &site, &snapshots));
    // An error here means that the client went away early, which needs no action.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer(
    request: Request<Incoming>,
    site: &Arc<impl Site>,
    snapshots: &Semaphore,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let reply = match *request.method() {
        Method::GET | Method::HEAD => {
            let accept = request.headers().get(ACCEPT);
            let accept = accept.and_then(|accept| accept.to_str().ok());
            let format = Format::accepted(accept.unwrap_or_default());
            let (site, path) = (Arc::clone(site), request.uri().path().to_owned());
            // The semaphore is never closed, and a task that panics ends the process.
            let _permit = snapshots.acquire().await;
            let content = task::spawn_blocking(move || site.content(&path, format)).await;
            match content {
                Ok(Some((kind, text))) => reply(StatusCode::OK, kind, text),
                Ok(None) => reply(
                    StatusCode::NOT_FOUND,
                    TEXT,
                    "there is /metrics, and / for people\n".to_owned(),
                ),
                Err(_) => reply(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    TEXT,
                    "the snapshot could not be read\n".to_owned(),
                ),
            }
        }
        _ => {
            let mut reply = reply(
                StatusCode::METHOD_NOT_ALLOWED,
                TEXT,
                "only GET and HEAD are supported\n".to_owned(),
            );
            let methods = HeaderValue::from_static("GET, HEAD");
            reply.headers_mut().insert(ALLOW, methods);
            reply
        }
    };
    Ok(reply)
}

fn reply(status: StatusCode, content: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::new(Bytes::from(text)));
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    reply
}

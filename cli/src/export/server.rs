// SPDX-License-Identifier: GPL-2.0

//! The HTTP server. hyper speaks the protocol; here is what nobody may hold up.
//!
//! A connection serves one request, and has a time in which that has to be done. There are so many connections at most; one more
//! ends the oldest. So who hangs, reads slowly or sends without an end takes one place for that time. Two
//! snapshots at most are read at once, since each takes memory.

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

use super::{exposition::Format, say};

/// How long a connection may take in all.
const WITHIN: Duration = Duration::from_secs(30);

/// How long a request's head may take.
const HEAD_WITHIN: Duration = Duration::from_secs(5);

/// Bytes of a request's head.
const HEAD: usize = 16 << 10;

/// Connections at a time. Each may hold a whole answer, some 10 MB on a large host.
const CONNECTIONS: usize = 32;

/// Snapshots that are read at a time.
const SNAPSHOTS: usize = 2;

/// After an error of accept(2), such as no more file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// The page has no scripts, and takes nothing from elsewhere.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// What is served.
pub trait Site: Send + Sync + 'static {
    /// Return the content at a path, with its type; `None` where there is nothing. `format` is that of metrics which the
    /// client asks for. This may take long: it is called on a thread for that.
    fn content(&self, path: &str, format: Format) -> Option<(&'static str, String)>;
}

/// What others look at as well can be served.
impl<S: Site> Site for Arc<S> {
    fn content(&self, path: &str, format: Format) -> Option<(&'static str, String)> {
        S::content(self, path, format)
    }
}

/// Serve until the process ends, at a socket from systemd or else at an address.
///
/// # Errors
///
/// When the address cannot be listened at.
pub fn serve(site: impl Site, address: SocketAddr) -> anyhow::Result<ExitCode> {
    let listener = listener(address)?;
    let address = listener.local_addr().unwrap_or(address);
    say(&format!("serves at http://{address}/metrics"));
    serve_at(site, listener)
}

/// Serve until the process ends.
///
/// # Errors
///
/// When the system does not allow it.
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

/// Return the socket that systemd gave, or else a new one.
fn listener(address: SocketAddr) -> anyhow::Result<net::TcpListener> {
    let given = listenfd::ListenFd::from_env()
        .take_tcp_listener(0)
        .context(
            "the socket from systemd is none of TCP: let the unit have ListenStream=ADDRESS:PORT",
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
        let connection = task::spawn(time::timeout(WITHIN, connection));
        connections.push_back(connection.abort_handle());
    }
}

/// Serve one request.
async fn connection(stream: TcpStream, site: Arc<impl Site>, snapshots: Arc<Semaphore>) {
    let service = service_fn(|request| answer(request, &site, &snapshots));
    // Who went away early is no concern of ours.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
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
                "there is GET alone\n".to_owned(),
            );
            let methods = HeaderValue::from_static("GET, HEAD");
            reply.headers_mut().insert(ALLOW, methods);
            reply
        }
    };
    Ok(reply)
}

const TEXT: &str = "text/plain; charset=utf-8";

fn reply(status: StatusCode, content: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::new(Bytes::from(text)));
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    reply
}

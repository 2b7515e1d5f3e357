//! Does: answers `/metrics`, `/healthz` and `/readyz` at the admin address, on a thread of its own.

use super::metrics;
use gradwire_ps::{CoordinatorReport, Monitor, Report};
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;

/// Connections at once: probes and a few scrapers. More wait in the kernel's queue.
const CONNECTIONS: usize = 32;
/// Time for a request and its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time for a shard to answer: its longest turn takes milliseconds.
const SHARD_PATIENCE: Duration = Duration::from_secs(2);

/// Time for a coordinator to answer, which may be asking an etcd that is gone: a second for each address of it.
const COORDINATOR_PATIENCE: Duration = Duration::from_secs(4);

/// What an admin address tells of.
pub(crate) trait Told: Send + Sync + 'static {
    /// The text of `/metrics`.
    fn metrics(&self) -> String;
    /// Who does not answer, if anybody.
    fn silent(&self) -> Option<String>;
    /// The same, of those whose silence a new process would end.
    fn dead(&self) -> Option<String> {
        self.silent()
    }
}

/// The shards that are served here.
pub(crate) struct Shards(pub(crate) Vec<Monitor>);

impl Shards {
    fn reports(&self) -> Vec<Option<Report>> {
        self.0.iter().map(|monitor| monitor.report(SHARD_PATIENCE)).collect()
    }
}

impl Told for Shards {
    fn metrics(&self) -> String {
        metrics::to_text(&self.reports())
    }

    fn silent(&self) -> Option<String> {
        let silent = (0u32..).zip(self.reports()).filter(|(_, report)| report.is_none());
        let silent: Vec<String> = silent.map(|(shard, _)| shard.to_string()).collect();
        (!silent.is_empty()).then(|| format!("shard {}", silent.join(", ")))
    }
}

/// A coordinator.
impl Told for Monitor<CoordinatorReport> {
    fn metrics(&self) -> String {
        metrics::of_coordinator(self.report(COORDINATOR_PATIENCE).as_ref())
    }

    fn silent(&self) -> Option<String> {
        self.report(COORDINATOR_PATIENCE).is_none().then(|| "the coordinator".to_owned())
    }
}

/// A server, and the coordinator that its process carries.
pub(crate) struct Both(pub(crate) Shards, pub(crate) Monitor<CoordinatorReport>);

impl Told for Both {
    fn metrics(&self) -> String {
        self.0.metrics() + &self.1.metrics()
    }

    fn silent(&self) -> Option<String> {
        let silent: Vec<String> = self.0.silent().into_iter().chain(self.1.silent()).collect();
        (!silent.is_empty()).then(|| silent.join(", "))
    }

    /// A coordinator that waits for an etcd which is gone is no reason to end a server that holds tables.
    fn dead(&self) -> Option<String> {
        self.0.dead()
    }
}

struct House {
    told: Arc<dyn Told>,
    ready: Arc<AtomicBool>,
}

/// Tells where the admin address is, for people or for programs.
pub(crate) fn announce(out: &mut impl Write, json: bool, admin: Option<SocketAddr>) -> std::io::Result<()> {
    match admin {
        Some(admin) if json => writeln!(out, "{}", serde_json::json!({ "admin": admin.to_string() })),
        Some(admin) => writeln!(out, "admin at {admin}"),
        None => Ok(()),
    }
}

/// Begins to answer at `listen`; where that is. `ready`: whether clients may come.
pub(crate) fn start(listen: SocketAddr, told: Arc<dyn Told>, ready: Arc<AtomicBool>) -> Result<SocketAddr, String> {
    begin(listen, House { told, ready }).map_err(|error| format!("--admin {listen}: {error}"))
}

fn begin(listen: SocketAddr, house: House) -> std::io::Result<SocketAddr> {
    let listener = std::net::TcpListener::bind(listen)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    let house = Arc::new(house);
    let serve = move || {
        let served = runtime.block_on(serve(listener, house));
        tracing::error!(error = ?served.err(), "the admin address is closed");
    };
    // It ends with the process: there is nothing to keep.
    std::thread::Builder::new().name("gradwire-admin".to_owned()).spawn(serve)?;
    Ok(address)
}

async fn serve(listener: std::net::TcpListener, house: Arc<House>) -> std::io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let guests = Arc::new(());
    loop {
        // Each connection holds a share of `guests`.
        while Arc::strong_count(&guests) > CONNECTIONS {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // No descriptors, most likely: they come back when connections end.
                tracing::warn!(%error, "an admin connection could not be taken");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (house, guest) = (Arc::clone(&house), Arc::clone(&guests));
        // Not spawned as a task that others could starve: all of them share this thread.
        tokio::task::spawn(async move {
            let answer = service_fn(|request| {
                let house = Arc::clone(&house);
                async move { Ok::<_, Infallible>(house.answer(&request)) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .keep_alive(false)
                .max_headers(64)
                .serve_connection(TokioIo::new(stream), answer);
            // Whoever does not take its answer does not get it.
            let _ = tokio::time::timeout(PATIENCE, connection).await;
            drop(guest);
        });
    }
}

impl House {
    fn answer(&self, request: &Request<Incoming>) -> Response<String> {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered here\n".to_owned());
        }
        match request.uri().path() {
            "/metrics" => {
                let mut response = text(StatusCode::OK, self.told.metrics());
                let kind = "text/plain; version=0.0.4; charset=utf-8".parse().expect("it is a header's value");
                response.headers_mut().insert(CONTENT_TYPE, kind);
                response
            }
            "/healthz" => health(self.told.dead(), true),
            "/readyz" => health(self.told.silent(), self.ready.load(Ordering::Acquire)),
            _ => text(StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz\n".to_owned()),
        }
    }
}

fn health(silent: Option<String>, ready: bool) -> Response<String> {
    if let Some(silent) = silent {
        return text(StatusCode::SERVICE_UNAVAILABLE, format!("no answer from {silent}\n"));
    }
    if ready {
        text(StatusCode::OK, "ok\n".to_owned())
    } else {
        text(StatusCode::SERVICE_UNAVAILABLE, "stopping\n".to_owned())
    }
}

fn text(status: StatusCode, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

//! Does: a real etcd for tests, on ports and in a folder of its own.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// An etcd of one member. Killed when dropped.
pub struct RunningEtcd {
    process: Child,
    folder: tempfile::TempDir,
    ports: Ports,
    tls: Option<EtcdFiles>,
}

/// Where it listens: to clients, to other members, and to whoever asks for its health.
struct Ports {
    clients: u16,
    peers: u16,
    health: u16,
}

/// What an etcd proves itself with, and asks its clients for.
pub struct EtcdFiles {
    pub cert: PathBuf,
    pub key: PathBuf,
    /// Who must have signed its clients' certificates.
    pub ca: PathBuf,
}

impl RunningEtcd {
    /// Starts one, and waits until it answers.
    pub fn start() -> Self {
        Self::start_as(None)
    }

    /// Starts one that speaks TLS with these files.
    #[allow(dead_code)] // Not every test needs it.
    pub fn start_with(tls: EtcdFiles) -> Self {
        Self::start_as(Some(tls))
    }

    fn start_as(tls: Option<EtcdFiles>) -> Self {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (folder, ports) = (tempfile::tempdir().unwrap(), Ports { clients: free(), peers: free(), health: free() });
        let process = spawn(folder.path(), &ports, tls.as_ref());
        let this = Self { process, folder, ports, tls };
        this.wait();
        this
    }

    /// Its client address.
    pub fn endpoint(&self) -> String {
        format!("{}://127.0.0.1:{}", scheme(self.tls.as_ref()), self.ports.clients)
    }

    /// Ends it at once; what it has written stays.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Starts it again with what it has written.
    pub fn restart(&mut self) {
        self.process = spawn(self.folder.path(), &self.ports, self.tls.as_ref());
        self.wait();
    }

    fn wait(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let healthy = || {
            let answer = ureq::get(format!("http://127.0.0.1:{}/health", self.ports.health)).call();
            answer.and_then(|mut answer| answer.body_mut().read_to_string()).is_ok_and(|body| body.contains("true"))
        };
        while !healthy() {
            assert!(Instant::now() < deadline, "etcd does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for RunningEtcd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn scheme(tls: Option<&EtcdFiles>) -> &'static str {
    if tls.is_some() { "https" } else { "http" }
}

fn spawn(folder: &Path, ports: &Ports, tls: Option<&EtcdFiles>) -> Child {
    let clients = format!("{}://127.0.0.1:{}", scheme(tls), ports.clients);
    let [peers, health] = [ports.peers, ports.health].map(|port| format!("http://127.0.0.1:{port}"));
    let mut command = Command::new("etcd");
    command.arg("--data-dir").arg(folder).args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
    command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
    command.args(["--initial-cluster", &format!("default={peers}"), "--logger", "zap", "--log-level", "error"]);
    command.args(["--listen-metrics-urls", &health]);
    if let Some(EtcdFiles { cert, key, ca }) = tls {
        command.arg("--cert-file").arg(cert).arg("--key-file").arg(key);
        command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(ca);
    }
    let spawned = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    spawned.expect("etcd must be installed for this test: scripts/test does so (Debian: etcd-server)")
}

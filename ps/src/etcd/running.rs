//! Does: a real etcd for tests, on ports and in a folder of its own.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// An etcd of one member. Killed when dropped.
pub struct RunningEtcd {
    process: Child,
    folder: tempfile::TempDir,
    port: u16,
    peers: u16,
}

impl RunningEtcd {
    /// Starts one, and waits until it answers.
    pub fn start() -> Self {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (folder, port, peers) = (tempfile::tempdir().unwrap(), free(), free());
        let process = spawn(folder.path(), port, peers);
        let this = Self { process, folder, port, peers };
        this.wait();
        this
    }

    /// Its client address.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Ends it at once; what it has written stays.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Starts it again with what it has written.
    pub fn restart(&mut self) {
        self.process = spawn(self.folder.path(), self.port, self.peers);
        self.wait();
    }

    fn wait(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let healthy = || {
            let answer = ureq::get(format!("{}/health", self.endpoint())).call();
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

fn spawn(folder: &std::path::Path, port: u16, peers: u16) -> Child {
    let (clients, peers) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peers}"));
    let mut command = Command::new("etcd");
    command.arg("--data-dir").arg(folder).args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
    command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
    command.args(["--initial-cluster", &format!("default={peers}"), "--logger", "zap", "--log-level", "error"]);
    let spawned = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    spawned.expect("etcd must be installed for this test: scripts/test does so (Debian: etcd-server)")
}

//! Does: runs the binary for tests, as a user does.
#![allow(dead_code)] // Not every test needs all of it.

use std::io::{BufRead, BufReader, Lines, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// The binary with these arguments, without what the environment says.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire-ps"));
    command.args(arguments);
    for name in std::env::vars().map(|(name, _)| name).filter(|name| name.starts_with("GRADWIRE_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn spawn(shards: usize, arguments: &[&str]) -> (Child, Lines<BufReader<ChildStdout>>) {
    let shards = shards.to_string();
    let mut all = vec!["serve", "--shards", &shards, "--json"];
    all.extend(arguments);
    let mut child = command(&all).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}

/// A running server, killed when the test fails before its end.
pub struct Running {
    pub child: Child,
    pub addresses: Vec<String>,
    /// What it prints next.
    pub lines: Lines<BufReader<ChildStdout>>,
}

impl Running {
    pub fn start(shards: usize, arguments: &[&str]) -> Self {
        Self::start_what("shard", shards, arguments)
    }

    /// A server with so many seats, for a coordinator.
    pub fn start_seats(seats: usize, arguments: &[&str]) -> Self {
        Self::start_what("seat", seats, arguments)
    }

    /// A server with so many seats that carries a coordinator, and where that is.
    pub fn start_carrying(seats: usize, arguments: &[&str]) -> (Self, String) {
        let (child, mut lines) = spawn(seats, arguments);
        let line: serde_json::Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        let coordinator = line["coordinator"].as_str().unwrap().to_owned();
        (Self::listening("seat", seats, (child, lines)), coordinator)
    }

    fn start_what(what: &str, shards: usize, arguments: &[&str]) -> Self {
        Self::listening(what, shards, spawn(shards, arguments))
    }

    fn listening(what: &str, shards: usize, (child, mut lines): (Child, Lines<BufReader<ChildStdout>>)) -> Self {
        let addresses = (0..shards).map(|shard| {
            let line: serde_json::Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
            assert_eq!(line[what], shard);
            line["address"].as_str().unwrap().to_owned()
        });
        let addresses = addresses.collect();
        Self { child, addresses, lines }
    }

    pub fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap().success());
    }

    /// Waits for its end; its exit code, how long it took, and its log.
    pub fn end(&mut self) -> (Option<i32>, Duration, String) {
        let begun = Instant::now();
        let mut log = String::new();
        // The log ends with the process.
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        (self.child.wait().unwrap().code(), begun.elapsed(), log)
    }

    /// Processor time used so far, in ticks of 10 ms.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

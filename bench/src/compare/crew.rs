//! Does: the ranks of one library: started, told what to do over a socket each, and ended. Between its turns a crew sleeps,
//! so that libraries can take turns.

use super::peer::Start;
use crate::collective::{Load, given};
use crate::family::Family;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long ranks may take to come, and a turn to end.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a crew may take to leave.
const LEAVING: Duration = Duration::from_secs(5);
/// How often a wait looks up.
const LOOK: Duration = Duration::from_millis(100);

/// What a turn came to.
pub(crate) enum Answer {
    /// Seconds of each call: the longest of any rank.
    Times(Vec<f64>),
    /// It cannot do this, and why.
    Without(String),
}

/// The ranks of one library.
pub(crate) struct Crew {
    ends: Vec<BufReader<UnixStream>>,
    family: Family,
    stop: Arc<AtomicBool>,
    words: tempfile::NamedTempFile,
    /// As it names itself, with its version.
    pub(crate) library: String,
}

impl Crew {
    /// Starts all ranks, and waits until each has come to `listener`.
    ///
    /// # Errors
    /// Who did not come, with the last words of the processes.
    pub(crate) fn start(
        starts: &[Start],
        listener: &UnixListener,
        ranks: u32,
        stop: &Arc<AtomicBool>,
    ) -> Result<Self, String> {
        let words = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
        let mut crew =
            Self { ends: Vec::new(), family: Family::default(), stop: Arc::clone(stop), words, library: String::new() };
        crew.come(starts, listener, ranks).map_err(|error| crew.with_words(&error))?;
        Ok(crew)
    }

    fn come(&mut self, starts: &[Start], listener: &UnixListener, ranks: u32) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        let io = |error: std::io::Error| error.to_string();
        for (at, Start { program, arguments, environment }) in starts.iter().enumerate() {
            let mut command = Command::new(program);
            let to_words = || self.words.reopen().map_err(io);
            command.args(arguments).envs(environment.iter().map(|(name, value)| (*name, value)));
            command.stdin(Stdio::null()).stdout(to_words()?).stderr(to_words()?);
            self.family.start(format!("process {at}"), &mut command).map_err(|error| error.to_string())?;
        }
        listener.set_nonblocking(true).map_err(io)?;
        while self.ends.len() < ranks as usize {
            match listener.accept() {
                Ok((end, _)) => {
                    end.set_nonblocking(false).map_err(io)?;
                    end.set_read_timeout(Some(LOOK)).map_err(io)?;
                    self.ends.push(BufReader::new(end));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let ended = self.family.look().map_err(|error| error.to_string())?;
                    if ended || Instant::now() > deadline {
                        return Err(format!("only {} of {ranks} ranks came", self.ends.len()));
                    }
                    self.interrupted()?;
                    std::thread::sleep(LOOK / 10);
                }
                Err(error) => return Err(io(error)),
            }
        }
        for at in 0..self.ends.len() {
            let hello = self.line(at, deadline)?;
            // hello RANK WORLD_SIZE LIBRARY
            let mut words = hello.splitn(4, ' ').skip(3);
            self.library = words.next().unwrap_or("unknown").split_whitespace().collect::<Vec<_>>().join(" ");
        }
        Ok(())
    }

    /// Has all ranks verify and then time `calls` calls.
    ///
    /// # Errors
    /// A wrong result, or a crew that has failed: it is of no more use.
    pub(crate) fn turn(&mut self, load: Load, calls: usize) -> Result<Answer, String> {
        self.take_turn(load, calls).map_err(|error| self.with_words(&error))
    }

    fn take_turn(&mut self, load: Load, calls: usize) -> Result<Answer, String> {
        let Load { operation, element, elements, modulus } = load;
        let order = format!("run {} {} {elements} {modulus} {calls}\n", operation.name(), given(&element));
        for end in &mut self.ends {
            end.get_mut().write_all(order.as_bytes()).map_err(|error| format!("a rank has gone: {error}"))?;
        }
        let deadline = Instant::now() + PATIENCE;
        let mut longest = vec![0.0_f64; calls];
        for at in 0..self.ends.len() {
            let line = self.line(at, deadline)?;
            match line.split_once(' ') {
                Some(("times", times)) => {
                    for (most, time) in longest.iter_mut().zip(times.split(' ')) {
                        let nanoseconds: f64 = time.parse().map_err(|_| format!("{time:?} is no time"))?;
                        *most = most.max(nanoseconds / 1e9);
                    }
                }
                // The others say the same.
                Some(("without", why)) => {
                    for other in at + 1..self.ends.len() {
                        self.line(other, deadline)?;
                    }
                    return Ok(Answer::Without(why.to_owned()));
                }
                _ => return Err(line),
            }
        }
        Ok(Answer::Times(longest))
    }

    fn line(&mut self, at: usize, deadline: Instant) -> Result<String, String> {
        let mut bytes = Vec::new();
        loop {
            match self.ends[at].read_until(b'\n', &mut bytes) {
                Ok(_) if bytes.ends_with(b"\n") => return Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned()),
                Ok(_) => return Err("a rank has gone".to_owned()),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(format!("a rank has gone: {error}")),
            }
            self.interrupted()?;
            if Instant::now() > deadline {
                return Err(format!("no answer within {PATIENCE:?}"));
            }
        }
    }

    fn interrupted(&self) -> Result<(), String> {
        if self.stop.load(Ordering::SeqCst) { Err("interrupted".to_owned()) } else { Ok(()) }
    }

    /// `error` with the last line that a process wrote.
    fn with_words(&self, error: &str) -> String {
        let said = std::fs::read(self.words.path()).unwrap_or_default();
        let said = String::from_utf8_lossy(&said).into_owned();
        match said.lines().rev().find(|line| line.chars().any(char::is_alphanumeric)) {
            Some(last) => format!("{error}: {}", last.trim()),
            None => error.to_owned(),
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        // A rank leaves when its socket ends; whoever does not is ended with the family.
        self.ends.clear();
        let deadline = Instant::now() + LEAVING;
        while self.family.look().is_ok_and(|ended| !ended) && Instant::now() < deadline {
            std::thread::sleep(LOOK / 10);
        }
    }
}

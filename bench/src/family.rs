//! Does: the processes of one measurement: started, waited for, and ended with it.

use std::error::Error;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// How often they are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Processes that end when this does.
#[derive(Default)]
pub(crate) struct Family(Vec<(String, Child)>);

impl Family {
    /// Starts one more, called `name` in messages.
    pub(crate) fn start(&mut self, name: String, command: &mut Command) -> Result<&mut Child, Box<dyn Error>> {
        let child = command.spawn().map_err(|error| format!("cannot start {name}: {error}"))?;
        self.0.push((name, child));
        Ok(&mut self.0.last_mut().expect("it was just put there").1)
    }

    /// Waits until all have ended well; `what` they do is for the error.
    ///
    /// # Errors
    /// Who failed, as soon as one does; who is left at the deadline.
    pub(crate) fn wait(&mut self, what: &str, deadline: Instant) -> Result<(), Box<dyn Error>> {
        let began = Instant::now();
        while !self.look()? {
            if Instant::now() >= deadline {
                let left: Vec<&str> = self.0.iter().map(|(name, _)| name.as_str()).collect();
                return Err(format!("{what}: after {:?} still not done: {}", began.elapsed(), left.join(", ")).into());
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Whether all have ended well.
    ///
    /// # Errors
    /// Who failed.
    pub(crate) fn look(&mut self) -> Result<bool, Box<dyn Error>> {
        for (name, child) in &mut self.0 {
            if let Some(status) = child.try_wait()?.filter(|status| !status.success()) {
                return Err(format!("{name} failed ({status})").into());
            }
        }
        self.0.retain_mut(|(_, child)| child.try_wait().is_ok_and(|status| status.is_none()));
        Ok(self.0.is_empty())
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        for (_, child) in &mut self.0 {
            // It may have ended just now.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

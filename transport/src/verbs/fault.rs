//! Pure: why a queue pair is of no use any more, as an error that names it and says what to do.

use super::status::Status;
use std::fmt;

/// A failure of one queue pair, or of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The device, port and address.
    pub device: String,
    /// The queue pair's number.
    pub queue_pair: u32,
    /// The status of the first work request that failed, where one did.
    pub status: Option<Status>,
    /// What happened, in words.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

impl Fault {
    /// A work request failed.
    pub fn of_work(device: String, queue_pair: u32, status: Status) -> Self {
        Self { device, queue_pair, status: Some(status), what: status.to_string(), remedy: status.remedy().to_owned() }
    }

    /// The device said so, or refused to work.
    pub fn of_device(device: String, queue_pair: u32, what: String) -> Self {
        let remedy = "look at the device's state (ibv_devinfo) and log (dmesg)".to_owned();
        Self { device, queue_pair, status: None, what, remedy }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "queue pair {} on {}: {}; {}", self.queue_pair, self.device, self.what, self.remedy)
    }
}

impl std::error::Error for Fault {}

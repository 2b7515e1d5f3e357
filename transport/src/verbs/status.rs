//! Pure: how a work request can fail, in words, with what to do about it (`enum ibv_wc_status` of libibverbs).

use std::fmt;

/// The status of a work completion that is no success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// The code of `enum ibv_wc_status`.
    pub code: u32,
    /// The vendor's own code; 0 where it has none.
    pub vendor: u32,
}

/// Code of a work request that was in the queue when its queue pair failed: another one is the cause.
pub const FLUSHED: u32 = 5;
/// Code of an access to memory of the peer that it does not allow.
pub const REMOTE_ACCESS: u32 = 10;
/// Code of a peer that did not answer.
pub const RETRIES: u32 = 12;

impl Status {
    /// What it says and what to do.
    fn texts(self) -> (&'static str, &'static str) {
        match self.code {
            1 => (
                "the message is longer than the receive or the device allows",
                "report this: both ends agree on lengths",
            ),
            2 => ("the queue pair is not able to do this", "report this with the device's name and firmware"),
            4 => (
                "memory is not, or no longer, registered as needed",
                "do not free or remap memory that a call still uses",
            ),
            FLUSHED => {
                ("it was in the queue when the queue pair failed", "look at the first failure of this queue pair")
            }
            6 => ("a memory window could not be bound", "report this"),
            7 => ("the device answered what makes no sense", "look at the device's log (dmesg)"),
            8 => ("memory was accessed locally that is not registered for it", "report this"),
            9 => ("the peer took the request for invalid", "run the same version of gradwire on both ends"),
            REMOTE_ACCESS => (
                "the peer does not allow the access",
                "its process may have ended, or the memory was withdrawn: see its log",
            ),
            11 => ("the peer's device failed", "look at the peer's device log (dmesg)"),
            RETRIES => (
                "the peer did not answer",
                "check that both ends use RoCE v2 GIDs of one network (GRADWIRE_IB_GID_INDEX), that UDP port 4791 passes the \
                 firewall, that no switch has a smaller MTU, and that the peer's host is up",
            ),
            13 => ("the peer had no receive posted, again and again", "report this: credits should make it impossible"),
            21 => ("a general failure of the device", "look at the device's log (dmesg)"),
            _ => ("an unknown status", "look it up in the device's documentation"),
        }
    }

    /// What to do about it.
    pub fn remedy(self) -> &'static str {
        self.texts().1
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (status {}", self.texts().0, self.code)?;
        match self.vendor {
            0 => f.write_str(")"),
            vendor => write!(f, ", vendor code {vendor:#x})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_words_and_a_remedy() {
        for code in 1..30 {
            let status = Status { code, vendor: 0x81 };
            assert!(status.to_string().contains(&format!("status {code}, vendor code 0x81")));
            assert!(status.remedy().len() > 8);
        }
        assert!(Status { code: RETRIES, vendor: 0 }.remedy().contains("4791"));
    }
}

//! Does: reads what RDMA devices count of packets that came when nobody could take them.

use serde::{Deserialize, Serialize};
use std::ops::Sub;
use std::path::Path;

/// Where the kernel shows its RDMA devices.
const DEVICES: &str = "/sys/class/infiniband";
/// What devices call messages that met no receive (rxe, mlx5), and packets that came out of order, since some were lost.
const NOT_READY: [&str; 2] = ["send_rnr_err", "out_of_buffer"];
const OUT_OF_ORDER: [&str; 2] = ["out_of_seq_request", "out_of_sequence"];

/// What this host's devices have counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Refused {
    /// Messages that met no receive, so that the sender had to wait and send again.
    pub(super) not_ready: u64,
    pub(super) out_of_order: u64,
}

impl Sub for Refused {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            not_ready: self.not_ready.saturating_sub(before.not_ready),
            out_of_order: self.out_of_order.saturating_sub(before.out_of_order),
        }
    }
}

/// What this host's devices have counted by now; `None` where none counts.
pub(super) fn refused() -> Option<Refused> {
    read(Path::new(DEVICES))
}

fn read(devices: &Path) -> Option<Refused> {
    let mut sum = None;
    for device in std::fs::read_dir(devices).ok()?.flatten() {
        for port in std::fs::read_dir(device.path().join("ports")).ok()?.flatten() {
            let counter = |name: &&str| {
                let text = std::fs::read_to_string(port.path().join("hw_counters").join(name)).ok()?;
                text.trim().parse::<u64>().ok()
            };
            let Some(not_ready) = NOT_READY.iter().find_map(counter) else { continue };
            let sum = sum.get_or_insert(Refused::default());
            sum.not_ready += not_ready;
            sum.out_of_order += OUT_OF_ORDER.iter().find_map(counter).unwrap_or(0);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_all_devices_and_ports_are_added() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()), None);
        for (device, name, count) in
            [("rxe0", "send_rnr_err", 3), ("rxe0", "out_of_seq_request", 5), ("mlx5_0", "out_of_buffer", 4)]
        {
            let counters = folder.path().join(device).join("ports/1/hw_counters");
            std::fs::create_dir_all(&counters).unwrap();
            std::fs::write(counters.join(name), format!("{count}\n")).unwrap();
        }
        assert_eq!(read(folder.path()), Some(Refused { not_ready: 7, out_of_order: 5 }));
    }
}

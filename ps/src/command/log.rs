//! Does: the flags of the log, and its beginning.

use clap::{Args, ValueEnum};
use std::io::IsTerminal;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Lines for people
    Text,
    /// An object a line, for programs
    Json,
}

/// Flags of a command that runs until it is stopped, and logs.
#[derive(Args)]
pub(crate) struct Log {
    /// How much to log to standard error: off, error, warn, info, debug or trace, or `info,gradwire_ps=debug` by module
    #[arg(long, env = "GRADWIRE_LOG", default_value = "info", value_name = "LEVEL")]
    log: Targets,
    /// How to log
    #[arg(long, env = "GRADWIRE_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
}

impl Log {
    /// Begins to log: `warnings` first.
    pub(crate) fn begin(&self, warnings: &[String]) {
        let registry = tracing_subscriber::registry().with(self.log.clone());
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        match self.log_format {
            LogFormat::Text => registry.with(lines.with_ansi(std::io::stderr().is_terminal())).init(),
            LogFormat::Json => registry.with(lines.json()).init(),
        }
        warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    }
}

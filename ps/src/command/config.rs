//! Does: reads a configuration file: what the flags of `serve` say, by their names.

use clap::{Arg, ArgAction, Args, Command};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Flags of `config`.
#[derive(Args)]
pub(crate) struct Check {
    /// File to check: a TOML file with the flags of `serve` as keys, without their dashes. What it names is read too
    #[arg(long, value_name = "FILE")]
    check: PathBuf,
}

impl Check {
    pub(crate) fn file(&self) -> &Path {
        &self.check
    }

    /// Says that the file is good.
    pub(crate) fn praise(&self) {
        println!("{}: a server can start with it", self.check.display());
    }
}

/// The arguments of `command` that the file at `path` stands for. `environment`: whether a variable is set, which wins.
pub(crate) fn arguments(
    command: &Command,
    path: &Path,
    environment: impl Fn(&str) -> bool,
) -> Result<Vec<OsString>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("--config {}: {error}", path.display()))?;
    let table: Table = text.parse().map_err(|error| format!("{}: {error}", path.display()))?;
    let mut all = Vec::new();
    for (key, value) in &table {
        let wrong = |what: String| format!("{}: {key}: {what}", path.display());
        let known = flags(command).find(|(name, _)| name == key);
        let (name, argument) = known.ok_or_else(|| wrong(format!("there is no such setting{}", hint(command, key))))?;
        let said = argument.get_env().and_then(|name| name.to_str()).is_some_and(&environment);
        match (argument.get_action(), value) {
            _ if said => {}
            (ArgAction::SetTrue, Value::Boolean(true)) => all.push(format!("--{name}").into()),
            (ArgAction::SetTrue, Value::Boolean(false)) => {}
            (ArgAction::SetTrue, _) => return Err(wrong("it is true or false".to_owned())),
            (_, Value::String(text)) => all.push(format!("--{name}={text}").into()),
            (_, Value::Integer(number)) => all.push(format!("--{name}={number}").into()),
            _ => return Err(wrong("it is a string or a whole number".to_owned())),
        }
    }
    Ok(all)
}

/// The flags that a file may set.
fn flags(command: &Command) -> impl Iterator<Item = (&str, &Arg)> {
    let flags = command.get_arguments().filter_map(|argument| Some((argument.get_long()?, argument)));
    flags.filter(|(name, _)| !matches!(*name, "config" | "help" | "version"))
}

fn hint(command: &Command, key: &str) -> String {
    let likeness = |name: &str| strsim::jaro_winkler(name, &key.replace('_', "-"));
    let nearest = flags(command).map(|(name, _)| (likeness(name), name)).max_by(|a, b| a.0.total_cmp(&b.0));
    nearest
        .filter(|(likeness, _)| *likeness > 0.7)
        .map_or_else(String::new, |(_, name)| format!("; did you mean {name}?"))
}

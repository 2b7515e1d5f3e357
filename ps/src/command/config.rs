//! Does: reads a configuration file: what the flags of `serve` or `coordinate` say, by their names.

use clap::{Arg, ArgAction, Args, Command, ValueEnum};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Commands that take a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Of {
    /// A server
    Serve,
    /// A coordinator
    Coordinate,
}

impl Of {
    /// The command's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Serve => "serve",
            Self::Coordinate => "coordinate",
        }
    }
}

/// Flags of `config`.
#[derive(Args)]
pub(crate) struct Check {
    /// File to check: a TOML file with a command's flags as keys, without their dashes. What it names is read too
    #[arg(long, value_name = "FILE")]
    check: PathBuf,
    /// The command whose flags it holds
    #[arg(long, default_value = "serve")]
    of: Of,
}

impl Check {
    pub(crate) fn file(&self) -> &Path {
        &self.check
    }

    pub(crate) fn of(&self) -> Of {
        self.of
    }

    /// Says that the file is good.
    pub(crate) fn praise(&self) {
        let who = match self.of {
            Of::Serve => "server",
            Of::Coordinate => "coordinator",
        };
        println!("{}: a {who} can start with it", self.check.display());
    }
}

/// The arguments of `command` that the file at `path` stands for. `environment`: whether a variable is set, which wins.
pub(crate) fn arguments(
    command: &Command,
    path: &Path,
    environment: impl Fn(&str) -> bool,
) -> Result<Vec<OsString>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("--config {}: {error}", path.display()))?;
    in_text(command, &text, path, environment)
}

/// The same, of the file's text.
fn in_text(
    command: &Command,
    text: &str,
    path: &Path,
    environment: impl Fn(&str) -> bool,
) -> Result<Vec<OsString>, String> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, Parser};
    use proptest::prelude::*;

    fn lines() -> impl Strategy<Value = String> {
        let command = crate::Arguments::command();
        let serve = command.find_subcommand("serve").unwrap();
        let known: Vec<String> = flags(serve).map(|(name, _)| name.to_owned()).collect();
        let key = prop_oneof![proptest::sample::select(known), "[a-z-]{0,12}", ".{0,8}"];
        let value =
            prop_oneof!["true|false", "-?[0-9]{1,20}", "\"[^\"\n]{0,20}\"", "[0-9.]{1,8}", "\\[.{0,5}", ".{0,10}"];
        let line = (key, prop_oneof![Just(" = "), Just(""), Just("=\n")], value);
        let line = line.prop_map(|(key, is, value)| format!("{key}{is}{value}\n"));
        proptest::collection::vec(line, 0..8).prop_map(|lines| lines.concat())
    }

    proptest! {
        #[test]
        fn a_file_of_any_kind_is_refused_with_its_name_or_means_flags(text in lines(), noise in ".{0,60}") {
            let command = crate::Arguments::command();
            let serve = command.find_subcommand("serve").unwrap();
            for text in [text, noise] {
                match in_text(serve, &text, Path::new("ps.toml"), |_| false) {
                    Ok(arguments) => {
                        let all = ["gradwire-ps", "serve"].map(OsString::from).into_iter().chain(arguments.clone());
                        let _ = crate::Arguments::try_parse_from(all).map(|_| ());
                        let flag = |argument: &OsString| argument.to_string_lossy().starts_with("--");
                        prop_assert!(arguments.iter().all(flag));
                    }
                    Err(error) => prop_assert!(error.starts_with("ps.toml: "), "{error}"),
                }
            }
        }
    }
}

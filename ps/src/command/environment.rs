//! Pure: which variables of the environment mean something, and which were meant.

use clap::Command;
use std::collections::BTreeSet;

const OURS: &str = "GRADWIRE_";
/// What ranks and clients read, beside the variables of our flags: both may be started with one environment.
/// `python/gradwire/config.py` has what they mean.
const OF_OTHERS: [&str; 14] = [
    "GRADWIRE_SOCKET_IFNAME",
    "GRADWIRE_PORT_RANGE",
    "GRADWIRE_LANES",
    "GRADWIRE_ALGO",
    "GRADWIRE_CHECK_NAN",
    "GRADWIRE_DETERMINISTIC",
    "GRADWIRE_TIMEOUT",
    "GRADWIRE_TRACE",
    "GRADWIRE_TRACE_SIGNAL",
    "GRADWIRE_CUDA_LIBRARY",
    "GRADWIRE_CUDA_DIRECT",
    "GRADWIRE_CUDA_REDUCE",
    "GRADWIRE_CUDA_ALIKE",
    "GRADWIRE_NVRTC_LIBRARY",
];
/// Likeness from which a name may have been meant, of 1.
const LIKE: f64 = 0.9;

/// Every variable that means something: those of the flags of `command` and of its commands, and those of others.
fn known(command: &Command) -> BTreeSet<String> {
    let own = command.get_arguments().filter_map(|argument| argument.get_env()?.to_str().map(str::to_owned));
    let below = command.get_subcommands().flat_map(known);
    own.chain(below).chain(OF_OTHERS.map(str::to_owned)).collect()
}

/// A warning for each of `names` that begins as ours do and means nothing.
pub(crate) fn warnings(command: &Command, names: impl Iterator<Item = String>) -> Vec<String> {
    let known = known(command);
    let unknown = names.filter(|name| name.starts_with(OURS) && !known.contains(name));
    let unknown: BTreeSet<String> = unknown.collect();
    unknown.iter().map(|name| warning(name, &known)).collect()
}

fn warning(name: &str, known: &BTreeSet<String>) -> String {
    // What all names begin with makes none of them likelier.
    let rest = |name: &str| name[OURS.len()..].to_owned();
    let likeness = |other: &String| strsim::jaro_winkler(&rest(name), &rest(other));
    let nearest = known.iter().map(|other| (likeness(other), other)).max_by(|a, b| a.0.total_cmp(&b.0));
    let hint = match nearest.filter(|(likeness, _)| *likeness >= LIKE) {
        Some((_, meant)) => format!("did you mean {meant}?"),
        None => format!("there are {}", known.iter().map(String::as_str).collect::<Vec<_>>().join(", ")),
    };
    format!("{name} is set, but means nothing to gradwire; {hint}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn warned(names: &[&str]) -> Vec<String> {
        warnings(&crate::Arguments::command(), names.iter().map(|&name| name.to_owned()))
    }

    #[test]
    fn a_name_that_means_nothing_is_told_with_the_one_that_was_meant() {
        for (typed, meant) in [
            ("GRADWIRE_TRANSPROT", "GRADWIRE_TRANSPORT"),
            ("GRADWIRE_TOKN", "GRADWIRE_TOKEN"),
            ("GRADWIRE_ETCDS", "GRADWIRE_ETCD"),
            ("GRADWIRE_TLS_CERTS", "GRADWIRE_TLS_CERT"),
            ("GRADWIRE_LOGFORMAT", "GRADWIRE_LOG_FORMAT"),
            ("GRADWIRE_PORT_RANG", "GRADWIRE_PORT_RANGE"),
        ] {
            let said = warned(&[typed]);
            assert!(said.len() == 1 && said[0].starts_with(typed), "{said:?}");
            assert!(said[0].ends_with(&format!("did you mean {meant}?")), "{said:?}");
        }
        let strange = warned(&["GRADWIRE_QQ"]);
        assert!(strange[0].contains("GRADWIRE_LOG, GRADWIRE_LOG_FORMAT"), "{strange:?}");
        assert!(warned(&["GRADWIRE_LOG", "GRADWIRE_ALGO", "GRADWIRE_ETCD", "PATH", "XGRADWIRE_Y"]).is_empty());
    }

    #[test]
    fn all_that_ranks_and_clients_read_is_known_here() {
        let python = concat!(env!("CARGO_MANIFEST_DIR"), "/../python/gradwire/config.py");
        let python = std::fs::read_to_string(python).unwrap();
        let table = python.split_once("NAMES = {").and_then(|(_, rest)| rest.split_once("\n}")).unwrap().0;
        let names = table.lines().filter_map(|line| line.trim().strip_prefix('"')?.split_once("\":"));
        let names: Vec<&str> = names.map(|(name, _)| name).collect();
        assert!(names.contains(&"GRADWIRE_TRANSPORT") && names.len() > 20, "{names:?}");
        assert_eq!(warned(&names), Vec::<String>::new(), "add it to OF_OTHERS");
    }
}

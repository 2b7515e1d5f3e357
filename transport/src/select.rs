//! Pure: which wire a group uses, and the reason in words. Every rank comes to the same answer: it is given the same facts.

use crate::{TransportError, WireChoice};

/// Whether all ranks share memory, and why, or why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locality {
    /// Whether they do.
    pub shared: bool,
    /// The reason, for people.
    pub reason: String,
}

fn no(reason: &str) -> Option<Locality> {
    Some(Locality { shared: false, reason: reason.to_owned() })
}

/// What is known before anybody has tried: `None` where the proof must be made. `boots`: every rank's boot of its host.
pub fn before_proof(choice: WireChoice, boots: &[String]) -> Option<Locality> {
    match boots {
        [] | [_] => no("this rank is alone"),
        _ if choice == WireChoice::Tcp => no("GRADWIRE_TRANSPORT=tcp"),
        _ if choice == WireChoice::Verbs => no("GRADWIRE_TRANSPORT=verbs"),
        [first, ..] if first.is_empty() => no("this host has no boot id to compare"),
        [first, rest @ ..] if rest.iter().any(|boot| boot != first) => {
            no("ranks on different hosts: their boot ids differ")
        }
        _ => None,
    }
}

/// What the proof has shown: `refusal` says who could not open the segment and why; empty, all could.
pub fn after_proof(refusal: &str) -> Locality {
    if refusal.is_empty() {
        let reason = "same host: boot ids are equal and every rank reached the shared segment".to_owned();
        Locality { shared: true, reason }
    } else {
        Locality { shared: false, reason: format!("one boot id, but the shared segment cannot be reached: {refusal}") }
    }
}

/// Why two ranks do not share memory, as far as that is known before anybody has tried; `None` where the proof must be made.
pub fn pair_before_proof(choice: WireChoice, own_boot: &str, other_boot: &str) -> Option<String> {
    let reason = match choice {
        WireChoice::Tcp => "GRADWIRE_TRANSPORT=tcp",
        WireChoice::Verbs => "GRADWIRE_TRANSPORT=verbs",
        _ if own_boot.is_empty() || other_boot.is_empty() => "a host without a boot id to compare",
        _ if own_boot != other_boot => "another host: its boot id differs",
        _ => return None,
    };
    Some(reason.to_owned())
}

/// Why two ranks of one boot id use what they use: `refusal` says why memory could not be shared; empty, it is.
pub fn pair_after_proof(refusal: &str) -> String {
    match refusal {
        "" => "same host: boot ids are equal and each reached the memory of the pair".to_owned(),
        refusal => format!("one boot id, but no shared memory: {refusal}"),
    }
}

/// For each rank, the lowest rank of the same boot id; itself where it has none.
pub fn lowest_of_same(boots: &[String]) -> Vec<u32> {
    let lowest = |(at, boot): (usize, &String)| match boot.as_str() {
        "" => at,
        _ => boots.iter().position(|other| other == boot).unwrap_or(at),
    };
    boots.iter().enumerate().map(lowest).map(|at| u32::try_from(at).unwrap_or(u32::MAX)).collect()
}

/// Whether boot ids tell who shares a host: where memory is not used, or nobody can share any; else the pairs have proved it.
pub fn knows_hosts_by_boot(choice: WireChoice, by_boot: &[u32]) -> bool {
    matches!(choice, WireChoice::Tcp | WireChoice::Verbs) || (0u32..).zip(by_boot).all(|(rank, &lowest)| rank == lowest)
}

/// Whether a pair that does not share memory tries RDMA verbs.
pub fn tries_verbs(choice: WireChoice, shares_memory: bool) -> bool {
    match choice {
        WireChoice::Verbs => true,
        WireChoice::Auto => !shares_memory,
        WireChoice::Tcp | WireChoice::Shm => false,
    }
}

/// What is asked to be encrypted is not sent in the clear: RDMA knows no TLS.
///
/// # Errors
/// `Config` where both were asked for by name.
pub fn check_encryption(choice: WireChoice, tls: bool) -> Result<(), TransportError> {
    if tls { check_verbs(choice, NO_TLS_OVER_RDMA) } else { Ok(()) }
}

/// Why there is no RDMA beside TLS.
pub const NO_TLS_OVER_RDMA: &str = "TLS is on, and what goes over RDMA is not encrypted";

/// Nothing is downgraded in silence: verbs that were asked for by name and cannot be had are an error.
///
/// # Errors
/// `Config` with the reason.
pub fn check_verbs(choice: WireChoice, refusal: &str) -> Result<(), TransportError> {
    if choice != WireChoice::Verbs {
        return Ok(());
    }
    let reason = format!("RDMA verbs were asked for, but {refusal}; use auto or tcp");
    Err(TransportError::Config { setting: "GRADWIRE_TRANSPORT=verbs".to_owned(), reason })
}

/// Nothing is downgraded in silence: the same of a peer that comes and goes.
///
/// # Errors
/// `Config` with the reason.
pub fn check_memory(choice: WireChoice, refusal: &str) -> Result<(), TransportError> {
    check(choice, &Locality { shared: false, reason: refusal.to_owned() })
}

/// Nothing is downgraded in silence: shared memory that was asked for by name and cannot be had is an error.
///
/// # Errors
/// `Config` with the reason.
pub fn check(choice: WireChoice, locality: &Locality) -> Result<(), TransportError> {
    if choice == WireChoice::Shm && !locality.shared && locality.reason != "this rank is alone" {
        let reason = format!("shared memory was asked for, but {}; use auto or tcp", locality.reason);
        return Err(TransportError::Config { setting: "GRADWIRE_TRANSPORT=shm".to_owned(), reason });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_has_its_reason() {
        for (choice, own, other, expected) in [
            (WireChoice::Tcp, "a", "a", Some("GRADWIRE_TRANSPORT=tcp")),
            (WireChoice::Verbs, "a", "a", Some("GRADWIRE_TRANSPORT=verbs")),
            (WireChoice::Auto, "a", "b", Some("differs")),
            (WireChoice::Auto, "", "", Some("without a boot id")),
            (WireChoice::Auto, "a", "a", None),
            (WireChoice::Shm, "a", "a", None),
        ] {
            let answer = pair_before_proof(choice, own, other);
            assert_eq!(answer.is_some(), expected.is_some());
            assert!(answer.unwrap_or_default().contains(expected.unwrap_or_default()));
        }
        assert!(pair_after_proof("").starts_with("same host"));
        assert!(pair_after_proof("permission denied").contains("permission denied"));
    }

    #[test]
    fn verbs_are_tried_where_memory_is_not_shared_or_by_name() {
        assert!(tries_verbs(WireChoice::Verbs, true) && tries_verbs(WireChoice::Auto, false));
        for (choice, shared) in [(WireChoice::Auto, true), (WireChoice::Tcp, false), (WireChoice::Shm, false)] {
            assert!(!tries_verbs(choice, shared));
        }
        assert!(check_verbs(WireChoice::Auto, "no device").is_ok());
        assert!(check_verbs(WireChoice::Verbs, "no device").unwrap_err().to_string().contains("no device"));
    }

    #[test]
    fn boot_ids_tell_hosts_where_memory_cannot() {
        let boots = ["a", "b", "a", "", "b", ""].map(str::to_owned);
        assert_eq!(lowest_of_same(&boots), [0, 1, 0, 3, 1, 5]);
        assert!(knows_hosts_by_boot(WireChoice::Tcp, &[0, 0]) && knows_hosts_by_boot(WireChoice::Auto, &[0, 1]));
        assert!(!knows_hosts_by_boot(WireChoice::Auto, &[0, 1, 0]));
    }

    #[test]
    fn every_answer_has_its_reason() {
        let boots = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        for (choice, boot_ids, expected) in [
            (WireChoice::Auto, boots(&["a"]), Some("alone")),
            (WireChoice::Tcp, boots(&["a", "a"]), Some("GRADWIRE_TRANSPORT=tcp")),
            (WireChoice::Verbs, boots(&["a", "a"]), Some("GRADWIRE_TRANSPORT=verbs")),
            (WireChoice::Auto, boots(&["a", "b"]), Some("differ")),
            (WireChoice::Auto, boots(&["", ""]), Some("no boot id")),
            (WireChoice::Auto, boots(&["a", "a", "a"]), None),
            (WireChoice::Shm, boots(&["a", "a"]), None),
        ] {
            let answer = before_proof(choice, &boot_ids);
            assert_eq!(answer.is_some(), expected.is_some(), "{boot_ids:?}");
            if let (Some(answer), Some(expected)) = (answer, expected) {
                assert!(!answer.shared && answer.reason.contains(expected), "{answer:?}");
            }
        }
        assert!(after_proof("").shared);
        let refused = after_proof("rank 2: permission denied");
        assert!(!refused.shared && refused.reason.contains("rank 2"));
        assert!(check(WireChoice::Auto, &refused).is_ok());
        assert!(check(WireChoice::Shm, &refused).unwrap_err().to_string().contains("rank 2"));
    }
}

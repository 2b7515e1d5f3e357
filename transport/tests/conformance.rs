//! What every wire promises, tested on every wire that this machine has.

#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod authority;
#[macro_use]
mod promises;

use authority::Authority;
use gradwire_transport::{Config, CreditSettings, TlsFiles};
use promises::World;
use std::sync::LazyLock;

promises! {
    over_sim by crate::promises::sim;
    over_bad_sim by crate::promises::bad_sim;
    over_sim_credit by crate::promises::sim_credit;
    over_bad_sim_credit by crate::promises::bad_sim_credit;
    over_shm by crate::promises::shm;
    over_shm_credit by crate::promises::shm_credit;
    over_mesh by crate::promises::mesh;
    over_mixed_mesh by crate::promises::mixed_mesh;
    over_tcp by crate::promises::tcp;
    over_tcp_lanes by crate::promises::tcp_lanes;
    over_tcp_credit by crate::promises::tcp_credit;
    over_tls by crate::tls;
    over_tls_lanes by crate::tls_lanes;
    over_verbs by crate::promises::verbs;
    over_verbs_lanes by crate::promises::verbs_lanes;
    over_verbs_credit by crate::promises::verbs_credit;
    over_breaking_verbs_credit by crate::promises::breaking_verbs_credit;
    over_breaking_verbs by crate::promises::breaking_verbs;
    over_failing_verbs by crate::promises::failing_verbs;
}

/// Sockets with TLS on them, and certificates asked of both ends.
fn tls(config: &Config, count: u32) -> World {
    static FILES: LazyLock<(Authority, TlsFiles)> = LazyLock::new(|| {
        let authority = Authority::new();
        let files = TlsFiles { client_ca: Some(authority.ca()), ..authority.files(&["127.0.0.1"]) };
        (authority, files)
    });
    promises::tcp(&Config { tls: authority::load(&FILES.1), ..config.clone() }, count)
}

/// The same over several connections, with portions granted.
fn tls_lanes(config: &Config, count: u32) -> World {
    let credit = CreditSettings { loopback: true, ..CreditSettings::default() };
    tls(&Config { lanes: 3, credit: Some(credit), ..config.clone() }, count)
}

mod one_sided_over_verbs {
    use crate::promises::one_sided::{self, OneSidedPair};
    use crate::promises::verbs_wires;
    use gradwire_transport::verbs::Fabric;
    use gradwire_transport::{Config, VerbsWire};
    use std::time::Instant;

    fn pair() -> OneSidedPair<VerbsWire> {
        let wires = verbs_wires(&Config::default(), 2, || Box::new(Fabric::adapter(&FABRIC)));
        let wires = wires.try_into().unwrap_or_else(|_| unreachable!("two wires were asked for"));
        OneSidedPair { wires, done: [Vec::new(), Vec::new()], turn: Box::new(Instant::now) }
    }

    static FABRIC: std::sync::LazyLock<Fabric> = std::sync::LazyLock::new(Fabric::default);

    #[test]
    fn puts_and_gets_reach_exposed_memory() {
        one_sided::puts_and_gets_reach_exposed_memory(pair);
    }
}

mod one_sided_over_sim {
    use crate::promises::one_sided::{self, OneSidedPair};
    use crate::promises::simulate;
    use gradwire_transport::{Config, FaultPlan, SimWire};
    use std::time::Duration;

    fn pair() -> OneSidedPair<SimWire> {
        let mut plan = FaultPlan::default();
        (plan.link.delay, plan.link.jitter) = (Duration::from_micros(5), Duration::from_micros(9));
        plan.link.lost_per_million = 50_000;
        let (network, wires, mut now) = simulate(3, plan, &Config::default(), 2);
        let turn = Box::new(move || {
            now = network.next_event().unwrap_or(now + Duration::from_millis(1)).max(now);
            now
        });
        let wires = wires.try_into().unwrap_or_else(|_| unreachable!("two wires were asked for"));
        OneSidedPair { wires, done: [Vec::new(), Vec::new()], turn }
    }

    #[test]
    fn puts_and_gets_reach_exposed_memory() {
        one_sided::puts_and_gets_reach_exposed_memory(pair);
    }

    #[test]
    fn an_access_outside_of_what_is_exposed_ends_the_connection() {
        one_sided::an_access_outside_of_what_is_exposed_ends_the_connection(pair);
    }
}

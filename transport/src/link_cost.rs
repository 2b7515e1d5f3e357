//! Pure: what a message costs, as measured when a group forms: the numbers that algorithms are chosen by.

/// What a message of some bytes costs over one kind of link (Hockney, 1994, doi:10.1016/S0167-8191(06)80021-9; the cost of a
/// message to its sender as in LogP, Culler and others, 1993, doi:10.1145/155332.155333).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkCost {
    /// From the call that sends until a short message is there, in ns.
    pub latency_ns: f64,
    /// Each more of many short messages on their way at once, in ns.
    pub message_ns: f64,
    /// Each byte of a long message, in ns: 1 ns is 1 GB/s.
    pub byte_ns: f64,
}

/// The costs inside a host and between hosts; all ranks of a group have the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkCosts {
    /// Between ranks of one host.
    pub near: LinkCost,
    /// Between hosts.
    pub far: LinkCost,
    /// Cores of rank 0: where a host has more ranks, they take turns.
    pub cores: u32,
    /// Whether they were measured, else assumed.
    pub measured: bool,
}

impl Default for LinkCosts {
    /// Loopback TCP of a small machine, and a network of 10 Gb/s.
    fn default() -> Self {
        let near = LinkCost { latency_ns: 12_000.0, message_ns: 4_000.0, byte_ns: 0.4 };
        let far = LinkCost { latency_ns: 25_000.0, message_ns: 4_000.0, byte_ns: 0.85 };
        Self { near, far, cores: 2, measured: false }
    }
}

/// Bytes of both costs and the cores, as ranks tell them to each other.
pub(crate) const ENCODED_BYTES: usize = 6 * 8 + 5;

impl LinkCosts {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let numbers =
            [self.near, self.far].into_iter().flat_map(|cost| [cost.latency_ns, cost.message_ns, cost.byte_ns]);
        let mut bytes: Vec<u8> = numbers.flat_map(f64::to_le_bytes).collect();
        bytes.extend(self.cores.to_le_bytes());
        bytes.push(u8::from(self.measured));
        bytes
    }

    /// `None` for what is no table of costs: too short, or numbers that are none.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (numbers, rest) = bytes.split_at_checked(6 * 8)?;
        let mut numbers = numbers.as_chunks().0.iter().map(|eight| f64::from_le_bytes(*eight));
        let mut cost = || {
            let mut next = || numbers.next().filter(|ns| ns.is_finite() && *ns >= 0.0);
            Some(LinkCost { latency_ns: next()?, message_ns: next()?, byte_ns: next()? })
        };
        let (near, far) = (cost()?, cost()?);
        let (cores, measured) = (u32::from_le_bytes(*rest.first_chunk()?).max(1), *rest.get(4)? == 1);
        Some(Self { near, far, cores, measured })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_come_back_as_they_were_and_nonsense_is_refused() {
        let costs = LinkCosts { cores: 7, measured: true, ..LinkCosts::default() };
        let bytes = costs.encode();
        assert_eq!((bytes.len(), LinkCosts::decode(&bytes)), (ENCODED_BYTES, Some(costs)));
        assert_eq!(LinkCosts::decode(&bytes[1..]), None);
        let wrong = LinkCosts { near: LinkCost { byte_ns: f64::NAN, ..costs.near }, ..costs };
        assert_eq!(LinkCosts::decode(&wrong.encode()), None);
    }
}

//! Pure: what two ends tell each other, over sockets, to connect their queue pairs, for the first time or again; and the one
//! rule by which both come to the same answer.

use super::adapter::{Endpoint, Remote};

/// Longest text of a refusal.
const MAX_TEXT: usize = 300;
/// Queue pairs of one link.
pub(super) const MAX_LANES: usize = 8;
const MARK: [u8; 4] = *b"GWV4";

/// How one end would go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Means {
    /// By these queue pairs, each with as many receives, and memory for as many small frames.
    QueuePairs { endpoints: Vec<Endpoint>, receives: u32, ring: Remote },
    /// Over the sockets, for the reason given.
    Sockets(String),
}

/// One end's word on the next epoch of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Proposal {
    /// How many times the link has been connected before.
    pub(super) epoch: u32,
    /// Messages received on each lane since the link began.
    pub(super) received: Vec<u64>,
    /// What to go on by.
    pub(super) means: Means,
}

/// What both ends conclude from two proposals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Conclusion {
    /// Our queue pairs, in order, are connected to these, which have so many receives and this memory.
    Connect(Vec<Endpoint>, u32, Remote),
    /// Both go on over sockets, for this reason.
    Sockets(String),
}

/// Queue pairs where both ends offer them, as many as the one with fewer has; sockets where either says so.
pub(super) fn conclude(ours: &Proposal, theirs: &Proposal) -> Conclusion {
    match (&ours.means, &theirs.means) {
        (Means::Sockets(reason), Means::QueuePairs { .. }) => Conclusion::Sockets(format!("this end: {reason}")),
        (Means::QueuePairs { .. }, Means::Sockets(reason)) => Conclusion::Sockets(format!("the other end: {reason}")),
        (Means::Sockets(own), Means::Sockets(other)) if own == other => Conclusion::Sockets(own.clone()),
        (Means::Sockets(own), Means::Sockets(other)) => {
            Conclusion::Sockets(format!("this end: {own}; the other end: {other}"))
        }
        (Means::QueuePairs { endpoints: own, .. }, Means::QueuePairs { endpoints, receives, ring }) => {
            let both = own.len().min(endpoints.len());
            Conclusion::Connect(endpoints[..both].to_vec(), *receives, *ring)
        }
    }
}

impl Proposal {
    /// The proposal as bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = MARK.to_vec();
        out.extend(self.epoch.to_le_bytes());
        out.push(self.received.len().min(MAX_LANES) as u8);
        self.received.iter().take(MAX_LANES).for_each(|count| out.extend(count.to_le_bytes()));
        match &self.means {
            Means::Sockets(text) => {
                let end = (0..=text.len().min(MAX_TEXT)).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
                out.push(0);
                out.extend(&text.as_bytes()[..end]);
            }
            Means::QueuePairs { endpoints, receives, ring } => {
                out.push(endpoints.len().min(MAX_LANES) as u8);
                out.extend(receives.to_le_bytes());
                out.extend(ring.address.to_le_bytes());
                out.extend(ring.key.to_le_bytes());
                for end in endpoints.iter().take(MAX_LANES) {
                    out.extend(end.queue_pair.to_le_bytes());
                    out.extend(end.packet.to_le_bytes());
                    out.extend(end.lid.to_le_bytes());
                    out.extend(end.mtu_bytes.to_le_bytes());
                    out.push(end.reads);
                    out.extend(end.gid);
                }
            }
        }
        out
    }

    /// The proposal in `bytes`; `None` for what is none.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes.strip_prefix(&MARK)?;
        let epoch = u32::from_le_bytes(take(&mut rest)?);
        let [lanes] = take(&mut rest)?;
        let received: Option<Vec<u64>> =
            (0..lanes).map(|_| take(&mut rest).map(u64::from_le_bytes)).collect::<Option<_>>();
        let received = received.filter(|counts| counts.len() <= MAX_LANES)?;
        let [pairs] = take(&mut rest)?;
        let means = if pairs == 0 {
            Means::Sockets(String::from_utf8(rest.to_vec()).ok().filter(|text| text.len() <= MAX_TEXT)?)
        } else {
            let receives = u32::from_le_bytes(take(&mut rest)?);
            let address = u64::from_le_bytes(take(&mut rest)?);
            let ring = Remote { address, key: u32::from_le_bytes(take(&mut rest)?) };
            let endpoints = (0..pairs).map(|_| endpoint(&mut rest)).collect::<Option<Vec<_>>>()?;
            let sound = endpoints.len() <= MAX_LANES && receives > 1 && rest.is_empty();
            sound.then_some(Means::QueuePairs { endpoints, receives, ring })?
        };
        Some(Self { epoch, received, means })
    }
}

fn endpoint(rest: &mut &[u8]) -> Option<Endpoint> {
    Some(Endpoint {
        queue_pair: u32::from_le_bytes(take(rest)?),
        packet: u32::from_le_bytes(take(rest)?),
        lid: u16::from_le_bytes(take(rest)?),
        mtu_bytes: u16::from_le_bytes(take(rest)?),
        reads: u8::from_le_bytes(take(rest)?),
        gid: take(rest)?,
    })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pairs(count: u32) -> Proposal {
        let endpoint =
            |at| Endpoint { queue_pair: at, packet: 7, lid: 0, mtu_bytes: 4096, reads: 16, gid: [at as u8; 16] };
        let endpoints = (0..count).map(endpoint).collect();
        let ring = Remote { address: 1 << 50, key: count };
        Proposal { epoch: 3, received: vec![5, 1 << 40], means: Means::QueuePairs { endpoints, receives: 64, ring } }
    }

    fn sockets(reason: &str) -> Proposal {
        Proposal { epoch: 3, received: vec![0], means: Means::Sockets(reason.to_owned()) }
    }

    #[test]
    fn a_proposal_comes_back_as_it_was() {
        for proposal in [pairs(1), pairs(8), sockets(""), sockets("no device")] {
            let bytes = proposal.encode();
            assert!(bytes.len() < 512);
            assert_eq!(Proposal::decode(&bytes), Some(proposal));
        }
        assert!(sockets(&"é".repeat(400)).encode().len() < 512);
    }

    #[test]
    fn both_ends_come_to_one_answer() {
        let ends = [pairs(1), pairs(3), sockets("a"), sockets("b")];
        for a in &ends {
            for b in &ends {
                match (conclude(a, b), conclude(b, a)) {
                    (Conclusion::Connect(there, 64, _), Conclusion::Connect(here, 64, _)) => {
                        assert_eq!(there.len(), here.len())
                    }
                    (Conclusion::Sockets(there), Conclusion::Sockets(here)) => {
                        assert!(!there.is_empty() && !here.is_empty());
                    }
                    other => panic!("{a:?} and {b:?}: {other:?}"),
                }
            }
        }
    }

    proptest! {
        #[test]
        fn hostile_proposals_are_refused_not_believed(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut marked = MARK.to_vec();
            marked.extend(&bytes);
            if let Some(Proposal { received, means: Means::QueuePairs { endpoints, .. }, .. }) = Proposal::decode(&marked) {
                prop_assert!(received.len() <= MAX_LANES && endpoints.len() <= MAX_LANES);
            }
        }

        #[test]
        fn a_cut_proposal_is_refused(at in 0usize..70) {
            prop_assert!(Proposal::decode(&pairs(1).encode()[..at]).is_none());
        }
    }
}

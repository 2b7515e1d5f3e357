//! Pure: by which way a device's memory could reach the wire, from what the device and the cards say.

use std::fmt;

/// What was found on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Whether the CUDA device exports its memory as dma-bufs.
    pub exports: bool,
    /// Each RDMA device, with why it takes no dma-buf, if it does not.
    pub cards: Vec<(String, Option<String>)>,
    /// Whether the module nvidia_peermem is loaded.
    pub peer_memory: bool,
}

/// What came of trying to register one buffer with one card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    /// The RDMA device.
    pub card: String,
    /// By a dma-buf, or why not.
    pub dma_buf: Result<(), String>,
    /// By its address, or why not.
    pub peer_memory: Result<(), String>,
}

/// The ways, best first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// A card could read and write the device's memory by a dma-buf.
    DmaBuf {
        /// The RDMA device.
        card: String,
    },
    /// It could, by nvidia_peermem.
    PeerMemory {
        /// The RDMA device.
        card: String,
    },
    /// Only by way of the host's memory.
    Staged {
        /// Why by no other.
        reason: String,
    },
}

impl Way {
    /// The best way there is.
    pub fn of(findings: &Findings) -> Self {
        let Findings { exports, cards, peer_memory } = findings;
        if cards.is_empty() {
            return Self::Staged { reason: "no RDMA device".to_owned() };
        }
        let taker = cards.iter().find(|(_, refusal)| refusal.is_none());
        match taker {
            Some((card, _)) if *exports => return Self::DmaBuf { card: card.clone() },
            _ if *peer_memory => return Self::PeerMemory { card: cards[0].0.clone() },
            _ => {}
        }
        let mut reasons = Vec::new();
        if !exports {
            reasons.push("the CUDA device exports no dma-buf".to_owned());
        }
        let refused = |(card, refusal): &(String, Option<String>)| {
            refusal.as_ref().map(|refusal| format!("{card} refuses dma-buf: {refusal}"))
        };
        reasons.extend(cards.iter().filter_map(refused));
        reasons.push("nvidia_peermem is not loaded".to_owned());
        Self::Staged { reason: reasons.join("; ") }
    }

    /// The way of one buffer, once it was tried.
    pub fn of_trial(trial: &Trial) -> Self {
        let Trial { card, dma_buf, peer_memory } = trial;
        match (dma_buf, peer_memory) {
            (Ok(()), _) => Self::DmaBuf { card: card.clone() },
            (_, Ok(())) => Self::PeerMemory { card: card.clone() },
            (Err(refusal), Err(other)) => {
                Self::Staged { reason: format!("{card} refuses dma-buf: {refusal}; {other}") }
            }
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DmaBuf { card } => write!(f, "GPU-direct RDMA by dma-buf of {card}"),
            Self::PeerMemory { card } => write!(f, "GPU-direct RDMA by nvidia_peermem of {card}"),
            Self::Staged { reason } => write!(f, "no GPU-direct RDMA: {reason}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_way_is_taken_and_the_last_says_why_not_the_others() {
        let yes = |name: &str| (name.to_owned(), None);
        let no = |name: &str| (name.to_owned(), Some("Operation not supported".to_owned()));
        let way = |exports, cards: Vec<_>, peer_memory| Way::of(&Findings { exports, cards, peer_memory });
        assert_eq!(way(true, vec![no("rxe0"), yes("mlx5_0")], true), Way::DmaBuf { card: "mlx5_0".to_owned() });
        assert_eq!(way(false, vec![yes("mlx5_0")], true), Way::PeerMemory { card: "mlx5_0".to_owned() });
        assert_eq!(way(true, vec![no("rxe0")], true), Way::PeerMemory { card: "rxe0".to_owned() });
        assert_eq!(way(true, vec![], true).to_string(), "no GPU-direct RDMA: no RDMA device");
        assert_eq!(
            way(true, vec![no("rxe0")], false).to_string(),
            "no GPU-direct RDMA: rxe0 refuses dma-buf: Operation not supported; nvidia_peermem is not loaded"
        );
        assert_eq!(
            way(false, vec![yes("mlx5_0")], false).to_string(),
            "no GPU-direct RDMA: the CUDA device exports no dma-buf; nvidia_peermem is not loaded"
        );
    }
    #[test]
    fn a_buffer_goes_by_what_was_taken_and_says_each_refusal() {
        let card = || "rxe0".to_owned();
        let way = |dma_buf: Result<(), &str>, peer_memory: Result<(), &str>| {
            let [dma_buf, peer_memory] = [dma_buf, peer_memory].map(|tried| tried.map_err(str::to_owned));
            Way::of_trial(&Trial { card: card(), dma_buf, peer_memory })
        };
        assert_eq!(way(Ok(()), Err("not needed")), Way::DmaBuf { card: card() });
        assert_eq!(way(Err("no"), Ok(())), Way::PeerMemory { card: card() });
        assert_eq!(
            way(Err("Operation not supported (95)"), Err("nvidia_peermem is not loaded")).to_string(),
            "no GPU-direct RDMA: rxe0 refuses dma-buf: Operation not supported (95); nvidia_peermem is not loaded"
        );
    }
}

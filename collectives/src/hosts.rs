//! Pure: which ranks share a host.

use gradwire_transport::Rank;
use std::fmt;

/// The hosts of a group, in the order of their lowest ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hosts(Vec<Vec<Rank>>);

impl Hosts {
    /// From one number a rank, the same for ranks that share a host.
    pub fn new(of_rank: &[u32]) -> Self {
        let mut hosts: Vec<(u32, Vec<Rank>)> = Vec::new();
        for (rank, &host) in (0u32..).map(Rank).zip(of_rank) {
            match hosts.iter_mut().find(|(known, _)| *known == host) {
                Some((_, ranks)) => ranks.push(rank),
                None => hosts.push((host, vec![rank])),
            }
        }
        Self(hosts.into_iter().map(|(_, ranks)| ranks).collect())
    }

    /// The number of hosts.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The ranks of host number `host`, in order.
    pub fn ranks(&self, host: usize) -> &[Rank] {
        &self.0[host]
    }

    /// Every host's ranks.
    pub fn iter(&self) -> impl Iterator<Item = &[Rank]> {
        self.0.iter().map(Vec::as_slice)
    }

    /// The host of `rank`, and which of its ranks it is.
    pub fn place(&self, rank: Rank) -> (usize, usize) {
        let found = |ranks: &Vec<Rank>| ranks.iter().position(|&other| other == rank);
        let at = self.0.iter().enumerate().find_map(|(host, ranks)| Some((host, found(ranks)?)));
        at.expect("every rank of the group is on a host")
    }

    /// The ranks in the place of `rank` on every host, in the order of the hosts, and which of them it is. `None` where not all
    /// hosts have as many.
    pub fn across(&self, rank: Rank) -> Option<(Vec<Rank>, usize)> {
        let (host, place) = self.place(rank);
        (self.fewest() == self.most()).then(|| (self.iter().map(|ranks| ranks[place]).collect(), host))
    }

    /// The ranks of the host with the fewest: that many can each work between hosts with a partner on every other one.
    pub fn fewest(&self) -> usize {
        self.0.iter().map(Vec::len).min().unwrap_or(1)
    }

    /// The ranks of the host with the most.
    pub fn most(&self) -> usize {
        self.0.iter().map(Vec::len).max().unwrap_or(1)
    }
}

impl fmt::Display for Hosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (least, most) = (self.fewest(), self.most());
        match self.count() {
            1 => write!(f, "1 host"),
            count if least == most => write!(f, "{count} hosts of {most} ranks"),
            count => write!(f, "{count} hosts of {least} to {most} ranks"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_found_on_their_hosts() {
        let hosts = Hosts::new(&[7, 3, 7, 7]);
        assert_eq!((hosts.count(), hosts.fewest(), hosts.most()), (2, 1, 3));
        assert_eq!(hosts.ranks(0), [Rank(0), Rank(2), Rank(3)]);
        assert_eq!((hosts.place(Rank(3)), hosts.place(Rank(1))), ((0, 2), (1, 0)));
        assert_eq!(hosts.to_string(), "2 hosts of 1 to 3 ranks");
        assert_eq!(hosts.across(Rank(0)), None);
        let even = Hosts::new(&[7, 3, 7, 3, 5, 5]);
        assert_eq!(even.across(Rank(3)), Some((vec![Rank(2), Rank(3), Rank(5)], 1)));
    }
}

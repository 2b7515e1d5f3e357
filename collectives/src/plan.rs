//! Pure: a schedule made ready to run: who waits for whom, and in which order messages leave and come on each link.

use crate::{Action, Schedule, StepId};
use gradwire_transport::Rank;

/// A schedule with its tables; made once and kept for the next call of the same shape.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) schedule: Schedule,
    /// How many steps each step waits for.
    pub(crate) waits_for: Vec<u8>,
    /// Steps that wait for step i: `followers[first_follower[i]..first_follower[i + 1]]`.
    first_follower: Vec<u32>,
    followers: Vec<StepId>,
    /// One per rank that this rank exchanges messages with.
    pub(crate) links: Vec<PlanLink>,
    /// How many ranks take part, and this rank's number among them.
    pub(crate) members: usize,
    pub(crate) me: usize,
}

/// The messages between this rank and another, in the order that both keep.
#[derive(Debug)]
pub(crate) struct PlanLink {
    pub(crate) rank: Rank,
    /// Its number among those that take part, by which the schedule knows it.
    pub(crate) number: usize,
    pub(crate) sends: Vec<StepId>,
    pub(crate) recvs: Vec<StepId>,
    /// Whether, in an all-to-all, that rank may begin with packed messages, after which its part comes alone.
    pub(crate) may_pack: bool,
}

impl Plan {
    /// Makes `schedule` of number `me` among `members` ready, who are ranks by their numbers to it.
    pub(crate) fn new(schedule: Schedule, me: usize, members: &[Rank]) -> Self {
        let count = schedule.steps.len();
        let mut waits_for = vec![0u8; count];
        let mut first_follower = vec![0u32; count + 1];
        let edges = || {
            (0u32..)
                .zip(&schedule.steps)
                .flat_map(|(id, step)| step.after.iter().flatten().map(move |&earlier| (earlier, id)))
        };
        for (earlier, later) in edges() {
            first_follower[earlier as usize + 1] += 1;
            waits_for[later as usize] += 1;
        }
        for i in 0..count {
            first_follower[i + 1] += first_follower[i];
        }
        let mut next = first_follower.clone();
        let mut followers = vec![0; first_follower[count] as usize];
        for (earlier, later) in edges() {
            followers[next[earlier as usize] as usize] = later;
            next[earlier as usize] += 1;
        }
        let links = links(&schedule, me, members);
        Self { schedule, waits_for, first_follower, followers, links, members: members.len(), me }
    }

    /// The steps that wait for `step`.
    pub(crate) fn followers(&self, step: StepId) -> &[StepId] {
        let (first, last) = (self.first_follower[step as usize], self.first_follower[step as usize + 1]);
        &self.followers[first as usize..last as usize]
    }

    /// The link to `rank`.
    pub(crate) fn link(&self, rank: Rank) -> Option<usize> {
        self.links.iter().position(|link| link.rank == rank)
    }
}

fn links(schedule: &Schedule, me: usize, members: &[Rank]) -> Vec<PlanLink> {
    let link = |(number, &rank)| PlanLink { rank, number, sends: vec![], recvs: vec![], may_pack: false };
    let mut links: Vec<PlanLink> = members.iter().enumerate().map(link).collect();
    for (id, step) in (0u32..).zip(&schedule.steps) {
        match step.action {
            Action::Send { to, .. } | Action::SendToken { to } => links[to.index()].sends.push(id),
            Action::Recv { from, .. } | Action::RecvReduce { from, .. } | Action::RecvToken { from } => {
                links[from.index()].recvs.push(id);
            }
            Action::FoldAll { .. } => {
                links.iter_mut().filter(|link| link.number != me).for_each(|link| link.recvs.push(id));
            }
            Action::Copy { .. } | Action::Finish { .. } | Action::Join => {}
        }
    }
    links.retain(|link| !link.sends.is_empty() || !link.recvs.is_empty());
    links
}

//! Pure: small frames that the receiver watches for in its own memory, instead of waiting for a completion: how such a frame is
//! sealed, and when the receiver watches.
//!
//! Each end has a ring of places that the peer writes, one for each receive that it posts. Message `n` of the first lane, if it
//! goes this way, lies in place `n` modulo their number, at the place's end. It takes a credit as any other message does, so its
//! place is free; and it has a number among all, so there is one order: the next message is either in its place or the next
//! completion. A completion tells that all that was written before it lies in memory, so the ring is looked at before each.
//! After a break the numbers tell what goes again, and the places are wiped while no queue pair is there.
//!
//! **Nothing is assumed of the order in which the bytes of one write appear.** A frame counts once its last word has the number
//! and a sum over all of it. (A network card writes upwards and an x86 processor shows it so, but soft-RoCE may copy with string
//! instructions, whose stores appear in any order.)
//!
//! **Nothing is slept through.** Memory wakes nobody, so a sender writes to a ring only while a word in its own memory, which the
//! receiver writes, says that it watches. Before a receiver sleeps it writes there that it does not, and what it has received;
//! the end of that write wakes it once more, and it looks again before it sleeps on. A sender looks at the word before each
//! write, after it, and whenever it is polled: if the receiver has ceased to watch and may lack a frame, it sends one of the
//! ordinary kind, which wakes. What is left are writes on their way while the word changed, of a sender that is not polled any
//! more: for those the sleep is broken, after 1 ms at first, then after twice as long each time, up to a second. So a frame waits
//! no longer than twice its own time on the network, or a second. The tests below go through every interleaving.

use std::time::{Duration, Instant};

/// One place of the ring.
pub(super) const PLACE_BYTES: usize = 192;
/// What makes a frame whole: the word that is watched.
pub(super) const SEAL_BYTES: usize = 8;
/// Longest frame that is watched for.
pub(super) const MOST_BYTES: usize = PLACE_BYTES - SEAL_BYTES;
/// Words of the longest.
pub(super) const MOST_WORDS: usize = MOST_BYTES / 8;
/// Small frames that must come without a sleep between them before it is worth while to watch.
const QUICK: u32 = 8;
/// The part of a number that a seal shows; its sum is over all of it.
const MARK: u64 = (1 << MARK_BITS) - 1;
const MARK_BITS: u32 = 24;
const FIRST_NAP: Duration = Duration::from_millis(1);
/// Times that a nap is doubled.
const DOUBLINGS: u32 = 10;

/// The word behind frame `number` of the first lane, of so many words: a sum over frame and number; one more than the words, so
/// that it is never that of wiped memory; the number's last three bytes.
pub(super) fn seal(frame: impl Iterator<Item = u64>, words: usize, number: u64) -> u64 {
    let head = (words as u64 + 1) << MARK_BITS | number & MARK;
    let start = number.wrapping_mul(0xD6E8_FEB8_6659_FD93) ^ head;
    let mixed = frame.fold(start, |sum, word| (sum.rotate_left(23) ^ word).wrapping_mul(0x9FB2_1C65_1E98_DF25));
    (mixed ^ mixed >> 29) << 32 | head
}

/// How many words frame `number` has, if `last`, the last word of its place, may be its seal.
pub(super) fn words_of(last: u64, number: u64) -> Option<usize> {
    if (last ^ number) & MARK != 0 {
        return None;
    }
    let words = (last >> MARK_BITS & 0xff).wrapping_sub(1) as usize;
    (words <= MOST_WORDS).then_some(words)
}

/// What a receiver tells the sender: whether it watches, and how many messages of the first lane it has received.
pub(super) fn word(watches: bool, received: u64) -> u64 {
    received << 1 | u64::from(watches)
}

/// Whether the receiver watches, by its word.
pub(super) fn watches(word: u64) -> bool {
    word & 1 == 1
}

/// Whether a receiver that does not watch any more may lack one of the first `written` messages.
pub(super) fn may_lack(word: u64, written: u64) -> bool {
    !watches(word) && word >> 1 < written
}

/// Whether a receiver watches.
#[derive(Debug, Default)]
pub(super) struct Watcher {
    watching: bool,
    quick: u32,
    naps: u32,
    nap: Option<Instant>,
}

impl Watcher {
    /// Whether the peer has been told that we watch.
    pub(super) fn is_watching(&self) -> bool {
        self.watching
    }

    /// A small frame has come by a completion: whether to tell the peer now that we watch.
    pub(super) fn came(&mut self) -> bool {
        self.quick = self.quick.saturating_add(1);
        !self.watching && self.quick >= QUICK
    }

    /// The peer is told that we watch.
    pub(super) fn watch(&mut self) {
        (self.watching, self.nap) = (true, None);
    }

    /// The peer is told that we do not watch.
    pub(super) fn leave(&mut self, now: Instant) {
        (self.watching, self.naps, self.nap) = (false, 0, Some(now + FIRST_NAP));
    }

    /// Before each sleep: how long it may be.
    pub(super) fn sleeps(&mut self, now: Instant) {
        self.quick = 0;
        if self.nap.is_some_and(|nap| nap <= now) {
            self.naps = (self.naps + 1).min(DOUBLINGS);
            self.nap = Some(now + FIRST_NAP * (1 << self.naps));
        }
    }

    /// When a sleep must end, to look.
    pub(super) fn nap(&self) -> Option<Instant> {
        self.nap
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeSet, VecDeque};

    /// What is on its way, in order, each way.
    #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Packet {
        Ring(u64),
        Frame(Option<u64>),
        Word(u64),
        Done,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Sender {
        /// Looks at the word, and posts accordingly.
        Free,
        /// Has decided to write into the ring.
        Decided,
        /// Has done so, and looks again.
        Written,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Receiver {
        Awake,
        /// Has told that it does not watch, where it did; it arms.
        Leaving,
        /// The next completion wakes it; it looks a last time.
        Armed,
        Asleep,
    }

    /// Two ends and what is between them. Messages are numbered as the link does, nudges included.
    #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
    struct World {
        sender: Sender,
        left: u32,
        sent: u64,
        written: u64,
        word: u64,
        out: VecDeque<Packet>,
        back: VecDeque<Packet>,
        ring: BTreeSet<u64>,
        completions: VecDeque<Packet>,
        receiver: Receiver,
        watching: bool,
        received: u64,
        sleeps: u32,
    }

    impl World {
        fn new(messages: u32, watching: bool, sleeps: u32) -> Self {
            let receiver = Receiver::Awake;
            Self {
                sender: Sender::Free,
                left: messages,
                sent: 0,
                written: 0,
                word: word(watching, 0),
                out: VecDeque::new(),
                back: VecDeque::new(),
                ring: BTreeSet::new(),
                completions: VecDeque::new(),
                receiver,
                watching,
                received: 0,
                sleeps,
            }
        }

        fn frame(&mut self) {
            self.out.push_back(Packet::Frame(Some(self.sent)));
            self.sent += 1;
            self.written = 0;
        }

        fn nudge(&mut self) {
            if may_lack(self.word, self.written) {
                self.frame();
            }
        }

        fn look(&mut self) {
            while self.ring.remove(&self.received) {
                self.received += 1;
            }
        }

        /// Takes everything, as a poll does; false: a completion came before what precedes it.
        fn take(&mut self) -> bool {
            self.look();
            while let Some(completion) = self.completions.pop_front() {
                if let Packet::Frame(Some(number)) = completion {
                    self.look();
                    if number != self.received {
                        return false;
                    }
                    self.received += 1;
                }
            }
            self.look();
            true
        }

        fn complete(&mut self, completion: Packet) {
            self.completions.push_back(completion);
            if matches!(self.receiver, Receiver::Armed | Receiver::Asleep) {
                self.receiver = Receiver::Awake;
            }
        }

        /// Everything that may happen next; a nap only where `naps`.
        fn steps(&self, naps: bool, polls: bool) -> Vec<World> {
            let mut next = Vec::new();
            let mut step = |change: &dyn Fn(&mut World)| {
                let mut world = self.clone();
                change(&mut world);
                next.push(world);
            };
            match self.sender {
                Sender::Free if self.left > 0 => step(&|w| {
                    w.left -= 1;
                    match watches(w.word) {
                        true => w.sender = Sender::Decided,
                        false => w.frame(),
                    }
                }),
                Sender::Free if polls && may_lack(self.word, self.written) => step(&World::nudge),
                Sender::Free => {}
                Sender::Decided => step(&|w| {
                    w.out.push_back(Packet::Ring(w.sent));
                    w.sent += 1;
                    w.written = w.sent;
                    w.sender = Sender::Written;
                }),
                Sender::Written => step(&|w| {
                    w.nudge();
                    w.sender = Sender::Free;
                }),
            }
            if !self.out.is_empty() {
                step(&|w| match w.out.pop_front() {
                    Some(Packet::Ring(number)) => assert!(w.ring.insert(number)),
                    Some(Packet::Frame(number)) => w.complete(Packet::Frame(number)),
                    _ => unreachable!("words go the other way"),
                });
            }
            if !self.back.is_empty() {
                step(&|w| match w.back.pop_front() {
                    // Its acknowledgement is not before it, and may be as slow as anything.
                    Some(Packet::Word(word)) => {
                        w.word = word;
                        if !watches(word) {
                            w.back.push_front(Packet::Done);
                        }
                    }
                    _ => w.complete(Packet::Done),
                });
            }
            match self.receiver {
                Receiver::Awake => {
                    if self.sleeps > 0 {
                        step(&|w| {
                            w.sleeps -= 1;
                            w.receiver = Receiver::Leaving;
                            if std::mem::take(&mut w.watching) {
                                w.back.push_back(Packet::Word(word(false, w.received)));
                            }
                        });
                    }
                    step(&|w| assert!(w.take(), "out of order: {w:?}"));
                    if !self.watching {
                        step(&|w| {
                            w.watching = true;
                            w.back.push_back(Packet::Word(word(true, w.received)));
                        });
                    }
                }
                Receiver::Leaving => step(&|w| w.receiver = Receiver::Armed),
                Receiver::Armed => step(&|w| {
                    let before = w.received;
                    let any = !w.completions.is_empty();
                    assert!(w.take(), "out of order: {w:?}");
                    w.receiver = if any || w.received > before { Receiver::Awake } else { Receiver::Asleep };
                }),
                Receiver::Asleep if naps => step(&|w| w.receiver = Receiver::Awake),
                Receiver::Asleep => {}
            }
            next.retain(|world| world != self);
            next
        }

        fn is_stuck(&self) -> bool {
            self.receiver == Receiver::Asleep && self.received < self.sent
        }
    }

    /// Goes through all worlds that can be reached; those in which nothing happens by itself any more.
    fn ends(first: World, polls: bool) -> (usize, Vec<World>) {
        let (mut seen, mut open, mut ends) = (BTreeSet::from([first.clone()]), vec![first], Vec::new());
        while let Some(world) = open.pop() {
            let next = world.steps(false, polls);
            if next.is_empty() {
                ends.push(world);
                continue;
            }
            open.extend(next.into_iter().filter(|world| seen.insert(world.clone())));
        }
        (seen.len(), ends)
    }

    #[test]
    fn no_interleaving_loses_a_frame_or_sleeps_through_one_of_a_sender_that_is_polled() {
        for (messages, watching) in [(1, true), (2, true), (3, true), (2, false), (3, false)] {
            let (worlds, ends) = ends(World::new(messages, watching, 2), true);
            assert!(worlds > 50 && !ends.is_empty(), "{worlds} worlds");
            for end in &ends {
                assert!(end.left == 0 && end.received == end.sent, "lost or slept through: {end:?}");
            }
        }
    }

    #[test]
    fn a_sender_that_falls_silent_is_helped_by_a_nap() {
        let (_, ends) = ends(World::new(2, true, 2), false);
        let stuck: Vec<_> = ends.into_iter().filter(World::is_stuck).collect();
        assert!(!stuck.is_empty(), "this is why there are naps");
        for world in stuck {
            assert_eq!((world.out.len(), world.back.len()), (0, 0));
            let mut woken = world.steps(true, false).pop().unwrap();
            assert!(woken.take());
            assert_eq!(woken.received, woken.sent);
        }
    }

    #[test]
    fn naps_double_up_to_a_second_and_end_where_it_watches_again() {
        let (mut now, mut watcher) = (Instant::now(), Watcher::default());
        assert_eq!((0..9).map(|_| watcher.came()).filter(|told| *told).count(), 2);
        watcher.watch();
        assert!(!watcher.came() && watcher.is_watching());
        watcher.leave(now);
        let mut lengths = Vec::new();
        for _ in 0..12 {
            let nap = watcher.nap().unwrap();
            lengths.push((nap - now).as_millis());
            watcher.sleeps(now);
            assert_eq!(watcher.nap(), Some(nap), "a sleep that ends early is taken up again");
            now = nap;
            watcher.sleeps(now);
        }
        assert_eq!(lengths, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1024]);
        assert!(!watcher.came(), "a sleep ends the row of quick frames");
        watcher.watch();
        assert_eq!(watcher.nap(), None);
    }

    proptest! {
        #[test]
        fn a_frame_of_which_anything_is_missing_is_not_taken(
            new in proptest::collection::vec(any::<u64>(), 0..=MOST_WORDS),
            old in proptest::collection::vec(any::<u64>(), MOST_WORDS),
            number in any::<u64>(), missing in any::<u32>(),
        ) {
            let last = seal(new.iter().copied(), new.len(), number);
            prop_assert_eq!(words_of(last, number), Some(new.len()));
            prop_assert_eq!(words_of(last, number.wrapping_add(64)), None);
            let torn: Vec<u64> = (0..new.len()).map(|at| if missing >> at & 1 == 1 { old[at] } else { new[at] }).collect();
            let whole = seal(torn.iter().copied(), torn.len(), number) == last;
            prop_assert_eq!(whole, torn == new);
            // What has lain there for as long as the mark takes to come again.
            let later = number.wrapping_add(1 << MARK_BITS);
            prop_assert_eq!(words_of(last, later), Some(new.len()));
            prop_assert_ne!(seal(new.iter().copied(), new.len(), later), last);
        }
    }

    #[test]
    fn wiped_memory_is_no_frame() {
        for number in [0, 1, 63, MARK, MARK + 1, u64::MAX] {
            assert_eq!(words_of(0, number), None);
            assert_eq!(words_of(seal(std::iter::empty(), 0, number), number), Some(0));
        }
    }
}

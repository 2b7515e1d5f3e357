//! Pure: what ranks tell each other beside the data: how far they are, and the verdict when a group ends.

use crate::verdict::{Answer, Verdict};
use gradwire_transport::{Rank, Tag};
use std::time::Duration;

/// The conversation of control messages.
pub(crate) const CONTROL: Tag = Tag(Tag::CONTROL_BIT);
/// Longest control message; a longer cause is cut.
pub(crate) const MAX_BYTES: usize = 4096;
const MAX_TEXT: usize = 2048;
const MAX_RANKS: usize = 256;

/// One control message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Control {
    /// "How far are you? What did you call as number `sequence`?"
    Inquiry { sequence: u64 },
    /// The reply.
    Answer { sequence: u64, answer: Answer },
    /// "It is over, and this is why." `sequence`: the collective in which it showed.
    Verdict { sequence: u64, verdict: Verdict },
}

impl Control {
    /// The message as bytes, at most [`MAX_BYTES`].
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Inquiry { sequence } => put(&mut out, 1, &[*sequence]),
            Self::Answer { sequence, answer } => {
                let known = u64::from(answer.fingerprint.is_some());
                put(&mut out, 2, &[*sequence, answer.begun, known, answer.fingerprint.unwrap_or(0)]);
            }
            Self::Verdict { sequence, verdict } => match verdict {
                Verdict::Failed { ranks, cause } => {
                    put(&mut out, 3, &[*sequence]);
                    put_ranks(&mut out, ranks);
                    put_text(&mut out, cause);
                }
                Verdict::Late { missing, waited } => {
                    put(&mut out, 4, &[*sequence, u64::try_from(waited.as_millis()).unwrap_or(u64::MAX)]);
                    put_ranks(&mut out, missing);
                }
                Verdict::Differs { rank, expected, got } => {
                    put(&mut out, 5, &[*sequence, u64::from(rank.0), *expected, *got]);
                }
                Verdict::Parts { sender, receiver, sent, awaited } => {
                    put(&mut out, 7, &[*sequence, u64::from(sender.0), u64::from(receiver.0), *sent, *awaited]);
                }
                Verdict::NotANumber { rank, element } => {
                    put(&mut out, 8, &[*sequence, u64::from(rank.0), *element]);
                }
                Verdict::Aborted { reason } => {
                    put(&mut out, 6, &[*sequence]);
                    put_text(&mut out, reason);
                }
            },
        }
        out
    }

    /// The message in `bytes`; `None` where it is none of ours.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (&kind, mut rest) = bytes.split_first()?;
        let rest = &mut rest;
        let sequence = word(rest)?;
        Some(match kind {
            1 => Self::Inquiry { sequence },
            2 => {
                let (begun, known, fingerprint) = (word(rest)?, word(rest)?, word(rest)?);
                Self::Answer { sequence, answer: Answer { begun, fingerprint: (known != 0).then_some(fingerprint) } }
            }
            3 => {
                let (ranks, cause) = (ranks(rest)?, text(rest)?);
                Self::Verdict { sequence, verdict: Verdict::Failed { ranks, cause } }
            }
            4 => {
                let (waited, missing) = (Duration::from_millis(word(rest)?), ranks(rest)?);
                Self::Verdict { sequence, verdict: Verdict::Late { missing, waited } }
            }
            5 => {
                let (rank, expected, got) = (rank(rest)?, word(rest)?, word(rest)?);
                Self::Verdict { sequence, verdict: Verdict::Differs { rank, expected, got } }
            }
            6 => Self::Verdict { sequence, verdict: Verdict::Aborted { reason: text(rest)? } },
            7 => {
                let (sender, receiver, sent, awaited) = (rank(rest)?, rank(rest)?, word(rest)?, word(rest)?);
                Self::Verdict { sequence, verdict: Verdict::Parts { sender, receiver, sent, awaited } }
            }
            8 => {
                let (rank, element) = (rank(rest)?, word(rest)?);
                Self::Verdict { sequence, verdict: Verdict::NotANumber { rank, element } }
            }
            _ => return None,
        })
    }
}

/// Between the words and the verdict in the text of an abort.
const SEAL: char = '\u{1f}';
/// Longest text that a wire carries whole.
const MAX_SEALED: usize = 2000;

/// `reason` with the verdict behind it, for the text of an abort: whoever sees the end before the message knows it too.
pub(crate) fn seal(reason: &str, verdict: &Verdict) -> String {
    let bytes = Control::Verdict { sequence: 0, verdict: verdict.clone() }.encode();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let sealed = format!("{reason}{SEAL}{hex}");
    if sealed.len() <= MAX_SEALED { sealed } else { reason.to_owned() }
}

/// The words in the text of an abort.
pub(crate) fn words(text: &str) -> &str {
    text.split_once(SEAL).map_or(text, |(words, _)| words)
}

/// The verdict in the text of an abort.
pub(crate) fn unseal(text: &str) -> Option<Verdict> {
    let (_, hex) = text.split_once(SEAL)?;
    let digits = hex.as_bytes().as_chunks::<2>().0;
    let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    match Control::decode(&digits.iter().map(byte).collect::<Option<Vec<u8>>>()?)? {
        Control::Verdict { verdict, .. } => Some(verdict),
        _ => None,
    }
}

fn put(out: &mut Vec<u8>, kind: u8, words: &[u64]) {
    out.push(kind);
    words.iter().for_each(|word| out.extend(word.to_le_bytes()));
}

fn put_ranks(out: &mut Vec<u8>, ranks: &[Rank]) {
    let ranks = &ranks[..ranks.len().min(MAX_RANKS)];
    out.extend((ranks.len() as u64).to_le_bytes());
    ranks.iter().for_each(|rank| out.extend(u64::from(rank.0).to_le_bytes()[..4].iter()));
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    let end = (0..=text.len().min(MAX_TEXT)).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    out.extend((end as u64).to_le_bytes());
    out.extend(&text.as_bytes()[..end]);
}

fn word(rest: &mut &[u8]) -> Option<u64> {
    let (head, tail) = rest.split_first_chunk::<8>()?;
    *rest = tail;
    Some(u64::from_le_bytes(*head))
}

fn rank(rest: &mut &[u8]) -> Option<Rank> {
    u32::try_from(word(rest)?).ok().map(Rank)
}

fn ranks(rest: &mut &[u8]) -> Option<Vec<Rank>> {
    let count = usize::try_from(word(rest)?).ok().filter(|&count| count <= MAX_RANKS)?;
    (0..count)
        .map(|_| {
            let (head, tail) = rest.split_first_chunk::<4>()?;
            *rest = tail;
            Some(Rank(u32::from_le_bytes(*head)))
        })
        .collect()
}

fn text(rest: &mut &[u8]) -> Option<String> {
    let bytes = usize::try_from(word(rest)?).ok().filter(|&bytes| bytes <= MAX_TEXT)?;
    let (head, tail) = rest.split_at_checked(bytes)?;
    *rest = tail;
    String::from_utf8(head.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PARTS: Verdict = Verdict::Parts { sender: Rank(1), receiver: Rank(0), sent: 9, awaited: 1 << 40 };

    #[test]
    fn every_message_comes_back_as_it_was() {
        let long = "é".repeat(3000);
        for message in [
            Control::Inquiry { sequence: 7 },
            Control::Answer { sequence: 7, answer: Answer { begun: 8, fingerprint: Some(3) } },
            Control::Answer { sequence: 7, answer: Answer { begun: 7, fingerprint: None } },
            Control::Verdict {
                sequence: 1,
                verdict: Verdict::Failed { ranks: vec![Rank(3), Rank(9)], cause: "gone".into() },
            },
            Control::Verdict {
                sequence: 1,
                verdict: Verdict::Late { missing: vec![], waited: Duration::from_millis(8000) },
            },
            Control::Verdict { sequence: 1, verdict: Verdict::Differs { rank: Rank(2), expected: 5, got: 6 } },
            Control::Verdict { sequence: 1, verdict: PARTS },
            Control::Verdict { sequence: 1, verdict: Verdict::NotANumber { rank: Rank(2), element: 5 } },
            Control::Verdict { sequence: 1, verdict: Verdict::Aborted { reason: "enough".into() } },
        ] {
            assert_eq!(Control::decode(&message.encode()), Some(message));
        }
        let cut = Control::Verdict { sequence: 1, verdict: Verdict::Aborted { reason: long } }.encode();
        assert!(cut.len() <= MAX_BYTES && Control::decode(&cut).is_some());
    }

    #[test]
    fn an_abort_carries_the_verdict_behind_its_words() {
        let verdict = Verdict::Failed { ranks: vec![Rank(3)], cause: "gone".into() };
        let text = seal("rank 3 failed", &verdict);
        assert_eq!((words(&text), unseal(&text)), ("rank 3 failed", Some(verdict)));
        assert_eq!((words("enough"), unseal("enough"), unseal("a\u{1f}zz")), ("enough", None, None));
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_refused_not_believed(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(message) = Control::decode(&bytes) {
                prop_assert!(message.encode().len() <= MAX_BYTES);
            }
        }
    }
}

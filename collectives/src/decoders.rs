//! Pure: everything of this crate that reads bytes from elsewhere, by name: for those who feed it what nobody should send.

use crate::Fingerprint;
use crate::control::{Control, MAX_BYTES, seal, unseal, words};
use crate::verdict::{Answer, Verdict};
use gradwire_transport::Rank;
use gradwire_transport::decoders::Decoder;
use std::time::Duration;

/// All of this crate.
pub fn all() -> Vec<Decoder> {
    vec![
        Decoder::new("control message", messages, message, (16 << 10, 4)),
        Decoder::new("text of an abort", aborts, abort, (16 << 10, 4)),
        Decoder::new("fingerprint", fingerprints, fingerprint, (1 << 10, 0)),
    ]
}

fn verdicts() -> [Verdict; 6] {
    [
        Verdict::Failed { ranks: vec![Rank(3), Rank(9)], cause: "göne".into() },
        Verdict::Late { missing: vec![Rank(1)], waited: Duration::from_millis(8000) },
        Verdict::Differs { rank: Rank(2), expected: 5, got: 6 },
        Verdict::Parts { sender: Rank(1), receiver: Rank(0), sent: 9, awaited: 8 },
        Verdict::NotANumber { rank: Rank(2), element: 5 },
        Verdict::Aborted { reason: "enough".into() },
    ]
}

fn messages() -> Vec<Vec<u8>> {
    let mut all = vec![Control::Inquiry { sequence: 7 }.encode()];
    for fingerprint in [None, Some(3)] {
        all.push(Control::Answer { sequence: 7, answer: Answer { begun: 8, fingerprint } }.encode());
    }
    all.extend(verdicts().map(|verdict| Control::Verdict { sequence: 1, verdict }.encode()));
    all
}

fn message(bytes: &[u8]) {
    if let Some(message) = Control::decode(bytes) {
        let again = message.encode();
        assert!(again.len() <= MAX_BYTES, "a message longer than may be was taken");
        assert_eq!(Control::decode(&again), Some(message));
    }
}

fn aborts() -> Vec<Vec<u8>> {
    verdicts().map(|verdict| seal("rank 3 failed", &verdict).into_bytes()).to_vec()
}

fn abort(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    assert!(text.starts_with(words(text)));
    if let Some(verdict) = unseal(text) {
        assert!(verdict_is_told(&verdict), "a verdict that nobody can tell was taken");
    }
}

/// A verdict is told in words, whatever ranks it names.
fn verdict_is_told(verdict: &Verdict) -> bool {
    let sealed = seal("", verdict);
    sealed.is_empty() || unseal(&sealed).as_ref() == Some(verdict)
}

fn fingerprints() -> Vec<Vec<u8>> {
    [0, u64::MAX, 0x0123_4567_89ab_cdef].map(|bits: u64| bits.to_le_bytes().to_vec()).to_vec()
}

fn fingerprint(bytes: &[u8]) {
    if let Some(bits) = bytes.first_chunk() {
        assert!(!Fingerprint(u64::from_le_bytes(*bits)).to_string().is_empty());
    }
}

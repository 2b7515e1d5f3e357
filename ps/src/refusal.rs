//! Pure: why a server refuses a request, as both ends know it.

use crate::body::{BadBody, Reader, Writer};

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u16)]
pub enum Reason {
    /// Client and server, or two clients, do not agree on something that must be the same.
    Mismatch = 1,
    /// No such table here: it was never opened, or the server was started anew.
    UnknownTable = 2,
    /// It would take more than the server may hold.
    Limit = 3,
    /// A newer process, or connection, of the same client has taken its place.
    Superseded = 4,
    /// The shard map has changed.
    WrongEpoch = 5,
    /// It waited as long as it was allowed to.
    Waited = 6,
    /// The request makes no sense.
    Malformed = 7,
    /// Another worker has begun to recover the table, and waits for all others to do so too.
    Recovering = 8,
    /// A reason from a later version.
    Unknown = 0xffff,
}

impl Reason {
    /// The reason that a status stands for.
    pub fn of_status(status: u16) -> Self {
        const KNOWN: [Reason; 8] = [
            Reason::Mismatch,
            Reason::UnknownTable,
            Reason::Limit,
            Reason::Superseded,
            Reason::WrongEpoch,
            Reason::Waited,
            Reason::Malformed,
            Reason::Recovering,
        ];
        KNOWN.into_iter().find(|known| *known as u16 == status).unwrap_or(Self::Unknown)
    }
}

/// A refusal: of what, what was expected, what came.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{subject}: {what}: expected {expected}, got {got}")]
pub struct Refusal {
    /// The kind of refusal.
    pub reason: Reason,
    /// The table, barrier or client that it is about.
    pub subject: String,
    /// What does not agree.
    pub what: String,
    /// What the server expected.
    pub expected: String,
    /// What it got.
    pub got: String,
}

impl Refusal {
    pub(crate) fn new(
        reason: Reason,
        subject: impl Into<String>,
        what: impl Into<String>,
        expected: impl ToString,
        got: impl ToString,
    ) -> Self {
        let (subject, what) = (subject.into(), what.into());
        Self { reason, subject, what, expected: expected.to_string(), got: got.to_string() }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        [&self.subject, &self.what, &self.expected, &self.got].into_iter().for_each(|text| out.text(text));
        out.0
    }

    pub(crate) fn decode(status: u16, body: &[u8]) -> Result<Self, BadBody> {
        let mut from = Reader(body);
        let mut text = || from.text().map(str::to_owned);
        let (subject, what, expected, got) = (text()?, text()?, text()?, text()?);
        from.end()?;
        Ok(Self { reason: Reason::of_status(status), subject, what, expected, got })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_refusal_comes_back_as_it_was(texts in any::<[String; 4]>()) {
            let [subject, what, expected, got] = texts.map(|text| text.chars().take(100).collect::<String>());
            let refusal = Refusal { reason: Reason::Limit, subject, what, expected, got };
            prop_assert_eq!(Refusal::decode(Reason::Limit as u16, &refusal.encode()), Ok(refusal.clone()));
            let body = refusal.encode();
            for cut in 0..body.len() {
                prop_assert!(Refusal::decode(3, &body[..cut]).is_err());
            }
        }
    }
}

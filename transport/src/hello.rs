//! Pure: what two ends tell each other before the first frame, and how each proves that it knows the token.
//!
//! Caller: [`Hello`] with a challenge. Listener: [`Hello`] with its own challenge and its proof. Caller: its proof.
//! Listener: a verdict. A proof is HMAC-SHA256 by the token over both challenges and both identities, so it is of no use
//! anywhere else; without a token, the token is empty.

use crate::{Rank, TransportError};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Longest record taken.
pub const MAX_RECORD_BYTES: usize = 1024;
/// Bytes of a proof.
pub const PROOF_BYTES: usize = 32;
const MARK: [u8; 4] = *b"GWH4";
const MAX_NAME: usize = 255;

/// Who a process is, as it tells its peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its rank, where it is a member of a group.
    pub rank: Option<Rank>,
    /// Its host name.
    pub host: String,
    /// Its process id.
    pub pid: u32,
    /// The boot of its host (`/proc/sys/kernel/random/boot_id`), to tell hosts of the same name apart.
    pub boot_id: String,
    /// Drawn anew for each group and process, so that an old address is not taken for a new one.
    pub nonce: u64,
    /// Whether it proposes, or answers, queue pairs after the hello.
    pub rdma: bool,
    /// Whether it offers shared memory to peers of its host after the hello, or takes what is offered.
    pub memory: bool,
}

/// The first record of each side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Who speaks.
    pub identity: Identity,
    /// The nonce of whom the speaker wants to reach; 0: whoever is there.
    pub wants: u64,
    /// Which of its lanes this connection is.
    pub lane: u16,
    /// How many lanes there will be.
    pub lanes: u16,
    /// Random.
    pub challenge: [u8; 16],
}

impl Hello {
    /// The record as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MARK.to_vec();
        out.extend(self.wants.to_le_bytes());
        out.extend(self.lane.to_le_bytes());
        out.extend(self.lanes.to_le_bytes());
        out.extend(self.challenge);
        out.extend(self.identity.rank.map_or(u32::MAX, |rank| rank.0).to_le_bytes());
        out.extend(self.identity.pid.to_le_bytes());
        out.extend(self.identity.nonce.to_le_bytes());
        out.push(u8::from(self.identity.rdma) | u8::from(self.identity.memory) << 1);
        for text in [&self.identity.host, &self.identity.boot_id] {
            let end = (0..=text.len().min(MAX_NAME)).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
            out.push(u8::try_from(end).unwrap_or(u8::MAX));
            out.extend(&text.as_bytes()[..end]);
        }
        out
    }

    /// The record in `bytes`; the error says what is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut rest = bytes;
        if take::<4>(&mut rest)? != MARK {
            return Err("it does not begin with gradwire's hello, version 4".to_owned());
        }
        let wants = u64::from_le_bytes(take(&mut rest)?);
        let lane = u16::from_le_bytes(take(&mut rest)?);
        let lanes = u16::from_le_bytes(take(&mut rest)?);
        let challenge = take(&mut rest)?;
        let rank = Some(u32::from_le_bytes(take(&mut rest)?)).filter(|&rank| rank != u32::MAX).map(Rank);
        let pid = u32::from_le_bytes(take(&mut rest)?);
        let nonce = u64::from_le_bytes(take(&mut rest)?);
        let [ways] = take::<1>(&mut rest)?;
        let (rdma, memory) = (ways & 1 != 0, ways & 2 != 0);
        let (host, boot_id) = (text(&mut rest)?, text(&mut rest)?);
        if lanes == 0 || lane >= lanes {
            return Err(format!("lane {lane} of {lanes} makes no sense"));
        }
        Ok(Self { identity: Identity { rank, host, pid, boot_id, nonce, rdma, memory }, wants, lane, lanes, challenge })
    }
}

/// Which side proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Who called.
    Caller,
    /// Who listened.
    Listener,
}

/// The proof of `side` for the conversation that began with these two records.
pub fn proof(token: &str, side: Side, caller: &[u8], listener: &[u8]) -> [u8; PROOF_BYTES] {
    let mut mac = keyed(token);
    feed(&mut mac, side, caller, listener);
    mac.finalize().into_bytes().into()
}

/// Whether `proof` is that of `side`; takes as long for a wrong one as for a right one.
pub fn proves(token: &str, side: Side, caller: &[u8], listener: &[u8], proof: &[u8; PROOF_BYTES]) -> bool {
    let mut mac = keyed(token);
    feed(&mut mac, side, caller, listener);
    mac.verify_slice(proof).is_ok()
}

/// The error for a proof that does not hold.
pub fn refused(address: String) -> TransportError {
    TransportError::Authentication { address, reason: "the tokens of the two ends differ".to_owned() }
}

fn keyed(token: &str) -> Hmac<Sha256> {
    Hmac::new_from_slice(token.as_bytes()).expect("HMAC takes keys of any length")
}

fn feed(mac: &mut Hmac<Sha256>, side: Side, caller: &[u8], listener: &[u8]) {
    mac.update(match side {
        Side::Caller => b"caller",
        Side::Listener => b"listen",
    });
    mac.update(&(caller.len() as u64).to_le_bytes());
    mac.update(caller);
    mac.update(listener);
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], String> {
    let (head, tail) = rest.split_first_chunk::<N>().ok_or("it ends too early")?;
    *rest = tail;
    Ok(*head)
}

fn text(rest: &mut &[u8]) -> Result<String, String> {
    let length = usize::from(take::<1>(rest)?[0]);
    let (head, tail) = rest.split_at_checked(length).ok_or("it ends too early")?;
    *rest = tail;
    String::from_utf8(head.to_vec()).map_err(|_| "a name in it is not UTF-8".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> Hello {
        let identity = Identity {
            rank: Some(Rank(3)),
            host: "héron".into(),
            pid: 77,
            boot_id: "b".repeat(36),
            nonce: 5,
            rdma: true,
            memory: true,
        };
        Hello { identity, wants: 9, lane: 1, lanes: 2, challenge: [7; 16] }
    }

    #[test]
    fn a_hello_comes_back_as_it_was() {
        assert_eq!(Hello::decode(&hello().encode()), Ok(hello()));
        assert!(hello().encode().len() <= MAX_RECORD_BYTES);
    }

    #[test]
    fn a_proof_holds_for_its_token_side_and_records_only() {
        let proof = proof("secret", Side::Caller, b"a", b"b");
        assert!(proves("secret", Side::Caller, b"a", b"b", &proof));
        assert!(!proves("other", Side::Caller, b"a", b"b", &proof));
        assert!(!proves("secret", Side::Listener, b"a", b"b", &proof));
        assert!(!proves("secret", Side::Caller, b"ab", b"", &proof));
    }

    proptest! {
        #[test]
        fn hostile_records_are_refused_not_believed(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Hello::decode(&bytes);
            let mut marked = MARK.to_vec();
            marked.extend(&bytes);
            if let Ok(hello) = Hello::decode(&marked) {
                prop_assert!(hello.lane < hello.lanes);
            }
        }

        #[test]
        fn a_cut_hello_is_refused(at in 0usize..50) {
            prop_assert!(Hello::decode(&hello().encode()[..at]).is_err());
        }
    }
}

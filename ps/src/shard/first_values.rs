//! Pure: who writes the first values of a dense table, and when they are all there.

use super::{Action, Shard, Wait, done, expect_elements};
use crate::dense::Init;
use crate::header::Kind;
use crate::refusal::Refusal;
use gradwire_transport::PeerId;

impl Shard {
    /// Answers with the claim's number, or 0 when first values are there already; waits while another client writes them.
    pub(super) fn claim_init(&mut self, wait: &Wait, out: &mut Vec<Action>) -> Result<(), Refusal> {
        let header = wait.header;
        let table = self.table(&header)?;
        let mine = (header.client, header.incarnation);
        let untouched = table.is_untouched();
        match table.init.holder {
            Some((client, incarnation, _)) if (client, incarnation) == mine => {
                table.init.holder = Some((client, incarnation, wait.to));
                done(wait, table.init.claim, out);
            }
            _ if table.init.done || !untouched => done(wait, 0, out),
            None => grant_init(&mut table.init, wait, out),
            Some(_) => wait_for_values(&mut table.init, wait),
        }
        Ok(())
    }

    pub(super) fn init(&mut self, wait: &Wait, payload: &[u8], out: &mut Vec<Action>) -> Result<(), Refusal> {
        let header = wait.header;
        let table = self.table(&header)?;
        let part = table.part(header.keys)?;
        expect_elements(table, &header, header.dtype == Some(table.spec.dtype))?;
        resume_init(&mut table.init, wait);
        table.write_initial(part, header.sequence, payload);
        done(wait, 0, out);
        Ok(())
    }

    /// Answers with the claim's number, or 0 when it was given to somebody else meanwhile: once that one's values are there.
    pub(super) fn end_init(&mut self, wait: &Wait, out: &mut Vec<Action>) -> Result<(), Refusal> {
        let header = wait.header;
        let table = self.table(&header)?;
        let untouched = table.is_untouched();
        let init = &mut table.init;
        if header.sequence == init.claim {
            init.done = true;
            init.holder = None;
            init.waits.drain(..).for_each(|wait| done(&wait, 0, out));
            done(wait, init.claim, out);
        } else if init.done || !untouched {
            done(wait, 0, out);
        } else {
            wait_for_values(init, wait);
        }
        Ok(())
    }
}

fn wait_for_values(init: &mut Init, wait: &Wait) {
    init.waits.retain(|other| other.header.client != wait.header.client);
    init.waits.push(*wait);
}

fn grant_init(init: &mut Init, wait: &Wait, out: &mut Vec<Action>) {
    init.claim += 1;
    init.holder = Some((wait.header.client, wait.header.incarnation, wait.to));
    done(wait, init.claim, out);
}

/// The connection `peer` is gone. What it claimed is the next one's, whether that waits already or is to come.
pub(super) fn release_init(init: &mut Init, peer: PeerId, out: &mut Vec<Action>) {
    if init.holder.take_if(|(.., holder)| *holder == peer).is_some() {
        // Who has lost a claim waits too, and is given no other.
        let next = init.waits.iter().position(|wait| wait.header.kind == Kind::ClaimInit);
        if let Some(at) = next {
            let next = init.waits.remove(at);
            grant_init(init, &next, out);
        }
    }
}

/// Who has the latest claim and was gone meanwhile goes on with it.
fn resume_init(init: &mut Init, wait: &Wait) {
    if !init.done && init.claim > 0 && wait.header.sequence == init.claim {
        init.holder.get_or_insert((wait.header.client, wait.header.incarnation, wait.to));
    }
}

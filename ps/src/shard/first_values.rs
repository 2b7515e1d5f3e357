//! Pure: who writes the first values of a dense table, and when they are all there.

use super::{Action, Shard, Wait, done, expect_elements};
use crate::dense::Init;
use crate::refusal::Refusal;

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
            Some(_) => {
                table.init.waits.retain(|other| other.header.client != header.client);
                table.init.waits.push(*wait);
            }
        }
        Ok(())
    }

    pub(super) fn init(&mut self, wait: &Wait, payload: &[u8], out: &mut Vec<Action>) -> Result<(), Refusal> {
        let header = wait.header;
        let table = self.table(&header)?;
        let part = table.part(header.keys)?;
        expect_elements(table, &header, header.dtype == Some(table.spec.dtype))?;
        table.write_initial(part, header.sequence, payload);
        done(wait, 0, out);
        Ok(())
    }

    /// Answers with the claim's number, or 0 when it was given to somebody else meanwhile.
    pub(super) fn end_init(&mut self, wait: &Wait, out: &mut Vec<Action>) -> Result<(), Refusal> {
        let header = wait.header;
        let init = &mut self.table(&header)?.init;
        let current = header.sequence == init.claim;
        if current {
            init.done = true;
            init.holder = None;
            init.waits.drain(..).for_each(|wait| done(&wait, 0, out));
        }
        done(wait, if current { init.claim } else { 0 }, out);
        Ok(())
    }
}

pub(super) fn grant_init(init: &mut Init, wait: &Wait, out: &mut Vec<Action>) {
    init.claim += 1;
    init.holder = Some((wait.header.client, wait.header.incarnation, wait.to));
    done(wait, init.claim, out);
}

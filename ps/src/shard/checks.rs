//! Pure: what is looked at before a shard does anything.

use crate::Mode;
use crate::TableId;
use crate::dense::Table;
use crate::header::Header;
use crate::refusal::{Reason, Refusal};
use std::collections::BTreeMap;

/// Checks that the payload holds the elements that the header speaks of, of a type that may come here.
pub(super) fn expect_elements(table: &Table, header: &Header, dtype_fits: bool) -> Result<(), Refusal> {
    let subject = || table.spec.subject();
    let got = header.dtype.map_or("none", |dtype| dtype.name());
    if !dtype_fits {
        return Err(Refusal::new(Reason::Mismatch, subject(), "dtype", table.spec.dtype, got));
    }
    let each = header.dtype.map_or(0, |dtype| dtype.bytes() as u64);
    if header.keys.len().checked_mul(each) != Some(header.payload_bytes) {
        let expected = format!("{} elements of {got}", header.keys.len());
        let got = format!("{} bytes", header.payload_bytes);
        return Err(Refusal::new(Reason::Malformed, subject(), "payload", expected, got));
    }
    Ok(())
}

/// Checks that a push says by whom it is, and which one.
pub(super) fn check_pusher(header: &Header, mode: Mode, subject: impl Fn() -> String) -> Result<(), Refusal> {
    if let Some(workers) = mode.workers()
        && (header.client >= workers.into() || header.clock == 0)
    {
        let expected = format!("a worker from 0 to {}, and a clock from 1", workers - 1);
        let got = format!("client {} at clock {}", header.client, header.clock);
        return Err(Refusal::new(Reason::Mismatch, subject(), "who pushes", expected, got));
    }
    if header.sequence == 0 {
        return Err(Refusal::new(Reason::Malformed, subject(), "sequence", "from 1", 0));
    }
    Ok(())
}

/// The table that the header names, with its values.
pub(super) fn there<'a>(tables: &'a mut BTreeMap<TableId, Table>, header: &Header) -> Result<&'a mut Table, Refusal> {
    let table = tables.get_mut(&header.table).ok_or_else(|| unknown(header))?;
    table.check_there()?;
    Ok(table)
}

pub(super) fn not_for_a_shard(header: &Header) -> Refusal {
    Refusal::new(Reason::Malformed, "request", "kind", "a client's request", format!("{:?}", header.kind))
}

pub(super) fn unknown(header: &Header) -> Refusal {
    let (expected, got) = ("one that was opened here", "another (was the server started anew?)");
    Refusal::new(Reason::UnknownTable, format!("table {:#x}", header.table.0), "table", expected, got)
}

//! Does: what a device says of itself: reads it, acknowledges it, and puts it into words.

#![allow(unsafe_code)]

use super::adapter::Trouble;
use super::context::Context;
use super::ffi::*;
use std::ptr::null_mut;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum About {
    QueuePair,
    Port,
    All,
}

/// Appends what the device has said of this port and its queue pairs, without waiting.
pub(super) fn read(context: &Context, port: u8, troubles: &mut Vec<Trouble>) {
    let mut event = ibv_async_event { element: null_mut(), event_type: 0 };
    // SAFETY: the context is open, its descriptor never blocks, and the structure is ours to be written.
    while unsafe { (context.library.get_async_event)(context.raw.as_ptr(), &raw mut event) } == 0 {
        let (about, fatal, what) = words(event.event_type);
        let mut queue_pair = None;
        let mut ours = true;
        match about {
            About::QueuePair => {
                // SAFETY: an event of this kind names a queue pair, which stays until the event is acknowledged.
                queue_pair = Some(unsafe { (*event.element.cast::<ibv_qp>()).qp_num });
            }
            // The number lies in the first four bytes of the union, which are the lower ones on every host that we know.
            About::Port => ours = (event.element.addr() as u32) == u32::from(port) || cfg!(target_endian = "big"),
            About::All => {}
        }
        // SAFETY: the event was read just now and is acknowledged once.
        unsafe { (context.library.ack_async_event)(&raw mut event) }
        if ours && let Some(what) = what {
            let what = match about {
                About::Port => format!("{}:{port}: {what}", context.name),
                _ => format!("{}: {what}", context.name),
            };
            troubles.push(Trouble { queue_pair, fatal, what });
        }
    }
}

/// What a code of `enum ibv_event_type` is about, whether work cannot go on, and what to say of it, if anything.
pub(super) fn words(code: u32) -> (About, bool, Option<&'static str>) {
    use About::{All, Port, QueuePair};
    match code {
        0 => (All, true, Some("its completion queue has overflowed")),
        1 => (QueuePair, true, Some("a queue pair failed in the device: look at its log (dmesg)")),
        2 => (QueuePair, true, Some("a queue pair met a request that makes no sense: do both ends run one version?")),
        3 => (QueuePair, true, Some("a peer asked a queue pair for memory that it may not access")),
        // The first packet came before we were told that the peer is connected; the send queue is drained.
        4 | 5 => (QueuePair, false, None),
        6 | 7 => (QueuePair, false, Some("a queue pair was moved to another path")),
        8 => (All, true, Some("the device has failed: look at its log (dmesg)")),
        9 => (Port, false, Some("the port is active again")),
        10 => (Port, false, Some("the port has lost its link: check cable and switch")),
        11 => (Port, false, Some("the port has another LID: connections may end")),
        12 => (Port, false, Some("the port's partition keys have changed")),
        13 => (Port, false, Some("another subnet manager has taken over")),
        14 => (All, true, Some("a shared receive queue failed")),
        // A shared receive queue runs low; the last receive of a stopped queue pair has ended. We have no such queue.
        15 => (All, false, None),
        16 => (QueuePair, false, None),
        17 => (Port, false, Some("the subnet manager wants everything to be registered anew")),
        18 => (Port, false, Some("the addresses of the port have changed: connections may end")),
        19 => (All, true, Some("a work queue failed")),
        _ => (All, false, Some("an event that we do not know")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stops_work_is_fatal_and_has_words() {
        for code in 0..40 {
            let (about, fatal, what) = words(code);
            assert!(!fatal || what.is_some(), "{code}");
            assert_eq!(fatal, [0, 1, 2, 3, 8, 14, 19].contains(&code), "{code}");
            // The members of the union that are pointers to queue pairs, by `man ibv_get_async_event`.
            assert_eq!(about == About::QueuePair, [1, 2, 3, 4, 5, 6, 7, 16].contains(&code), "{code}");
        }
    }
}

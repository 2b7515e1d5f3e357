//! Does: the collectives of [`SameHost`] that only move what ranks have.

use super::{Done, LENGTH_BYTES, SHORT_BYTES, STREAM_BYTES, SameHost, Stopped, Turn, copy};
use crate::pieces::{part, part_mut, within};
use gradwire_transport::Rank;
use gradwire_transport::shm::Letters;
use std::ops::Range;

/// From here on results go past the cache, where this rank's own part is as long as the others' and may well be in its cache.
const STREAM_MOVED_BYTES: usize = 4 << 20;
/// The lengths that stand before a part in a letter: what its writer gives its reader, and what it awaits of it.
const TOLD_BYTES: usize = 2 * LENGTH_BYTES;

impl SameHost {
    pub(super) fn broadcast<E>(&mut self, root: Rank, buffer: &mut [u8], turn: &mut Turn<'_, E>) -> Done<E> {
        if buffer.len() <= SHORT_BYTES {
            if self.rank == root {
                self.begin_one_sided(buffer.len());
                self.write(0, buffer);
                return self.step(turn);
            }
            self.step(turn)?;
            buffer.copy_from_slice(self.segment.letters().of(root, 0..buffer.len()));
            return Ok(());
        }
        let stream = buffer.len() >= STREAM_BYTES;
        for range in self.rounds(buffer.len(), turn.dtype, 1) {
            let round = &mut buffer[range];
            if self.rank == root {
                self.begin_one_sided(round.len());
                self.put(0, round);
            }
            self.step(turn)?;
            if self.rank != root {
                copy(round, self.segment.others().of(root, 0..round.len()), stream);
            }
            self.end_round();
        }
        Ok(())
    }

    /// All-gather, or gather to `root`.
    pub(super) fn gather<E>(
        &mut self,
        root: Option<Rank>,
        input: Option<&[u8]>,
        output: &mut [&mut [u8]],
        turn: &mut Turn<'_, E>,
    ) -> Done<E> {
        let (me, size) = (self.rank, self.world_size);
        let (gives, takes) = (root != Some(me), root.is_none_or(|root| root == me));
        let len = input.map_or_else(|| part_mut(output, me, size).len(), <[u8]>::len);
        let own = match root {
            None => size.ranks().map(|rank| part_mut(output, rank, size).len()).max().unwrap_or(0),
            Some(_) => len,
        };
        let (before, most) = match root {
            None => (0, SHORT_BYTES),
            Some(_) => (LENGTH_BYTES, SHORT_BYTES),
        };
        if own <= most && gives {
            self.begin_gather(root, own);
            self.write(before, input.unwrap_or_else(|| part_mut(output, me, size)));
        }
        if root == Some(me) {
            self.tell(0, |rank| (0, part_mut(output, rank, size).len()));
        }
        let kept = input.filter(|_| takes);
        let keep = |output: &mut [&mut [u8]]| {
            kept.inspect(|input| part_mut(output, me, size).copy_from_slice(input));
        };
        let longest = match root {
            None if own <= most => self.step_and(turn, || keep(output)).map(|()| own)?,
            None => own,
            Some(_) => self.longest(own, turn)?,
        };
        if let Some(root) = root {
            self.compare_gathered(root, len, output)?;
        }
        if longest <= most {
            if root.is_some() {
                keep(output);
            }
            let letters = self.segment.letters();
            for rank in self.others().filter(|_| takes) {
                copy_letter(&letters, rank, before, part_mut(output, rank, size));
            }
            self.end();
            return Ok(());
        }
        self.gather_rounds((root, longest, len), input, output, turn)
    }

    /// Without a root, every rank both gives and takes.
    fn begin_gather(&mut self, root: Option<Rank>, bytes: usize) {
        match root {
            None => self.begin(bytes),
            Some(_) => self.begin_one_sided(bytes),
        }
    }

    /// What is too long for letters, in so many rounds as the longest part takes; this rank's has `len` bytes.
    fn gather_rounds<E>(
        &mut self,
        (root, longest, len): (Option<Rank>, usize, usize),
        input: Option<&[u8]>,
        output: &mut [&mut [u8]],
        turn: &mut Turn<'_, E>,
    ) -> Done<E> {
        let (me, size) = (self.rank, self.world_size);
        let (gives, takes) = (root != Some(me), root.is_none_or(|root| root == me));
        let kept = input.filter(|_| takes);
        let (stream, stream_own) = (longest >= STREAM_BYTES, len >= STREAM_MOVED_BYTES);
        for range in self.rounds(longest, turn.dtype, 1) {
            let mine = within(&range, len);
            self.begin_gather(root, range.len());
            if gives {
                let given = input.unwrap_or_else(|| part_mut(output, me, size));
                self.put(0, &given[mine.clone()]);
            }
            self.step_and(turn, || {
                kept.inspect(|input| copy(&mut part_mut(output, me, size)[mine.clone()], &input[mine], stream_own));
            })?;
            if takes {
                let others = self.segment.others();
                for rank in self.others() {
                    let part = part_mut(output, rank, self.world_size);
                    let theirs = within(&range, part.len());
                    let bytes = theirs.len();
                    copy(&mut part[theirs], others.of(rank, 0..bytes), stream);
                }
            }
            self.end_round();
        }
        Ok(())
    }

    pub(super) fn all_to_all<E>(
        &mut self,
        input: &[&[u8]],
        output: &mut [&mut [u8]],
        turn: &mut Turn<'_, E>,
    ) -> Done<E> {
        let (n, size, me) = (self.world_size.get() as usize, self.world_size, self.rank);
        let own = part(input, me, size);
        let stream = own.len() * n >= STREAM_MOVED_BYTES;
        let longest = size.ranks().map(|rank| part(input, rank, size).len()).max().unwrap_or(0);
        let width = self.told_width();
        self.tell(width, |rank| (part(input, rank, size).len(), part_mut(output, rank, size).len()));
        if longest <= width {
            self.begin_one_sided(longest);
            self.put_told(input, width);
        }
        let longest = self.longest(longest, turn)?;
        let agreed = self.others().flat_map(|rank| {
            let (given, awaited) = self.told(rank, me, width);
            let own = (part(input, rank, size).len() as u64, part_mut(output, rank, size).len() as u64);
            [(rank, me, given, own.1), (me, rank, own.0, awaited)]
        });
        Self::agree(agreed)?;
        if longest <= width {
            part_mut(output, me, size).copy_from_slice(own);
            let letters = self.segment.letters();
            for rank in self.others() {
                copy_letter(&letters, rank, Self::told_at(rank, me, width).end, part_mut(output, rank, size));
            }
            return Ok(());
        }
        for range in self.rounds(longest, turn.dtype, (n - 1).max(1)) {
            self.begin(range.len());
            self.put_parts(input, &range);
            let mine = within(&range, own.len());
            self.step_and(turn, || copy(&mut part_mut(output, me, size)[mine.clone()], &own[mine], stream))?;
            let others = self.segment.others();
            for rank in self.others() {
                let part = part_mut(output, rank, size);
                let mine = within(&range, part.len());
                let at = Self::place(rank, me, range.len());
                let slot = at..at + mine.len();
                copy(&mut part[mine], others.of(rank, slot), stream);
            }
            self.end_round();
        }
        Ok(())
    }

    pub(super) fn scatter<E>(
        &mut self,
        root: Rank,
        input: &[&[u8]],
        output: &mut [u8],
        turn: &mut Turn<'_, E>,
    ) -> Done<E> {
        let (n, size) = (self.world_size.get() as usize, self.world_size);
        let longest = match self.rank == root {
            true => size.ranks().map(|rank| part(input, rank, size).len()).max().unwrap_or(0),
            false => output.len(),
        };
        let (width, me) = (self.told_width(), self.rank);
        if me == root {
            self.tell(width, |rank| (part(input, rank, size).len(), 0));
        }
        if me == root && longest <= width {
            self.begin_one_sided(longest);
            self.put_told(input, width);
        }
        let longest = self.longest(longest, turn)?;
        match me == root {
            true => Self::agree(self.others().map(|rank| {
                let given = part(input, rank, size).len() as u64;
                (root, rank, given, self.said(rank))
            }))?,
            false => Self::agree(std::iter::once((root, me, self.told(root, me, width).0, output.len() as u64)))?,
        }
        if longest <= width {
            match me == root {
                true => output.copy_from_slice(part(input, root, size)),
                false => copy_letter(&self.segment.letters(), root, Self::told_at(root, me, width).end, output),
            }
            return Ok(());
        }
        let stream = output.len() >= STREAM_MOVED_BYTES;
        for range in self.rounds(longest, turn.dtype, (n - 1).max(1)) {
            if self.rank == root {
                self.begin_one_sided(range.len());
                self.put_parts(input, &range);
            }
            let mine = within(&range, output.len());
            let is_root = self.rank == root;
            self.step_and(turn, || {
                if is_root {
                    copy(&mut output[mine.clone()], &part(input, root, size)[mine.clone()], stream);
                }
            })?;
            if !is_root {
                let at = Self::place(root, self.rank, range.len());
                let slot = at..at + mine.len();
                copy(&mut output[mine], self.segment.others().of(root, slot), stream);
            }
            self.end_round();
        }
        Ok(())
    }

    /// The longest that any rank says: where a rank knows only its own parts, all must still take as many rounds. One step; what
    /// goes with it stands behind the length.
    fn longest<E>(&mut self, own: usize, turn: &mut Turn<'_, E>) -> Result<usize, Stopped<E>> {
        self.segment.letter(LENGTH_BYTES).copy_from_slice(&(own as u64).to_le_bytes());
        self.step(turn)?;
        let said = |rank| usize::try_from(self.said(rank)).unwrap_or(usize::MAX);
        Ok(self.others().map(said).fold(own, usize::max))
    }

    /// The length that `rank` said with the last step.
    fn said(&self, rank: Rank) -> u64 {
        self.number(rank, 0)
    }

    fn number(&self, rank: Rank, at: usize) -> u64 {
        let letters = self.segment.letters();
        u64::from_le_bytes(letters.of(rank, at..at + LENGTH_BYTES).first_chunk().copied().unwrap_or_default())
    }

    /// Bytes of a part for another rank that a letter has room for, behind its lengths.
    fn told_width(&self) -> usize {
        self.letter_width().saturating_sub(TOLD_BYTES)
    }

    /// Where in a letter of `writer` the lengths are told that `reader` and it must agree on, with a part of `width` behind them.
    fn told_at(writer: Rank, reader: Rank, width: usize) -> Range<usize> {
        let at = LENGTH_BYTES + Self::place(writer, reader, TOLD_BYTES + width);
        at..at + TOLD_BYTES
    }

    /// Tells each other rank how many bytes this one gives it, and awaits of it.
    fn tell(&mut self, width: usize, mut lens: impl FnMut(Rank) -> (usize, usize)) {
        for rank in self.others() {
            let (at, (given, awaited)) = (Self::told_at(self.rank, rank, width), lens(rank));
            let letter = &mut self.segment.letter(at.end)[at];
            letter[..LENGTH_BYTES].copy_from_slice(&(given as u64).to_le_bytes());
            letter[LENGTH_BYTES..].copy_from_slice(&(awaited as u64).to_le_bytes());
        }
    }

    /// What `writer` said that it gives `reader`, and awaits of it.
    fn told(&self, writer: Rank, reader: Rank, width: usize) -> (u64, u64) {
        let at = Self::told_at(writer, reader, width).start;
        (self.number(writer, at), self.number(writer, at + LENGTH_BYTES))
    }

    /// Puts what is for each other rank into this rank's letter, behind the lengths.
    fn put_told(&mut self, input: &[&[u8]], width: usize) {
        for rank in self.others() {
            let at = Self::told_at(self.rank, rank, width).end;
            self.write(at, part(input, rank, self.world_size));
        }
    }

    /// Whether the root awaits what each rank gives: this rank gives `len` bytes.
    fn compare_gathered<E>(&self, root: Rank, len: usize, output: &mut [&mut [u8]]) -> Done<E> {
        let (me, size) = (self.rank, self.world_size);
        if me != root {
            return Self::agree(std::iter::once((me, root, len as u64, self.told(root, me, 0).1)));
        }
        let given = |rank| (rank, me, self.said(rank), part_mut(output, rank, size).len() as u64);
        Self::agree(self.others().map(given))
    }

    /// Whether all that was given was awaited: sender, receiver, bytes given, bytes awaited. All who see a wrong pair name the
    /// lowest.
    fn agree<E>(pairs: impl Iterator<Item = (Rank, Rank, u64, u64)>) -> Done<E> {
        let wrong = pairs.filter(|(.., given, awaited)| given != awaited).min();
        wrong
            .map_or(Ok(()), |(sender, receiver, sent, awaited)| Err(Stopped::Parts { sender, receiver, sent, awaited }))
    }
}

fn copy_letter(letters: &Letters<'_>, from: Rank, at: usize, into: &mut [u8]) {
    into.copy_from_slice(letters.of(from, at..at + into.len()));
}

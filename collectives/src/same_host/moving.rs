//! Does: the collectives of [`SameHost`] that only move what ranks have.

use super::{Done, LENGTH_BYTES, SHORT_BYTES, STREAM_BYTES, SameHost, Stopped, Turn, copy};
use crate::pieces::{part, part_mut, within};
use gradwire_transport::Rank;
use gradwire_transport::shm::Letters;

/// From here on results go past the cache, where this rank's own part is as long as the others' and may well be in its cache.
const STREAM_MOVED_BYTES: usize = 4 << 20;

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
        let kept = input.filter(|_| takes);
        let keep = |output: &mut [&mut [u8]]| {
            kept.inspect(|input| part_mut(output, me, size).copy_from_slice(input));
        };
        let longest = match root {
            None if own <= most => self.step_and(turn, || keep(output)).map(|()| own)?,
            None => own,
            Some(_) => self.longest(own, turn)?,
        };
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
        let width = self.letter_width();
        if longest <= width {
            self.begin_one_sided(longest);
            self.put_letter(LENGTH_BYTES, input, width);
        }
        let longest = self.longest(longest, turn)?;
        if longest <= width {
            part_mut(output, me, size).copy_from_slice(own);
            let letters = self.segment.letters();
            for rank in self.others() {
                copy_letter(&letters, rank, LENGTH_BYTES + Self::place(rank, me, width), part_mut(output, rank, size));
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
        let width = self.letter_width();
        if self.rank == root && longest <= width {
            self.begin_one_sided(longest);
            self.put_letter(LENGTH_BYTES, input, width);
        }
        let longest = self.longest(longest, turn)?;
        if longest <= width {
            match self.rank == root {
                true => output.copy_from_slice(part(input, root, size)),
                false => {
                    let at = LENGTH_BYTES + Self::place(root, self.rank, width);
                    copy_letter(&self.segment.letters(), root, at, output);
                }
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
        let letters = self.segment.letters();
        let said = |rank| {
            let bytes = letters.of(rank, 0..LENGTH_BYTES).first_chunk().copied().unwrap_or_default();
            usize::try_from(u64::from_le_bytes(bytes)).unwrap_or(usize::MAX)
        };
        Ok(self.others().map(said).fold(own, usize::max))
    }
}

fn copy_letter(letters: &Letters<'_>, from: Rank, at: usize, into: &mut [u8]) {
    into.copy_from_slice(letters.of(from, at..at + into.len()));
}

//! Pure: the bodies of control messages, as numbers and short texts one after the other; the reader trusts nothing.

/// Longest text taken from a message.
pub(crate) const MAX_TEXT_BYTES: usize = 4096;

/// Why a body cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its body is malformed: {0}")]
pub struct BadBody(pub &'static str);

/// Appends fields to a message.
#[derive(Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    pub(crate) fn byte(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn number(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    pub(crate) fn float(&mut self, value: f64) {
        self.number(value.to_bits());
    }

    /// A text, cut at [`MAX_TEXT_BYTES`].
    pub(crate) fn text(&mut self, text: &str) {
        let end = (0..=text.len().min(MAX_TEXT_BYTES)).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        self.0.extend(u16::try_from(end).expect("a text is short").to_le_bytes());
        self.0.extend(&text.as_bytes()[..end]);
    }
}

/// Takes fields from a message.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], BadBody> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(BadBody("it ends too early"))?;
        self.0 = tail;
        Ok(*head)
    }

    pub(crate) fn byte(&mut self) -> Result<u8, BadBody> {
        Ok(self.take::<1>()?[0])
    }

    pub(crate) fn number(&mut self) -> Result<u64, BadBody> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    pub(crate) fn float(&mut self) -> Result<f64, BadBody> {
        Ok(f64::from_bits(self.number()?))
    }

    /// A count of things that take at least `each` bytes: no more than can follow.
    pub(crate) fn count(&mut self, each: usize) -> Result<usize, BadBody> {
        let count = usize::try_from(self.number()?).map_err(|_| BadBody("a count is too large"))?;
        if count > self.0.len() / each.max(1) {
            return Err(BadBody("it counts more than it holds"));
        }
        Ok(count)
    }

    pub(crate) fn text(&mut self) -> Result<&'a str, BadBody> {
        let length = usize::from(u16::from_le_bytes(self.take()?));
        if length > MAX_TEXT_BYTES {
            return Err(BadBody("a text is too long"));
        }
        let (head, tail) = self.0.split_at_checked(length).ok_or(BadBody("it ends too early"))?;
        self.0 = tail;
        std::str::from_utf8(head).map_err(|_| BadBody("a text is not UTF-8"))
    }

    /// All that is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// The next `count` bytes.
    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], BadBody> {
        let (head, tail) = self.0.split_at_checked(count).ok_or(BadBody("it ends too early"))?;
        self.0 = tail;
        Ok(head)
    }

    /// A number of at most 32 bits.
    pub(crate) fn small(&mut self) -> Result<u32, BadBody> {
        u32::try_from(self.number()?).map_err(|_| BadBody("a number is too large"))
    }

    /// A clock, or another number that is counted up: so far from the last that counting on never ends.
    pub(crate) fn counter(&mut self) -> Result<u64, BadBody> {
        self.number()
            .and_then(|number| if number >> 62 == 0 { Ok(number) } else { Err(BadBody("a number is too large")) })
    }

    pub(crate) fn end(&self) -> Result<(), BadBody> {
        if self.0.is_empty() { Ok(()) } else { Err(BadBody("it goes on after its end")) }
    }
}

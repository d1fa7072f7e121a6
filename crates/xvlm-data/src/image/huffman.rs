//! Reading the entropy-coded data of a baseline JPEG (ITU-T T.81, annex F.2).

/// Bits of a code, and of the value behind it, that are looked up at once.
const LOOK: u32 = 11;

/// Position in natural order of the k-th coefficient in the file's order; past the last, a place that nothing reads.
static ZIGZAG: [u8; 256] = {
    let order: [u8; 64] = [
        0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14,
        21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60,
        61, 54, 47, 55, 62, 63,
    ];
    let mut table = [64; 256];
    let mut k = 0;
    while k < 64 {
        table[k] = order[k];
        k += 1;
    }
    table
};

/// What bits stand for: `length | extra << 5 | run << 9 | value << 17`.
///
/// `length` bits are to be dropped, then, if `extra` is not 0, a value of so many bits is to be read; `run` coefficients are 0
/// before the value.
#[derive(Clone, Copy)]
struct Entry(u32);

impl Entry {
    /// `extra` of a code longer than [`LOOK`] bits.
    const LONG: u32 = 15;
    /// `run` of the mark that the rest of a block is 0: leads behind any block.
    const END: u32 = 128;

    fn new(length: u32, extra: u32, run: u32, value: i32) -> Self {
        Self(length | extra << 5 | run << 9 | (value << 17).cast_unsigned())
    }

    fn length(self) -> u32 {
        self.0 & 31
    }

    fn extra(self) -> u32 {
        self.0 >> 5 & 15
    }

    fn run(self) -> u32 {
        self.0 >> 9 & 255
    }

    fn value(self) -> i32 {
        self.0.cast_signed() >> 17
    }
}

/// The value that `bits`, `size` of them, stand for.
fn extend(bits: u32, size: u32) -> i32 {
    let bits = bits.cast_signed();
    if size > 0 && bits < 1 << (size - 1) { bits - (1 << size) + 1 } else { bits }
}

/// Bits of several codes and their values that are passed over at once.
const SKIP: u32 = 12;

/// Several codes with their values. The mark that the rest of a block is 0 is no part of them.
#[derive(Clone, Copy, Default)]
struct Several {
    /// The bits they take; 0 if not even one fits.
    length: u8,
    /// How many coefficients they lead on.
    advance: u8,
}

// Each code takes a bit or more and leads 16 coefficients on at most.
const _: () = assert!(SKIP * 16 <= u8::MAX as u32 && SKIP >= LOOK);

/// A Huffman code.
pub(super) struct Huffman {
    look: Box<[Entry; 1 << LOOK]>,
    /// None, each, unless it is for coefficients but the first.
    several: Box<[Several; 1 << SKIP]>,
    /// For each length the first code that is longer, as the upper of 16 bits.
    limits: [u32; 17],
    /// For each length what to add to a code for its index among `symbols`.
    offsets: [i32; 17],
    symbols: Vec<u8>,
    is_dc: bool,
}

impl Huffman {
    /// A code with `counts[n − 1]` symbols of `n` bits.
    pub(super) fn new(counts: &[u8], symbols: &[u8], is_dc: bool) -> Option<Self> {
        let mut look = Box::new([Entry::new(0, Entry::LONG, 0, 0); 1 << LOOK]);
        let (mut limits, mut offsets) = ([0; 17], [0; 17]);
        let (mut code, mut index) = (0u32, 0usize);
        for length in 1..=16u32 {
            let count = usize::from(counts[length as usize - 1]);
            offsets[length as usize] = index as i32 - code.cast_signed();
            if code as usize + count > 1 << length {
                return None;
            }
            for &symbol in &symbols[index..index + count] {
                if length <= LOOK {
                    let (from, many) = (code << (LOOK - length), 1 << (LOOK - length));
                    for low in 0..many {
                        look[(from + low) as usize] = Self::entry(symbol, length, low, is_dc)?;
                    }
                }
                code += 1;
            }
            index += count;
            limits[length as usize] = code << (16 - length);
            code <<= 1;
        }
        let mut several = Box::new([Several::default(); 1 << SKIP]);
        if !is_dc {
            for (bits, several) in (0..).zip(several.iter_mut()) {
                *several = Several::new(&look, bits);
            }
        }
        Some(Self { look, several, limits, offsets, symbols: symbols.to_vec(), is_dc })
    }

    /// What stands for a code of `length` bits followed by the bits `low`, together [`LOOK`].
    fn entry(symbol: u8, length: u32, low: u32, is_dc: bool) -> Option<Entry> {
        let (run, size) = Self::meaning(symbol, is_dc)?;
        let rest = LOOK - length;
        Some(if size <= rest {
            Entry::new(length + size, 0, run, extend(low >> (rest - size), size))
        } else {
            Entry::new(length, size, run, 0)
        })
    }

    /// What stands for a code and its value that are not looked up at once: at the top of `bits`, of which `entry` was found.
    #[inline(never)]
    fn long(&self, bits: u64, entry: Entry) -> Option<Entry> {
        let (length, run, size) = if entry.extra() == Entry::LONG {
            let bits = (bits >> 48) as u32;
            let length = (LOOK + 1..=16).find(|&length| bits < self.limits[length as usize])?;
            let index = (bits >> (16 - length)).cast_signed() + self.offsets[length as usize];
            let (run, size) = Self::meaning(*self.symbols.get(usize::try_from(index).ok()?)?, self.is_dc)?;
            (length, run, size)
        } else {
            (entry.length(), entry.run(), entry.extra())
        };
        // Shifted twice: `size` may be 0.
        let value = (bits << length >> 1 >> (63 - size)) as u32;
        Some(Entry::new(length + size, 0, run, extend(value, size)))
    }

    /// How many zeros a symbol stands for, and how many bits of a value follow it; `None` if no image of 8 bits has that.
    fn meaning(symbol: u8, is_dc: bool) -> Option<(u32, u32)> {
        match (is_dc, symbol >> 4, symbol & 15) {
            (true, 0, size @ 0..=11) => Some((0, size.into())),
            (false, 0, 0) => Some((Entry::END, 0)),
            (false, 15, 0) => Some((15, 0)),
            (false, run, size @ 1..=10) => Some((run.into(), size.into())),
            _ => None,
        }
    }
}

impl Several {
    /// The codes that are whole in the [`SKIP`] bits `bits`.
    fn new(look: &[Entry; 1 << LOOK], bits: u32) -> Self {
        let (mut length, mut advance) = (0, 0);
        loop {
            // Zeros come in behind; a code that needs them is not taken.
            let entry = look[(bits << length & ((1 << SKIP) - 1)) as usize >> (SKIP - LOOK)];
            let whole = entry.extra() == 0 && length + entry.length() <= SKIP;
            if !whole || entry.run() == Entry::END {
                return Self { length: length as u8, advance: advance as u8 };
            }
            length += entry.length();
            advance += entry.run() + 1;
        }
    }
}

/// Reads the entropy-coded data, from which stuffed bytes and markers have been removed.
pub(super) struct Bits<'a> {
    data: &'a [u8],
    position: usize,
    /// The next bits, from the top.
    buffer: u64,
    /// How many of them have been counted.
    left: u32,
}

impl<'a> Bits<'a> {
    /// Bytes that may be read behind the end.
    pub(super) const PADDING: usize = 8;

    pub(super) fn new(data: &'a [u8], position: usize) -> Self {
        Self { data, position, buffer: 0, left: 0 }
    }

    /// Makes at least 56 bits available.
    #[inline(always)]
    pub(super) fn refill(&mut self) {
        // Behind the end there are zeros; `overran` tells.
        let word = self.data.get(self.position..).and_then(<[u8]>::first_chunk).map_or(0, |b| u64::from_be_bytes(*b));
        // What is there beyond the counted bits is the same as what is read again.
        self.buffer |= word >> self.left;
        self.position += ((63 - self.left) >> 3) as usize;
        self.left |= 56;
    }

    #[inline(always)]
    fn drop(&mut self, bits: u32) {
        self.buffer <<= bits;
        self.left -= bits;
    }

    /// Whether more has been consumed than there is before `end`.
    pub(super) fn overran(&self, end: usize) -> bool {
        self.position - (self.left / 8) as usize > end
    }

    /// The next code's run and value: at most 27 bits.
    #[inline(always)]
    pub(super) fn next(&mut self, table: &Huffman) -> Option<(u32, i32)> {
        let mut entry = table.look[(self.buffer >> (64 - LOOK)) as usize];
        if entry.extra() > 0 {
            entry = table.long(self.buffer, entry)?;
        }
        self.drop(entry.length());
        Some((entry.run(), entry.value()))
    }

    /// Reads the coefficients of a block but for the first into `block`, dequantised; answers how far in the file's order they are
    /// not 0.
    #[inline(always)]
    pub(super) fn block(&mut self, table: &Huffman, quantisation: &[f32; 64], block: &mut [f32; 128]) -> Option<usize> {
        let mut k = 1usize;
        loop {
            self.refill();
            for _ in 0..2 {
                let (run, value) = self.next(table)?;
                let at = k + run as usize;
                block[usize::from(ZIGZAG[at & 255]) & 127] = value as f32 * quantisation[at & 63];
                if at >= 63 {
                    return Some(if at == 63 { 63 } else { k - 1 });
                }
                k = at + 1;
            }
        }
    }

    /// Passes over a block's coefficients but for the first.
    #[inline(always)]
    pub(super) fn skip_block(&mut self, table: &Huffman) -> Option<()> {
        let mut k = 1;
        loop {
            self.refill();
            for _ in 0..2 {
                let Several { length, advance } = table.several[(self.buffer >> (64 - SKIP)) as usize];
                // What would lead behind the block belongs, in part, to the next one.
                if k + u32::from(advance) < 64 {
                    self.drop(length.into());
                    k += u32::from(advance);
                }
            }
            k += self.next(table)?.0 + 1;
            if k >= 64 {
                return Some(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// How many symbols of each length: in turn, of the codes that are left, a share of so many 256ths.
    fn counts(shares: [u8; 16]) -> [u8; 16] {
        let mut left = 1u32;
        shares.map(|share| {
            left *= 2;
            // What is left doubles with each length; more than are taken here have no use.
            let count = (left * u32::from(share)).div_ceil(256).min(16);
            left = (left - count).min(1 << 10);
            count as u8
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn blocks_are_passed_over_as_they_are_read(
            shares in any::<[u8; 16]>(),
            drawn in proptest::collection::vec((0u8..16, 1u8..=10), 256),
            marks in any::<[u8; 2]>(),
            mut data in proptest::collection::vec(any::<u8>(), 64..512),
        ) {
            let end = data.len();
            data.extend([0; Bits::PADDING]);
            let mut symbols: Vec<u8> = drawn.iter().map(|(run, size)| run << 4 | size).collect();
            // The end of a block, and sixteen zeros: often short ones.
            for (mark, symbol) in marks.into_iter().zip([0, 0xF0]) {
                symbols[usize::from(mark) >> 4] = symbol;
            }
            let table = Huffman::new(&counts(shares), &symbols, false).expect("a code");
            let (mut read, mut passed) = (Bits::new(&data, 0), Bits::new(&data, 0));
            while !read.overran(end) {
                let mut block = [0.0; 128];
                let known = read.block(&table, &[1.0; 64], &mut block).is_some();
                prop_assert_eq!(passed.skip_block(&table).is_some(), known);
                if !known {
                    break;
                }
                prop_assert_eq!(8 * read.position as u32 - read.left, 8 * passed.position as u32 - passed.left);
            }
        }
    }

    #[test]
    fn codes_of_one_bit_lead_as_far_as_there_is_room_for() {
        // Sixteen zeros are one bit, the end of a block is the other.
        let mut counts = [0; 16];
        counts[0] = 2;
        let table = Huffman::new(&counts, &[0xF0, 0], false).expect("a code");
        let Several { length, advance } = table.several[0];
        assert_eq!((u32::from(length), u32::from(advance)), (SKIP, 16 * SKIP));
    }
}

//! A decoder for a part of a JPEG file: what random crops need.
//!
//! Most photographs are baseline JPEG with one scan of luma and halved chroma. Of these the decoder here reads the entropy-coded
//! data up to the last row of the part and transforms only the blocks that the part touches. All else (progressive files, CMYK, other
//! subsampling, anything damaged) it leaves to the general decoder by answering `None`. Marker codes and tables
//! are those of ITU-T T.81; upsampling and colours are libjpeg's to the bit, the inverse transform is not ([`super::idct`]).

use std::ops::Range;

use super::huffman::{Bits, Huffman};
use super::idct::{inverse, inverse_flat};
use crate::transform::Rect;

/// The pixels `[height][width][3]` of a part of an image, or what is wrong if there are none; `None` if the file is of another kind.
pub(super) fn decode_part(bytes: &[u8], part: Rect) -> Option<Result<Vec<u8>, String>> {
    let image = Image::read(bytes)?;
    let [width, height] = [image.width, image.height].map(|side| side as u32);
    if !part.is_inside(width, height) {
        return None;
    }
    if let Err(message) = worth_its_memory(image.data.len(), width, height) {
        return Some(Err(message));
    }
    Some(pulp::Arch::new().dispatch(Decoding { image, part }).ok_or_else(|| NOTHING.to_owned()))
}

/// What is wrong with a file of which headers are all that is left.
pub(super) const NOTHING: &str = "a JPEG without any pixels behind its headers";

/// Refuses less than a sixteenth of the least data a baseline image of this size has.
pub(super) fn worth_its_memory(bytes: usize, width: u32, height: u32) -> Result<(), String> {
    // A block takes at least two codes of a bit each.
    let blocks = u64::from(width.div_ceil(8)) * u64::from(height.div_ceil(8));
    if (bytes as u64) * 8 * 16 < blocks * 2 {
        return Err(format!("{bytes} bytes of data for {width}x{height} pixels"));
    }
    Ok(())
}

/// Whether three components are red, green and blue rather than luma and chroma, as libjpeg decides.
pub(super) fn is_rgb(bytes: &[u8]) -> bool {
    let (mut colours, mut ids) = (Colours::default(), None);
    for (marker, segment) in segments(bytes).take_while(|(marker, _)| *marker != 0xDA) {
        match (marker, segment) {
            (0xC0..=0xC3, [_, _, _, _, _, 3, r, _, _, g, _, _, b, _, _]) => ids = Some([*r, *g, *b]),
            _ => colours.read(marker, segment),
        }
    }
    ids.is_some_and(|ids| colours.are_rgb(ids))
}

/// What the application markers tell of the colours.
#[derive(Default)]
struct Colours {
    jfif: bool,
    /// The transform that Adobe's marker names.
    adobe: Option<u8>,
}

impl Colours {
    fn read(&mut self, marker: u8, segment: &[u8]) {
        match marker {
            0xE0 if segment.starts_with(b"JFIF\0") => self.jfif = true,
            0xEE if segment.starts_with(b"Adobe") => self.adobe = segment.get(11).copied(),
            _ => {}
        }
    }

    /// Whether components of these identifiers are red, green and blue.
    fn are_rgb(&self, ids: [u8; 3]) -> bool {
        !self.jfif && self.adobe.map_or(ids == *b"RGB", |transform| transform == 0)
    }
}

/// Where there is nothing.
const GREY: u8 = 128;

/// The marker segments up to the first scan's header.
pub(super) fn segments(bytes: &[u8]) -> Segments<'_> {
    Segments { rest: bytes.strip_prefix(&[0xFF, 0xD8]).unwrap_or_default() }
}

/// See [`segments`].
pub(super) struct Segments<'a> {
    /// What follows the last segment that was given.
    rest: &'a [u8],
}

impl<'a> Iterator for Segments<'a> {
    /// A marker's code and its segment's content.
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            // As libjpeg, this passes over bytes that do not belong there.
            let start = self.rest.iter().position(|&byte| byte == 0xFF)?;
            let code = start + self.rest[start..].iter().position(|&byte| byte != 0xFF)?;
            let (marker, behind) = (self.rest[code], &self.rest[code + 1..]);
            match marker {
                0 | 1 | 0xD0..=0xD8 => self.rest = behind,
                0xD9 => return None,
                _ => {
                    let length = usize::from(u16::from_be_bytes(*behind.first_chunk()?));
                    let segment = behind.get(2..length)?;
                    self.rest = &behind[length..];
                    return Some((marker, segment));
                }
            }
        }
    }
}

/// A file that breaks off, up to the last segment that is whole, and with an end; `None` if it has one.
pub(super) fn ended(bytes: &[u8]) -> Option<Vec<u8>> {
    const END: [u8; 2] = [0xFF, 0xD9];
    let is_marker = |pair: &[u8]| pair[0] == 0xFF && !matches!(pair[1], 0 | 0xD0..=0xD7 | 0xFF);
    let last = bytes.windows(2).rposition(is_marker).unwrap_or(0);
    let segment = bytes.get(last + 2..).unwrap_or_default();
    if bytes[last..].starts_with(&END) {
        return None;
    }
    let fits = segment.first_chunk().is_some_and(|length| usize::from(u16::from_be_bytes(*length)) < segment.len());
    let kept = if fits { bytes } else { &bytes[..last] };
    Some([kept, &END].concat())
}

/// A colour component.
struct Component {
    id: u8,
    /// Blocks of a unit, across and down.
    across: usize,
    down: usize,
    table: usize,
    /// In the file's order.
    quantisation: [f32; 64],
    dc: usize,
    ac: usize,
    /// The mean of the block before.
    mean: i32,
    /// The decoded units of the region.
    plane: Vec<u8>,
}

impl Component {
    /// Decodes this component's blocks of a unit, into the plane if it has a place there. `columns`: how many units a plane is wide.
    #[inline(always)]
    fn decode(
        &mut self,
        bits: &mut Bits<'_>,
        dc: &Huffman,
        ac: &Huffman,
        place: Option<(usize, usize)>,
        columns: usize,
    ) -> Option<()> {
        let stride = columns * self.across * 8;
        for i in 0..self.down * self.across {
            bits.refill();
            self.mean = self.mean.wrapping_add(bits.next(dc)?.1);
            let Some((column, row)) = place else {
                bits.skip_block(ac)?;
                continue;
            };
            let mut block = [0f32; 128];
            let last = bits.block(ac, &self.quantisation, &mut block)?;
            block[0] = self.mean as f32 * self.quantisation[0];
            let x = (column * self.across + i % self.across) * 8;
            let y = (row * self.down + i / self.across) * 8;
            transform(&block, last, &mut self.plane[y * stride + x..], stride);
        }
        Some(())
    }
}

/// The decoding of a part, to be compiled for each instruction set: what it calls must be `#[inline(always)]` to profit.
struct Decoding {
    image: Image,
    part: Rect,
}

impl pulp::NullaryFnOnce for Decoding {
    type Output = Option<Vec<u8>>;

    #[inline(always)]
    fn call(mut self) -> Option<Vec<u8>> {
        let region = self.image.region(self.part);
        self.image.decode_blocks(&region)?;
        Some(self.image.colours(self.part, &region))
    }
}

/// A file's headers.
struct Image {
    width: usize,
    height: usize,
    components: Vec<Component>,
    /// Whether they are red, green and blue rather than luma and chroma.
    is_rgb: bool,
    dc: [Option<Huffman>; 4],
    ac: [Option<Huffman>; 4],
    /// Units between restarts; 0 for none.
    restart: usize,
    /// The entropy-coded data without stuffing, padded.
    data: Vec<u8>,
    /// Where the data of each restart interval ends.
    ends: Vec<usize>,
}

/// Units (blocks of all components that belong together) that a part touches.
struct Region {
    columns: Range<usize>,
    rows: Range<usize>,
}

impl Image {
    fn read(bytes: &[u8]) -> Option<Self> {
        let mut quantisation = [None; 4];
        let (mut dc, mut ac) = ([const { None }; 4], [const { None }; 4]);
        let mut frame: Option<(usize, usize, Vec<Component>)> = None;
        let (mut restart, mut colours) = (0, Colours::default());
        let mut segments = segments(bytes);
        while let Some((marker, segment)) = segments.next() {
            match marker {
                0xC0 | 0xC1 if frame.is_none() => frame = Some(read_frame(segment)?),
                0xC4 => read_codes(segment, &mut dc, &mut ac)?,
                0xDB => read_quantisation(segment, &mut quantisation)?,
                0xDD => restart = usize::from(u16::from_be_bytes(*segment.first_chunk()?)),
                0xDA => {
                    let (width, height, mut components) = frame?;
                    read_scan(segment, &mut components)?;
                    for component in &mut components {
                        component.quantisation = quantisation[component.table]?;
                        if dc[component.dc].is_none() || ac[component.ac].is_none() {
                            return None;
                        }
                    }
                    let ids = components.iter().map(|component| component.id).collect::<Vec<_>>();
                    let is_rgb = ids.try_into().is_ok_and(|ids| colours.are_rgb(ids));
                    let (data, ends) = entropy_coded(segments.rest, restart > 0)?;
                    return Some(Self { width, height, components, is_rgb, dc, ac, restart, data, ends });
                }
                0xE0..=0xEF => colours.read(marker, segment),
                0xFE => {}
                _ => return None,
            }
        }
        None
    }

    /// How many pixels a unit has, across and down.
    fn unit(&self) -> (usize, usize) {
        (self.components[0].across * 8, self.components[0].down * 8)
    }

    fn region(&self, part: Rect) -> Region {
        let (across, down) = self.unit();
        // Upsampling looks at the chroma next to a pixel's: up to two pixels away.
        let along = |from: u32, size: u32, unit: usize, side: usize| {
            let (from, to) = (from as usize, from as usize + size as usize);
            from.saturating_sub(2) / unit..(to + 2).min(side).div_ceil(unit)
        };
        Region {
            columns: along(part.x, part.width, across, self.width),
            rows: along(part.y, part.height, down, self.height),
        }
    }

    /// Fills the planes; what the data does not reach is grey, as with libjpeg. `None` if it reaches nothing.
    #[inline(always)]
    fn decode_blocks(&mut self, region: &Region) -> Option<()> {
        let (across, down) = self.unit();
        let units = self.width.div_ceil(across);
        let (all, needed) = (units * self.height.div_ceil(down), units * region.rows.end);
        for component in &mut self.components {
            let blocks = region.columns.len() * component.across * region.rows.len() * component.down;
            component.plane = vec![GREY; blocks * 64];
        }
        let interval = if self.restart > 0 { self.restart } else { all };
        let (mut start, mut shown) = (0, false);
        for (first, &end) in (0..all).step_by(interval).zip(&self.ends) {
            let mut bits = Bits::new(&self.data, start);
            self.components.iter_mut().for_each(|component| component.mean = 0);
            for unit in first..all.min(first + interval) {
                // Whether there is anything is the same of each part.
                if shown && unit >= needed {
                    return Some(());
                }
                let (row, column) = (unit / units, unit % units);
                let place = (region.rows.contains(&row) && region.columns.contains(&column))
                    .then(|| (column - region.columns.start, row - region.rows.start));
                // A plain loop, which is inlined.
                let mut decoded = Some(());
                for component in &mut self.components {
                    let (Some(dc), Some(ac)) = (&self.dc[component.dc], &self.ac[component.ac]) else { return None };
                    decoded = decoded.and(component.decode(&mut bits, dc, ac, place, region.columns.len()));
                }
                if decoded.is_none() || bits.overran(end) {
                    // The next interval may be whole.
                    break;
                }
                shown = true;
            }
            start = end;
        }
        shown.then_some(())
    }

    /// Upsamples chroma and converts to red, green and blue.
    #[inline(always)]
    fn colours(&self, part: Rect, region: &Region) -> Vec<u8> {
        let (width, height) = (part.width as usize, part.height as usize);
        let (across, down) = self.unit();
        let (x0, y0) = (part.x as usize - region.columns.start * across, part.y as usize - region.rows.start * down);
        let mut rgb = vec![0; width * height * 3];
        let stride = region.columns.len() * across;
        let luma = self.components[0].plane.chunks_exact(stride).skip(y0);
        let rows = rgb.chunks_exact_mut(width * 3).zip(luma.map(|row| &row[x0..x0 + width]));
        let [_, blue, red] = self.components.as_slice() else {
            for (row, luma) in rows {
                for (pixel, &byte) in row.chunks_exact_mut(3).zip(luma) {
                    pixel.fill(byte);
                }
            }
            return rgb;
        };
        let chroma = Chroma {
            filtered: self.width.div_ceil(2) > 2,
            halved: (across == 16, down == 16),
            stride: region.columns.len() * 8,
            width: self.width.div_ceil(across / 8) - region.columns.start * 8,
            height: self.height.div_ceil(down / 8) - region.rows.start * 8,
        };
        let mut sums = Vec::new();
        let (mut blues, mut reds) = (Vec::new(), Vec::new());
        for (y, (row, luma)) in rows.enumerate() {
            chroma.row(&blue.plane, y0 + y, &mut sums, &mut blues);
            chroma.row(&red.plane, y0 + y, &mut sums, &mut reds);
            let planes = [luma, &blues[x0..x0 + width], &reds[x0..x0 + width]];
            if self.is_rgb {
                interleave(planes, row, |pixel| pixel);
            } else {
                interleave(planes, row, convert);
            }
        }
        rgb
    }
}

/// Transforms a block. `last`: how far in the file's order it is not 0.
#[inline(always)]
fn transform(block: &[f32; 128], last: usize, out: &mut [u8], stride: usize) {
    /// The coefficients up to here, in the file's order, are among the first four of a row and column.
    const CORNER: usize = 9;
    let block: &[f32; 64] = block.first_chunk().expect("more than a block");
    match last {
        0 => inverse_flat(block[0], out, stride),
        1..=CORNER => inverse::<4>(block, out, stride),
        _ => inverse::<8>(block, out, stride),
    }
}

/// How chroma lies in its planes.
struct Chroma {
    /// Whether there is one for two pixels, across and down.
    halved: (bool, bool),
    /// Whether what is missing is interpolated: libjpeg repeats what is no wider than two.
    filtered: bool,
    stride: usize,
    /// What of a plane is inside the image, from the plane's start.
    width: usize,
    height: usize,
}

impl Chroma {
    /// The chroma of each pixel of row `y`, as libjpeg's triangle filter ("fancy upsampling") gives it.
    #[inline(always)]
    fn row(&self, plane: &[u8], y: usize, sums: &mut Vec<u16>, out: &mut Vec<u8>) {
        let width = self.width.min(self.stride);
        let row = |y: usize| &plane[y.min(self.height - 1) * self.stride..][..width];
        out.resize(width * if self.halved.0 { 2 } else { 1 }, 0);
        if self.halved.0 && !self.filtered {
            let repeated = row(if self.halved.1 { y / 2 } else { y }).iter();
            out.as_chunks_mut().0.iter_mut().zip(repeated).for_each(|(pair, &byte)| *pair = [byte; 2]);
            return;
        }
        let (weight, low, high, shift) = if self.halved.1 {
            // Three parts of the near row and one of the far one.
            let near = row(y / 2);
            let far = row(if y.is_multiple_of(2) { (y / 2).saturating_sub(1) } else { y / 2 + 1 });
            sums.clear();
            sums.extend(near.iter().zip(far).map(|(&near, &far)| 3 * u16::from(near) + u16::from(far)));
            (3, 8, 7, 4)
        } else if self.halved.0 {
            sums.clear();
            sums.extend(row(y).iter().map(|&byte| u16::from(byte)));
            (3, 1, 2, 2)
        } else {
            out.copy_from_slice(row(y));
            return;
        };
        // The same across; at the ends the outer neighbour is the pixel itself.
        let first = sums[0];
        let last = sums[width - 1];
        let inner = sums.windows(2).zip(out[1..].chunks_exact_mut(2));
        for (pair, out) in inner {
            out[0] = ((weight * pair[0] + pair[1] + high) >> shift) as u8;
            out[1] = ((weight * pair[1] + pair[0] + low) >> shift) as u8;
        }
        out[0] = ((4 * first + low) >> shift) as u8;
        out[2 * width - 1] = ((4 * last + high) >> shift) as u8;
    }
}

/// Luma and chroma of a pixel to red, green and blue (JFIF), in 16 fractional bits as libjpeg: 1.402 red, 1.772 blue, −0.34414 blue
/// and −0.71414 red, each split in a whole part and one that fits 16 bits.
#[inline(always)]
pub(super) fn convert([luma, blue, red]: [u8; 3]) -> [u8; 3] {
    let (luma, blue, red) = (i16::from(luma), i16::from(blue) - 128, i16::from(red) - 128);
    let wide = |factor: i16, value: i16| i32::from(factor) * i32::from(value);
    // Rounded at the last but one bit: one instruction multiplies and takes the upper half.
    let rounded = |factor: i16, value: i16| (((wide(factor, 2 * value) >> 16) as i16) + 1) >> 1;
    let r = luma + red + rounded(26345, red);
    let g = luma - red + ((wide(-22554, blue) + wide(18734, red) + (1 << 15)) >> 16) as i16;
    let b = luma + 2 * blue + rounded(-14942, blue);
    [r, g, b].map(|value| value.clamp(0, 255) as u8)
}

/// Rows of three planes to a row of pixels.
#[inline(always)]
fn interleave(planes: [&[u8]; 3], out: &mut [u8], convert: impl Fn([u8; 3]) -> [u8; 3]) {
    const MANY: usize = 16;
    let [(a, a_rest), (b, b_rest), (c, c_rest)] = planes.map(<[u8]>::as_chunks::<MANY>);
    let (pixels, rest) = out.as_chunks_mut::<{ 3 * MANY }>();
    let word = |pixel: [u8; 3]| u32::from_le_bytes([pixel[0], pixel[1], pixel[2], 0]);
    for (pixels, ((a, b), c)) in pixels.iter_mut().zip(a.iter().zip(b).zip(c)) {
        let mut converted = [[0u8; MANY]; 3];
        for i in 0..MANY {
            [converted[0][i], converted[1][i], converted[2][i]] = convert([a[i], b[i], c[i]]);
        }
        let words: [u32; MANY] = std::array::from_fn(|i| word([converted[0][i], converted[1][i], converted[2][i]]));
        // Each word's fourth byte is overwritten by the next; the last has no room for it.
        for (i, word) in words[..MANY - 1].iter().enumerate() {
            pixels[3 * i..3 * i + 4].copy_from_slice(&word.to_le_bytes());
        }
        pixels[3 * MANY - 3..].copy_from_slice(&words[MANY - 1].to_le_bytes()[..3]);
    }
    for (pixel, ((&a, &b), &c)) in rest.as_chunks_mut::<3>().0.iter_mut().zip(a_rest.iter().zip(b_rest).zip(c_rest)) {
        *pixel = convert([a, b, c]);
    }
}

/// Width, height and components of a frame header, if they are of the common kinds.
fn read_frame(segment: &[u8]) -> Option<(usize, usize, Vec<Component>)> {
    let [8, h1, h0, w1, w0, count, components @ ..] = segment else { return None };
    let [width, height] = [[*w1, *w0], [*h1, *h0]].map(|side| usize::from(u16::from_be_bytes(side)));
    let mut components: Vec<Component> = components.chunks_exact(3).map(component).collect::<Option<_>>()?;
    if width == 0 || height == 0 || components.len() != usize::from(*count) {
        return None;
    }
    match components.as_mut_slice() {
        // Alone, its sampling means nothing.
        [only] => (only.across, only.down) = (1, 1),
        [luma, chroma @ ..] => {
            let common = [(1, 1), (2, 1), (2, 2)].contains(&(luma.across, luma.down));
            let single = chroma.len() == 2 && chroma.iter().all(|c| (c.across, c.down) == (1, 1));
            if !common || !single {
                return None;
            }
        }
        [] => return None,
    }
    Some((width, height, components))
}

fn component(bytes: &[u8]) -> Option<Component> {
    let (across, down, table) = (usize::from(bytes[1] >> 4), usize::from(bytes[1] & 15), usize::from(bytes[2]));
    (table < 4).then(|| Component {
        id: bytes[0],
        across,
        down,
        table,
        quantisation: [0.0; 64],
        dc: 0,
        ac: 0,
        mean: 0,
        plane: Vec::new(),
    })
}

/// A scan header that has all components in their order and all their coefficients.
fn read_scan(segment: &[u8], components: &mut [Component]) -> Option<()> {
    let (&count, rest) = segment.split_first()?;
    let [tables @ .., 0, 63, 0] = rest else { return None };
    if usize::from(count) != components.len() || tables.len() != 2 * components.len() {
        return None;
    }
    for (component, pair) in components.iter_mut().zip(tables.chunks_exact(2)) {
        (component.dc, component.ac) = (usize::from(pair[1] >> 4), usize::from(pair[1] & 15));
        if pair[0] != component.id || component.dc > 3 || component.ac > 3 {
            return None;
        }
    }
    Some(())
}

fn read_quantisation(mut segment: &[u8], tables: &mut [Option<[f32; 64]>; 4]) -> Option<()> {
    while let Some((&head, rest)) = segment.split_first() {
        let size = if head >> 4 == 0 { 1 } else { 2 };
        let (values, rest) = rest.split_at_checked(64 * size)?;
        let value = |k: usize| values[k * size..][..size].iter().fold(0u16, |sum, &byte| sum << 8 | u16::from(byte));
        *tables.get_mut(usize::from(head & 15))? = Some(std::array::from_fn(|k| f32::from(value(k))));
        segment = rest;
    }
    Some(())
}

fn read_codes(mut segment: &[u8], dc: &mut [Option<Huffman>; 4], ac: &mut [Option<Huffman>; 4]) -> Option<()> {
    while let Some((&head, rest)) = segment.split_first() {
        let (counts, rest) = rest.split_at_checked(16)?;
        let (symbols, rest) = rest.split_at_checked(counts.iter().map(|&count| usize::from(count)).sum())?;
        let tables = if head >> 4 == 0 { &mut *dc } else { &mut *ac };
        *tables.get_mut(usize::from(head & 15))? = Some(Huffman::new(counts, symbols, head >> 4 == 0)?);
        segment = rest;
    }
    Some(())
}

/// The entropy-coded data up to the end of the image or the file, without stuffed bytes and restart markers, and where each restart
/// interval ends in it; `None` if there is another scan.
fn entropy_coded(bytes: &[u8], restarts: bool) -> Option<(Vec<u8>, Vec<usize>)> {
    let mut data = Vec::with_capacity(bytes.len() + Bits::PADDING);
    let mut ends = Vec::new();
    let mut rest = bytes;
    loop {
        while let Some(word) = rest.first_chunk::<8>() {
            if word.contains(&0xFF) {
                break;
            }
            data.extend_from_slice(word);
            rest = &rest[8..];
        }
        let plain = rest.iter().position(|&byte| byte == 0xFF).unwrap_or(rest.len());
        data.extend_from_slice(&rest[..plain]);
        match rest.get(plain + 1) {
            Some(0) => data.push(0xFF),
            Some(0xD0..=0xD7) if restarts => ends.push(data.len()),
            Some(0xD9) | None => {
                ends.push(data.len());
                data.extend([0; Bits::PADDING]);
                return Some((data, ends));
            }
            Some(_) => return None,
        }
        rest = &rest[plain + 2..];
    }
}

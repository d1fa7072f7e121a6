//! Image files before they are decoded: their size, and then no more of their pixels than are needed.
//!
//! # What comes out
//!
//! What `PIL.Image.open(file).convert("RGB")` gives, within the rounding of JPEG decoders, but for these:
//!
//! - of grey PNG of 16 bits the upper 8 are taken (Pillow cuts values above 255 off, which makes most pictures white);
//! - of a progressive JPEG that breaks off the coarse picture is taken, of which Pillow shows nothing. What other truncated files
//!   lack is grey (JPEG) or black (PNG, GIF), as in Pillow with `LOAD_TRUNCATED_IMAGES`, which the original sets; but a file of which no
//!   pixel can be decoded is an error. So is any truncated WebP, as with Pillow;
//! - behind damage a baseline JPEG is grey up to the next restart marker or the end, where libjpeg makes pixels of what is there;
//! - a JPEG with less than a sixteenth of the least data that an image of its size has is an error.
//!
//! Transparency is dropped, of an animation the first frame is taken, colour profiles are ignored, as with Pillow. So is the EXIF
//! orientation, because boxes in annotations refer to pixels as stored; pictures of people's own are to be shown upright
//! ([`DecodeOptions::upright`]).

use std::borrow::Cow;
use std::io::{BufRead, Cursor, Seek};
use std::path::Path;

use image::metadata::Orientation;
use image::{ColorType, ImageDecoder, ImageFormat};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::{Picture, jpeg};
use crate::error::DataError;
use crate::records::ImageSource;
use crate::transform::Rect;

/// The largest number of pixels that is decoded unless asked otherwise: twice Pillow's `MAX_IMAGE_PIXELS`, beyond which Pillow, too,
/// refuses an image. At three bytes each, half a gigabyte.
pub const MAX_PIXELS: u64 = 178_956_970;

/// How files are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Images of more pixels are refused, by their headers alone.
    pub max_pixels: u64,
    /// Whether to turn and mirror as the EXIF orientation says. Boxes in annotations refer to pixels as stored.
    pub upright: bool,
}

impl Default for DecodeOptions {
    /// As for training: [`MAX_PIXELS`], as stored.
    fn default() -> Self {
        Self { max_pixels: MAX_PIXELS, upright: false }
    }
}

impl DecodeOptions {
    /// As for people's own pictures: upright.
    #[must_use]
    pub fn upright() -> Self {
        Self { upright: true, ..Self::default() }
    }
}

/// The content of an image file of which the header has been read.
#[derive(Debug, Clone)]
pub struct Encoded<'a> {
    bytes: Cow<'a, [u8]>,
    name: String,
    format: ImageFormat,
    /// As stored.
    width: u32,
    height: u32,
    orientation: Orientation,
    max_pixels: u64,
}

impl<'a> Encoded<'a> {
    /// Reads a file, or borrows from memory; `name` is for messages about the latter.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]; [`DataError::Image`] also if the file cannot be read.
    pub fn of(
        source: &'a ImageSource,
        name: &dyn std::fmt::Display,
        options: DecodeOptions,
    ) -> Result<Self, DataError> {
        match source {
            ImageSource::Path(path) => Self::open(path, options),
            ImageSource::Bytes(bytes) => Self::new(&**bytes, name, options),
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]; [`DataError::Image`] also if the file cannot be read.
    pub fn open(path: &Path, options: DecodeOptions) -> Result<Self, DataError> {
        let name = path.display();
        let bytes = std::fs::read(path).map_err(|error| broken(&name, &error))?;
        Self::new(bytes, &name, options)
    }

    /// Reads the header of an image file's content.
    ///
    /// # Errors
    ///
    /// [`DataError::Image`] naming `name` if this is no JPEG, PNG, WebP or GIF, or its header is broken;
    /// [`DataError::ImageSize`] if it claims to have no pixels or more than `options` allow.
    pub fn new(
        bytes: impl Into<Cow<'a, [u8]>>,
        name: &dyn std::fmt::Display,
        options: DecodeOptions,
    ) -> Result<Self, DataError> {
        let bytes = bytes.into();
        let format = image::guess_format(&bytes).map_err(|error| broken(name, &error))?;
        let (width, height, orientation) = match format {
            ImageFormat::Jpeg => jpeg_header(&bytes, options.upright).map_err(|message| broken(name, &message))?,
            _ => {
                let mut decoder =
                    decoder(Cursor::new(&*bytes), format, options.max_pixels).map_err(|error| broken(name, &error))?;
                let (width, height) = decoder.dimensions();
                let orientation = if options.upright { decoder.orientation().ok() } else { None };
                (width, height, orientation.unwrap_or(Orientation::NoTransforms))
            }
        };
        check_size(name, width, height, options.max_pixels)?;
        let (name, max_pixels) = (name.to_string(), options.max_pixels);
        Ok(Self { bytes, name, format, width, height, orientation, max_pixels })
    }

    /// Width in pixels, after turning if that is asked for.
    #[must_use]
    pub fn width(&self) -> u32 {
        if self.lies() { self.height } else { self.width }
    }

    /// Height in pixels, after turning if that is asked for.
    #[must_use]
    pub fn height(&self) -> u32 {
        if self.lies() { self.width } else { self.height }
    }

    /// Whether it is turned by a quarter.
    fn lies(&self) -> bool {
        use Orientation::*;
        matches!(self.orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
    }

    /// All pixels.
    ///
    /// # Errors
    ///
    /// [`DataError::Image`] if none can be decoded.
    pub fn decode(&self) -> Result<Picture, DataError> {
        self.decode_part(Rect::whole(self.width(), self.height()))
    }

    /// The pixels of a part, equal to that part of [`Self::decode`]. What is outside is not decoded if the file is a baseline
    /// JPEG.
    ///
    /// # Errors
    ///
    /// [`DataError::Image`] if no pixel of the image can be decoded.
    ///
    /// # Panics
    ///
    /// If the part is empty or not inside the image.
    pub fn decode_part(&self, part: Rect) -> Result<Picture, DataError> {
        let whole = Rect::whole(self.width(), self.height());
        assert!(part.is_inside(self.width(), self.height()), "{part:?} is not in {whole:?}");
        if self.format == ImageFormat::Jpeg
            && self.orientation == Orientation::NoTransforms
            && let Some(rgb) = jpeg::decode_part(&self.bytes, part)
        {
            let rgb = rgb.map_err(|message| broken(&self.name, &message))?;
            return Ok(Picture { width: part.width, height: part.height, rgb });
        }
        let rgb = match self.format {
            ImageFormat::Jpeg => match jpeg::decode_part(&self.bytes, Rect::whole(self.width, self.height)) {
                Some(rgb) => rgb,
                None => self.any_jpeg(),
            },
            _ => self.other(),
        };
        let rgb = rgb.map_err(|message| broken(&self.name, &message))?;
        let stored = Picture { width: self.width, height: self.height, rgb };
        let picture = turned(stored, self.orientation);
        Ok(if part == whole { picture } else { picture.part(part) })
    }

    /// What [`jpeg`] does not decode.
    fn any_jpeg(&self) -> Result<Vec<u8>, String> {
        jpeg::worth_its_memory(self.bytes.len(), self.width, self.height)?;
        let ended = jpeg::ended(&self.bytes);
        let rgb = match (self.general_jpeg(&self.bytes), &ended) {
            // Of a progressive file that breaks off there may still be a coarse picture: libjpeg, too, pretends that it ends there.
            (Err(error), Some(ended)) => self.general_jpeg(ended).map_err(|_| error)?,
            (result, _) => result?,
        };
        // What a file without any coefficient is.
        let grey = rgb.first().is_none_or(|first| rgb.iter().all(|byte| byte == first));
        if ended.is_some() && grey {
            return Err(jpeg::NOTHING.to_owned());
        }
        Ok(rgb)
    }

    fn general_jpeg(&self, bytes: &[u8]) -> Result<Vec<u8>, String> {
        let (width, height) = (usize::from(u16::MAX), usize::from(u16::MAX));
        let options = DecoderOptions::default().set_max_width(width).set_max_height(height).set_strict_mode(false);
        let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
        decoder.decode_headers().map_err(|error| error.to_string())?;
        let stored = decoder.input_colorspace().unwrap_or(ColorSpace::YCbCr);
        let info = decoder.info().ok_or("a JPEG without a frame header")?;
        if (u32::from(info.width), u32::from(info.height)) != (self.width, self.height) {
            return Err(format!("a second frame of {}x{} pixels", info.width, info.height));
        }
        let out = match (info.components, stored) {
            (4, _) => stored,
            // By Adobe's marker alone zune-jpeg takes these for red, green and blue, and converts nothing.
            (3, ColorSpace::CMYK | ColorSpace::RGB) => ColorSpace::RGB,
            // As they are.
            (3, _) => ColorSpace::YCbCr,
            _ => ColorSpace::RGB,
        };
        decoder.set_options(options.jpeg_set_out_colorspace(out));
        let mut pixels = vec![0; self.pixels() * out.num_components()];
        decoder.decode_into(&mut pixels).map_err(|error| error.to_string())?;
        if info.components == 3 && !jpeg::is_rgb(bytes) {
            pixels.as_chunks_mut().0.iter_mut().for_each(|pixel| *pixel = jpeg::convert(*pixel));
        }
        let four = pixels.as_chunks::<4>().0;
        let lit = |&[y, blue, red, black]: &[u8; 4]| from_inks(jpeg::convert([y, blue, red]).map(|c| 255 - c), black);
        Ok(match (info.components, stored) {
            (4, ColorSpace::YCCK) => four.iter().flat_map(lit).collect(),
            (4, _) => four.iter().flat_map(|&[c, m, y, black]| from_inks([c, m, y], black)).collect(),
            _ => pixels,
        })
    }

    fn pixels(&self) -> usize {
        self.width as usize * self.height as usize
    }

    fn other(&self) -> Result<Vec<u8>, String> {
        let decoder =
            decoder(Cursor::new(&*self.bytes), self.format, self.max_pixels).map_err(|error| error.to_string())?;
        let color = decoder.color_type();
        let size = decoder.total_bytes();
        let mut pixels = vec![0; usize::try_from(size).map_err(|_| format!("{size} bytes of pixels"))?];
        let result = decoder.read_image(&mut pixels);
        if let Err(error) = &result
            && pixels.iter().all(|&byte| byte == 0)
        {
            return Err(error.to_string());
        }
        if color.bytes_per_pixel() / color.channel_count() == 2 {
            // Of 16 bits the upper 8, as Pillow. The decoder brings them into this machine's order last of all: what has been decoded
            // before an error is still in that of PNG.
            let value = if result.is_ok() { u16::from_ne_bytes } else { u16::from_be_bytes };
            pixels = pixels.as_chunks().0.iter().map(|&pair| (value(pair) >> 8) as u8).collect();
        }
        Ok(match color {
            ColorType::L8 | ColorType::L16 => pixels.iter().flat_map(|&byte| [byte; 3]).collect(),
            ColorType::La8 | ColorType::La16 => pixels.chunks_exact(2).flat_map(|pixel| [pixel[0]; 3]).collect(),
            ColorType::Rgb8 | ColorType::Rgb16 => pixels,
            ColorType::Rgba8 | ColorType::Rgba16 => {
                pixels.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect()
            }
            other => return Err(format!("pixels of type {other:?}")),
        })
    }
}

pub(super) fn broken(name: &dyn std::fmt::Display, message: &dyn std::fmt::Display) -> DataError {
    DataError::Image { name: name.to_string(), message: message.to_string() }
}

/// Refuses images of no pixels, or of more than are allowed.
pub(super) fn check_size(name: &dyn std::fmt::Display, width: u32, height: u32, limit: u64) -> Result<(), DataError> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 || pixels > limit {
        return Err(DataError::ImageSize { name: name.to_string(), limit, width, height });
    }
    Ok(())
}

pub(super) fn decoder<'a>(
    reader: impl BufRead + Seek + 'a,
    format: ImageFormat,
    max_pixels: u64,
) -> image::ImageResult<Box<dyn ImageDecoder + 'a>> {
    /// For what is no pixel, such as colour profiles.
    const OTHER: u64 = 64 << 20;
    let mut reader = image::ImageReader::with_format(reader, format);
    // A frame of a GIF may claim to be larger than the image that it is part of.
    let mut limits = image::Limits::no_limits();
    limits.max_alloc = Some(max_pixels.saturating_mul(4).saturating_add(OTHER));
    reader.limits(limits);
    Ok(Box::new(reader.into_decoder()?))
}

/// The marker of a scan.
pub(super) const SCAN: u8 = 0xDA;

/// Width, height and orientation.
pub(super) fn jpeg_header(bytes: &[u8], upright: bool) -> Result<(u32, u32, Orientation), String> {
    let mut found = None;
    let mut orientation = Orientation::NoTransforms;
    for (marker, segment) in jpeg::segments(bytes).take_while(|(marker, _)| *marker != SCAN) {
        match (marker, segment) {
            (0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF, [_, h1, h0, w1, w0, ..]) => {
                found = Some([[*w1, *w0], [*h1, *h0]].map(|side| u32::from(u16::from_be_bytes(side))));
            }
            (0xE1, [b'E', b'x', b'i', b'f', 0, _, exif @ ..]) if upright => {
                orientation = Orientation::from_exif_chunk(exif).unwrap_or(orientation);
            }
            _ => {}
        }
    }
    let [width, height] = found.ok_or("a JPEG without a frame header")?;
    Ok((width, height, orientation))
}

/// Red, green and blue of the inks that Adobe stores inverted, as Pillow converts them.
fn from_inks(colours: [u8; 3], light: u8) -> [u8; 3] {
    colours.map(|colour| {
        // Pillow's MULDIV255.
        let product = u32::from(255 - colour) * u32::from(light) + 128;
        light.saturating_sub(((product + (product >> 8)) >> 8) as u8)
    })
}

/// Turns and mirrors a picture as an EXIF orientation says.
fn turned(picture: Picture, orientation: Orientation) -> Picture {
    if orientation == Orientation::NoTransforms {
        return picture;
    }
    let (width, height) = (picture.width as usize, picture.height as usize);
    let (right, bottom) = (width - 1, height - 1);
    let lies = |lies: bool| if lies { (height, width) } else { (width, height) };
    use Orientation::*;
    let (new_width, new_height) = lies(matches!(orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH));
    let source = |x: usize, y: usize| match orientation {
        NoTransforms => (x, y),
        FlipHorizontal => (right - x, y),
        FlipVertical => (x, bottom - y),
        Rotate180 => (right - x, bottom - y),
        Rotate90 => (y, bottom - x),
        Rotate270 => (right - y, x),
        Rotate90FlipH => (y, x),
        Rotate270FlipH => (right - y, bottom - x),
    };
    let mut rgb = Vec::with_capacity(picture.rgb.len());
    for y in 0..new_height {
        for x in 0..new_width {
            let (x, y) = source(x, y);
            rgb.extend_from_slice(&picture.rgb[(y * width + x) * 3..][..3]);
        }
    }
    Picture { width: new_width as u32, height: new_height as u32, rgb }
}

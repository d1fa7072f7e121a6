//! The size of the image in a file, of which no more is read than that takes.

use std::fmt::Display;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use image::{ImageDecoder, ImageFormat};

use super::encoded::{SCAN, broken, check_size, decoder, jpeg_header};
use super::jpeg;
use crate::error::DataError;

/// Width and height as stored; `name` is for messages.
///
/// # Errors
///
/// As [`super::Encoded::new`]; [`DataError::Image`] also if the file cannot be read.
pub(crate) fn size(mut file: impl Read + Seek, name: &dyn Display, max_pixels: u64) -> Result<(u32, u32), DataError> {
    /// What nearly all JPEGs have their frame's header in.
    const FIRST: u64 = 1 << 14;
    let unread = |error: io::Error| broken(name, &error);
    let mut head = Vec::new();
    file.by_ref().take(FIRST).read_to_end(&mut head).map_err(unread)?;
    let format = image::guess_format(&head).map_err(|error| broken(name, &error))?;
    let (width, height) = if format == ImageFormat::Jpeg {
        // Metadata, colour profiles and thumbnails come before the frame's header.
        while !jpeg::segments(&head).any(|(marker, _)| marker == SCAN) {
            let more = head.len() as u64;
            if file.by_ref().take(more).read_to_end(&mut head).map_err(unread)? == 0 {
                break;
            }
        }
        let (width, height, _) = jpeg_header(&head, false).map_err(|message| broken(name, &message))?;
        (width, height)
    } else {
        file.seek(SeekFrom::Start(0)).map_err(unread)?;
        let decoder = decoder(BufReader::new(file), format, max_pixels).map_err(|error| broken(name, &error))?;
        decoder.dimensions()
    };
    check_size(name, width, height, max_pixels)?;
    Ok((width, height))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::image::{DecodeOptions, Encoded, MAX_PIXELS};

    /// Counts what is read.
    struct Counted<R>(R, u64);

    impl<R: Read> Read for Counted<R> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let read = self.0.read(buffer)?;
            self.1 += read as u64;
            Ok(read)
        }
    }

    impl<R: Seek> Seek for Counted<R> {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.0.seek(to)
        }
    }

    fn written(format: ImageFormat, width: u32, height: u32) -> Vec<u8> {
        let noise = |x: u32, y: u32| {
            let mut mixed = (x + 1000 * y).wrapping_mul(0x9e37_79b1);
            mixed = (mixed ^ (mixed >> 15)).wrapping_mul(0x85eb_ca6b);
            mixed ^= mixed >> 13;
            image::Rgb([mixed as u8, (mixed >> 8) as u8, (mixed >> 16) as u8])
        };
        let mut bytes = Cursor::new(Vec::new());
        image::RgbImage::from_fn(width, height, noise).write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn the_size_is_that_of_the_whole_file() {
        for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::Gif, ImageFormat::WebP] {
            let bytes = written(format, 300, 200);
            let mut file = Counted(Cursor::new(&bytes), 0);
            assert_eq!(size(&mut file, &"x", MAX_PIXELS).unwrap(), (300, 200), "{format:?}");
            assert!(bytes.len() > 50_000 && file.1 < 40_000, "{format:?}: {} of {} bytes", file.1, bytes.len());
            let error = size(Cursor::new(&bytes), &"x", 59_999).unwrap_err();
            assert!(matches!(error, DataError::ImageSize { limit: 59_999, width: 300, height: 200, .. }), "{error}");
            // Cut anywhere, it is known or refused as that of an image in memory.
            for end in (0..bytes.len()).step_by(997) {
                let whole = Encoded::new(&bytes[..end], &"x", DecodeOptions::default());
                let whole = whole.map(|image| (image.width(), image.height())).ok();
                assert_eq!(size(Cursor::new(&bytes[..end]), &"x", MAX_PIXELS).ok(), whole, "{format:?} {end}");
            }
        }
    }

    #[test]
    fn a_header_may_lie_far_behind() {
        let plain = written(ImageFormat::Jpeg, 300, 200);
        let profile = [&[0xFF, 0xE2, 0xFF, 0xFF][..], &vec![7; 0xFFFD]].concat();
        let bytes = [&plain[..2], &profile.repeat(5), &plain[2..]].concat();
        assert_eq!(size(Cursor::new(&bytes), &"x", MAX_PIXELS).unwrap(), (300, 200));
        assert!(size(Cursor::new(&bytes[..300_000]), &"x", MAX_PIXELS).is_err());
    }
}

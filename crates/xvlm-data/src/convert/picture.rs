//! Image files on their way into shards: looked at by their headers, and made smaller if that is asked for.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use crate::annotations::Reason;
use crate::error::DataError;
use crate::image::{DecodeOptions, Encoded, MAX_PIXELS, header};

/// Why an image cannot be used, and what was found.
pub(crate) type Unusable = (Reason, String);

fn opened(path: &Path) -> Result<File, Unusable> {
    File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => (Reason::MissingImage, "no such file".to_owned()),
        _ => (Reason::UnreadableImage, error.to_string()),
    })
}

fn unusable(error: DataError) -> Unusable {
    let found = match error {
        DataError::Image { message, .. } => message,
        DataError::ImageSize { limit, width, height, .. } => {
            format!("an image of {width}x{height} pixels, of 1 to {limit}")
        }
        other => other.to_string(),
    };
    (Reason::UnreadableImage, found)
}

/// Width and height as the header of an image file tells them; of the rest of the file little is read.
pub(crate) fn file_size(path: &Path) -> Result<(u32, u32), Unusable> {
    header::size(opened(path)?, &path.display(), MAX_PIXELS).map_err(unusable)
}

/// An image file's content, and what is known of it.
pub(crate) struct ImageFile {
    pub(crate) bytes: Vec<u8>,
    /// Width and height of the image in the file that it was read from.
    pub(crate) size: (u32, u32),
    /// Width and height of the image in `bytes`.
    pub(crate) new_size: (u32, u32),
}

/// Reads an image file; if a side is longer than `max_side` it is made smaller and written anew as a JPEG.
pub(crate) fn read(path: &Path, max_side: Option<u32>, quality: u8) -> Result<ImageFile, Unusable> {
    let unreadable = |found: String| (Reason::UnreadableImage, found);
    let mut bytes = Vec::new();
    opened(path)?.read_to_end(&mut bytes).map_err(|error| unreadable(error.to_string()))?;
    let encoded = Encoded::new(&*bytes, &path.display(), DecodeOptions::default()).map_err(unusable)?;
    let size = (encoded.width(), encoded.height());
    let longest = size.0.max(size.1);
    let Some(max_side) = max_side.filter(|&max_side| longest > max_side) else {
        return Ok(ImageFile { bytes, size, new_size: size });
    };
    let picture = encoded.decode().map_err(unusable)?;
    let scaled = |side: u32| {
        ((u64::from(side) * u64::from(max_side) * 2 + u64::from(longest)) / (2 * u64::from(longest))) as u32
    };
    let new_size = (scaled(size.0).max(1), scaled(size.1).max(1));
    let small = picture.resized(picture.rect(), new_size.0, new_size.1);
    let mut jpeg = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, quality)
        .encode(small.rgb(), new_size.0, new_size.1, image::ExtendedColorType::Rgb8)
        .map_err(|error| unreadable(error.to_string()))?;
    Ok(ImageFile { bytes: jpeg, size, new_size })
}

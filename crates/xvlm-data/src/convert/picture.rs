//! Image files on their way into shards: looked at by their headers, and made smaller if that is asked for.

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, ErrorKind, Seek};
use std::path::Path;

use crate::annotations::Reason;
use crate::image::Picture;

/// Why an image cannot be used, and what was found.
pub(crate) type Unusable = (Reason, String);

fn opened(path: &Path) -> Result<File, Unusable> {
    File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => (Reason::MissingImage, "no such file".to_owned()),
        _ => (Reason::UnreadableImage, error.to_string()),
    })
}

fn header(reader: impl BufRead + Seek) -> Result<(u32, u32), Unusable> {
    let unreadable = |found: String| (Reason::UnreadableImage, found);
    let reader =
        image::ImageReader::new(reader).with_guessed_format().map_err(|error| unreadable(error.to_string()))?;
    if reader.format().is_none() {
        return Err(unreadable("no image format that is known".to_owned()));
    }
    let size = reader.into_dimensions().map_err(|error| unreadable(error.to_string()))?;
    if size.0 == 0 || size.1 == 0 {
        return Err(unreadable(format!("an image of {}x{} pixels", size.0, size.1)));
    }
    Ok(size)
}

/// Width and height as the header of an image file tells them.
pub(crate) fn file_size(path: &Path) -> Result<(u32, u32), Unusable> {
    header(BufReader::new(opened(path)?))
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
    opened(path)?;
    let bytes = std::fs::read(path).map_err(|error| unreadable(error.to_string()))?;
    let size = header(Cursor::new(&bytes))?;
    let longest = size.0.max(size.1);
    let Some(max_side) = max_side.filter(|&max_side| longest > max_side) else {
        return Ok(ImageFile { bytes, size, new_size: size });
    };
    let picture = Picture::from_bytes(&bytes, &path.display()).map_err(|error| unreadable(error.to_string()))?;
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

"""RandAugment's ten operations of X-VLM's pre-training, with OpenCV and NumPy, on (height, width, 3) arrays of uint8.

The colour operations are those of Pillow (ImageOps, ImageEnhance), the geometric ones are OpenCV's bilinear warps over
a grey border. Strength goes from 0 to 10.
"""

import cv2
import numpy as np

STRONGEST = 10
BORDER = (128, 128, 128)
LEVELS = np.arange(256, dtype=np.float32)


def per_channel(image, table_of):
    """Maps each channel by a table made from it."""
    return cv2.merge([table_of(channel)[channel] for channel in cv2.split(image)])


def table(values):
    return np.clip(values, 0, 255).astype(np.uint8)


def identity(image, _):
    return image


def auto_contrast(image, _):
    def stretch(channel):
        low, high = float(channel.min()), float(channel.max())
        if high <= low:
            return LEVELS.astype(np.uint8)
        return table((LEVELS - low) * (255.0 / (high - low)))

    return per_channel(image, stretch)


def equalize(image, _):
    def flatten(channel):
        histogram = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        used = histogram[histogram > 0]
        step = int(used[:-1].sum()) // 255
        if step == 0:
            return LEVELS.astype(np.uint8)
        below = np.cumsum(histogram) - histogram
        return table((below + step // 2) // step)

    return per_channel(image, flatten)


def enhancement(level):
    return 0.1 + 1.8 * level / STRONGEST


def brightness(image, level):
    return table(LEVELS * enhancement(level))[image]


SMOOTHING = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13


def sharpness(image, level):
    """Away from the smoothed picture, or towards it; the outermost pixels stay."""
    factor = enhancement(level)
    smooth = cv2.filter2D(image, -1, SMOOTHING)[1:-1, 1:-1].astype(np.float32)
    out = image.astype(np.float32)
    inner = out[1:-1, 1:-1]
    out[1:-1, 1:-1] = smooth + factor * (inner - smooth)
    return np.clip(out, 0, 255).astype(np.uint8)


def warp(image, matrix):
    height, width = image.shape[:2]
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=BORDER)


def either_sign(value):
    return value if np.random.random() < 0.5 else -value


def shear_x(image, level):
    return warp(image, np.float32([[1, either_sign(0.3 * level / STRONGEST), 0], [0, 1, 0]]))


def shear_y(image, level):
    return warp(image, np.float32([[1, 0, 0], [either_sign(0.3 * level / STRONGEST), 1, 0]]))


def translate_x(image, level):
    return warp(image, np.float32([[1, 0, either_sign(10.0 * level / STRONGEST)], [0, 1, 0]]))


def translate_y(image, level):
    return warp(image, np.float32([[1, 0, 0], [0, 1, either_sign(10.0 * level / STRONGEST)]]))


def rotate(image, level):
    height, width = image.shape[:2]
    return warp(image, cv2.getRotationMatrix2D((width / 2, height / 2), either_sign(30.0 * level / STRONGEST), 1))


COLOUR = (identity, auto_contrast, equalize, brightness, sharpness)
ALL = COLOUR + (shear_x, shear_y, translate_x, translate_y, rotate)


class RandAugment:
    """`count` operations drawn with repetition, each of them done with probability 1/2."""

    def __init__(self, operations, count=2, level=7):
        self.operations, self.count, self.level = operations, count, level

    def __call__(self, image):
        for index in np.random.randint(len(self.operations), size=self.count):
            if np.random.random() < 0.5:
                image = self.operations[index](image, self.level)
        return image

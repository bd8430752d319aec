"""Image files as pixels: the one meaning of a file, for training, evaluation and answers alike.

What is in a file decides its format, never its name. Pillow reads it, and is imported when called.
TensorFlow's own decoder gives the same pixels for plain JPEGs (`is_plain_jpeg`) and stands in for
them where many files are read (`decode.py`). What becomes of the pixels is the caller's matter.
"""

import io
import re

import numpy as np

# Of files that are taken for images, in letters of any size.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# More may be an attack on memory. Pillow refuses as many unless told otherwise, and so does
# TensorFlow.
MOST_PIXELS = 178_956_970

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # what Pillow may open
_GREY = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF

# Where EXIF, in either byte order, or XMP says how a picture is turned; and where they say that
# it is not.
_TURNED = re.compile(
    rb"\x01\x12\x00[\x01-\x0d]\x00\x00\x00\x01..|\x12\x01[\x01-\x0d]\x00\x01\x00\x00\x00.."
    rb"|tiff:Orientation(?:=.|>).",
    re.DOTALL,
)
_UPRIGHT = re.compile(
    rb"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x01|\x12\x01\x03\x00\x01\x00\x00\x00\x01\x00"
    rb"|tiff:Orientation(?:=.|>)1",
    re.DOTALL,
)


class Refused(ValueError):
    """A file that is not read as an image; the text completes "<file> ..."."""

    def __init__(self, why: str):
        super().__init__(f"cannot be read as an image: {why}")


def decode(data: bytes, channels: int) -> np.ndarray:
    """The picture in an image file of content `data`, (H, W, C) uint8; C is 1 (grey) or 3 (RGB).

    JPEG, PNG, WebP, BMP, GIF and TIFF are read; of several frames or pages the first. A picture is
    turned as its EXIF or XMP says. Of 16 bits the upper 8 are kept. Palettes are resolved,
    CMYK becomes RGB, colours become grey by ITU-R 601. Alpha is dropped: a pixel has the colour
    that is stored, however transparent it is. Colour profiles are ignored.

    Raises Refused, with the reason in a sentence, for files that are no such image, that are not
    complete, whose range of values is not known (32 bits), or of more than
    MOST_PIXELS; ValueError for another number of channels.
    """
    from PIL import Image, UnidentifiedImageError

    if channels not in (1, 3):
        raise ValueError(f"the network takes {channels} channels, which no image file has")
    if not data:
        raise Refused("it is empty")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return _pixels(image, channels)
    except Refused:
        raise
    except UnidentifiedImageError:
        raise Refused("it is no JPEG, PNG, WebP, BMP, GIF or TIFF") from None
    except Image.DecompressionBombError:
        raise Refused(f"it has more than {MOST_PIXELS:,} pixels; make it smaller") from None
    except MemoryError:
        raise Refused("there is not enough memory for its pixels") from None
    except Exception as error:  # Pillow's readers raise all kinds
        raise Refused(f"it is truncated or damaged ({error})") from error


def is_plain_jpeg(data: bytes, channels: int) -> bool:
    """Whether any decoder gives the pixels of `decode` for a JPEG, without knowing its EXIF.

    It is complete, of 8 bits, baseline or progressive, of one or three components, upright, not to
    be made grey, and of a harmless number of pixels. False where that is not certain.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return False
    at, frame = 2, b""
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] in (0xC0, 0xC1, 0xC2):
            frame = data[at + 4 : at + 2 + length]
        at += 2 + length
    height, width = (int.from_bytes(frame[i : i + 2], "big") for i in (1, 3))
    return (
        data[at : at + 2] == b"\xff\xda"
        and frame[:1] == b"\x08"
        and frame[5:6] in ((b"\x01",) if channels == 1 else (b"\x01", b"\x03"))
        and 0 < height * width <= MOST_PIXELS
        and all(map(_UPRIGHT.fullmatch, _TURNED.findall(data, 0, at)))
    )


def _pixels(image, channels: int) -> np.ndarray:
    from PIL import ImageOps

    image.load()
    tags = getattr(image, "tag_v2", {})  # of a TIFF; a turned image has none
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = _eight_bits(image, tags)
    elif image.mode in ("I", "F"):
        raise Refused("its pixels have 32 bits, of an unknown range; save it with 8 or 16")
    elif image.mode not in _GREY:
        # By way of RGBA, for Pillow would warn of a palette's transparency.
        image = image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")
    image = image.convert({1: "L", 3: "RGB"}[channels])
    return np.asarray(image).reshape(image.height, image.width, channels)


def _eight_bits(image, tags):
    """A grey `image` of up to 16 bits with the upper 8 of them."""
    from PIL import Image

    (bits,) = tags.get(_BITS_PER_SAMPLE, (16,))
    pixels = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(~pixels if tags.get(_PHOTOMETRIC) == 0 else pixels)

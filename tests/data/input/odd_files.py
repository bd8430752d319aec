"""Odd image files, by name, each with the pixels that it shows or the reason to refuse it."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 32
ORIENTATION = 0x0112


def picture() -> np.ndarray:
    """(24, 32, 3): four areas of one colour each, which blocks of JPEG do not mix."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:8, :16], pixels[:8, 16:] = (200, 40, 40), (40, 180, 60)
    pixels[8:, :16], pixels[8:, 16:] = (30, 60, 220), (230, 220, 90)
    return pixels


PIXELS = picture()
IMAGE = Image.fromarray(PIXELS)
GREY = np.asarray(IMAGE.convert("L"))
AS_GREY = np.repeat(GREY[..., None], 3, axis=-1)
PALETTE = IMAGE.quantize(4, dither=Image.Dither.NONE)
BLACK_AND_WHITE = np.where(AS_GREY > 127, 255, 0)
RED = np.full_like(PIXELS, (200, 40, 40))
FINE = {"quality": 95, "subsampling": 0}
TURNED = {  # by EXIF's orientation, what the stored PIXELS mean
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.swapaxes(0, 1),
    6: np.rot90(PIXELS, -1),
    7: np.rot90(PIXELS, 2).swapaxes(0, 1),
    8: np.rot90(PIXELS),
}


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **{**(FINE if kind == "JPEG" else {}), **options})
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def with_segment(jpeg: bytes, marker: int, content: bytes, at: int = 2) -> bytes:
    """`jpeg` with another segment before its byte `at`."""
    segment = struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
    return jpeg[:at] + segment + jpeg[at:]


def little_endian_exif(orientation: int) -> bytes:
    entry = struct.pack("<HHIHH", ORIENTATION, 3, 1, orientation, 0)
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)


def png(header: tuple[int, ...], rows: np.ndarray) -> bytes:
    """A PNG of big-endian `rows` (H, bytes) uint8; `header` is depth and colour type."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    shape = struct.pack(">IIBBBBB", WIDTH, HEIGHT, *header, 0, 0, 0)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = chunk(b"IHDR", shape), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def sixteen(pixels: np.ndarray) -> np.ndarray:
    """`pixels` uint8 as 16 bits whose lower half is noise: rows (H, bytes) big-endian."""
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape)
    return (pixels.astype(">u2") * 256 + noise.astype(">u2")).astype(">u2").view(np.uint8)


def tiff(pixels: np.ndarray, photometric: int, bits: int = 16) -> bytes:
    """A grey TIFF of `pixels` (24, 32) little-endian, in one strip."""
    raw = pixels.tobytes()
    tags = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags |= {278: HEIGHT, 279: len(raw)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(raw)) + raw + directory


def jpegs() -> dict[str, tuple[bytes, np.ndarray | str]]:
    """By name: content and pixels, or why not."""
    plain = saved(IMAGE, "JPEG")
    frame = plain.index(b"\xff\xc0")
    huge = bytearray(plain)
    huge[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="3"/>'
    upright = xmp.replace(b'"3"', b'"1"')
    half = "truncated or damaged"
    files = {
        "plain.jpg": (plain, PIXELS),
        "progressive.jpg": (saved(IMAGE, "JPEG", progressive=True), PIXELS),
        "grey.jpg": (saved(IMAGE.convert("L"), "JPEG"), AS_GREY),
        "subsampled.jpg": (saved(Image.fromarray(RED), "JPEG", subsampling=2), RED),
        "stored_as_rgb.jpg": (saved(IMAGE, "JPEG", keep_rgb=True), PIXELS),
        "cmyk.jpg": (saved(IMAGE.convert("CMYK"), "JPEG"), PIXELS),
        "little_endian.jpg": (with_segment(plain, 0xE1, little_endian_exif(3)), TURNED[3]),
        "exif_at_the_end.jpg": (with_segment(plain, 0xE1, little_endian_exif(3), frame), TURNED[3]),
        "upright_little_endian.jpg": (with_segment(plain, 0xE1, little_endian_exif(1)), PIXELS),
        "xmp.jpg": (with_segment(plain, 0xE1, xmp), TURNED[3]),
        "upright_xmp.jpg": (with_segment(plain, 0xE1, upright), PIXELS),
        "comment.jpg": (with_segment(plain, 0xFE, b"Exif" * 500), PIXELS),
        "profile.jpg": (saved(IMAGE, "JPEG", icc_profile=bytes(3000), exif=exif(8)), TURNED[8]),
        "trailing.jpg": (plain + b"more of the camera's", PIXELS),
        "several.jpg": (
            saved(IMAGE, "MPO", save_all=True, append_images=[IMAGE.rotate(180)], **FINE),
            PIXELS,
        ),
        "named.png": (plain, PIXELS),
        "ten_bytes_less.jpg": (plain[:-10], half),
        "half.jpg": (plain[: len(plain) // 2], half),
        "without_end.jpg": (plain[:-2], half),
        "huge.jpg": (bytes(huge), "more than 178,956,970 pixels"),
        "wide.jpg": (saved(Image.new("L", (20000, 1), 77), "JPEG"), np.full((1, 20000, 3), 77)),
    }
    for number, pixels in TURNED.items():
        files[f"turned{number}.jpg"] = (saved(IMAGE, "JPEG", exif=exif(number)), pixels)
    return files


def pngs() -> dict[str, tuple[bytes, np.ndarray | str]]:
    """By name: content and pixels, or why not."""
    plain = saved(IMAGE, "PNG")
    alpha = np.dstack([PIXELS, np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 256])
    rgba = Image.fromarray(alpha.astype(np.uint8))
    la = np.dstack([GREY, np.zeros_like(GREY)])
    huge = plain[:16] + struct.pack(">II", 20000, 20000) + plain[24:29]
    huge += struct.pack(">I", zlib.crc32(huge[12:29])) + plain[33:]
    files = {
        "plain.png": (plain, PIXELS),
        "grey.PNG": (saved(IMAGE.convert("L"), "PNG"), AS_GREY),
        "alpha.png": (saved(rgba, "PNG"), PIXELS),
        "grey_alpha.png": (saved(Image.fromarray(la, "LA"), "PNG"), AS_GREY),
        "bits1.png": (saved(Image.fromarray(GREY > 127), "PNG"), BLACK_AND_WHITE),
        "palette.png": (saved(PALETTE, "PNG"), PIXELS),
        "palette_transparent.png": (saved(PALETTE, "PNG", transparency=1), PIXELS),
        "palette_alpha.png": (saved(PALETTE, "PNG", transparency=bytes((0, 9, 99))), PIXELS),
        "keyed.png": (saved(IMAGE, "PNG", transparency=(200, 40, 40)), PIXELS),
        "grey16.png": (png((16, 0), sixteen(GREY)), AS_GREY),
        "middle16.png": (
            png((16, 0), np.full((HEIGHT, WIDTH), 0x8000, ">u2").view(np.uint8)),
            np.full((HEIGHT, WIDTH, 3), 128),
        ),
        "rgb16.png": (png((16, 2), sixteen(PIXELS).reshape(HEIGHT, -1)), PIXELS),
        "rgba16.png": (png((16, 6), sixteen(alpha).reshape(HEIGHT, -1)), PIXELS),
        "animated.png": (
            saved(IMAGE, "PNG", save_all=True, append_images=[IMAGE.rotate(180)]),
            PIXELS,
        ),
        "really.jpg": (plain, PIXELS),
        "without_end.png": (plain[:-10], PIXELS),  # all of its pixels are there
        "half.png": (plain[: len(plain) // 2], "truncated or damaged"),
        "huge.png": (huge, "more than 178,956,970 pixels"),
        "wide.png": (saved(Image.new("L", (20000, 1), 77), "PNG"), np.full((1, 20000, 3), 77)),
        "tall.png": (saved(Image.new("L", (1, 20000), 77), "PNG"), np.full((20000, 1, 3), 77)),
        "one.png": (
            saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"),
            np.full((1, 1, 3), (9, 8, 7)),
        ),
    }
    for number in (3, 6, 8):
        files[f"turned{number}.png"] = (saved(IMAGE, "PNG", exif=exif(number)), TURNED[number])
    return files


def others() -> dict[str, tuple[bytes, np.ndarray | str]]:
    """By name: content and pixels, or why not."""
    rgba = IMAGE.convert("RGBA")
    rgba.putalpha(0)
    upside_down = [IMAGE.rotate(180)]
    webp, bmp = saved(IMAGE, "WEBP", lossless=True), saved(IMAGE, "BMP")
    no_image = "it is no JPEG, PNG, WebP, BMP, GIF or TIFF"
    range_unknown = "its pixels have 32 bits"
    white_is_zero = (0xFFFF - GREY.astype(np.uint16) * 256).astype("<u2")
    return {
        "plain.webp": (webp, PIXELS),
        "alpha.webp": (saved(rgba, "WEBP", lossless=True, exact=True), PIXELS),
        "animated.webp": (
            saved(IMAGE, "WEBP", lossless=True, save_all=True, append_images=upside_down),
            PIXELS,
        ),
        "turned.webp": (saved(IMAGE, "WEBP", lossless=True, exif=exif(6)), TURNED[6]),
        "half.webp": (webp[: len(webp) // 2], "truncated or damaged"),
        "plain.bmp": (bmp, PIXELS),
        "palette.bmp": (saved(PALETTE, "BMP"), PIXELS),
        "palette_bmp.png": (saved(PALETTE, "BMP"), PIXELS),
        "palette_bmp.jpg": (saved(PALETTE, "BMP"), PIXELS),
        "bits32.bmp": (saved(rgba, "BMP"), PIXELS),
        "ten_bytes_less.bmp": (bmp[:-10], "truncated or damaged"),
        "plain.gif": (saved(PALETTE, "GIF"), PIXELS),
        "animated.gif": (saved(PALETTE, "GIF", save_all=True, append_images=upside_down), PIXELS),
        "transparent.gif": (saved(PALETTE, "GIF", transparency=2), PIXELS),
        "half.gif": (saved(PALETTE, "GIF")[:-30], "truncated or damaged"),
        "plain.tif": (saved(IMAGE, "TIFF"), PIXELS),
        "packed.TIFF": (saved(IMAGE, "TIFF", compression="tiff_lzw"), PIXELS),
        "cmyk.tif": (saved(IMAGE.convert("CMYK"), "TIFF"), PIXELS),
        "turned.tif": (saved(IMAGE, "TIFF", exif=exif(8)), TURNED[8]),
        "pages.tif": (saved(IMAGE, "TIFF", save_all=True, append_images=upside_down), PIXELS),
        "grey16.tif": (tiff(GREY.astype("<u2") * 256 + 7, photometric=1), AS_GREY),
        "white_is_zero16.tif": (tiff(white_is_zero, photometric=0), AS_GREY),
        "float.tif": (saved(IMAGE.convert("F"), "TIFF"), range_unknown),
        "integer.tif": (saved(IMAGE.convert("I"), "TIFF"), range_unknown),
        "ten_bytes_less.tif": (saved(IMAGE, "TIFF")[:-10], "truncated or damaged"),
        "empty.jpg": (b"", "it is empty"),
        "text.jpg": (b"no image at all", no_image),
        "page.png": (b"<html>404</html>", no_image),
        "other.png": (saved(IMAGE, "PPM"), no_image),
    }


def table() -> dict[str, tuple[bytes, np.ndarray | str]]:
    """By name of a file: its content, and its pixels (h, w, 3) or why it is refused."""
    return {**jpegs(), **pngs(), **others()}

"""Pictures, which Pillow reads: stills, and animations in their formats.

What stands behind a picture's end is not the picture: a gain map, a film of
the moment, further pages or previews. Only formats that can move have further
frames. Transparency is left away: the colours are those that are stored.
"""

import dataclasses
import fractions
import io
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

import av
import av.error
import numpy as np
from PIL import Image, UnidentifiedImageError, features

from vdit_jax.media import display

# Formats that say what they are in their first bytes. Pillow's others are
# guessed, or run a program (EPS).
_FORMATS = "AVIF BMP GIF JPEG JPEG2000 PNG PPM QOI TIFF WEBP".split()
_MOVING = ("AVIF", "GIF", "PNG", "WEBP")

# Decoders that tell of errors which Pillow's pass over.
_STRICT = {"JPEG": "mjpeg", "MPO": "mjpeg", "PNG": "png"}

# What Pillow raises for broken pictures.
ERRORS = (
  Image.DecompressionBombError,
  AttributeError,
  EOFError,
  IndexError,
  KeyError,
  OSError,
  OverflowError,
  RuntimeError,
  SyntaxError,
  TypeError,
  ValueError,
  struct.error,
)

_CLOCK = fractions.Fraction(1, 1_000_000)  # seconds
_SHORTEST, _USUAL = 10, 100  # ms: what is shorter browsers show for so long
_ORIENTATION, _BITS, _WHITE = 274, 258, 262  # tags of EXIF and TIFF

# Primaries and curve in the first bytes of an AVIF and of a PNG.
_COLOURS = re.compile(rb"colrnclx\0(.)\0(.)|cICP(.)(.)", re.DOTALL)
_HEAD = 2**14  # bytes

_AVIF = (b"ftypavif", b"ftypavis")

# Of a WebP.
_CHUNKS = (
  *(b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"),
  *(b"ICCP", b"EXIF", b"XMP "),
)


@dataclasses.dataclass(frozen=True)
class Picture:
  """An opened picture.

  Attributes:
    image: as Pillow has it.
    file: that it lies in.
    colours: codes of its primaries and curve in ITU-T H.273; 2 is not said.
  """

  image: Image.Image
  file: BinaryIO
  colours: tuple[int, int]


def open(file: BinaryIO) -> Picture | None:
  """Open a picture; None where a file is none. Raises one of `ERRORS`."""
  file.seek(0)
  head = file.read(_HEAD)
  if head[8:12] == b"WEBP":
    file = _exact(head + file.read())
  file.seek(0)
  try:
    image = Image.open(file, formats=_FORMATS)
  except UnidentifiedImageError:
    if head[4:12] in _AVIF and features.check("avif"):
      raise  # else it would be taken for a video
    return None
  found = _COLOURS.search(head) if image.format in ("AVIF", "PNG") else None
  codes = [group[0] for group in found.groups() if group] if found else [2, 2]
  return Picture(image, file, (codes[0], codes[1]))


def frames(picture: Picture) -> Iterator[av.VideoFrame]:
  """Decode a still, or all of an animation, upright. Raises of `ERRORS`.

  Yields:
    frames rgb24 with their times, in millionths of a second.
  """
  image, pts = picture.image, 0
  for number in _numbers(image):
    image.seek(number)
    frame = av.VideoFrame.from_ndarray(_rgb(image), format="rgb24")
    frame.pts, frame.time_base = pts, _CLOCK
    frame.color_primaries, frame.color_trc = picture.colours
    yield frame
    milliseconds = image.info.get("duration") or 0
    shown = milliseconds if milliseconds > _SHORTEST else _USUAL
    pts += round(shown * 1000)


def size(picture: Picture) -> tuple[int, int]:
  """Give the height and width as displayed, without decoding."""
  width, height = picture.image.size
  # Pillow gives a TIFF's when it is turned.
  turned = picture.image.format != "TIFF" and _turn(picture.image).transposed
  return (width, height) if turned else (height, width)


def check(picture: Picture) -> None:
  """Raise av.error.FFmpegError where a still of some formats is damaged.

  Pillow decodes a JPEG to its end whatever its bits say.
  """
  image, file = picture.image, picture.file
  codec = _STRICT.get(image.format or "")
  if codec is None or len(_numbers(image)) > 1:
    return
  decoder = av.CodecContext.create(codec, "r")
  decoder.options = {"err_detect": "explode"}
  file.seek(0)
  try:
    decoder.decode(av.Packet(file.read()))  # pyright: ignore[reportAttributeAccessIssue]
  except av.error.PatchWelcomeError:
    return  # a kind that this decoder doesn't know


def _exact(data: bytes) -> BinaryIO:
  """Give a WebP whose header tells the size that its chunks have.

  Browsers don't look at it, the library that Pillow uses does.
  """
  end = 12
  while data[end : end + 4] in _CHUNKS:
    length = int.from_bytes(data[end + 4 : end + 8], "little")
    end += 8 + length + length % 2
  end = min(end, len(data))
  return io.BytesIO(data[:4] + (end - 8).to_bytes(4, "little") + data[8:end])


def _numbers(image: Image.Image) -> range:
  """Give the numbers of the pictures that are frames."""
  if image.format not in _MOVING:
    return range(1)
  # A PNG's first picture may be for viewers that know no animation.
  begin = int(getattr(image, "default_image", False))
  return range(begin, getattr(image, "n_frames", 1))


def _rgb(image: Image.Image) -> np.ndarray:
  """Give a picture as uint8 [H, W, 3], upright."""
  image.load()  # which turns a TIFF
  if image.mode[0] in "IF":
    pixels = np.repeat(_grey(image)[..., None], 3, -1)
  else:
    clear = "transparency" in image.info  # else Pillow warns of palettes
    whole = image.convert("RGBA") if clear else image
    pixels = np.asarray(whole.convert("RGB"))
  return np.ascontiguousarray(_turn(image).apply(pixels))


def _grey(image: Image.Image) -> np.ndarray:
  """Give a picture of more than eight bits, which Pillow would clip."""
  tags = getattr(image, "tag_v2", {})
  bits = tags.get(_BITS, (16,))[0]
  if image.mode == "F" or bits > 16:
    raise ValueError("no number of so many bits is known as its white")
  grey = (np.asarray(image).astype(np.int32) >> (bits - 8)).astype(np.uint8)
  return 255 - grey if tags.get(_WHITE) == 0 else grey


def _turn(image: Image.Image) -> display.Turn:
  """Tell how a picture lies by its EXIF; as it is where that is broken."""
  try:
    return display.EXIF.get(
      image.getexif().get(_ORIENTATION, 1), display.Turn()
    )
  except ERRORS:
    return display.Turn()

"""High dynamic range to what a screen shows: PQ and HLG become sRGB.

Without it such a frame is grey and dull, for its numbers mean other light. The
curves are those of ITU-R BT.2100, and diffuse white is at 203 cd/m2 (ITU-R
BT.2408). What is brighter is rolled off towards white, hue kept. The way from
colour to colour is a table of 33**3, which Pillow looks up and interpolates.
"""

import functools

import numpy as np
from PIL import Image, ImageFilter

# Codes of ITU-T H.273.
_PQ, _HLG = 16, 18
_BT2020, _P3_D65 = 9, 12

_WHITE = 203.0  # cd/m2
_PEAK = 1000.0  # cd/m2 of HLG's screen, and where PQ's highlights end
_KNEE = 0.75  # of white: what is darker stays as it is
_SIZE = 33  # of the table

# From linear light of these primaries to BT.709's, by rows (ITU-R BT.2087 and
# SMPTE EG 432-1).
_TO_BT709 = {
  _BT2020: [
    [1.6605, -0.5876, -0.0728],
    [-0.1246, 1.1329, -0.0083],
    [-0.0182, -0.1006, 1.1187],
  ],
  _P3_D65: [
    [1.2249, -0.2249, 0.0],
    [-0.0421, 1.0421, 0.0],
    [-0.0196, -0.0786, 1.0983],
  ],
}
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593])  # of BT.2020


def to_screen(image: np.ndarray, curve: int, primaries: int) -> np.ndarray:
  """Show an image uint8 [H, W, 3]; one that is not PQ or HLG stays as it is.

  Args:
    image: R'G'B'.
    curve: transfer characteristics, a code of ITU-T H.273.
    primaries: colour primaries, another; BT.2020's if they are not said.
  """
  if curve not in (_PQ, _HLG):
    return image
  return np.asarray(Image.fromarray(image).filter(_table(curve, primaries)))


@functools.cache
def _table(curve: int, primaries: int) -> ImageFilter.Color3DLUT:
  steps = np.linspace(0.0, 1.0, _SIZE)
  blue, green, red = np.meshgrid(steps, steps, steps, indexing="ij")
  colours = np.stack([red, green, blue], -1).reshape(-1, 3)  # red runs first
  light = (_pq(colours) if curve == _PQ else _hlg(colours)) / _WHITE
  if primaries != 1:
    matrix = _TO_BT709.get(primaries, _TO_BT709[_BT2020])
    light = np.maximum(light @ np.array(matrix).T, 0)
  return ImageFilter.Color3DLUT(_SIZE, _srgb(_roll_off(light)).ravel())


def _pq(code: np.ndarray) -> np.ndarray:
  """Decode PQ to cd/m2 (BT.2100, table 4)."""
  m1, m2 = 1305 / 8192, 2523 / 32
  c1, c2, c3 = 107 / 128, 2413 / 128, 2392 / 128
  root = code ** (1 / m2)
  return 1e4 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)


def _hlg(code: np.ndarray) -> np.ndarray:
  """Decode HLG to cd/m2 on a screen of `_PEAK` (BT.2100, table 5)."""
  a, b, c = 0.17883277, 0.28466892, 0.55991073
  scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
  luminance = np.maximum(scene @ _LUMINANCE, 1e-6)[:, None]
  return _PEAK * luminance**0.2 * scene  # the system's gamma is 1.2


def _roll_off(light: np.ndarray) -> np.ndarray:
  """Bring light whose white is 1 into [0, 1], by its brightest primary."""
  peak = np.maximum(light.max(-1, keepdims=True), 1e-6)
  most = _PEAK / _WHITE - _KNEE
  above = np.clip(peak - _KNEE, 0, most)
  # It leaves the knee with slope 1, and the peak becomes 1.
  curve = above / (1 + above * (1 / (1 - _KNEE) - 1 / most))
  return light / peak * np.where(peak > _KNEE, _KNEE + curve, peak)


def _srgb(light: np.ndarray) -> np.ndarray:
  """Encode light in [0, 1] (IEC 61966-2-1)."""
  high = 1.055 * np.maximum(light, 1e-6) ** (1 / 2.4) - 0.055
  return np.clip(np.where(light <= 0.0031308, 12.92 * light, high), 0, 1)

"""Shifts that follow a clip's size: those of the three Open-Soras."""

import math

import pytest

from vdit_jax.diffusion import shifts

PATCH = (1, 2, 2)
FIRST = shifts.SizeShift(kind="area", unit=5)  # Open-Sora 1.2
SECOND = shifts.SizeShift(kind="area", left_out=1)  # 1.3
THIRD = shifts.SizeShift()  # 2.0


def latents(tokens, f):
  side = 2 * round(math.sqrt(tokens))
  return f, side, side, 16


def test_a_line_in_tokens_goes_through_its_points():
  for tokens, f, want in ((256, 1, 1), (4096, 1, 3), (4096, 4, 6)):
    assert THIRD.factor(latents(tokens, f), PATCH) == want
  # Open-Sora 2.0 at 768 px and 129 frames: 48 x 48 tokens, 33 latent frames.
  assert abs(THIRD.factor(latents(2304, 33), PATCH) - 11.87) < 0.01


# The published rule: sqrt(H W / 512^2) sqrt(n), where n is F // 17 * 5 in 1.2
# and (F - 1) // 4 in 1.3, of pixels; latents are 8 times smaller.
@pytest.mark.parametrize("size", [(512, 512), (720, 1280), (240, 424)])
@pytest.mark.parametrize("num_frames", (1, 49, 51, 102, 113))
def test_the_side_of_a_frame_is_the_published_rule(num_frames, size):
  F, (h, w) = num_frames, (n // 8 for n in size)
  space = math.sqrt(size[0] * size[1] / 512**2)
  whole, rest = divmod(F, 17)
  n = 1 if F == 1 else F // 17 * 5
  shape = 5 * whole + -(-rest // 4), h, w, 4
  assert math.isclose(FIRST.factor(shape, PATCH), space * math.sqrt(n))
  n = 1 if F == 1 else (F - 1) // 4
  shape = (F - 1) // 4 + 1, h, w, 16
  assert math.isclose(SECOND.factor(shape, PATCH), space * math.sqrt(n))


def test_short_clips_count_a_frame_and_pictures_have_no_scale():
  assert FIRST.factor((3, 64, 64), PATCH) == 1.0
  scaled = shifts.SizeShift(kind="area", scale=3.0)
  assert scaled.factor((1, 64, 64), PATCH) == 1.0
  assert scaled.factor((4, 64, 64), PATCH) == 6.0


def test_a_shift_is_read_of_a_number_of_fields_and_of_none():
  assert shifts.read(3) == 3.0 and shifts.read(None) == THIRD
  assert shifts.read({"kind": "area", "unit": 5}) == FIRST
  assert shifts.read(FIRST) is FIRST
  assert shifts.factor(4.0, (1, 2, 2), PATCH) == 4.0
  assert shifts.factor(THIRD, latents(4096, 4), PATCH) == 6
  hash(FIRST)  # static under jit


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"kind": "pixels"}, "kind must be one of .* 'pixels'"),
    ({"side": 0}, "side must be positive, got 0"),
    ({"unit": 0}, "unit must be positive, got 0"),
    ({"low_tokens": 4096}, "low_tokens must be below .* 4096 and 4096"),
  ],
)
def test_what_is_no_shift_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    shifts.read(fields)
  with pytest.raises(ValueError, match="must be at least a patch"):
    THIRD.factor((1, 1, 4), PATCH)

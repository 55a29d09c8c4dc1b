"""Laws of given frames: what is taken, what reaches the system, what not."""

import types as python

import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import conditioning, types
from vdit_jax.models import system

SIZE = 3, 4, 4  # F, H, W
SHAPE = 2, 3, 2, 2, 5  # of latents
WANTED = 2, *SIZE, 3


def fake(needs=(), found=None):
  """Modules of a system that notes down what it is asked, and its notes."""
  asked = []

  def condition(modules, apply, frames, mask, draw):
    asked.append((modules, apply, np.asarray(frames), mask, draw))
    return found or types.Given()

  known = system.System(
    name="fake",
    networks=(),
    places={},
    needs=lambda cfg: needs,
    condition=condition,
  )
  denoiser = python.SimpleNamespace(cfg=None)
  return system.Modules(known, {"denoiser": denoiser}), asked


def encode(frames, method):
  assert method == "encode"
  return jnp.full(SHAPE, np.mean(frames))


def give(modules, apply=encode, **given):
  frames = conditioning.Frames(**given)
  return conditioning.give(modules, apply, frames, SIZE, SHAPE, "draw")


def video(value=0.5):
  return np.full(WANTED, value, np.float32)


def test_an_image_is_the_first_of_its_frames():
  image = np.array([0, 51, 255], np.uint8) * np.ones((2, 4, 4, 1), np.uint8)
  frames, mask = conditioning.first(image, 3)
  assert frames.shape == WANTED and frames.dtype == np.float32
  want = np.broadcast_to(np.float32([-1, -0.6, 1]), WANTED)
  np.testing.assert_allclose(frames, want, atol=1e-6)
  assert mask.dtype == bool
  np.testing.assert_array_equal(mask, [[True, False, False]] * 2)
  one, alone = conditioning.first(image[0], 3)
  np.testing.assert_array_equal(one, frames[0])
  np.testing.assert_array_equal(alone, mask[0])
  conditioning.check(frames, mask, WANTED)


@pytest.mark.parametrize(
  "positions, places, mask",
  [
    ((0, -1), [0, 0, 0, 1], [1, 0, 0, 1]),
    ((1, 2), [0, 0, 1, 1], [0, 1, 1, 0]),
    ((-1,), [0, 0, 0, 0], [0, 0, 0, 1]),
  ],
)
def test_images_are_the_frames_that_positions_say(positions, places, mask):
  images = np.linspace(-1, 1, len(positions) * 96).reshape(2, -1, 4, 4, 3)
  frames, given = conditioning.place(images, positions, 4)
  np.testing.assert_array_equal(frames, images[:, places])
  np.testing.assert_array_equal(given, [np.array(mask, bool)] * 2)
  with pytest.raises(ValueError, match="num_frames must be enough for given"):
    conditioning.place(images, (0, 4), 4)
  with pytest.raises(ValueError, match=r"frames \(0, -1\), got 1"):
    conditioning.place(images, (0, -1), 1)


def test_an_image_of_floats_is_left_as_it_is():
  image = np.linspace(-1, 1, 48, dtype=np.float32).reshape(4, 4, 3)
  frames, _ = conditioning.first(image, 2)
  np.testing.assert_array_equal(frames, [image, image])


@pytest.mark.parametrize(
  "frames, message",
  [
    (
      video()[:, :2],
      r"frames must be \(2, 3, 4, 4, 3\).*got \(2, 2, 4, 4, 3\)",
    ),
    (video().astype(np.uint8), r"floats in \[-1, 1\], got uint8"),
    (video(1.01), r"floats in \[-1, 1\], got float32 in \[1.0"),
    (video(np.nan), r"got float32 in \[nan, nan\]"),
  ],
)
def test_frames_of_another_kind_are_refused(frames, message):
  with pytest.raises(ValueError, match=message):
    conditioning.check(frames, None, WANTED)


def test_a_mask_is_one_for_each_frame():
  mask = np.zeros((2, 3), bool)
  conditioning.check(None, mask, WANTED)
  conditioning.check(video(-1.0005), mask, WANTED)  # rounded by who made it
  for other in (mask[0], mask[:, :2], mask[..., None]):
    with pytest.raises(ValueError, match=r"frame_mask must be \(2, 3\)"):
      conditioning.check(video(), other, WANTED)


def test_nothing_given_is_nothing_unless_the_system_needs_some():
  modules, asked = fake()
  assert give(modules) == types.Given() and not asked
  cond = types.Cond(latents=jnp.ones(SHAPE))
  modules, asked = fake((0,), types.Given(cond=cond))
  assert give(modules).cond is cond
  [(_, apply, frames, mask, draw)] = asked
  assert apply is encode and draw == "draw"
  assert frames.shape == WANTED and not frames.any()
  assert mask.shape == (2, 3) and not mask.any()


def test_the_system_is_shown_the_frames_and_the_mask():
  latents = jnp.full(SHAPE, 3.0)
  modules, asked = fake(found=types.Given(latents=latents))
  mask = np.array([[True, False, True]] * 2)
  assert give(modules, frames=video(), mask=mask).latents is latents
  [(them, _, frames, given, _)] = asked
  assert them is modules and given is mask
  np.testing.assert_array_equal(frames, video())


def test_an_edit_begins_from_the_clips_latents():
  modules, asked = fake()
  found = give(modules, frames=video(0.25), strength=0.6)
  np.testing.assert_array_equal(found.latents, np.full(SHAPE, 0.25))
  assert found.mask is None and not asked
  assert give(modules, frames=video()).latents is None  # no edit


def test_an_edit_takes_the_systems_latents_where_it_has_some():
  latents = jnp.full(SHAPE, 3.0)
  modules, _ = fake((0,), types.Given(latents=latents))
  found = give(modules, frames=video(), strength=0.6)
  assert found.latents is latents


def test_what_needs_frames_is_refused_without_them():
  modules, _ = fake()
  for given in ({"strength": 0.5}, {"mask": np.zeros((2, 3), bool)}):
    with pytest.raises(ValueError, match="need frames; pass frames"):
      give(modules, **given)


def test_latents_of_another_shape_are_refused():
  short = lambda frames, method: jnp.zeros((2, 2, 2, 2, 5))
  with pytest.raises(ValueError, match=r"latents \(2, 2, 2, 2, 5\), wanted"):
    give(fake()[0], short, frames=video(), strength=0.5)

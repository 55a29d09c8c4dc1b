"""Laws of patches: join inverts cut, and where a latent lies in its token."""

import itertools

import numpy as np
import pytest

from vdit_jax.nn import patches

PATCH, GRID, C = (1, 2, 3), (2, 3, 2), 5
SHAPE = 2, *(n * p for n, p in zip(GRID, PATCH, strict=True)), C
ORDERS = "last", "first"


def latents():
  """Latents of which no two numbers are alike."""
  return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


@pytest.mark.parametrize("channels", ORDERS)
def test_join_inverts_cut(channels):
  x = latents()
  tokens = patches.cut(x, PATCH, channels)
  assert tokens.shape == (2, np.prod(GRID), np.prod(PATCH) * C)
  back = patches.join(tokens, GRID, PATCH, channels)
  np.testing.assert_array_equal(back, x)
  again = patches.cut(back, PATCH, channels)
  np.testing.assert_array_equal(again, tokens)


@pytest.mark.parametrize("channels", ORDERS)
def test_a_token_is_its_patch_with_channels_where_they_are_said(channels):
  x = latents()
  tokens = patches.cut(x, PATCH, channels)
  for place, at in enumerate(itertools.product(*map(range, GRID))):
    f, h, w = (slice(i * p, i * p + p) for i, p in zip(at, PATCH, strict=True))
    patch = x[:, f, h, w]  # [B, p_f, p_h, p_w, c]
    if channels == "first":
      patch = np.moveaxis(patch, -1, 1)
    np.testing.assert_array_equal(tokens[:, place], patch.reshape(2, -1))


def test_orders_differ_by_a_permutation_within_tokens():
  last, first = (patches.cut(latents(), PATCH, order) for order in ORDERS)
  swapped = last.reshape(2, np.prod(GRID), -1, C).swapaxes(2, 3)
  np.testing.assert_array_equal(swapped.reshape(first.shape), first)
  assert not np.array_equal(last, first)


def test_join_may_have_other_channels_than_cut():
  x = latents()[..., :2]
  tokens = patches.cut(x, PATCH)
  np.testing.assert_array_equal(patches.join(tokens, GRID, PATCH), x)


def test_parts_of_patches_and_unknown_orders_are_refused():
  with pytest.raises((TypeError, ValueError), match="reshape"):
    patches.cut(latents(), (1, 4, 3))
  with pytest.raises(KeyError, match="middle"):
    patches.cut(latents(), PATCH, "middle")

"""Laws of padding's three kinds: what encoder and denoiser see of it."""

import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import types
from vdit_jax.text import padding

MASK = np.array([[True, True, False], [True, False, False], [False] * 3])


@pytest.fixture
def text():
  embeds = np.arange(1.0, 37.0).reshape(3, 3, 4)
  return types.Text(embeds=jnp.asarray(embeds), mask=jnp.asarray(MASK))


def test_the_encoder_sees_padding_in_one_kind_alone():
  for kind in padding.KINDS:
    seen = padding.for_encoder(kind, MASK)
    want = np.ones_like(MASK) if kind == "seen" else MASK
    assert seen.dtype == bool and seen.shape == MASK.shape
    np.testing.assert_array_equal(seen, want)


def test_masked_is_left_as_it_is(text):
  got = padding.for_denoiser("masked", text)
  np.testing.assert_array_equal(got.mask, MASK)
  np.testing.assert_array_equal(got.embeds, text.embeds)


def test_seen_keeps_every_embedding_and_calls_it_text(text):
  got = padding.for_denoiser("seen", text)
  np.testing.assert_array_equal(got.mask, np.ones_like(MASK))
  np.testing.assert_array_equal(got.embeds, text.embeds)


def test_zeroed_has_zeros_where_there_is_no_token(text):
  got = padding.for_denoiser("zeroed", text)
  np.testing.assert_array_equal(got.mask, np.ones_like(MASK))
  np.testing.assert_array_equal(got.embeds, text.embeds * MASK[..., None])
  assert np.all(np.asarray(got.embeds)[MASK] > 0)


def test_zeroed_hides_what_is_not_finite(text):
  broken = text.replace(embeds=text.embeds.at[~MASK].set(jnp.nan))
  got = padding.for_denoiser("zeroed", broken)
  want = padding.for_denoiser("zeroed", text)
  np.testing.assert_array_equal(got.embeds, want.embeds)


def test_the_pooled_embedding_is_of_a_text_that_has_a_token(text):
  pooled = jnp.ones((3, 4))
  for kind in padding.KINDS:
    got = padding.for_denoiser(kind, text.replace(pooled=pooled))
    want = pooled if kind == "seen" else pooled.at[2].set(0)
    np.testing.assert_array_equal(got.pooled, want)


def test_another_kind_is_refused(text):
  for call in (
    lambda: padding.check("hidden"),
    lambda: padding.for_encoder("hidden", MASK),
    lambda: padding.for_denoiser("hidden", text),
  ):
    with pytest.raises(ValueError, match="padding .*'zeroed'.* got 'hidden'"):
      call()

"""Videos of one batch after another: which noise and text each is of."""

import dataclasses

import numpy as np
import pytest

from vdit_jax import pipeline


@pytest.fixture(scope="module")
def pipe():
  """The packaged model, in a few steps; its null is learned."""
  loaded = pipeline.load(pipeline.RELEASE)
  recipe = dataclasses.replace(loaded.recipe, steps=2)
  return dataclasses.replace(loaded, recipe=recipe)


def test_an_empty_prompt_is_the_null(pipe):
  """So guidance has nowhere to lead, and a blank negative prompt says none."""
  red = "a red seven"
  one, two = (pipe.generate([red, ""], guidance=g, seed=1) for g in (2.0, 6.0))
  np.testing.assert_allclose(one[1], two[1], atol=1e-5)
  assert np.abs(one[0] - two[0]).max() > 1e-3
  away = pipe.generate(
    [red, " "], negative_prompts=["", ""], guidance=2.0, seed=1
  )
  np.testing.assert_allclose(away, one, atol=1e-5)


@pytest.mark.parametrize("wrong", [3, None, "\ud800"])
def test_what_is_no_text_is_refused(pipe, wrong):
  red = "a red seven"
  with pytest.raises(ValueError, match=r"^prompts\[1\] must be Unicode text"):
    pipe.generate([red, wrong])
  with pytest.raises(ValueError, match=r"^negative_prompts\[0\] must be Uni"):
    pipe.generate([red], negative_prompts=[wrong])


def test_each_clip_is_of_its_seed_in_any_batch(pipe):
  """Bit for bit in batches of one size, else up to rounding."""
  prompts = ["a red seven", "a blue two"] * 2
  whole = pipe.generate(prompts, seed=5)
  apart = pipe.generate(prompts, seed=5, batch_size=1)
  np.testing.assert_allclose(apart, whole, atol=2e-3)
  for i in (0, 3):
    alone = pipe.generate([prompts[i]], seed=5 + i)
    np.testing.assert_array_equal(alone[0], apart[i])
  mixed = pipe.generate(prompts[:2], seed=[7, 6], batch_size=1)
  np.testing.assert_array_equal(mixed, apart[[2, 1]])
  for seed in ([1, 2], -1, 2**32):
    with pytest.raises(ValueError, match="^seed must be"):
      pipe.generate(prompts[:1], seed=seed)


def test_a_stream_gives_a_batch_when_it_is_made(pipe):
  decoded = []
  prompts = ["a red seven"] * 3
  decode = pipeline.Pipeline.decode

  def watched(self, latents, num_frames=None):
    decoded.append(len(latents))
    return decode(self, latents, num_frames)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline.Pipeline, "decode", watched)
    stream = pipe.stream(prompts, batch_size=2)
    assert decoded == [] and len(next(stream)) == 2 and decoded == [2]
    assert len(next(stream)) == 1 and decoded == [2, 1]
  with pytest.raises(ValueError, match="steps"):
    pipe.stream(prompts, steps=0)  # refused when it is called


def test_long_prompts_are_warned_of_once_each(pipe, caplog):
  long = "a red seven moving left " * 30
  list(
    pipe.stream([long] * 2, negative_prompts=[f"no {long}"] * 2, batch_size=1)
  )
  said = [
    r.getMessage() for r in caplog.records if "loses its end" in r.getMessage()
  ]
  assert [text.partition("[")[0] for text in said] == [
    "prompts",
    "negative_prompts",
  ]

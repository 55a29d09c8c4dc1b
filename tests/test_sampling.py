"""Laws of the sampling loop: experts, branches and given frames, by hand.

The denoiser is a function that one line of numpy repeats; on rectified flow
an Euler step is x + (t' - t) output.
"""

import dataclasses
import types as types_

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sampling, types
from vdit_jax.diffusion import guidance, schedules, shifts

B, SHAPE = 2, (2, 2, 1, 1, 3)  # of the latents [B, f, h, w, c]
ASKED = []  # (gain, t) of each call of the network


class Net(nn.Module):
  """gain tanh(x + said + shown) + t, which notes down when it is run."""

  @nn.compact
  def __call__(self, x, t, text, cond=None):
    gain = self.param("gain", nn.initializers.ones_init(), ())
    jax.debug.callback(lambda *at: ASKED.append(at), gain, t)
    said = schedules.expand(text.embeds.mean((1, 2)), x)
    shown = 0.0 if cond is None else cond.latents
    return gain * jnp.tanh(x + said + shown) + schedules.expand(t, x)


def output(gain, x, t, said, shown=0.0):
  return gain * np.tanh(x + said.reshape(-1, 1, 1, 1, 1) + shown) + t


def euler(x, times, slope):
  """Steps from noise to data along slope(x, t)."""
  for t, after in zip(times, [*times[1:], 0.0], strict=True):
    x = x + (after - t) * slope(x, t)
  return x


PARAMS = {"denoiser": {"gain": jnp.float32(0.5)}}
PARAMS |= {"denoiser_2": {"gain": jnp.float32(-1.0)}}
TIMES = [1.0, 0.75, 0.5, 0.25]
HIDDEN = types.Branch("negative", hides=("latents",))
THREE = HIDDEN, *types.CLASSIFIER_FREE
NEGATIVE, PROMPT = np.float32([0.3, -0.4]), np.float32([1.0, 2.0])


def how(*experts, **fields):
  defaults = dict(
    objective="flow",
    schedule=schedules.Schedule(),
    sampler="euler",
    steps=4,
    shift=1.0,
    experts=experts or (types.Expert(),),
  )
  return sampling.Sampling(**defaults | fields)


def experts(low=1.0, high=1.0):
  return (
    types.Expert(0.0, 0.5, guidance=low),
    types.Expert(0.5, 1.0, guidance=high, network="denoiser_2"),
  )


def text_of(*said):
  said = jnp.concatenate([jnp.asarray(s) for s in said])
  embeds = jnp.broadcast_to(said[:, None, None], (len(said), 3, 4))
  return types.Text(embeds=embeds, mask=jnp.ones((len(said), 3), bool))


def noise():
  return jax.random.normal(jax.random.key(0), SHAPE)


def sample(settings, text, given=None, **more):
  ASKED.clear()
  found = sampling.sample_latents(
    (Net(),) * len(settings.experts),
    settings,
    PARAMS,
    text,
    noise(),
    given,
    **more,
  )
  jax.effects_barrier()
  return found


def recipe(**fields):
  defaults = dict(
    experts=experts(3.0, 5.0),
    objective="flow",
    schedule={"kind": "rectified_flow"},
    sampler="ddim",
    steps=7,
    shift=2.0,
    num_frames=5,
    height=16,
    width=16,
    fps=8.0,
    sampler_options={"eta": 0.5},
  )
  return types.Recipe(**defaults | fields)


def test_one_expert_is_the_loop_by_hand():
  got = sample(how(), text_of(PROMPT))
  want = euler(noise(), TIMES, lambda x, t: output(0.5, x, t, PROMPT))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_two_experts_are_the_loop_that_switches_at_the_boundary():
  got = sample(how(*experts()), text_of(PROMPT))
  gain = lambda t: 0.5 if t <= 0.5 else -1.0
  want = euler(noise(), TIMES, lambda x, t: output(gain(t), x, t, PROMPT))
  np.testing.assert_allclose(got, want, atol=1e-5)
  one = sample(how(), text_of(PROMPT))
  assert np.abs(got - one).max() > 0.1


def test_each_expert_is_asked_at_its_own_times_only():
  sample(how(*experts()), text_of(PROMPT))
  asked = sorted((float(gain), float(t.max())) for gain, t in ASKED)
  assert asked == [(-1.0, 0.75), (-1.0, 1.0), (0.5, 0.25), (0.5, 0.5)]


def test_experts_of_one_network_are_one_expert():
  both = types.Expert(0.0, 0.5), types.Expert(0.5, 1.0)
  got = sample(how(*both), text_of(PROMPT))
  one = sample(how(), text_of(PROMPT))
  np.testing.assert_allclose(got, one, atol=1e-6)


def test_each_expert_is_guided_by_its_own_scale():
  got = sample(how(*experts(3.0, 1.5)), text_of(NEGATIVE, PROMPT))

  def slope(x, t):
    gain, scale = (0.5, 3.0) if t <= 0.5 else (-1.0, 1.5)
    away, to = (output(gain, x, t, said) for said in (NEGATIVE, PROMPT))
    return away + scale * (to - away)

  np.testing.assert_allclose(got, euler(noise(), TIMES, slope), atol=1e-5)


def test_three_branches_are_the_formula_and_the_first_is_shown_zeros():
  shown = np.float32(np.arange(12).reshape(SHAPE)) / 6
  given = types.Given(cond=types.Cond(latents=jnp.asarray(shown)))
  settings = how(types.Expert(guidance=4.0), branches=THREE, image_guidance=1.7)
  got = sample(settings, text_of(NEGATIVE, PROMPT), given)

  def slope(x, t):
    hidden = output(0.5, x, t, NEGATIVE)
    negative = output(0.5, x, t, NEGATIVE, shown)
    prompt = output(0.5, x, t, PROMPT, shown)
    return hidden + 1.7 * (negative - hidden) + 4.0 * (prompt - negative)

  np.testing.assert_allclose(got, euler(noise(), TIMES, slope), atol=1e-4)


def test_what_a_branch_hides_is_its_own():
  """A condition and its mask, of which one branch keeps the mask."""
  cond = types.Cond(latents=jnp.ones(SHAPE), mask=jnp.ones(SHAPE))
  both = types.Branch("negative", hides=types.SHOWN)
  for branches, masks in ((THREE, [1, 1, 1]), ((both, *THREE[1:]), [0, 1, 1])):
    found = sampling._hide(branches, cond)
    assert found.latents[::B, 0, 0, 0, 0].tolist() == [0, 1, 1]
    assert found.mask[::B, 0, 0, 0, 0].tolist() == masks


def test_scales_of_text_and_image_go_as_the_recipe_says():
  got = sampling.settle(
    recipe(
      guidance_kind="oscillating",
      guidance_options={"steady": 4},
      image_guidance_options={"rises": True, "falls_to": "step"},
    )
  )
  text = guidance.Course("oscillating", steady=4)
  assert got.course == text
  assert got.image_course == dataclasses.replace(
    text, rises=True, falls_to="step"
  )
  got = sampling.settle(recipe(), guidance_kind="dynamic")
  assert got.course == got.image_course == guidance.Course("dynamic")


def test_an_images_scale_may_rise_over_the_frames():
  shown = np.float32(np.arange(12).reshape(SHAPE)) / 6
  given = types.Given(cond=types.Cond(latents=jnp.asarray(shown)))
  course = guidance.Course(rises=True)
  fields = {"image_guidance": 3.0, "image_course": course, "branches": THREE}
  settings = how(types.Expert(guidance=4.0), **fields)
  got = sample(settings, text_of(NEGATIVE, PROMPT), given)

  def slope(x, t):
    # Two frames, and four steps from 1 to 0.
    image = np.float32([1.0, 1 + 2 * t]).reshape(1, 2, 1, 1, 1)
    hidden = output(0.5, x, t, NEGATIVE)
    negative = output(0.5, x, t, NEGATIVE, shown)
    prompt = output(0.5, x, t, PROMPT, shown)
    return hidden + image * (negative - hidden) + 4.0 * (prompt - negative)

  np.testing.assert_allclose(got, euler(noise(), TIMES, slope), atol=1e-4)


def test_whether_there_is_guidance():
  assert not how().guided and how(types.Expert(guidance=2.0)).guided
  assert how(*experts(1.0, 2.0)).guided
  assert not how(image_guidance=2.0).guided  # of two branches it is none
  assert how(image_guidance=2.0, branches=THREE).guided
  assert how(*experts(3.0, 5.0)).guidance == 3.0


def test_given_frames_stay_and_are_told_no_noise():
  latents = jnp.full(SHAPE, 0.3)
  mask = jnp.array([[True, False]] * B)
  given = types.Given(latents=latents, mask=mask)
  got = sample(how(), text_of(PROMPT), given)
  np.testing.assert_array_equal(got[:, 0], latents[:, 0])
  told = sorted((t.tolist() for _, t in ASKED), reverse=True)
  assert told == [[[0.0, t]] * B for t in TIMES]
  slope = lambda x, t: output(0.5, x, t, PROMPT)
  want = euler(noise(), TIMES, slope)
  np.testing.assert_allclose(got[:, 1], want[:, 1], atol=1e-5)


def test_an_edit_begins_between_its_clip_and_noise():
  latents = jnp.full(SHAPE, 2.0)
  given = types.Given(latents=latents)
  got = sample(how(strength=0.5), text_of(PROMPT), given)
  times = [0.5 * t for t in TIMES]
  slope = lambda x, t: output(0.5, x, t, PROMPT)
  want = euler((latents + noise()) / 2, times, slope)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_last_of_the_traced_states_is_the_result():
  found, states = sample(how(), text_of(PROMPT), traced=True)
  assert states.shape == (4, *SHAPE)
  np.testing.assert_allclose(states[-1], found, atol=1e-6)
  slope = lambda x, t: output(0.5, x, t, PROMPT)
  step = noise() - 0.25 * slope(noise(), 1.0)
  np.testing.assert_allclose(states[0], step, atol=1e-5)


def test_step_noise_is_for_samplers_that_draw_some():
  steps = jnp.zeros((4, *SHAPE))
  assert not how().draws_noise
  with pytest.raises(ValueError, match="step_noise .* got euler, which adds"):
    sample(how(), text_of(PROMPT), step_noise=steps)
  options = {"sampler": "ddim", "sampler_options": (("eta", 1.0),)}
  assert how(**options).draws_noise
  quiet = sample(how(**options), text_of(PROMPT), step_noise=steps)
  loud = sample(how(**options), text_of(PROMPT), step_noise=steps + 1)
  assert np.abs(quiet - loud).max() > 0.1


def test_what_is_not_given_is_the_recipes():
  got = sampling.settle(recipe())
  assert got.experts == experts(3.0, 5.0) and got.guidance == 3.0
  assert (got.sampler, got.steps, got.shift) == ("ddim", 7, 2.0)
  assert got.sampler_options == (("eta", 0.5),)
  assert got.spacing is None and got.schedule == schedules.Schedule()
  hash(got)  # static under jit


def test_what_is_given_goes_before_the_recipe():
  got = sampling.settle(
    recipe(), guidance=2, sampler="euler", steps=3, shift=1.0, rescale=0.7
  )
  assert got.experts == experts(2.0, 2.0)  # at all times
  assert got.sampler_options == ()  # they are the other sampler's
  assert (got.sampler, got.steps, got.shift) == ("euler", 3, 1.0)
  assert got.rescale == 0.7


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"strength": 0.0}, r"strength must be in \(0, 1\], got 0.0"),
    ({"strength": 1.5}, r"strength must be in \(0, 1\], got 1.5"),
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"sampler": "plms"}, "sampler must be one of .* got 'plms'"),
    ({"guidance_kind": "rising"}, "guidance_kind must .* got 'rising'"),
  ],
)
def test_what_cannot_be_sampled_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    sampling.settle(recipe(), **arguments)


def test_a_shift_may_follow_the_clips_size():
  got = sampling.settle(recipe(shift={"kind": "area", "side": 0.5}))
  assert got.shift == shifts.SizeShift("area", side=0.5)
  hash(got)

  class Sized(Net):
    cfg = types_.SimpleNamespace(patch=(1, 1, 1))

  for shape, shift in (((2, 1, 1), 2 * 2**0.5), ((1, 4, 4), 8.0)):
    noises = jax.random.normal(jax.random.key(0), (B, *shape, 3))
    one, other = (
      sampling.sample_latents(
        (Sized(),), how(shift=s), PARAMS, text_of(PROMPT), noises
      )
      for s in (got.shift, shift)
    )
    np.testing.assert_array_equal(one, other)
  assert sampling.settle(recipe(shift={}), shift=3).shift == 3.0


def test_options_that_the_recipes_sampler_lacks_are_refused():
  wrong = dataclasses.replace(recipe(), sampler="euler")
  with pytest.raises(ValueError, match=r"sampler_options of euler .*\['eta'\]"):
    sampling.settle(wrong)


def test_a_clips_noise_is_of_its_own_key():
  keys = jax.random.split(jax.random.key(3), 4)
  drawn = sampling.initial_noise(keys, (4, 2, 3), None)
  for row in (0, 3):
    alone = sampling.draw_noise(keys[row : row + 1], (2, 3))[0]
    np.testing.assert_array_equal(drawn[row], alone)
  given = sampling.initial_noise(keys, (4, 2, 3), np.asarray(drawn))
  np.testing.assert_array_equal(given, drawn)
  with pytest.raises(
    ValueError, match=r"noise must be \(4, 2, 3\), got \(4, 2"
  ):
    sampling.initial_noise(keys, (4, 2, 3), drawn[..., 0])

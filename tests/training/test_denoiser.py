"""The denoiser's loss: what it is told of a clip beside its caption."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import types
from vdit_jax.models import networks
from vdit_jax.models.vdit import denoiser as vdit
from vdit_jax.training import denoiser

B = 4
CFG = vdit.Config(
  latent_channels=2,
  width=16,
  depth=1,
  heads=2,
  mlp_width=16,
  text_width=8,
  cond=("fps", "size", "motion_score"),
  dtype="float32",
)
MODULES = networks.gather({"denoiser": vdit.Denoiser(CFG)})


def batch(**cond):
  rng = np.random.default_rng(0)
  moments = rng.normal(size=(2, B, 1, 4, 4, 2)).astype(np.float32)
  known = {"fps": jnp.full(B, 8.0), "size": jnp.full((B, 2), 32.0)}
  return types.Batch(
    video=None,
    weight=jnp.ones(B),
    moments=tuple(moments),
    captions={
      "text_encoder": types.Captions(
        mask=jnp.ones((B, 3), bool),
        embeds=rng.normal(size=(B, 3, 8)).astype(np.float32),
      )
    },
    cond=types.Cond(**known | cond),
  )


@pytest.fixture(scope="module")
def params(randomise):
  text = types.Text(jnp.zeros((1, 1, 8)), jnp.ones((1, 1), bool))
  init = lambda: MODULES.denoiser.init(
    jax.random.key(0), jnp.zeros((1, 1, 2, 2, 2)), jnp.zeros(1), text
  )
  return {
    "denoiser": randomise(
      jax.eval_shape(lambda: nn.meta.unbox(init())["params"])
    )
  }


@jax.jit
def _terms(params, data, drawn):
  loss = denoiser.make_loss(MODULES, denoiser.Objective(shift=1.0))
  return loss.terms(params, {}, data, drawn)["loss"]


@functools.partial(jax.jit, static_argnums=0)
def _draw(dropout, data, key):
  goal = denoiser.Objective(shift=1.0, cond_dropout=dropout)
  return denoiser.make_loss(MODULES, goal).draw(data, jax.random.key(key))


def terms(params, data, dropout, key=0):
  scores = data.cond.scores
  if scores is None:  # one program for all
    scores = jnp.full((B, 1), jnp.nan)
  data = data.replace(cond=data.cond.replace(scores=scores))
  drawn = _draw(dropout, data, key)
  return np.asarray(_terms(params, data, drawn)), drawn


def test_loss_is_of_the_clips_numbers(params):
  plain, _ = terms(params, batch(), 0.0)
  fps = jnp.array([8.0, 8.0, 30.0, 8.0])
  other, _ = terms(params, batch(fps=fps), 0.0)
  changed = np.abs(other - plain) > 1e-5
  assert changed.tolist() == [False, False, True, False]
  assert np.isfinite(plain).all()


def test_numbers_are_left_open_for_a_share_of_clips(params):
  data = batch(scores=jnp.full((B, 1), 5.0))
  found = [terms(params, data, 0.5, key) for key in range(4)]
  unknown = jax.tree.map(lambda x: x * jnp.nan, data.cond)
  for key, (loss, drawn) in enumerate(found):
    told, _ = terms(params, data, 0.0, key)
    untold, _ = terms(params, data.replace(cond=unknown), 0.0, key)
    want = np.where(drawn["numbers"], told, untold)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
  tell = np.stack([drawn["numbers"] for _, drawn in found])
  assert 0 < tell.mean() < 1


def test_validation_is_told_all(params):
  goal = denoiser.Objective(shift=1.0, cond_dropout=0.9)
  validate = jax.jit(denoiser.make_validation(MODULES, goal, (0.5,)))
  losses = [
    validate(params, {}, batch(fps=jnp.full(B, fps)), 0)[0]
    for fps in (8.0, 60.0)
  ]
  assert abs(float(losses[0][0] - losses[1][0])) > 1e-5


def test_dropout_that_cannot_be_is_refused():
  with pytest.raises(ValueError, match="cond_dropout must be in"):
    denoiser.Objective(cond_dropout=1.0)

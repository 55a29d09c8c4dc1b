"""Any frame and region given: what the denoiser is shown, what comes back."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import conditioning, pipeline, types
from vdit_jax.models import networks
from vdit_jax.models.vdit import autoencoder, denoiser
from vdit_jax.nn import stills

VAE = dataclasses.replace(autoencoder.VARIANTS["digits"], channels=(8, 8, 16))
C = VAE.latent_channels
CFG = denoiser.Config(
  latent_channels=C,
  width=32,
  depth=1,
  heads=2,
  mlp_width=32,
  text_width=8,
  given=VAE.time_stride,
  dtype="float32",
)
B, F, H, W = 2, 9, 16, 24
RECIPE = types.Recipe(
  experts=(types.Expert(guidance=2.0),),
  objective="flow",
  schedule={},
  sampler="euler",
  steps=2,
  shift=1.0,
  num_frames=F,
  height=H,
  width=W,
  fps=8.0,
)


def _modules(cfg=CFG):
  return networks.gather(
    {
      "autoencoder": autoencoder.Autoencoder(VAE),
      "denoiser": denoiser.Denoiser(cfg),
    }
  )


@pytest.fixture(scope="module")
def pipe(randomise):
  modules = _modules()
  params = {
    name: randomise(
      jax.eval_shape(
        lambda m=module: nn.meta.unbox(networks.init(m, jax.random.key(0)))
      )
    )
    for name, module in modules.networks.items()
  }
  return pipeline.Pipeline(modules, params, {}, RECIPE, {})


TEXT = types.Text(
  embeds=np.random.default_rng(0).standard_normal((B, 3, 8), np.float32),
  mask=np.ones((B, 3), bool),
)


def _video():
  rng = np.random.default_rng(1)
  return rng.uniform(-1, 1, (B, F, H, W, 3)).astype(np.float32)


def _generate(pipe, mask=None, frames=None, **options):
  frames = _video() if frames is None else frames
  given = {} if mask is None else {"frames": frames, "frame_mask": mask}
  return pipe.generate(["one", "two"], text=TEXT, **given, **options)


def _condition(pipe, mask, frames=None):
  modules, apply = pipe.modules, pipe._apply
  frames = _video() if frames is None else frames
  return modules.system.condition(modules, apply, frames, mask, None)


def _mask(*places):
  return np.tile(np.isin(np.arange(F), places), (B, 1))


def test_single_frames_are_shown_as_images_where_they_are(pipe):
  found = _condition(pipe, _mask(0, 6))
  assert found.latents is None and found.mask is None
  video = jnp.asarray(_video())
  shown = np.asarray(found.cond.latents)
  wanted = np.zeros_like(shown)
  for frame, f, slot in ((0, 0, 3), (6, 2, 1)):
    still = pipe._apply(video[:, frame : frame + 1], method="encode")[:, 0]
    wanted[:, f, :, :, slot * C : (slot + 1) * C] = still
  np.testing.assert_allclose(shown, wanted, atol=1e-5)
  mask = np.asarray(found.cond.mask)
  assert mask.sum() == 2 * B * mask.shape[2] * mask.shape[3]


def test_what_is_not_given_does_not_matter(pipe):
  mask = np.ones((B, F, H, W), bool)
  mask[:, :, :, 12:] = False
  frames = _video()
  one = _condition(pipe, mask, frames)
  frames[:, :, :, 12:] = 0.3
  other = _condition(pipe, mask, frames)
  np.testing.assert_array_equal(one.cond.latents, other.cond.latents)
  cells = np.asarray(one.cond.mask)[:, 1:]
  np.testing.assert_array_equal(cells[:, :, :, :2], 1)
  np.testing.assert_array_equal(cells[:, :, :, 2:], 0)  # beside, and not given


def test_nothing_given_is_nothing_shown(pipe):
  found = _condition(pipe, _mask())
  assert found == types.Given()
  empty = _generate(pipe, _mask())
  np.testing.assert_array_equal(empty, _generate(pipe))


def test_given_frames_come_back_and_change_the_others(pipe):
  mask, video = _mask(0, 3, 8), _video()
  made = _generate(pipe, mask)
  np.testing.assert_array_equal(made[mask], video[mask])
  plain = _generate(pipe)
  assert np.abs(made - plain)[~mask].max() > 1e-3
  again = _video()
  again[:, 3] *= -1
  other = _generate(pipe, mask, again)
  assert np.abs(other - made)[~mask].max() > 1e-3


def test_given_pixels_come_back_of_regions(pipe):
  mask, video = np.zeros((B, F, H, W), bool), _video()
  mask[:, :, :12, 4:20] = True
  made = _generate(pipe, mask)
  np.testing.assert_array_equal(made[mask], video[mask])
  assert np.abs(made - _generate(pipe))[~mask].max() > 1e-3


def test_a_network_that_was_not_made_for_it_takes_no_regions():
  cfg = dataclasses.replace(CFG, given=0)
  pipe = pipeline.Pipeline(_modules(cfg), {"denoiser": {}}, {}, RECIPE, {})
  mask = np.ones((B, F, H, W), bool)
  with pytest.raises(ValueError, match="takes no regions"):
    _generate(pipe, mask)


def test_latents_of_another_shape_are_refused(pipe):
  shape = (1, 3, 4, 6, C)
  cond = types.Cond(latents=jnp.zeros((1, 3, 4, 6, 2)))
  with pytest.raises(ValueError, match=r"cond.latents must be \(1, 3, 4, 6"):
    jax.eval_shape(
      lambda: denoiser.Denoiser(CFG).apply(
        {"params": pipe.params["denoiser"]},
        jnp.zeros(shape),
        jnp.zeros(1),
        jax.tree.map(lambda x: jnp.asarray(x[:1]), TEXT),
        cond,
      )
    )


def test_it_begins_as_the_network_that_is_given_nothing():
  """So a model that takes none can be trained on to take some."""
  cfg = dataclasses.replace(CFG, given=0)
  key = jax.random.key(0)
  both = [
    nn.meta.unbox(networks.init(denoiser.Denoiser(c), key)) for c in (CFG, cfg)
  ]
  added = both[0].pop("given")
  assert not np.any(added["in"]["kernel"])
  jax.tree.map(np.testing.assert_array_equal, *both)


def test_strides_that_differ_are_refused():
  modules = _modules(dataclasses.replace(CFG, given=2))
  with pytest.raises(ValueError, match="frames a latent frame of denoiser"):
    modules.system.check(modules, "folder")


def test_restoring_needs_something_given():
  video = _video()
  assert conditioning.restore(conditioning.Frames(), video) is video
  mask = _mask(2)
  frames = conditioning.Frames(-video, mask)
  found = conditioning.restore(frames, video)
  np.testing.assert_array_equal(found[:, 2], -video[:, 2])
  np.testing.assert_array_equal(found[:, 3], video[:, 3])


def test_stills_are_what_single_frames_are_shown_as(pipe):
  """What a cache keeps of every frame is what sampling encodes of some."""
  video = jnp.asarray(_video())
  every = stills.encode(pipe._apply, video)
  known = np.zeros(every.shape[:4], bool)
  known[:, [0, 6]] = True
  cond = stills.lay_out(every, jnp.asarray(known), CFG.given)
  found = _condition(pipe, _mask(0, 6)).cond
  np.testing.assert_allclose(cond.latents, found.latents, atol=1e-5)
  np.testing.assert_array_equal(cond.mask, found.mask)

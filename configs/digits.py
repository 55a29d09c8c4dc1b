"""Moving digits on a laptop: `vae`, then `dit` on its latents.

`make demo` runs both. See each function's docstring for what it takes.
"""

from ml_collections import ConfigDict

from vdit_jax.configs import defaults
from vdit_jax.data import digit_worlds
from vdit_jax.diffusion import schedules
from vdit_jax.models.t5 import encoder as t5
from vdit_jax.models.vdit import autoencoder as causal_vae
from vdit_jax.models.vdit import denoiser as vdit
from vdit_jax.training import denoiser, given

_PROMPTS = (
  "a red seven moving left",
  "a blue two standing still",
  "an orange five moving up right",
  "a green three moving down",
  "a white zero moving right",
  "a cyan nine moving down left",
)

# Of moving_digits/worlds.
_SHAPES = tuple(
  (frames, *size)
  for frames in (1, 5, 9, 13, 17, 33)
  for size in ((32, 32), (32, 48), (48, 32))
)


def get_config(arg: str) -> ConfigDict:
  """Return the config that `arg` names."""
  known = {
    "vae": _vae,
    "dit": _dit,
    "worlds_vae": _worlds_vae,
    "worlds": _worlds,
  }
  if arg not in known:
    raise ValueError(f"configs/digits.py has {sorted(known)}, got {arg!r}")
  return known[arg]()


def _vae() -> ConfigDict:
  """Train the autoencoder: 4x4x4 compression, 8 channels.

  python train.py --config=configs/digits.py:vae --workdir=work/vae

  31.0 dB on moving_digits/one, 3 minutes on two CPU cores, 1.4 GB. 5,000 steps
  on moving_digits/mixed: 33.8 dB.
  """
  config = defaults.run(steps=1_500, batch_size=4, lr=2e-3)
  config.task = "autoencoder"
  config.autoencoder = defaults.module("vdit", causal_vae.VARIANTS["digits"])
  config.l2_weight = 4.0
  config.kl_weight = 1e-4
  return config


def _dit() -> ConfigDict:
  """Train the denoiser and its text encoder on cached latents.

  python train.py --config=configs/digits.py:dit --workdir=work/dit

  On latents/one, two CPU cores: 16 to 18 minutes, colour and direction 1.00,
  identity 0.90, consistency 0.46. The packaged model is of 49,000 steps on
  latents/mixed; its card has the scores.
  """
  config = defaults.run(steps=5_300, batch_size=32, lr=2e-3)
  config.task = "denoiser"
  config.autoencoder_workdir = "work/vae"
  config.init_from = ""  # workdir or release whose weights to fine-tune
  config.autoencoder = defaults.module("vdit", causal_vae.VARIANTS["digits"])
  config.text_encoder_dir = ""  # folder of a frozen one; here it is trained
  config.text_encoder = defaults.module("t5", t5.VARIANTS["digits"])
  config.denoiser = defaults.module("vdit", vdit.VARIANTS["digits"])
  config.objective = defaults.group(
    denoiser.Objective(distribution="uniform", shift=4.0)
  )
  config.objective.schedule = defaults.group(schedules.Schedule())
  config.validation.levels = (0.1, 0.3, 0.5, 0.7, 0.9)
  config.samples = ConfigDict({"every": 1_000, "prompts": _PROMPTS})
  config.sampling = ConfigDict(
    {
      "sampler": "euler",
      "steps": 30,
      "shift": 4.0,
      "guidance": 7.0,
      "num_frames": 9,
      "height": 32,
      "width": 32,
      "fps": 8.0,
    }
  )
  return config


def _worlds_vae() -> ConfigDict:
  """Train the autoencoder on clips of many shapes, with ground and cameras.

  Commands and what this and `worlds` are for: docs/given.md.
  """
  config = _vae()
  config.data.name = "moving_digits/worlds"
  config.data.buckets.max_tokens = 1_920  # latents
  config.data.buckets.shapes = _SHAPES
  config.optim.total_steps = 12_000
  return config


def _worlds() -> ConfigDict:
  """Train the denoiser for all that can be given, asked and told of a clip."""
  config = _dit()
  config.autoencoder_workdir = "work/worlds_vae"
  config.data.name = "latents/worlds"
  config.data.max_length = 24
  config.data.buckets.max_tokens = 1_536
  config.data.buckets.shapes = _SHAPES
  config.optim.total_steps = 60_000
  config.denoiser.given = 4
  config.denoiser.cond = digit_worlds.CAMERA + digit_worlds.BOX
  config.given = defaults.group(given.Shares())
  config.sampling.guidance = 3.0
  return config

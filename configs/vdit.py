"""Our denoiser at the sizes of a pod, text from a frozen T5 v1.1 XXL.

  python -m vdit_jax.cache --autoencoder=gs://BUCKET/vae \
    --text_encoder=gs://BUCKET/t5 --max_length=226 --data=MINE \
    --data_dir=gs://BUCKET/data --name=latents/mine
  python train.py --config=configs/vdit.py:5b --workdir=gs://BUCKET/5b \
    --config.data.data_dir=gs://BUCKET/data --config.data.name=latents/mine \
    --config.autoencoder_workdir=gs://BUCKET/vae \
    --config.text_encoder_dir=gs://BUCKET/t5

Sizes s, b, l, 2b, 5b, 14b are rows of `models.vdit.VARIANTS`; `vae` trains
their autoencoder. Not run on a TPU: `python -m vdit_jax.aot` says what the TPU
compiler makes of them, and README has its figures.
"""

from ml_collections import ConfigDict

from vdit_jax.configs import defaults
from vdit_jax.diffusion import schedules
from vdit_jax.models.t5 import encoder as t5
from vdit_jax.models.vdit import autoencoder as causal_vae
from vdit_jax.models.vdit import denoiser as vdit
from vdit_jax.training import denoiser

_PROMPTS = (
  "A panda plays a small guitar in a bamboo forest, soft morning light.",
  "A paper boat drifts down a rain-filled street, seen from close above.",
  "Waves break on black sand at dusk, the camera rises slowly.",
  "A potter's hands shape wet clay on a turning wheel.",
)


def get_config(arg: str) -> ConfigDict:
  """Return the config of a size, or of the autoencoder."""
  sizes = [name for name in vdit.VARIANTS if name != "digits"]
  if arg == "vae":
    return _vae()
  if arg not in sizes:
    raise ValueError(f"configs/vdit.py has {['vae', *sizes]}, got {arg!r}")
  return _denoiser(arg)


def _vae() -> ConfigDict:
  """Train the autoencoder: 4x8x8 compression, 16 channels; not run."""
  config = defaults.run(steps=200_000, batch_size=256, lr=1e-4)
  config.task = "autoencoder"
  config.autoencoder = defaults.module("vdit", causal_vae.VARIANTS["4x8x8"])
  config.l2_weight = 1.0
  config.kl_weight = 1e-6
  return _at_scale(config)


def _denoiser(size: str) -> ConfigDict:
  """Train a size on cached latents and text embeddings; not run.

  The mesh is for 64 chips and more: 32 hold a copy of the weights.
  """
  config = defaults.run(steps=400_000, batch_size=256, lr=1e-4)
  config.task = "denoiser"
  config.autoencoder_workdir = "work/vae"
  config.init_from = ""
  config.autoencoder = defaults.module("vdit", causal_vae.VARIANTS["4x8x8"])
  config.text_encoder_dir = "work/t5"
  config.text_encoder = defaults.module("t5", t5.VARIANTS["v1_1_xxl"])
  config.denoiser = defaults.module("vdit", vdit.VARIANTS[size])
  config.mesh.fsdp = 32
  config.objective = defaults.group(denoiser.Objective())
  config.objective.schedule = defaults.group(schedules.Schedule())
  config.validation.levels = (0.1, 0.3, 0.5, 0.7, 0.9)
  config.samples = ConfigDict({"every": 5_000, "prompts": _PROMPTS})
  config.sampling = ConfigDict(
    {
      "sampler": "euler",
      "steps": 50,
      "shift": 5.0,
      "guidance": 6.0,
      "num_frames": 49,
      "height": 480,
      "width": 720,
      "fps": 16.0,
    }
  )
  return _at_scale(config)


def _at_scale(config: ConfigDict) -> ConfigDict:
  """What a run of weeks wants otherwise than one of minutes."""
  config.data.max_length = 226
  config.optim.warmup_steps = 2_000
  config.optim.schedule = "constant"
  config.ema_decay = 0.9999
  config.checkpoint.every = 1_000
  config.checkpoint.keep_every = 50_000
  config.validation.every = 5_000
  return config

"""Fine-tune a released CogVideoX, whole or by low-rank adapters.

  hf download zai-org/CogVideoX-2b --local-dir=CogVideoX-2b
  python -m vdit_jax.cache --autoencoder=CogVideoX-2b/vae \
    --text_encoder=CogVideoX-2b --sees_padding --data=MINE --name=latents/mine \
    --data_dir=DATA
  python train.py --config=configs/cogvideox.py:CogVideoX-2b \
    --workdir=work/tuned --config.data.name=latents/mine \
    --config.data.data_dir=DATA --config.mesh.fsdp=1 --config.batch_size=1 \
    --config.lora.rank=128 --config.optim.lr=1e-3

Behind the colon stands a pipeline's folder, or a variant, `2b`, `5b`,
`5b_i2v`, `1_5_5b`, `1_5_5b_i2v`, whose folder is then --config.init_from.
`lora.rank` 0 trains all weights of the denoiser. Image-to-video variants train
from a dataset of videos; the others from such a one too, whose clips and
captions each step then encodes. Not run on released weights or a TPU: `python
-m vdit_jax.aot` says what the TPU compiler makes of them, README has figures.
"""

from ml_collections import ConfigDict

from vdit_jax.configs import defaults
from vdit_jax.models.cogvideox import autoencoder as cogvideox_vae
from vdit_jax.models.cogvideox import denoiser as cogvideox
from vdit_jax.models.t5 import encoder as t5
from vdit_jax.nn import lora
from vdit_jax.training import denoiser, images
from vdit_jax.weights import autoencoder, base_model, text_encoder


def get_config(arg: str) -> ConfigDict:
  """Return the config of a variant, or for a pipeline's folder."""
  if arg in cogvideox.VARIANTS:
    return _config(
      f"work/CogVideoX-{arg}",
      defaults.module("cogvideox", cogvideox.VARIANTS[arg]),
      defaults.module("cogvideox_vae", cogvideox_vae.AE_VARIANTS[arg]),
      defaults.module("t5", t5.VARIANTS["v1_1_xxl"]),
      cogvideox.RECIPES[arg],
    )
  if not arg:
    raise ValueError(
      "configs/cogvideox.py needs what to fine-tune: a pipeline's folder or "
      f"one of {sorted(cogvideox.VARIANTS)}, as in configs/cogvideox.py:2b"
    )
  return _of_folder(arg)


def _of_folder(folder: str) -> ConfigDict:
  """Read the networks' shapes; clips are of the size they were trained at."""
  cfg = base_model.read_config(folder, "bfloat16")
  return _config(
    folder,
    defaults.module("cogvideox", cfg),
    autoencoder.read_config(f"{folder}/vae", "bfloat16"),
    defaults.module("t5", text_encoder.read_config(folder, "bfloat16")),
    cogvideox.recipe(cfg),
  )


def _config(folder, network, vae, text, recipe) -> ConfigDict:
  """Train on 64 chips and more, each of them one clip."""
  config = defaults.run(steps=2_000, batch_size=256, lr=2e-5)
  config.task = "denoiser"
  config.init_from = folder
  # They follow init_from where that is set.
  config.autoencoder_workdir = config.get_oneway_ref("init_from") + "/vae"
  config.text_encoder_dir = config.get_oneway_ref("init_from")
  config.autoencoder = vae
  config.text_encoder = text
  config.denoiser = network
  config.denoiser.remat = "full"
  config.lora = defaults.group(lora.Lora())
  if config.denoiser.image_channels:
    config.image = defaults.group(images.Image())
  goal = denoiser.Objective(
    objective=recipe.objective, distribution="uniform", shift=1.0
  )
  config.objective = defaults.group(goal)
  config.objective.schedule = dict(recipe.schedule)
  config.data.max_length = config.denoiser.text_tokens
  config.data.name, config.data.data_dir = "latents/mine", "work/data"
  config.mesh.fsdp = 64
  config.optim.schedule = "constant"
  config.optim.b2 = 0.95
  config.optim.weight_decay = 1e-4
  config.validation.levels = (0.1, 0.3, 0.5, 0.7, 0.9)
  config.samples = ConfigDict({"every": 500, "prompts": ()})
  config.sampling = ConfigDict(
    {
      "sampler": recipe.sampler,
      "steps": recipe.steps,
      "shift": recipe.shift,
      "guidance": recipe.denoisers[0][2],
      "num_frames": recipe.num_frames,
      "height": recipe.height,
      "width": recipe.width,
      "fps": recipe.fps,
      "negative_prompt": recipe.negative_prompt,
      "sees_padding": recipe.sees_padding,
      "spacing": dict(recipe.spacing),
    }
  )
  return config

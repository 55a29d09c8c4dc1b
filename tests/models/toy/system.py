"""A family that answers otherwise than ours and the others.

Two text encoders, joined: of one the denoiser sees zeros in place of padding,
of the other padding and a pooled embedding, and each has its length. Three
branches of guidance; no time compression, patches of two frames that are filled
up behind; a first frame that may be shown, or not. Some releases have a second
denoiser, some a layout of their own, and some must be given the first and the
last frame, which an image encoder encodes too.
"""

import functools
import json

import jax.numpy as jnp
import numpy as np

from tests.models.toy import (
  autoencoder,
  denoiser,
  encoder,
  image_encoder,
  keys,
)
from vdit_jax import types
from vdit_jax.convert import schedulers
from vdit_jax.models import frame_positions, system
from vdit_jax.models.t5 import system as t5
from vdit_jax.models.t5 import tokenizer

NAMES = "text_encoder", "text_encoder_2"
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}
# The layout of its own: where diffusers' parts lie.
OWN = {
  "vae": "net/ae",
  "transformer": "net/dit",
  "text_encoder": "words",
  "text_encoder_2": "words_2",
  "tokenizer": "words_pieces",
  "tokenizer_2": "words_2_pieces",
}


def recipe(cfg, folder=None):
  del cfg
  second = folder is not None and (folder / "transformer_2").exists()
  return types.Recipe(
    experts=(
      types.Expert(0.0, 0.5, guidance=3.0),
      types.Expert(0.5, 1.0, guidance=5.0, network="denoiser" + "_2" * second),
    ),
    objective="flow",
    schedule={"kind": "rectified_flow"},
    sampler="euler",
    steps=4,
    shift=2.0,
    num_frames=3,
    height=32,
    width=32,
    fps=4.0,
    negative_prompt=None,
    guidance_kind="oscillating",
    guidance_options={"steady": 2},
    image_guidance=1.5,
    image_guidance_options={"rises": True},
  )


def join_text(texts):
  one, two = (texts[name] for name in NAMES)
  join = lambda a, b: jnp.concatenate([jnp.asarray(a), jnp.asarray(b)], 1)
  embeds, mask = join(one.embeds, two.embeds), join(one.mask, two.mask)
  return types.Text(embeds, mask, two.pooled)


def latent_shape(modules, num_frames, height, width):
  f, *space = modules.autoencoder.latent_shape(num_frames, height, width)
  return f + f % 2, *space


def fill(latents, patch):
  """Repeat the last; it is decoded, and its frame left out of the video."""
  del patch
  last = [latents[:, -1:]] * (latents.shape[1] % 2)
  return jnp.concatenate([latents, *last], 1)


def condition(modules, apply, frames, mask, draw):
  """Given frames in the first latents' place, and their embeddings if any."""
  cfg, given = modules.denoiser.cfg, np.asarray(mask, bool)
  wanted = cfg.given or (0,)
  frame_positions.check("toy", given, wanted)
  B, n = len(frames), len(wanted)
  f, h, w, c = latent_shape(modules, *frames.shape[1:4])
  shown = jnp.asarray(frames)[:, given[0].nonzero()[0]]
  first = apply(shown, draw((n, h, w, c)), method="encode_condition")
  latents = jnp.concatenate([first, jnp.zeros((B, f - n, h, w, c))], 1)
  embeds = None
  if cfg.image_width:
    images = shown.reshape(B * n, *shown.shape[2:])
    embeds = apply(images, method="__call__", network="image_encoder")
    embeds = embeds.reshape(B, -1, cfg.image_width)
  return types.Given(cond=types.Cond(latents=latents, image_embeds=embeds))


def tiny(folder, captions, second=False, shown=False):
  write = lambda path, fields: path.write_text(json.dumps(fields))
  pieces = [
    t5.write_tiny_tokenizer(folder / name, captions)
    for name in ("tokenizer", "tokenizer_2")
  ]
  (folder / "scheduler").mkdir()
  write(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
  scheduler = ["diffusers", SCHEDULER["_class_name"]]
  index = {"_class_name": "ToyPipeline", "scheduler": scheduler}
  index["transformer_2"] = ["toy", "ToyTransformer"] if second else [None] * 2
  index["image_encoder"] = ["toy", "ToyImageEncoder"] if shown else [None] * 2
  write(folder / "model_index.json", index)
  vae = {"shift": [0.1, -0.2, 0.3], "factor": [2.0, 3.0, 4.0]}
  configs = {
    "text_encoder": t5.tiny(8, pieces[0]),
    "text_encoder_2": {
      "architectures": ["ToyTextEncoder"],
      "vocab_size": pieces[1],
    },
    "transformer": {"_class_name": "ToyTransformer"},
    "vae": {"_class_name": "ToyAutoencoder", **vae},
  }
  if second:
    configs["transformer_2"] = {"_class_name": "ToyTransformer"}
  if shown:
    configs["transformer"] |= {"given": [0, -1], "image_width": 8}
    configs["image_encoder"] = {"_class_name": "ToyImageEncoder", "width": 8}
  return configs


def own_tiny(folder, captions):
  """As `tiny`, without an index, and the classes said as transformers does."""
  configs = tiny(folder, captions)
  for name in ("tokenizer", "tokenizer_2"):
    (folder / name).rename(folder / OWN[name])
  (folder / "scheduler").rmtree()
  (folder / "model_index.json").unlink()
  (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
  named = lambda c: {"architectures": [c.pop("_class_name")], **c}
  return {
    OWN[part]: named(dict(c)) if "_class_name" in c else c
    for part, c in configs.items()
  }


def recognises(folder):
  config = folder / "config.json"
  return (
    config.exists()
    and json.loads(config.read_text()).get("model_type") == "toy"
  )


def read(folder):
  places = SYSTEM.present(lambda part: False)
  networks = {k: folder / OWN[p.folder] for k, p in places.items()}
  tokenizers = {k: folder / OWN[places[k].tokenizer] for k in NAMES}
  sampling = schedulers.recipe_fields(SCHEDULER, schedulers.FLOW_EULER)
  return system.Folder(SYSTEM, networks, tokenizers, sampling)


SYSTEM = system.System(
  name="toy",
  networks=(
    system.Network(
      family="toy",
      kind="denoiser",
      module=denoiser.Denoiser,
      config=denoiser.Config,
      variants=denoiser.VARIANTS,
      example=denoiser.example,
      classes={"ToyTransformer": keys.TRANSFORMER},
    ),
    system.Network(
      family="toy",
      kind="autoencoder",
      module=autoencoder.Autoencoder,
      config=autoencoder.Config,
      variants=autoencoder.VARIANTS,
      example=autoencoder.example,
      classes={"ToyAutoencoder": keys.VAE},
    ),
    system.Network(
      family="toy",
      kind="text_encoder",
      module=encoder.TextEncoder,
      config=encoder.Config,
      variants=encoder.VARIANTS,
      example=encoder.example,
      classes={"ToyTextEncoder": keys.TEXT},
      tokenizer=tokenizer.load,
      tokenizer_files=((tokenizer.FILE,),),
    ),
    system.Network(
      family="toy",
      kind="image_encoder",
      module=image_encoder.ImageEncoder,
      config=image_encoder.Config,
      variants=image_encoder.VARIANTS,
      example=image_encoder.example,
      classes={"ToyImageEncoder": keys.IMAGE},
    ),
  ),
  places={
    "autoencoder": system.Place("vae"),
    "text_encoder": system.Place("text_encoder", "tokenizer"),
    "text_encoder_2": system.Place("text_encoder_2", "tokenizer_2"),
    "denoiser": system.Place("transformer"),
    "denoiser_2": system.Place("transformer_2", optional=True),
    "image_encoder": system.Place("image_encoder", optional=True),
  },
  pipelines=("ToyPipeline",),
  schedulers={**schedulers.FLOW_EULER, **schedulers.UNIPC},
  recognises=recognises,
  read=read,
  recipe=recipe,
  text={
    "text_encoder": system.TextRule(padding="zeroed", null="prompt"),
    "text_encoder_2": system.TextRule(padding="seen", null="prompt"),
  },
  text_lengths=lambda cfg: dict(zip(NAMES, cfg.text_tokens, strict=True)),
  join_text=join_text,
  latent_shape=latent_shape,
  fill=fill,
  trim=lambda video, num_frames: video[:, :num_frames],
  needs=lambda cfg: cfg.given,
  image=types.Image(noise_mean=-4.0, noise_std=0.1, dropout=0.2),
  condition=condition,
  branches=lambda cfg: (
    types.Branch("negative", hides=types.SHOWN),
    types.Branch("negative"),
    types.Branch("prompt"),
  ),
  adapters=system.Adapters(
    targets=("q|k|v",), spellings=({r"^x\.to_(\w)$": r"net.attn.\1"},)
  ),
  tiny={
    "small": tiny,
    "small2": functools.partial(tiny, second=True),
    "own": own_tiny,
    "shown": functools.partial(tiny, shown=True),
  },
)

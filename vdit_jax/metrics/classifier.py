"""A small digit classifier, the eye of the checks on generated clips.

Sees ink, [H, W] with 0 for background and about 1 on a stroke, through a
window around the ink's centre of mass. Trained on the training scans drawn as
the clips draw them, under small distortions, blur, noise and fading, so that
it also reads what an autoencoder has softened. It learns in under a minute on
a CPU and is kept in a file.
"""

import functools
import io
from typing import Any

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import logging
from etils import epath

from vdit_jax import writing
from vdit_jax.data import digits as scenes
from vdit_jax.types import Array

STEPS = 2500

_WINDOW = 20  # samples a side of what the network sees
_BOX = 16  # of these, the digit's box; the rest is margin
_BATCH = 128
_LEARNING_RATE = 3e-3
_BRIGHT = 0.3  # ink above this is a stroke for certain
_FLOOR = 0.08  # ink below this is noise


class Network(nn.Module):
  """Two convolutions and two dense layers: windows to class logits.

  Strides and no pooling: the gradient of a maximum takes most of the time of
  a training step on a CPU.
  """

  @nn.compact
  def __call__(self, windows: Array, train: bool = False) -> Array:
    """Map windows [B, 20, 20] to logits [B, 10]; dropout when training."""
    x = nn.relu(nn.Conv(24, (5, 5), strides=2)(windows[..., None]))
    x = nn.relu(nn.Conv(48, (3, 3), strides=2)(x))
    x = nn.Dropout(0.3, deterministic=not train)(x.reshape(len(x), -1))
    x = nn.Dropout(0.3, deterministic=not train)(nn.relu(nn.Dense(128)(x)))
    return nn.Dense(len(scenes.DIGITS))(x)


@flax.struct.dataclass
class Classifier:
  """Trained parameters and the box in pixels of the digits they read."""

  params: dict[str, Array]
  digit_size: int = flax.struct.field(pytree_node=False)


def load(
  path: epath.PathLike, digit_size: int, *, steps: int = STEPS, seed: int = 0
) -> Classifier:
  """Read a classifier from its file, or train it and write the file.

  Args:
    path: npz file; refused when it is of another digit_size.
    digit_size: side of the digits' box in pixels.
    steps, seed: of the training, if there is no file yet.
  """
  path = epath.Path(path)
  if not path.exists():
    classifier = train(digit_size, steps=steps, seed=seed)
    _save(path, classifier)
    return classifier
  with np.load(io.BytesIO(path.read_bytes())) as file:
    arrays = dict(file)
  stored = int(arrays.pop("digit_size"))
  if stored != digit_size:
    raise ValueError(
      f"digit_size is {digit_size}, but the classifier in {path} was trained"
      f" for {stored}; name another file"
    )
  return Classifier(
    flax.traverse_util.unflatten_dict(arrays, sep="/"), digit_size
  )


def train(digit_size: int, *, steps: int = STEPS, seed: int = 0) -> Classifier:
  """Train a classifier on the training scans.

  Args:
    digit_size: side of the digits' box in pixels; sizes within about a tenth
      of it are read as well.
    steps: of the optimiser.
    seed: of the parameters, the batches and their distortions.
  """
  patches, labels = _patches("train", digit_size)
  init_key, key = jax.random.split(jax.random.key(seed))
  params = Network().init(init_key, jnp.zeros((1, _WINDOW, _WINDOW)))["params"]
  optimiser = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps))
  carry = params, optimiser.init(params)
  # A step a call: XLA runs a convolution inside a loop on one CPU core.
  step = jax.jit(functools.partial(_step, optimiser, digit_size))
  progress = tqdm.tqdm(range(steps), desc="digit classifier", mininterval=1)
  for index in progress:
    step_key = jax.random.fold_in(key, index)
    carry, loss = step(carry, step_key, patches, labels)
    if index % 100 == 0:
      progress.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
  classifier = Classifier(carry[0], digit_size)
  share = accuracy(classifier, "validation")
  logging.info("Digit classifier: %.4f of validation scans right.", share)
  return classifier


def accuracy(classifier: Classifier, split: str, seed: int = 0) -> float:
  """Share of a split's scans read right, each at a random sub-pixel place."""
  patches, labels = _patches(split, classifier.digit_size)
  drawn = _draw(
    jax.random.key(seed), patches, classifier.digit_size, distort=False
  )
  predicted = _predict(classifier, drawn).argmax(-1)
  return float((predicted == labels).mean())


def logits(
  classifier: Classifier, ink: Array, centres: Array
) -> tuple[Array, Array]:
  """Classifies digits by their ink.

  Args:
    classifier: a trained one.
    ink: [..., H, W] in 0..1.
    centres: the ink's centre of mass (x, y) in pixels [..., 2].

  Returns:
    class logits [..., 10] and the windows that they were read from,
    [..., 20, 20].
  """
  seen = windows(ink, centres, classifier.digit_size)
  flat = seen.reshape(-1, _WINDOW, _WINDOW)
  values: Any = Network().apply({"params": classifier.params}, flat)
  return values.reshape(*seen.shape[:-2], -1), seen


def windows(ink: Array, centres: Array, digit_size: int) -> Array:
  """Sample ink around its centre, antialiased: [..., H, W] to [..., 20, 20].

  Args:
    ink: [..., H, W].
    centres: (x, y) in pixels [..., 2]; beyond the frame is no ink.
    digit_size: box in pixels, which fills 16 of the 20 samples.
  """
  step = digit_size / _BOX
  samples = (jnp.arange(_WINDOW) - (_WINDOW - 1) / 2) * step
  width = max(1.0, step)

  def weights(centre, size):
    at = centre[..., None] + samples  # [..., 20]
    distance = jnp.abs(at[..., None] - jnp.arange(size))
    return jnp.maximum(0, 1 - distance / width) / width

  rows = weights(centres[..., 1], ink.shape[-2])
  columns = weights(centres[..., 0], ink.shape[-1])
  return jnp.einsum(
    "...aH,...HW,...bW->...ab",
    rows,
    ink,
    columns,
    precision=jax.lax.Precision.HIGHEST,
  )


def centroid(ink: Array) -> tuple[Array, Array]:
  """Compute the ink [..., H, W], [...] and its centre (x, y) [..., 2]."""
  mass = ink.sum((-2, -1))
  x = (ink.sum(-2) * jnp.arange(ink.shape[-1])).sum(-1)
  y = (ink.sum(-1) * jnp.arange(ink.shape[-2])).sum(-1)
  return mass, jnp.stack([x, y], -1) / jnp.maximum(mass, 1e-6)[..., None]


def bright(value: Array) -> Array:
  """True where brightness [..., H, W] in 0..1 is a stroke for certain."""
  return value > _BRIGHT


def clean(value: Array, votes: Array) -> Array:
  """Take noise away: keep ink at strokes and their soft edges.

  Args:
    value: brightness in 0..1, [..., H, W].
    votes: `smooth`ed `bright` mask, [..., H, W].
  """
  ink = jnp.clip((value - _FLOOR) / (1 - _FLOOR), 0, 1)
  return ink * jnp.clip(4 * votes, 0, 1)


def smooth(image: Array) -> Array:
  """Filter [..., H, W] by 1 4 6 4 1 along both axes, zeros outside."""
  for axis in (-2, -1):
    for _ in range(2):
      image = _soften(image, axis)
  return image


def _soften(image, axis):
  pad = [(0, 0)] * image.ndim
  pad[axis] = (1, 1)
  padded = jnp.moveaxis(jnp.pad(image, pad), axis, 0)
  mixed = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
  return jnp.moveaxis(mixed, 0, axis)


def _patches(split, digit_size):
  """Resize a split's scans: patches [n, P, P] and labels [n]."""
  images, labels = scenes.scans(split)
  patches = np.stack([scenes.resize(image, digit_size) for image in images])
  return jnp.asarray(patches), jnp.asarray(labels)


def _draw(key, patches, digit_size, distort):
  """Draw patches [B, P, P] at random places of small frames [B, H, W]."""
  keys = dict(zip(("warp", "look"), jax.random.split(key), strict=True))
  side = digit_size + 8
  numbers = jax.random.uniform(
    keys["warp"], (len(patches), 6), minval=-1.0, maxval=1.0
  )
  frames = jax.vmap(functools.partial(_warp, side=side, distort=distort))(
    patches, numbers
  )
  return _fade(keys["look"], frames) if distort else frames


def _warp(patch, numbers, side, distort):
  """Move a patch by up to a pixel; turn, shear and scale it a little."""
  linear = jnp.eye(2)
  if distort:
    turn, shear, tall, wide = numbers[:4] * jnp.array([0.2, 0.2, 0.12, 0.12])
    rotation = jnp.array(
      [[jnp.cos(turn), -jnp.sin(turn)], [jnp.sin(turn), jnp.cos(turn)]]
    )
    linear = rotation @ jnp.array([[1 + tall, 0.0], [shear, 1 + wide]])
  grid = jnp.stack(jnp.mgrid[:side, :side]) - (side - 1) / 2  # [2, H, W]
  at = jnp.tensordot(linear, grid, 1) + numbers[4:, None, None]
  return jax.scipy.ndimage.map_coordinates(
    patch, at + (len(patch) - 1) / 2, order=1
  )


def _fade(key, frames):
  """Blurs, fades and adds noise, each frame by an amount of its own."""
  keys = jax.random.split(key, 4)
  shape = (len(frames), 1, 1)
  soft = jax.random.uniform(keys[0], shape)
  gain = jax.random.uniform(keys[1], shape, minval=0.7, maxval=1.1)
  sigma = jax.random.uniform(keys[2], shape, maxval=0.08)
  blurred = _soften(_soften(frames, -1), -2)
  frames = gain * (frames + soft * (blurred - frames))
  return frames + sigma * jax.random.normal(keys[3], frames.shape)


def _window(frames, digit_size):
  ink = clean(frames, smooth(bright(frames).astype(jnp.float32)))
  return windows(ink, centroid(ink)[1], digit_size)


@jax.jit
def _predict(classifier, frames):
  seen = _window(frames, classifier.digit_size)
  return Network().apply({"params": classifier.params}, seen)


def _loss(params, key, digit_size, patches, labels):
  draw_key, dropout_key = jax.random.split(key)
  seen = _window(_draw(draw_key, patches, digit_size, True), digit_size)
  values = Network().apply(
    {"params": params}, seen, train=True, rngs={"dropout": dropout_key}
  )
  return optax.losses.softmax_cross_entropy_with_integer_labels(
    values, labels
  ).mean()


def _step(optimiser, digit_size, carry, key, patches, labels):
  """Take one step; return (params, optimiser state) and the loss."""
  params, state = carry
  batch_key, loss_key = jax.random.split(key)
  chosen = jax.random.randint(batch_key, (_BATCH,), 0, len(labels))
  loss, grads = jax.value_and_grad(_loss)(
    params, loss_key, digit_size, patches[chosen], labels[chosen]
  )
  updates, state = optimiser.update(grads, state)
  return (optax.apply_updates(params, updates), state), loss


def _save(path, classifier):
  """Write what `load` reads."""
  arrays = flax.traverse_util.flatten_dict(classifier.params, sep="/")
  buffer = io.BytesIO()
  np.savez(buffer, digit_size=classifier.digit_size, **arrays)
  writing.write(path, buffer.getvalue())

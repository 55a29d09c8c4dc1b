"""What a dataset's records hold: from their features, and from their bytes.

  features --form--> Form;  record's bytes --parse--> Record

Four kinds of records are told apart by their features:

  clips    mp4 (the file's bytes; an image's for one frame), captions, key,
           fps, num_frames, height, width: `vdit_jax.data.build` writes it
  video    uint8 [F, H, W, 3], of one shape or of several; caption, key, fps
  frames   encoded images of one clip after another (features.Video, or a
           Sequence of Image), as the TFDS catalogue has them
  latents  mean and logvar float16 or float32 [f, h, w, c], of one shape or
           of several, captions, key; and, if `vdit_jax.cache` was given a
           text encoder, the embeddings of each caption's tokens: embeds
           float16 [n, E]; of a second encoder embeds_2; and the one of each
           caption, where an encoder has one: pooled, pooled_2, float16 [E];
           and of a pipeline whose denoiser must be given frames, these:
           given_frames uint8 [n, H, W, 3], and what networks encode of them:
           given_NETWORK, float16; and the latents of each frame alone, for
           one that may be given any: given_autoencoder [F, h, w, c]

`video` and `frames` may have a class label in a caption's place, and any name
where there is only one such feature. Scalars beside these are numbers that are
known of a clip, such as `motion_score`.
"""

import dataclasses
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import message
from tensorflow_datasets.proto import tf_example_pb2

from vdit_jax.media import footage, pictures

_SIZES = ("num_frames", "height", "width")
_FORMS = {
  "clips": ("mp4", "captions", "key", "fps", *_SIZES),
  "video": ("video", "caption", "key", "fps"),
  "latents": ("mean", "logvar", "key"),
}
_CAPTIONS = ("captions", "caption")
_DTYPES = {"video": (np.uint8,), "latents": (np.float16, np.float32)}


# What a damaged file, proto, clip or array raises on its way to numpy.
UNREADABLE = (
  message.DecodeError,
  AttributeError,
  EOFError,
  IndexError,
  KeyError,
  OSError,
  RuntimeError,
  ValueError,
)


# The embeddings of the text encoder "text_encoder" are the feature "embeds",
# those of "text_encoder_2" "embeds_2", and so with "pooled".
_ENCODER, _EMBEDS, _POOLED = "text_encoder", "embeds", "pooled"
_GIVEN = "given_"
GIVEN_FRAMES = _GIVEN + "frames"
STILLS = _GIVEN + "autoencoder"  # latents of each frame alone


@dataclasses.dataclass(frozen=True)
class Form:
  """What records hold, and in which features.

  Attributes:
    kind: "clips", "video", "frames" or "latents".
    arrays: features of the pixels or latents.
    shape: of the arrays, (F, H, W, C) or (f, h, w, c); None where it differs.
    captions: feature of the caption or captions; "" for none.
    label: feature of the class; "" for none, or where there are captions.
    numbers: features of one number each.
    text_widths: E of the captions' embeddings, by the text encoder's name.
    pooled_widths: E of the captions' pooled embeddings, of encoders that have
      one.
    given: features of the frames that a denoiser must be given, and of what
      networks encode of them, with their shapes.
  """

  kind: str
  arrays: tuple[str, ...]
  shape: tuple[int | None, ...]
  captions: str
  label: str
  numbers: tuple[str, ...]
  text_widths: dict[str, int]
  pooled_widths: dict[str, int]
  given: dict[str, tuple[int | None, ...]] = dataclasses.field(
    default_factory=dict
  )

  @property
  def encoded(self) -> tuple[str, ...]:
    """Features of what text encoders gave of each caption."""
    return (
      *map(embeds_of, self.text_widths),
      *map(pooled_of, self.pooled_widths),
    )

  @property
  def uniform(self) -> bool:
    """Whether all records have one shape."""
    return None not in self.shape


@dataclasses.dataclass(frozen=True)
class Record:
  """One record.

  Attributes:
    captions: texts, at least one; a label's name where there is only that.
    arrays: of `Form.arrays`, as asked: numpy arrays, or bytes (clips), or a
      list of bytes (frames).
    numbers: known of it, by name.
  """

  captions: list[str]
  arrays: dict[str, Any]
  numbers: dict[str, float]


def form(name: str, features: tfds.features.FeaturesDict) -> Form:
  """Tell what records hold; refuse what cannot be read.

  Args:
    name: of the dataset, for errors.
    features: of its records.
  """
  kind = next((k for k in _FORMS if set(_FORMS[k]) <= set(features)), "")
  if kind == "clips":
    arrays, shape = ("mp4",), (None, None, None, 3)
  elif kind:
    arrays = ("video",) if kind == "video" else ("mean", "logvar")
    shape = _shape(name, features, kind, arrays)
  else:
    kind, arrays, shape = _found(name, features)
  captions = next((c for c in _CAPTIONS if c in features), "")
  labels = [
    n for n, f in features.items() if isinstance(f, tfds.features.ClassLabel)
  ]
  return Form(
    kind=kind,
    arrays=arrays,
    shape=shape,
    captions=captions,
    label="" if captions or not labels else labels[0],
    numbers=tuple(n for n, f in features.items() if _is_number(f)),
    text_widths=_widths(name, features, kind, _EMBEDS),
    pooled_widths=_widths(name, features, kind, _POOLED),
    given={
      n: tuple(f.shape)
      for n, f in features.items()
      if kind == "latents" and n.startswith(_GIVEN)
    },
  )


def read_key(example: Any, otherwise: str) -> str:
  """Give the key of a parsed record, or another if it has none."""
  if "key" not in example:
    return otherwise
  return example["key"].bytes_list.value[0].decode()


def parse(data: bytes) -> Any:
  """Parse a record's bytes to its features by name."""
  # TFDS's own decoding of a whole example takes four times as long.
  return tf_example_pb2.Example.FromString(data).features.feature  # pyright: ignore[reportAttributeAccessIssue]


def read(
  form: Form,
  features: tfds.features.FeaturesDict,
  example: Any,
  names: Iterable[str],
) -> Record:
  """Read a parsed record.

  Args:
    form: of the dataset.
    features: of the dataset.
    example: what `parse` gave.
    names: arrays to read.
  """
  arrays = {}
  for name in names:
    if f"{name}/shape" in example:
      arrays[name] = _read_shaped(features[name], example, name)
      continue
    values = example[name].bytes_list.value
    if form.kind == "clips":
      arrays[name] = values[0]
    elif form.kind == "frames":
      arrays[name] = list(values)
    elif name in form.encoded:
      # Of TFDS's Sequence it is the inner feature that decodes one.
      inner = getattr(features[name], "feature", features[name])
      arrays[name] = [inner.decode_example_np(value) for value in values]
    else:
      arrays[name] = features[name].decode_example_np(values[0])
  return Record(
    captions=_read_captions(form, features, example),
    arrays=arrays,
    numbers={n: _read_number(example[n]) for n in form.numbers if n in example},
  )


def _read_shaped(feature, example: Any, name: str) -> np.ndarray:
  """Read a Tensor that has its shape beside it."""
  shape = tuple(example[f"{name}/shape"].int64_list.value)
  value = example[f"{name}/value"].bytes_list.value[0]
  return np.frombuffer(value, feature.np_dtype).reshape(shape)


def number(data: bytes, name: str) -> float:
  """Read one number of a record's bytes; 0 if it has none."""
  try:
    example = parse(data)
  except message.DecodeError:
    return 0.0
  return _read_number(example[name]) if name in example else 0.0


def size(form: Form, data: bytes, key: str) -> tuple[str, int, int, int, float]:
  """Read a record's key, frames, height, width and fps; 0 where not known."""
  try:
    example = parse(data)
    numbers = [_read_number(example[n]) for n in _SIZES if n in form.numbers]
    key = read_key(example, key)
    fps = _read_number(example["fps"]) if "fps" in form.numbers else 0.0
    if form.kind == "clips":
      return key, *map(int, numbers), fps  # pyright: ignore[reportReturnType]
    stored = f"{form.arrays[0]}/shape"
    if stored in example:
      return key, *example[stored].int64_list.value[:3], fps
    images = example[form.arrays[0]].bytes_list.value
    with footage.open(io.BytesIO(images[0])) as found:
      return key, len(images), *pictures.size(found.picture), fps  # pyright: ignore[reportArgumentType]
  except UNREADABLE:
    return key, 0, 0, 0, 0.0


def _read_captions(form: Form, features, example) -> list[str]:
  if form.captions:
    values = example[form.captions].bytes_list.value
    if not values:
      raise ValueError(f"{form.captions} has no caption")
    return [value.decode() for value in values]
  if form.label:
    index = example[form.label].int64_list.value[0]
    return [features[form.label].int2str(index)]
  return [""]


def _read_number(value) -> float:
  kind = value.WhichOneof("kind")
  numbers = getattr(value, kind).value if kind else ()
  return float(numbers[0]) if len(numbers) == 1 else float("nan")


def _is_number(feature) -> bool:
  label = isinstance(feature, tfds.features.ClassLabel)
  scalar = isinstance(feature, tfds.features.Tensor) and feature.shape == ()
  return scalar and not label and np.issubdtype(feature.np_dtype, np.number)


def _found(name: str, features) -> tuple[str, tuple[str], tuple]:
  """Look for the one feature that can be a video: its kind, name, shape."""
  images = {n: f for n, f in features.items() if _is_images(f)}
  tensors = {n: f for n, f in features.items() if _is_tensor(f)}
  found = [*images, *tensors]
  if len(found) != 1:
    wanted = {
      k: [n for n in names if n not in features] for k, names in _FORMS.items()
    }
    raise ValueError(
      f"{name} has features {sorted(features)}, and {len(found)} of them can "
      f"be videos (Video, a Sequence of Image, a uint8 Tensor of four dims), "
      f"not 1; as clips it lacks {wanted['clips']}, as video "
      f"{wanted['video']}, as latents {wanted['latents']}; build it with those"
    )
  if tensors:
    return "video", tuple(tensors), _shape(name, features, "video", tensors)
  return "frames", tuple(images), tuple(features[found[0]].shape)


def _is_images(feature) -> bool:
  """Whether it is a clip's frames, each an encoded image."""
  if not isinstance(feature, tfds.features.Sequence):
    return False
  image = feature.feature
  eight_bit = (
    isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8
  )
  return eight_bit and image.shape[-1] in (1, 3)  # pyright: ignore[reportIndexIssue]


def _is_tensor(feature) -> bool:
  """Whether it is a clip's pixels."""
  tensor = type(feature) is tfds.features.Tensor and len(feature.shape) == 4
  return tensor and feature.np_dtype == np.uint8


def _shape(name: str, features, kind: str, arrays) -> tuple[int, ...]:
  """Give the shape that all arrays of all records have; refuse others.

  They may be of several shapes, of the same channels.
  """
  shape = features[next(iter(arrays))].shape
  for array in arrays:
    feature = features[array]
    stored = feature.get_serialized_info()
    stored = stored["value"] if isinstance(stored, dict) else stored
    as_bytes = stored.shape == ()
    fixed = len(feature.shape) == 4 and None not in feature.shape
    several = len(feature.shape) == 4 and feature.shape[:3] == (None,) * 3
    several = several and feature.shape[3]
    if not (as_bytes and (fixed or several) and feature.shape == shape):
      raise ValueError(
        f"{name} has a feature {array!r} of shape {feature.shape}, got "
        f"{feature}; it must be a Tensor of four fixed dims, the same in all "
        "arrays, with encoding=Encoding.BYTES"
      )
    if feature.np_dtype not in _DTYPES[kind]:
      wanted = " or ".join(np.dtype(dtype).name for dtype in _DTYPES[kind])
      raise ValueError(
        f"{name} has a feature {array!r} of type {feature.np_dtype}; store it "
        f"as {wanted}"
      )
  return tuple(shape)


def embeds_of(encoder: str) -> str:
  """Name the feature of a text encoder's embeddings."""
  return _EMBEDS + encoder.removeprefix(_ENCODER)


def pooled_of(encoder: str) -> str:
  """Name the feature of a text encoder's pooled embeddings."""
  return _POOLED + encoder.removeprefix(_ENCODER)


def given_of(network: str) -> str:
  """Name the feature of what a network encodes of given frames."""
  return _GIVEN + network


def network_of(feature: str) -> str:
  """Name the network whose feature `given_of` names."""
  return feature.removeprefix(_GIVEN)


def _widths(name: str, features, kind: str, what: str) -> dict[str, int]:
  """Give the widths of the captions' embeddings, or pooled, by encoder."""
  if kind != "latents":
    return {}
  shape = () if what == _POOLED else (None,)
  return {
    _ENCODER + feature.removeprefix(what): _width(
      name, feature, features, shape
    )
    for feature in features
    if feature.startswith(what)
  }


def _width(name: str, embeds: str, features, shape: tuple) -> int:
  feature = features[embeds]
  feature = getattr(feature, "feature", feature)
  as_bytes = feature.get_serialized_info().shape == ()
  wanted = "(None, E)" if shape else "(E,)"
  listed = feature.shape[:-1] == shape and feature.shape[-1]
  if not (as_bytes and listed and feature.np_dtype == np.float16):
    raise ValueError(
      f"{name} has a feature {embeds!r}, got {feature}; it must be a Tensor of "
      f"shape {wanted} and float16, with encoding=Encoding.BYTES"
    )
  return feature.shape[-1]

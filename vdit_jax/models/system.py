"""What a family of models says of itself: all that the rest asks of it.

  models/<family>/  denoiser, autoencoder, keys --> System --> families.SYSTEMS

A `System` answers every question for which a reader would otherwise have to
know the family: which networks it has and how they lie in a folder, how text
is encoded, which sizes there are, what may be given, how it is guided. Every
field is documented, and every system has them all: a default stands where most
agree. To add a family is to make a folder with one of these and a row in
`models.families`.

A `Network` is one kind of network. Beside `apply`, what the rest asks of an
autoencoder's module, where cfg is its Config:

  latent_frames(F) -> f             how many; refuses a length
  video_frames(f) -> F              of the video that f of them decode to
  latent_shape(F, H, W) -> (f, h, w, c)           refuses a size
  latent_mask(mask [B, F]) -> [B, f]   latent frames that are given whole
  normalisation(params) -> {name: numbers}        of its latents
  in_tiles() -> module              the same in tiles; refuses if it has none
  moments, encode, decode; init_stream, decode_chunks, decode_step
  encode_condition(video, noise)    what a denoiser is shown, if it is

and of a denoiser's Config: patch, latent_channels, text_width. A text encoder's
module is called with tokens [B, M] and their mask [B, M], None to see all, and
gives embeds [B, M, E], or a tuple of those and pooled [B, E].
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vdit_jax import types
from vdit_jax.convert import rules
from vdit_jax.convert import schedulers as released
from vdit_jax.text import padding
from vdit_jax.text import tokenizer as tokenizers

NULLS = (
  "learned",  # of the denoiser, where a caption's mask is all False
  "prompt",  # a text's embeddings: the negative prompt, or the empty one
  "stored",  # with the denoiser's weights: `System.stored_null`
)

TEXT_TOKENS = 512  # of a text where a system says nothing: T5's own


@dataclasses.dataclass(frozen=True)
class Network:
  """A kind of network.

  Attributes:
    family: its folder below `models/`, and its name in a config.
    kind: "denoiser", "autoencoder", "text_encoder" or another.
    module: class of network, made of its Config.
    config: class of its Config.
    variants: Configs of the published sizes, by name.
    example: Config -> inputs of the smallest call, which initialise it.
    classes: how released ones are stored, by the class that their config.json
      names; none where nobody else has released one.
    tokenizer: reads a tokenizer of its files, all of one kind; of text
      encoders alone.
    tokenizer_files: names of the files of each kind, the first before others.
    layers: names of its Config's numbers of layers.
    former_names: that older configs call it by.
  """

  family: str
  kind: str
  module: type[nn.Module]
  config: type
  variants: Mapping[str, Any]
  example: Callable[[Any], tuple[Any, ...]]
  classes: Mapping[str, rules.Component] = dataclasses.field(
    default_factory=dict
  )
  tokenizer: Callable[..., tokenizers.Tokenizer] | None = None
  tokenizer_files: tuple[tuple[str, ...], ...] = ()
  layers: tuple[str, ...] = ()
  former_names: tuple[str, ...] = ()

  def init(self, module: nn.Module, key: jax.Array) -> Any:
    """Initialise params, boxed with their logical axes."""
    return module.init(key, *self.example(module.cfg))["params"]

  def find_tokenizer(self, folder: epath.Path) -> list[epath.Path]:
    """Find the files of a folder's tokenizer; none if no kind is whole."""
    kinds = ([folder / name for name in kind] for kind in self.tokenizer_files)
    whole = (kind for kind in kinds if all(file.exists() for file in kind))
    return next(whole, [])

  def read_tokenizer(
    self,
    folder: epath.Path,
    clean: Callable[[str], str] = tokenizers.as_it_is,
  ) -> tokenizers.Tokenizer:
    """Read a folder's tokenizer; refuse one that does not encode.

    Args:
      folder: that it lies in.
      clean: what texts go through first; see `TextRule`.
    """
    files = self.find_tokenizer(folder)
    if not files or self.tokenizer is None:
      raise ValueError(f"{folder} has no {self.said_tokenizer_files}")
    return dataclasses.replace(self.tokenizer(*files), clean=clean)

  @property
  def said_tokenizer_files(self) -> str:
    """The files that a tokenizer may lie in, for errors."""
    return " or ".join(" and ".join(kind) for kind in self.tokenizer_files)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a network of a pipeline lies in a released folder.

  Attributes:
    folder: of its config.json and weights.
    tokenizer: folder of its tokenizer; "" for a network without one.
    optional: whether some releases do without it, such as an image encoder or
      a second denoiser.
  """

  folder: str
  tokenizer: str = ""
  optional: bool = False


@dataclasses.dataclass(frozen=True)
class Folder:
  """A released pipeline's folder that has all its parts.

  Attributes:
    system: that it is of.
    networks: folder of each network that it has, by name.
    tokenizers: folder of each tokenizer, by its text encoder's name.
    sampling: fields of `types.Recipe` that the folder settles.
  """

  system: "System"
  networks: Mapping[str, epath.Path]
  tokenizers: Mapping[str, epath.Path]
  sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TextRule:
  """How a text encoder's captions reach the denoiser.

  Attributes:
    padding: who sees it, one of `text.padding.KINDS`.
    null: what stands for no caption, one of `NULLS`.
    clean: what captions go through before they are tokenized.
  """

  padding: str = "masked"
  null: str = "learned"
  clean: Callable[[str], str] = tokenizers.as_it_is

  def __post_init__(self):
    padding.check(self.padding)
    if self.null not in NULLS:
      raise ValueError(f"null must be one of {NULLS}, got {self.null!r}")


@dataclasses.dataclass(frozen=True)
class Adapters:
  """Low-rank adapters of a system's networks.

  Attributes:
    targets: regexes of the denoiser's layers that have some unless others are
      asked for.
    spellings: how files of other layouts call the denoisers' layers, a table
      each: regexes, and what stands in their place in a released name, one
      after the other.
  """

  targets: tuple[str, ...]
  spellings: tuple[Mapping[str, str], ...] = ()


class Apply(Protocol):
  """Runs a method of a network with its weights."""

  def __call__(
    self, *args: Any, method: str, network: str = "autoencoder"
  ) -> Any:
    """Apply."""


class Draw(Protocol):
  """Draws standard normal noise [B, *shape] for a batch; None for its mean."""

  def __call__(self, shape: tuple[int, ...]) -> jax.Array | None:
    """Draw."""


@dataclasses.dataclass(frozen=True)
class Modules:
  """The networks of a system, without weights.

  Attributes:
    system: that they are of.
    networks: by name.
  """

  system: "System"
  networks: Mapping[str, nn.Module]

  def __getitem__(self, name: str) -> nn.Module:
    """Return a network by its name."""
    return self.networks[name]

  @property
  def autoencoder(self) -> nn.Module:
    """The autoencoder."""
    return self.networks["autoencoder"]

  @property
  def denoiser(self) -> nn.Module | None:
    """The first denoiser; None where an autoencoder alone is built."""
    return self.networks.get("denoiser")

  @property
  def needs(self) -> tuple[int, ...]:
    """Positions of the frames that the denoiser must be given."""
    return self.system.needs(self.denoiser.cfg)

  @property
  def takes(self) -> int:
    """Frames of a latent frame that the denoiser may be given one by one."""
    return self.system.takes(self.denoiser.cfg)

  @property
  def text_encoders(self) -> dict[str, nn.Module]:
    """Those that turn captions into embeddings, by name."""
    return {k: m for k, m in self.networks.items() if k in self.system.text}

  @property
  def frame_encoders(self) -> dict[str, nn.Module]:
    """Those that given frames may be encoded by, by name."""
    return {
      name: module
      for name, module in self.networks.items()
      if name not in self.system.text and not name.startswith("denoiser")
    }


def _latent_shape(
  modules: Modules, num_frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
  """Latents of the autoencoder, which the patches must divide."""
  shape = modules.autoencoder.latent_shape(num_frames, height, width)
  strides = modules.autoencoder.cfg
  per = strides.time_stride, strides.space_stride, strides.space_stride
  names, patch = ("num_frames", "height", "width"), modules.denoiser.cfg.patch
  for name, n, p, s in zip(names, shape[:3], patch, per, strict=True):
    if n % p:
      near = max(round(n / p), 1) * p
      asked, near = (
        ((m - 1) * s + 1 if name == "num_frames" else m * s) for m in (n, near)
      )
      raise ValueError(
        f"{name} {asked} gives {n} latents, which patches of {p} do not "
        f"divide; try {near}"
      )
  return shape


def give_frames(
  modules: Modules,
  apply: Apply,
  frames: jax.Array,
  mask: np.ndarray,
  draw: Draw,
) -> types.Given:
  """Any latent frames, whose noise level is 0 then."""
  del draw
  given = jnp.asarray(modules.autoencoder.latent_mask(np.asarray(mask)))
  return types.Given(apply(jnp.asarray(frames), method="encode"), given)


def refuse_numbers(
  cfg: Any, B: int, known: Mapping[str, float], asked: Mapping[str, float]
) -> types.Cond | None:
  """Tell nothing."""
  del cfg, B, known
  if asked:
    raise ValueError(
      f"numbers must be None, got {dict(asked)}: this denoiser was told none "
      "in training; leave them out"
    )
  return None


def _the_only_text(texts: Mapping[str, types.Text]) -> types.Text:
  (text,) = texts.values()
  return text


def text_of(output: Any, mask: jax.Array) -> types.Text:
  """The Text of what a text encoder's module gave for tokens of a mask."""
  embeds, pooled = output if isinstance(output, tuple) else (output, None)
  return types.Text(embeds=embeds, mask=mask, pooled=pooled)


def check_widths(modules: Modules, where: str) -> None:
  """Refuse networks of different systems: latent channels, text's width."""
  denoiser, autoencoder = modules.denoiser.cfg, modules.autoencoder.cfg
  channels = denoiser.latent_channels, autoencoder.latent_channels
  check_equal(where, "latent channels of denoiser and autoencoder", *channels)
  for name, module in modules.text_encoders.items():
    widths = denoiser.text_width, module.cfg.width
    check_equal(where, f"widths of text of denoiser and {name}", *widths)


def check_equal(where: str, what: str, ours: Any, theirs: Any) -> None:
  """Refuse a fact of two networks of one pipeline that differs."""
  if ours != theirs:
    raise ValueError(
      f"the {what} in {where} must be equal, got {ours} and {theirs}; "
      "download the pipeline again"
    )


@dataclasses.dataclass(frozen=True)
class System:
  """A family: what it is made of and how it is run.

  Networks and folders:
    name: of its folder below `models/`, and in configs.
    networks: its own kinds: one denoiser, one autoencoder.
    places: its networks by name ("denoiser", "autoencoder", "text_encoder",
      "text_encoder_2", "image_encoder", "denoiser_2", ...), and where they lie
      in a released pipeline of diffusers' layout. One that is optional is
      there where model_index.json names it.
    pipelines: classes that model_index.json names; none where nobody else has
      released one.
    schedulers: classes of scheduler that are taken, by name.
    recognises: folder -> whether it is a release in a layout of its own,
      which need not have a model_index.json; asked before that is looked at.
    read: such a folder -> its `Folder`; refuses one that is not whole.
    not_float16: why nothing of it computes in float16; "" where it can.
    check: (modules, where) -> refuses networks that do not fit each other.
    recipe: denoiser's Config, pipeline's folder -> the published Recipe, with
      a row of experts for each denoiser that the folder has. Without a folder,
      that of the denoiser alone.

  Text:
    text: rule of each text encoder, by its name.
    text_lengths: denoiser's Config -> tokens of a text by encoder, for
      pipelines that pad to what the denoiser was trained with; of the others
      `TEXT_TOKENS`.
    join_text: what each encoder gave -> the Text that the denoiser takes.
    stored_null: (denoiser's params, Text) -> the Text of no caption, of its
      shape, where a rule's null is "stored".

  Sizes:
    latent_shape: (modules, F, H, W) -> (f, h, w, c) that is denoised; more
      than the autoencoder's where patches are filled up.
    fill: (latents [B, f, h, w, c], patch) -> the same, patches filled up, for
      training.
    unfill: (latents, f) -> the f latent frames that a video is decoded of.
    trim: (video [B, F', H, W, 3] that was decoded, F) -> the frames of it that
      are the video; some autoencoders leave others, which are told.

  What is given, told, guided:
    needs: denoiser's Config -> positions of the frames that must be given in
      sampling and in training, in their order: (0,) is the first, (0, -1) the
      first and the last, () none.
    takes: denoiser's Config -> frames of a latent frame that it may be given
      one by one, whole or in part, none of which it needs; 0 for none. What
      is given comes back as it is. See `nn.stills`.
    image: how training shows what is needed, unless a config says otherwise.
    condition: (modules, apply, frames [B, F, H, W, 3], mask [B, F], draw) ->
      Given; the same in sampling and in training. It refuses frames that the
      system cannot be given.
    numbers: denoiser's Config -> names of the numbers of a clip that it is
      told.
    number_cond: (Config, B, known, asked) -> Cond of numbers by name; refuses
      those that it is not told.
    branches: denoiser's Config -> the branches of guidance, the last one the
      prompt's.

  Beside:
    adapters: of its networks; None where there are none.
    tiny: by variant, (folder, captions) -> config.json of each network by
      folder, after what is no network has been written; see `weights.tiny`.
    tiny_gains: factors of random parameters, by a regex that is searched for
      in a parameter's path: what makes tiny networks behave as trained ones.
    baseline: module of the PyTorch side of `vdit_jax.compare`; "" where no
      package has the classes.
  """

  name: str
  networks: tuple[Network, ...]
  places: Mapping[str, Place]
  recipe: Callable[[Any, epath.Path | None], types.Recipe] | None = None
  pipelines: tuple[str, ...] = ()
  schedulers: Mapping[str, released.Scheduler] = dataclasses.field(
    default_factory=dict
  )
  recognises: Callable[[epath.Path], bool] = lambda folder: False
  read: Callable[[epath.Path], Folder] | None = None
  not_float16: str = ""
  check: Callable[[Modules, str], None] = check_widths
  text: Mapping[str, TextRule] = dataclasses.field(
    default_factory=lambda: {"text_encoder": TextRule()}
  )
  text_lengths: Callable[[Any], Mapping[str, int]] = lambda cfg: {}
  join_text: Callable[[Mapping[str, types.Text]], types.Text] = _the_only_text
  stored_null: Callable[[Any, types.Text], types.Text] | None = None
  latent_shape: Callable[..., tuple[int, int, int, int]] = _latent_shape
  fill: Callable[[jax.Array, tuple[int, ...]], jax.Array] = lambda x, patch: x
  unfill: Callable[[jax.Array, int], jax.Array] = lambda x, f: x
  trim: Callable[[np.ndarray, int], np.ndarray] = lambda video, F: video
  needs: Callable[[Any], tuple[int, ...]] = lambda cfg: ()
  takes: Callable[[Any], int] = lambda cfg: 0
  image: types.Image = types.Image()
  condition: Callable[..., types.Given] = give_frames
  numbers: Callable[[Any], tuple[str, ...]] = lambda cfg: ()
  number_cond: Callable[..., types.Cond | None] = refuse_numbers
  branches: Callable[[Any], tuple[types.Branch, ...]] = lambda cfg: (
    types.CLASSIFIER_FREE
  )
  adapters: Adapters | None = None
  tiny: Mapping[str, Callable[[epath.Path, list[str]], dict[str, Any]]] = (
    dataclasses.field(default_factory=dict)
  )
  tiny_gains: Mapping[str, float] = dataclasses.field(default_factory=dict)
  baseline: str = ""

  def __post_init__(self):
    demanded = {"denoiser", "autoencoder", *self.text}
    optional = {name for name, place in self.places.items() if place.optional}
    if both := sorted(optional & demanded):
      raise ValueError(
        f"places of {self.name} must not be optional for {', '.join(both)}, "
        "which every run asks for; demand them"
      )

  def present(self, has: Callable[[str], bool]) -> dict[str, Place]:
    """Return the places of a folder, by name: without optional ones it lacks.

    Args:
      has: a place's `folder` -> whether the release has it.
    """
    return {
      name: place
      for name, place in self.places.items()
      if not place.optional or has(place.folder)
    }

  def network(self, kind: str) -> Network:
    """Return its own network of a kind."""
    return next(n for n in self.networks if n.kind == kind)

  def max_lengths(self, cfg: Any) -> dict[str, int]:
    """Return the most tokens of a text, by encoder, for a denoiser's Config."""
    return dict.fromkeys(self.text, TEXT_TOKENS) | dict(self.text_lengths(cfg))

  def lengths(self, cfg: Any, most: int) -> dict[str, int]:
    """Tokens of a text by encoder: at most so many, of one encoder just that.

    Args:
      cfg: the denoiser's Config.
      most: tokens of a text.
    """
    own = dict.fromkeys(self.text, most)
    if len(own) > 1:
      own = self.max_lengths(cfg)
    return {name: min(own[name], most) for name in self.text}

  @property
  def nulls(self) -> set[str]:
    """The rules of null of its text encoders."""
    return {rule.null for rule in self.text.values()}

"""What a pipeline is made of, whatever it was loaded from.

a workdir, a release of ours, a released folder --> Parts --> pipeline
"""

import collections.abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vdit_jax import types
from vdit_jax.models.system import Modules, System
from vdit_jax.text.tokenizer import Tokenizer


class Weights(collections.abc.Mapping):
  """Params by network, read when first asked for and held until freed."""

  def __init__(self, readers: Mapping[str, Callable[[], Any]]):
    """Take what reads each network's params."""
    self._readers = dict(readers)
    self._held: dict[str, Any] = {}

  def __getitem__(self, name: str) -> Any:
    """Return a network's params; read them if they are not held."""
    if name not in self._held:
      self._held[name] = self._readers[name]()
    return self._held[name]

  def __contains__(self, name: object) -> bool:
    """Tell whether there is such a network, without reading it."""
    return name in self._readers

  def __iter__(self) -> Iterator[str]:
    """Go through the names."""
    return iter(self._readers)

  def __len__(self) -> int:
    """Count the networks."""
    return len(self._readers)

  @property
  def held(self) -> tuple[str, ...]:
    """Names of the networks whose params are in memory."""
    return tuple(self._held)

  def free(self, name: str) -> None:
    """Let go of a network's params, if they are held."""
    self._held.pop(name, None)


@dataclasses.dataclass(frozen=True)
class Parts:
  """Networks with their weights, and how they are run.

  Attributes:
    modules: the networks.
    params: their weights by name, a mapping that may read them only when they
      are asked for.
    tokenizers: by the text encoder's name. They and the text encoders may be
      absent if all prompts come encoded.
    recipe: how to sample when a caller does not say.
    max_lengths: tokens of a prompt, by the text encoder's name.
    sequential: whether one network is held at a time.
    one_expert: whether that is so of the denoisers while they sample, too,
      each read when its steps begin.
  """

  modules: Modules
  params: Mapping[str, Any] = dataclasses.field(repr=False)
  tokenizers: Mapping[str, Tokenizer] = dataclasses.field(repr=False)
  recipe: types.Recipe
  max_lengths: Mapping[str, int]
  sequential: bool = False
  one_expert: bool = False

  @property
  def system(self) -> System:
    """The system that the networks are of."""
    return self.modules.system

"""The tokenizer of a released T5, mT5 or UMT5.

A release has a spiece.model, which `T5Tokenizer` reads; what transformers 5
saves has a tokenizer.json alone, which the tokenizers package reads, as it does
for transformers.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import tokenizers as huggingface
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from vdit_jax import inputs, schema
from vdit_jax.text import tokenizer as tokenizers

FILE, JSON_FILE = "spiece.model", "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
model_pb2: Any = sentencepiece_model_pb2  # its names are made at run time
_SPECIAL = [tokenizers.PAD, tokenizers.EOS, tokenizers.UNK]
_SPECIAL_TEXTS = "<pad>", "</s>", "<unk>"
_FIELDS = {  # of tokenizer_config.json
  "extra_ids": schema.Field(int, 0, 10_000),
  "tokenizer_class": schema.Field(str, 1, 100, optional=True),
}
_T = TypeVar("_T", bound=tokenizers.Tokenizer)


@dataclasses.dataclass(frozen=True)
class T5Tokenizer(tokenizers.Tokenizer):
  """A released spiece.model that gives the ids of transformers' T5Tokenizer.

  Those (of transformers 5.23.0) are what the networks get, and they are not
  always sentencepiece's: special tokens are found wherever they are spelled,
  what follows one begins a word, characters without a piece are unknown even
  where the model has bytes (mT5), and each word is split by itself in float64,
  which settles ties such as "..." from ".." and "." in another way.

  Known difference: in text in decomposed form (NFD) transformers leaves kana
  decomposed and drops a letter's second accent; here both are composed.

  Attributes:
    extra_ids: sentinels `<extra_id_0>`, ... that come after the model's
      pieces, the last one first.
  """

  extra_ids: int = 100

  @property
  def vocab_size(self) -> int:
    """Number of token ids; the network's may be padded further."""
    return self.processor.vocab_size() + self.extra_ids

  @functools.cached_property
  def specials(self) -> dict[str, int]:
    """Ids of the texts that are one token wherever they are spelled."""
    piece = model_pb2.ModelProto.SentencePiece
    types = piece.CONTROL, piece.USER_DEFINED, piece.UNKNOWN
    pieces = enumerate(self._proto.pieces)
    own = {p.piece: i for i, p in pieces if p.type in types}
    return self._sentinels | own

  def decode(self, tokens: np.ndarray) -> list[str]:
    """Decode tokens [B, M] back to texts, without special tokens."""
    dropped = set(self.specials.values()) - {tokenizers.UNK}
    return [
      self.processor.decode([i for i in row if i not in dropped])
      for row in np.asarray(tokens).tolist()
    ]

  @property
  def _proto(self) -> Any:
    return model_pb2.ModelProto.FromString(self.model)

  @property
  def _sentinels(self) -> dict[str, int]:
    last = self.vocab_size - 1
    return {f"<extra_id_{i}>": last - i for i in range(self.extra_ids)}

  @functools.cached_property
  def _pieces(self) -> dict[str, tuple[int, float]]:
    """Id and log probability of each piece."""
    pieces = enumerate(self._proto.pieces)
    pieces = {p.piece: (i, p.score) for i, p in pieces}
    return pieces | {text: (i, 0.0) for text, i in self._sentinels.items()}

  @functools.cached_property
  def _limits(self) -> tuple[int, float]:
    """Length of the longest piece, log probability of an unknown character."""
    scores = [score for _, score in self._pieces.values()]
    return max(map(len, self._pieces)), min(scores) - 10.0

  @functools.cached_property
  def _split(self) -> re.Pattern[str]:
    longest_first = sorted(self.specials, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

  def _encode(self, captions: list[str]) -> list[list[int]]:
    return [[i for i, _ in self._spans(text)] for text in captions]

  def _spans(self, text: str) -> list[tuple[int, int]]:
    spans, begin = [], 0
    for part in self._split.split(text):
      if part in self.specials:
        spans.append((self.specials[part], begin))
      else:
        spans += [(i, begin + n) for i, n in self._words(part)]
      begin += len(part)
    return spans

  def _words(self, part: str) -> list[tuple[int, int]]:
    """Give the spans of a text without special tokens."""
    # T5's rules make a space of all other white space.
    part = part.replace("\x85", " ")
    normal, places = self.processor.normalize(part, with_offsets=True)
    return [
      (i, places[word.start() + n])
      for word in re.finditer("▁[^▁]+", normal)
      for i, n in self._word(word.group())
    ]

  def _word(self, word: str) -> list[tuple[int, int]]:
    """Give the spans of the likeliest pieces, by Viterbi's algorithm."""
    longest, unknown = self._limits
    best = [(0.0, 0, 0)] + [(-math.inf, 0, 0)] * len(word)
    for begin in range(len(word)):
      for end in range(begin + 1, min(begin + longest, len(word)) + 1):
        otherwise = (tokenizers.UNK, unknown if end == begin + 1 else -math.inf)
        i, score = self._pieces.get(word[begin:end], otherwise)
        score += best[begin][0]
        if score > best[end][0]:
          best[end] = score, i, begin
    spans, end = [], len(word)
    while end:
      _, i, end = best[end]
      if spans and i == tokenizers.UNK == spans[-1][0]:
        spans.pop()  # neighbours without a piece are one unknown token
      spans.append((i, end))
    return spans[::-1]


@dataclasses.dataclass(frozen=True)
class JsonTokenizer(tokenizers.Tokenizer):
  """A tokenizer.json, `model` its bytes; the ids are those of transformers."""

  @functools.cached_property
  def processor(self) -> huggingface.Tokenizer:  # pyright: ignore[reportIncompatibleVariableOverride]
    processor = huggingface.Tokenizer.from_str(self.model.decode())
    processor.no_truncation()
    processor.no_padding()
    return processor

  @property
  def vocab_size(self) -> int:
    """Number of token ids; the network's may be padded further."""
    return self.processor.get_vocab_size()

  def scores(self) -> list[float]:
    """None: JSON's numbers are finite."""
    return []

  def _encode(self, captions: list[str]) -> list[list[int]]:
    return [[i for i, _ in self._spans(text)] for text in captions]

  def _spans(self, text: str) -> list[tuple[int, int]]:
    found = self.processor.encode(text, add_special_tokens=False)
    return [(i, n) for i, (n, _) in zip(found.ids, found.offsets, strict=True)]


def load(path: epath.PathLike) -> tokenizers.Tokenizer:
  """Load a spiece.model or a tokenizer.json.

  How many sentinels come after the pieces of a spiece.model is what the
  tokenizer_config.json beside it says, or 100 as in transformers; none where
  the model has sentinels itself (UMT5). A tokenizer.json has them.

  Raises:
    ValueError: if the file is damaged, or no T5's.
  """
  path = epath.Path(path)
  model = inputs.read(path, tokenizers.MOST_BYTES)
  if path.name == JSON_FILE:
    return _checked(path, JsonTokenizer(model), _json_facts)
  released = _checked(path, T5Tokenizer(model, extra_ids=0), _model_facts)
  if "<extra_id_0>" in released.specials:
    return released
  return dataclasses.replace(released, extra_ids=_extra_ids(path.parent))


def _checked(
  path: epath.Path,
  tokenizer: _T,
  facts: Callable[[_T], tuple[list[int | None], bool]],
) -> _T:
  """Refuse a tokenizer that does not encode, or not as T5's do.

  Args:
    path: its file.
    tokenizer: as read.
    facts: tells the ids of its special tokens, and whether it is split and
      spelled as T5's are.
  """
  with tokenizers.reading(path):
    ids, alike = facts(tokenizer)
  if ids != _SPECIAL:
    raise ValueError(
      f"{path} must be a T5's tokenizer, <pad> </s> <unk> at {_SPECIAL}, got "
      f"{ids}"
    )
  if not alike:
    raise ValueError(
      f"{path} must be a unigram model that puts a space before a text, as all "
      "of T5's are"
    )
  return tokenizers.checked(path, tokenizer)


def _model_facts(released: T5Tokenizer) -> tuple[list[int | None], bool]:
  proto, ids = released._proto, released.specials
  unigram = proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM
  alike = unigram and proto.normalizer_spec.add_dummy_prefix
  return [ids.get(text) for text in _SPECIAL_TEXTS], alike


def _json_facts(released: JsonTokenizer) -> tuple[list[int | None], bool]:
  ids = [released.processor.token_to_id(text) for text in _SPECIAL_TEXTS]
  unigram = isinstance(released.processor.model, huggingface.models.Unigram)
  begins = released.processor.encode("a", add_special_tokens=False).tokens[:1]
  return ids, unigram and all(text.startswith("▁") for text in begins)


def _extra_ids(folder: epath.Path) -> int:
  file = folder / _CONFIG_FILE
  config = inputs.read_json(file) if file.exists() else {}
  schema.check(str(file), config, _FIELDS)
  return config.get("extra_ids", T5Tokenizer.extra_ids)

"""The tokenizer of a released T5, mT5 or UMT5, by its spiece.model."""

import dataclasses
import functools
import json
import math
import re
from typing import Any

import numpy as np
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from vdit_jax.text import tokenizer as tokenizers

FILE = "spiece.model"
_CONFIG_FILE = "tokenizer_config.json"
model_pb2: Any = sentencepiece_model_pb2  # its names are made at run time
_SPECIAL = [tokenizers.PAD, tokenizers.EOS, tokenizers.UNK]


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


def load(path: epath.PathLike) -> T5Tokenizer:
  """Load the `tokenizer` folder of a release, its spiece.model.

  How many sentinels come after the model's pieces is what the folder's
  tokenizer_config.json says, or 100 as in transformers; none where the model
  has sentinels itself (UMT5).
  """
  path = epath.Path(path)
  if not (path / FILE).exists():
    raise ValueError(
      f"path has no {FILE}: {path}; transformers 5 writes none beside "
      "its tokenizer.json, so take the one of the original release"
    )
  released = T5Tokenizer((path / FILE).read_bytes(), extra_ids=0)
  ids = [released.specials.get(text) for text in ("<pad>", "</s>", "<unk>")]
  if ids != _SPECIAL:
    raise ValueError(
      f"path must have a T5's tokenizer, <pad> </s> <unk> at "
      f"{_SPECIAL}, got {ids}: {path}"
    )
  _check_kind(released, path)
  if "<extra_id_0>" in released.specials:
    return released
  return dataclasses.replace(released, extra_ids=_extra_ids(path))


def _check_kind(released: T5Tokenizer, path: epath.Path):
  """Refuse models that are not split and spelled as T5's are."""
  proto = released._proto
  unigram = proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM
  if not unigram or not proto.normalizer_spec.add_dummy_prefix:
    raise ValueError(
      f"path must have a unigram model that puts a space before a text, as "
      f"all of T5's are: {path}"
    )


def _extra_ids(path: epath.Path) -> int:
  config = path / _CONFIG_FILE
  fields = json.loads(config.read_text()) if config.exists() else {}
  return fields.get("extra_ids", T5Tokenizer.extra_ids)

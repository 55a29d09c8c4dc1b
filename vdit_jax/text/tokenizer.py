"""Text tokens: a sentencepiece model, trained and applied.

The layout is T5's: pad 0, end of text 1, unknown 2, no beginning of text; every
text ends with the end token. Bytes stand in for characters that training never
saw, so nothing is unknown. `vdit_jax.data.tokenizer` trains one on a dataset.

`load_released` reads the tokenizer of a released T5, mT5 or UMT5.
"""

import dataclasses
import functools
import io
import json
import math
import os
import re

import numpy as np
import sentencepiece
from absl import logging
from etils import epath
from sentencepiece import sentencepiece_model_pb2 as model_pb2

PAD, EOS, UNK = 0, 1, 2

_BYTES = 256  # byte_fallback's pieces
_MODEL_FILE, _CONFIG_FILE = "spiece.model", "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A sentencepiece model, held as bytes so that it can go to a worker."""

  model: bytes = dataclasses.field(repr=False)

  @functools.cached_property
  def processor(self) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=self.model)

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    return self.processor.vocab_size()

  def encode(
    self, captions: list[str], max_length: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Encode captions, each ended by the end token, cut and padded.

    Args:
      captions: texts; the empty one gives the end token alone.
      max_length: tokens of a text with its end token, M.

    Returns:
      Tokens int32 [B, M] and a mask, True on tokens, bool [B, M].
    """
    if max_length < 1:
      raise ValueError(f"max_length must be at least 1, got {max_length}")
    tokens = np.full((len(captions), max_length), PAD, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(self._encode(captions)):
      ids = [*ids[: max_length - 1], EOS]
      tokens[row, : len(ids)] = ids
      mask[row, : len(ids)] = True
    return tokens, mask

  def _encode(self, captions: list[str]) -> list[list[int]]:
    # One thread: the readers that call this are many threads already.
    return self.processor.encode(list(captions), num_threads=1)

  def decode(self, tokens: np.ndarray) -> list[str]:
    """Decode tokens [B, M] back to texts, up to each one's end token."""
    rows = np.asarray(tokens).tolist()
    ends = [row.index(EOS) if EOS in row else len(row) for row in rows]
    return [
      self.processor.decode(row[:end])
      for row, end in zip(rows, ends, strict=True)
    ]

  def check(self, prompts: list[str], max_length: int) -> None:
    """Refuse blank prompts; warn of what is cut off over-long ones."""
    for index, prompt in enumerate(prompts):
      if not prompt.strip():
        raise ValueError(
          f"prompts[{index}] must say something, got {prompt!r}; leave it out "
          "or describe the clip"
        )
      cut = self.cut(prompt, max_length)
      if cut:
        logging.warning(
          "prompts[%d] is longer than %d tokens and loses its end: %r",
          index,
          max_length,
          cut,
        )

  def cut(self, prompt: str, max_length: int) -> str:
    """Give the part of a prompt that `encode` cuts off; "" for none."""
    spans = self._spans(prompt)
    if len(spans) < max_length:
      return ""
    _, begin = spans[max_length - 1]
    return prompt[begin:]

  def _spans(self, text: str) -> list[tuple[int, int]]:
    """Give each token's id and first character."""
    content = text.encode()
    return [
      (piece.id, len(content[: piece.begin].decode()))
      for piece in self.processor.encode(text, out_type="proto").pieces
    ]


@dataclasses.dataclass(frozen=True)
class Released(Tokenizer):
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
    piece = model_pb2.ModelProto.SentencePiece  # pyright: ignore[reportAttributeAccessIssue]
    types = piece.CONTROL, piece.USER_DEFINED, piece.UNKNOWN
    pieces = enumerate(self._proto.pieces)
    own = {p.piece: i for i, p in pieces if p.type in types}
    return self._sentinels | own

  def decode(self, tokens: np.ndarray) -> list[str]:
    """Decode tokens [B, M] back to texts, without special tokens."""
    dropped = set(self.specials.values()) - {UNK}
    return [
      self.processor.decode([i for i in row if i not in dropped])
      for row in np.asarray(tokens).tolist()
    ]

  @property
  def _proto(self) -> model_pb2.ModelProto:  # pyright: ignore[reportAttributeAccessIssue]
    return model_pb2.ModelProto.FromString(self.model)  # pyright: ignore[reportAttributeAccessIssue]

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
        otherwise = (UNK, unknown if end == begin + 1 else -math.inf)
        i, score = self._pieces.get(word[begin:end], otherwise)
        score += best[begin][0]
        if score > best[end][0]:
          best[end] = score, i, begin
    spans, end = [], len(word)
    while end:
      _, i, end = best[end]
      if spans and i == UNK == spans[-1][0]:
        spans.pop()  # neighbours without a piece are one unknown token
      spans.append((i, end))
    return spans[::-1]


def train(
  captions: list[str], path: epath.PathLike, vocab_size: int = 512
) -> Tokenizer:
  """Train a unigram model and write it; the same captions, the same bytes.

  Args:
    captions: texts; what a word is worth follows from how often it occurs.
    path: file to write; it appears whole or not at all.
    vocab_size: the most token ids; fewer when the texts don't yield as many.

  Returns:
    The trained tokenizer.
  """
  lines = [*captions, *_word_lines(captions)]
  _check_vocab_size(vocab_size, lines)
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    model_type="unigram",
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    pad_id=PAD,
    eos_id=EOS,
    unk_id=UNK,
    bos_id=-1,
    byte_fallback=True,
    character_coverage=1.0,
    num_threads=1,  # the order of sums, so the bytes, would depend on it
    minloglevel=2,
  )
  _write(epath.Path(path), model.getvalue())
  return Tokenizer(model.getvalue())


def load(path: epath.PathLike) -> Tokenizer:
  """Load a trained tokenizer."""
  path = epath.Path(path)
  if not path.exists():
    raise ValueError(
      f"path has no tokenizer: {path}; train it with python -m "
      f"vdit_jax.data.tokenizer --data=NAME --data_dir=DATA --out={path}"
    )
  return Tokenizer(path.read_bytes())


def load_released(path: epath.PathLike) -> Released:
  """Load the `tokenizer` folder of a release, its spiece.model.

  How many sentinels come after the model's pieces is what the folder's
  tokenizer_config.json says, or 100 as in transformers; none where the model
  has sentinels itself (UMT5).
  """
  path = epath.Path(path)
  if not (path / _MODEL_FILE).exists():
    raise ValueError(
      f"path has no {_MODEL_FILE}: {path}; transformers 5 writes none beside "
      "its tokenizer.json, so take the one of the original release"
    )
  released = Released((path / _MODEL_FILE).read_bytes(), extra_ids=0)
  ids = [released.specials.get(text) for text in ("<pad>", "</s>", "<unk>")]
  if ids != [PAD, EOS, UNK]:
    raise ValueError(
      f"path must have a T5's tokenizer, <pad> </s> <unk> at "
      f"{[PAD, EOS, UNK]}, got {ids}: {path}"
    )
  _check_kind(released, path)
  if "<extra_id_0>" in released.specials:
    return released
  return dataclasses.replace(released, extra_ids=_extra_ids(path))


def _check_kind(released: Released, path: epath.Path):
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
  return fields.get("extra_ids", Released.extra_ids)


def _word_lines(captions: list[str]) -> list[str]:
  """Show each word by itself.

  Captions of one template always have the same neighbours around a word, and
  then the model's parts of words ("re" + "d") explain them as well as words.
  """
  words = sorted({word for text in captions for word in text.split()})
  if not words:
    raise ValueError("captions must have words, got none; pass some texts")
  return [f"{word}, {word}. {word}s" for word in words]


def _check_vocab_size(vocab_size: int, lines: list[str]):
  least = _BYTES + len((PAD, EOS, UNK)) + len(set("".join(lines)))
  if vocab_size <= least:
    raise ValueError(
      f"vocab_size must be above {least}, the bytes, special tokens and "
      f"single characters, got {vocab_size}; try {2 * least}"
    )


def _write(path: epath.Path, content: bytes):
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
  temporary.write_bytes(content)
  temporary.replace(path)

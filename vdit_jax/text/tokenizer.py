"""Text tokens: a sentencepiece model, trained and applied.

The layout is T5's: pad 0, end of text 1, unknown 2, no beginning of text; every
text ends with the end token. Bytes stand in for characters that training never
saw, so nothing is unknown. `vdit_jax.data.tokenizer` trains one on a dataset.
"""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import sentencepiece
from absl import logging
from etils import epath

from vdit_jax import inputs, schema, writing

PAD, EOS, UNK = 0, 1, 2

MOST_BYTES = 64 * 2**20  # of a tokenizer's file; UMT5's has 17
_BYTES = 256  # byte_fallback's pieces
_TRIAL = "A café, ½ ﬁ\t１２ 你好 😀 e\u0301\u200b <extra_id_0>"
_T = TypeVar("_T", bound="Tokenizer")


def as_it_is(text: str) -> str:
  """Clean nothing of a text."""
  return text


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A sentencepiece model, held as bytes so that it can go to a worker.

  Attributes:
    model: the file.
    clean: what a text goes through first, a function of a module.
  """

  model: bytes = dataclasses.field(repr=False)
  clean: Callable[[str], str] = dataclasses.field(
    default=as_it_is, kw_only=True
  )

  @functools.cached_property
  def processor(self) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=self.model)

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    return self.processor.vocab_size()

  def scores(self) -> list[float]:
    """The log probabilities of its pieces."""
    ids = list(range(self.processor.vocab_size()))
    return self.processor.get_score(ids)

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
    cleaned = [self.clean(caption) for caption in captions]
    for row, ids in enumerate(self._encode(cleaned)):
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

  def check(
    self, prompts: list[str], max_length: int, name: str = "prompts"
  ) -> None:
    """Warn of what is cut off over-long prompts, once of each.

    Args:
      prompts: texts.
      max_length: tokens of a text with its end token, M.
      name: what the prompts are called.
    """
    for prompt in dict.fromkeys(prompts):
      cut = self.cut(prompt, max_length)
      if cut:
        logging.warning(
          "%s[%d] is longer than %d tokens and loses its end: %s",
          name,
          prompts.index(prompt),
          max_length,
          schema.quote(cut, 500),
        )

  def cut(self, prompt: str, max_length: int) -> str:
    """Give the part of a prompt that `encode` cuts off; "" for none."""
    prompt = self.clean(prompt)
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
  writing.write(path, model.getvalue())
  return Tokenizer(model.getvalue())


def load(path: epath.PathLike) -> Tokenizer:
  """Load a trained tokenizer."""
  path = epath.Path(path)
  if not path.exists():
    raise ValueError(
      f"path has no tokenizer: {path}; train it with python -m "
      f"vdit_jax.data.tokenizer --data=NAME --data_dir=DATA --out={path}"
    )
  return checked(path, Tokenizer(inputs.read(path, MOST_BYTES)))


def checked(path: epath.PathLike, tokenizer: _T) -> _T:
  """Try a tokenizer, so that a bad file is refused where it is loaded.

  Args:
    path: its file.
    tokenizer: as read.

  Raises:
    ValueError: if it does not encode, or its scores are no numbers.
  """
  with reading(path):
    finite = np.isfinite(tokenizer.scores()).all()
    tokens, _ = tokenizer.encode(["", _TRIAL], len(_TRIAL))
  if not finite:
    raise inputs.damaged(path, "not all of its scores are finite")
  if not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
    raise inputs.damaged(
      path, f"it has no more than {tokenizer.vocab_size} ids"
    )
  return tokenizer


@contextlib.contextmanager
def reading(path: epath.PathLike) -> Iterator[None]:
  """Turn whatever a damaged tokenizer fails with into our refusal."""
  try:
    yield
  # Errors are of any type, and a panic of Rust's is no Exception even.
  except BaseException as error:
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
      raise
    reason = f"{type(error).__name__}: {str(error)[:200]}"
    raise inputs.damaged(path, f"it is no tokenizer ({reason})") from error


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

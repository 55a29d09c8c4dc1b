"""Prompts: checks, and the tokens of both branches of guidance."""

import jax
import numpy as np

from vdit_jax import schema, types
from vdit_jax.text import tokenizer as tokenizers


def check(
  prompts: list[str], negative_prompts: list[str] | None, text: bool = False
) -> None:
  """Refuse prompts without negative ones of their number.

  Args:
    prompts: B texts.
    negative_prompts: B texts; None is none.
    text: whether the prompts come encoded, with all that goes with them.
  """
  if isinstance(prompts, str) or not len(prompts):
    raise ValueError(
      f"prompts must be a list of texts, got {schema.quote(prompts)}"
    )
  _check_texts("prompts", prompts)
  if negative_prompts is None:
    return
  if text:
    raise ValueError("negative_prompts need text=None; leave one of them out")
  if isinstance(negative_prompts, str):
    raise ValueError(
      "negative_prompts must be a list of texts, one a prompt, got "
      f"{schema.quote(negative_prompts)}"
    )
  _check_texts("negative_prompts", negative_prompts)
  if len(negative_prompts) != len(prompts):
    raise ValueError(
      f"negative_prompts must be one a prompt, got {len(negative_prompts)} "
      f"for {len(prompts)}"
    )


def encode(
  tokenizer: tokenizers.Tokenizer,
  prompts: list[str],
  negative_prompts: list[str] | None,
  max_length: int,
  *,
  learned: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Tokenize prompts behind those that guidance leads away from.

  Args:
    tokenizer: of the text encoder.
    prompts: B texts.
    negative_prompts: B texts; None is the null, whose mask is all False.
    max_length: tokens of a text, M.
    learned: whether the null is learned, and a blank text is that too.

  Returns:
    Tokens int32 and mask bool, [2B, M], the prompts last.
  """
  tokens, mask = _encode(tokenizer, prompts, max_length, learned)
  behind = tokens, mask & False
  if negative_prompts is not None:
    behind = _encode(tokenizer, negative_prompts, max_length, learned)
  return np.concatenate([behind[0], tokens]), np.concatenate([behind[1], mask])


def _encode(tokenizer, said: list[str], max_length: int, learned: bool):
  tokens, mask = tokenizer.encode(said, max_length)
  if learned:
    mask = mask & np.array([[bool(text.strip())] for text in said])
  return tokens, mask


def _check_texts(name: str, said: list[str]) -> None:
  """Refuse what is no text, and text that no tokenizer can encode."""
  for index, text in enumerate(said):
    if not isinstance(text, str) or not _encodes(text):
      raise ValueError(
        f"{name}[{index}] must be Unicode text, got {schema.quote(text)}"
      )


def _encodes(text: str) -> bool:
  return not any("\ud800" <= letter <= "\udfff" for letter in text)


def behind(number: int, own: str | None, null: str) -> list[str] | None:
  """Say what a text encoder's guidance leads away from.

  None is the null that is learned. The null "prompt" is the empty text; one
  that is stored takes its place.

  Args:
    number: of the prompts, B.
    own: the recipe's negative prompt; None is the null.
    null: the encoder's rule.
  """
  if own is None and null == "learned":
    return None
  return [own or ""] * number


def ready(
  text: types.Text, number: int, guided: bool, learned: bool
) -> types.Text:
  """Check prompts that come encoded; add the null if it is the learned one.

  Args:
    text: embeds [B, M, E], mask [B, M] and perhaps pooled [B, E]; where
      guidance leads away from another text, [2B, ...], that text first.
    number: of the prompts, B.
    guided: whether there is guidance.
    learned: whether it leads away from the learned null.
  """
  rows = number if learned else number * (1 + guided)
  if len(text.embeds) != rows:
    raise ValueError(
      f"text must be of the {number} prompts, {rows} rows, got "
      f"{len(text.embeds)}; encode_text makes them"
    )
  if not (learned and guided):
    return text
  join = lambda x: np.concatenate([np.zeros_like(x), x])
  return jax.tree.map(join, text)


def without(text: types.Text, number: int) -> types.Text:
  """Put the null that is learned in the place of a number of first rows."""
  join = lambda x: np.concatenate([np.zeros_like(x[:number]), x[number:]])
  return jax.tree.map(join, text)

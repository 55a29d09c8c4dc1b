"""Laws of prompts: negative ones first, and one for each."""

import numpy as np
import pytest

from vdit_jax import types
from vdit_jax.text import prompts


class Letters:
  """A tokenizer of a token a letter."""

  def encode(self, captions, max_length):
    tokens = np.zeros((len(captions), max_length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, text in enumerate(captions):
      ids = [ord(c) for c in text[: max_length - 1]] + [1]
      tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return tokens, mask


def text_of(rows):
  embeds = np.arange(1.0, rows * 6 + 1).reshape(rows, 3, 2)
  return types.Text(embeds=embeds, mask=np.ones((rows, 3), bool))


def test_negative_prompts_go_before_the_prompts():
  tokens, mask = prompts.encode(Letters(), ["ab", "c"], ["", "xyz"], 4)
  want, said = Letters().encode(["", "xyz", "ab", "c"], 4)
  np.testing.assert_array_equal(tokens, want)
  np.testing.assert_array_equal(mask, said)


def test_a_blank_text_is_the_null_where_that_is_learned():
  said = Letters(), ["ab", " "], ["", "xyz"], 4
  _, mask = prompts.encode(*said, learned=True)
  assert mask.any(1).tolist() == [False, True, True, False]
  _, mask = prompts.encode(*said)
  assert mask.any(1).all()


def test_one_text_is_no_list_of_negative_prompts():
  with pytest.raises(ValueError, match="list of texts, one a prompt, got 'no'"):
    prompts.check(["a cat", "a dog"], "no")


def test_the_null_has_no_token_that_is_seen():
  tokens, mask = prompts.encode(Letters(), ["ab", "c"], None, 4)
  assert tokens.shape == mask.shape == (4, 4)
  assert tokens.dtype == np.int32 and mask.dtype == bool
  assert not mask[:2].any()
  np.testing.assert_array_equal(tokens[2:], Letters().encode(["ab", "c"], 4)[0])
  np.testing.assert_array_equal(mask[2:], Letters().encode(["ab", "c"], 4)[1])


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("a cat", None), "prompts must be a list of texts, got 'a cat'"),
    (([], None), r"prompts must be a list of texts, got \[\]"),
    ((["a", "b"], ["c"]), "negative_prompts must be one a prompt, got 1 for 2"),
    ((["a"], ["b"], True), "negative_prompts need text=None"),
  ],
)
def test_what_does_not_pair_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    prompts.check(*arguments)


def test_the_learned_null_is_put_before_encoded_prompts():
  text = text_of(2)
  got = prompts.ready(text, 2, guided=True, learned=True)
  assert not np.any(got.embeds[:2]) and not np.any(got.mask[:2])
  assert got.mask.dtype == bool
  np.testing.assert_array_equal(got.embeds[2:], text.embeds)
  np.testing.assert_array_equal(got.mask[2:], text.mask)


@pytest.mark.parametrize(
  "guided, learned, rows",
  [(False, True, 2), (False, False, 2), (True, False, 4)],
)
def test_encoded_prompts_without_a_learned_null_come_whole(
  guided, learned, rows
):
  text = text_of(rows)
  assert prompts.ready(text, 2, guided=guided, learned=learned) is text
  for other in (rows - 1, rows + 1):
    message = f"text .* 2 prompts, {rows} rows, got {other}"
    with pytest.raises(ValueError, match=message):
      prompts.ready(text_of(other), 2, guided=guided, learned=learned)


def test_only_a_learned_null_has_no_text():
  assert prompts.behind(2, None, "learned") is None
  for null in ("stored", "prompt"):
    assert prompts.behind(2, None, null) == ["", ""]
  assert prompts.behind(2, "blurred", "learned") == ["blurred", "blurred"]


def test_the_learned_null_is_put_before_pooled_embeddings_too():
  text = types.Text(np.ones((2, 3, 4)), np.ones((2, 3), bool), np.ones((2, 5)))
  ready = prompts.ready(text, 2, guided=True, learned=True)
  assert ready.pooled.shape == (4, 5)
  assert not ready.pooled[:2].any() and not ready.mask[:2].any()
  assert prompts.ready(text, 1, guided=True, learned=False) is text
  with pytest.raises(ValueError, match="of the 2 prompts, 4 rows, got 2"):
    prompts.ready(text, 2, guided=True, learned=False)

"""What guidance leads away from, and prompts that come encoded."""

import numpy as np
import pytest

from vdit_jax import types
from vdit_jax.text import prompts


def test_only_a_learned_null_has_no_text():
  assert prompts.behind(2, None, {"learned"}) is None
  assert prompts.behind(2, None, {"stored"}) == ["", ""]
  assert prompts.behind(2, None, {"learned", "prompt"}) == ["", ""]
  assert prompts.behind(2, "blurred", {"learned"}) == ["blurred", "blurred"]


def test_the_learned_null_is_put_before_pooled_embeddings_too():
  text = types.Text(np.ones((2, 3, 4)), np.ones((2, 3), bool), np.ones((2, 5)))
  ready = prompts.ready(text, 2, guided=True, learned=True)
  assert ready.pooled.shape == (4, 5)
  assert not ready.pooled[:2].any() and not ready.mask[:2].any()
  assert prompts.ready(text, 1, guided=True, learned=False) is text
  with pytest.raises(ValueError, match="of the 2 prompts, 4 rows, got 2"):
    prompts.ready(text, 2, guided=True, learned=False)

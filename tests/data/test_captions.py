import math

import numpy as np
import pytest

from vdit_jax.data import captions


@pytest.mark.parametrize(
  "text",
  [
    "a ball rolls LEFT.",
    "the leftmost of three",
    "on the right-hand side",
    "it drifts rightwards",
    "hands turn clockwise",
    "a counter-clockwise spin",
    "anticlockwise",
  ],
)
def test_captions_that_tell_sides_are_found(text):
  with pytest.raises(ValueError, match="says '.+'.*flip=False") as error:
    captions.refuse_sides(["a bright cleft", text], "some/key")
  assert repr(text) in str(error.value) and "some/key" in str(error.value)


def test_other_captions_are_not():
  texts = ["a bright, upright piano", "copyright", "clockwork", "a cleft chin"]
  captions.refuse_sides(texts, "key")


def test_one_of_several_captions_is_drawn():
  rng = np.random.default_rng(0)
  drawn = [captions.draw(["a", "b", "c"], rng) for _ in range(300)]
  assert min(drawn.count(text) for text in "abc") > 70
  assert captions.draw(["a", "b"], None) == "a"


@pytest.mark.parametrize(
  "label, said",
  [
    ("ApplyEyeMakeup", "apply eye makeup"),
    ("jump_rope", "jump rope"),
    ("dog", "dog"),
  ],
)
def test_labels_are_said_in_words(label, said):
  assert captions.of_label("a video of {label}", label) == f"a video of {said}"


def test_numbers_that_are_known_are_said():
  templates = ("motion score: {motion_score:.1f}.", "{fps:.0f} fps.")
  numbers = {"motion_score": 5.04, "fps": 8.0}
  text = captions.with_numbers("a dog.", templates, numbers)
  assert text == "a dog. motion score: 5.0. 8 fps."
  numbers["motion_score"] = math.nan
  assert captions.with_numbers("a dog.", templates, numbers) == "a dog. 8 fps."
  assert captions.with_numbers("", templates, {"fps": 8.0}) == "8 fps."
  for broken in ("motion {score", "score {}", "{score:d}", "{score.name}"):
    with pytest.raises(ValueError, match="broken"):
      captions.fields(broken)
  assert captions.fields("{a:.1f} and {b}") == ["a", "b"]

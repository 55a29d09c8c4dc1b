"""Keys are made from params and back, one to one; all differences are told."""

import jax
import ml_dtypes
import numpy as np
import pytest

from vdit_jax.convert import rules


def _spec(*shape, dtype=np.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


TABLE = (
  rules.Rule("embed.weight", "embed/embedding"),
  rules.Rule(
    r"blocks\.(\d+)\.(fc\d)\.weight", r"blocks/\2/kernel", rules.LINEAR, layer=1
  ),
  rules.Rule(r"down\.(\d+)\.conv(\d)\.bias", r"down_\1/conv_\2/bias"),
  rules.Rule("ofs.bias", "ofs/bias", optional=True),
)
PARAMS = {
  "embed/embedding": _spec(7, 4),
  "blocks/fc1/kernel": _spec(3, 4, 6),
  "blocks/fc2/kernel": _spec(3, 6, 4),
  "down_0/conv_1/bias": _spec(5),
  "down_10/conv_2/bias": _spec(5),
}
TENSORS = {
  "embed.weight": _spec(7, 4),
  **{f"blocks.{i}.fc1.weight": _spec(6, 4) for i in range(3)},
  **{f"blocks.{i}.fc2.weight": _spec(4, 6) for i in range(3)},
  "down.0.conv1.bias": _spec(5),
  "down.10.conv2.bias": _spec(5),
}


def test_keys_of_params():
  slots = rules.keys(TABLE, PARAMS)
  assert sorted(slots) == sorted(TENSORS)
  slot = slots["blocks.2.fc1.weight"]
  assert (slot.path, slot.row) == ("blocks/fc1/kernel", 2)
  slot = slots["down.10.conv2.bias"]
  assert (slot.path, slot.row) == ("down_10/conv_2/bias", None)


def test_a_checkpoint_that_fits():
  assert rules.check(TABLE, PARAMS, TENSORS) == rules.keys(TABLE, PARAMS)


def test_an_optional_rule_holds_when_the_param_is_there():
  params = PARAMS | {"ofs/bias": _spec(3)}
  tensors = TENSORS | {"ofs.bias": _spec(3)}
  assert rules.check(TABLE, params, tensors)["ofs.bias"].path == "ofs/bias"
  with pytest.raises(ValueError, match="missing: ofs.bias"):
    rules.check(TABLE, params, TENSORS)
  with pytest.raises(ValueError, match="left over: ofs.bias"):
    rules.check(TABLE, PARAMS, tensors)


def test_all_differences_are_in_one_error():
  tensors = dict(TENSORS)
  del tensors["blocks.1.fc2.weight"]
  tensors["blocks.3.fc1.weight"] = _spec(6, 4)
  tensors["blocks.0.fc1.weight"] = _spec(4, 6)
  tensors["embed.weight"] = _spec(7, 4, dtype=np.int32)
  tensors["down.0.conv1.bias"] = _spec(5, 1)
  with pytest.raises(ValueError, match="^the file does not fit") as error:
    rules.check(TABLE, PARAMS, tensors, what="the file")
  text = str(error.value)
  assert "in 5 places" in text
  assert "missing: blocks.1.fc2.weight (for blocks/fc2/kernel[1])" in text
  assert "left over: blocks.3.fc1.weight (6, 4)" in text
  assert "wrong shape: blocks.0.fc1.weight (4, 6)" in text
  assert "wants (6, 4)" in text
  assert "wrong dtype: embed.weight int32" in text
  assert "wrong shape: down.0.conv1.bias (5, 1)" in text


def test_only_keys_that_are_ignored_may_be_left_over():
  tensors = TENSORS | {"rope.inv_freq": _spec(2), "rope.inv_freq2": _spec(2)}
  with pytest.raises(ValueError, match="in 1 places") as error:
    rules.check(TABLE, PARAMS, tensors, ignored=(r"rope\.inv_freq",))
  assert "left over: rope.inv_freq2" in str(error.value)
  rules.check(TABLE, PARAMS, tensors, ignored=(r"rope\..*",))


def test_layers_of_several_dtypes_need_one():
  half = _spec(6, 4, dtype=ml_dtypes.bfloat16)
  tensors = TENSORS | {"blocks.1.fc1.weight": half}
  with pytest.raises(ValueError, match="bfloat16, float32; give a param_dtype"):
    rules.check(TABLE, PARAMS, tensors)
  rules.check(TABLE, PARAMS, tensors, mixed=True)


def test_an_integer_param_wants_its_dtype():
  table, params = [rules.Rule("n", "n")], {"n": _spec(2, dtype=np.int32)}
  rules.check(table, params, {"n": _spec(2, dtype=np.int32)})
  for dtype in (np.int64, np.float32):
    with pytest.raises(ValueError, match="wants int32"):
      rules.check(table, params, {"n": _spec(2, dtype=dtype)})


def test_a_table_fills_each_param_just_once():
  more = {**PARAMS, "new/bias": _spec(2)}
  with pytest.raises(ValueError, match="param without a rule: new/bias"):
    rules.keys(TABLE, more)
  again = (*TABLE, rules.Rule("embed2.weight", "embed/embedding"))
  with pytest.raises(ValueError, match="param of several rules: embed/emb"):
    rules.keys(again, PARAMS)
  again = (*TABLE, rules.Rule("all.weight", "blocks/fc1/kernel"))
  with pytest.raises(ValueError, match=r"param of several.*fc1/kernel\[0\]"):
    rules.keys(again, PARAMS)
  again = (*TABLE, rules.Rule("new.bias", "new/bias"))
  with pytest.raises(ValueError, match="rule without a param: new.bias"):
    rules.keys(again, PARAMS)
  again = (*TABLE, rules.Rule("embed.weight", "new/bias"))
  with pytest.raises(ValueError, match="key of several rules: embed.weight"):
    rules.keys(again, more)


def test_a_row_without_a_rule_is_told():
  some = rules.Rule(r"a\.([01])\.bias", "a/bias", layer=1)
  with pytest.raises(ValueError, match=r"param without a rule: a/bias\[2\]"):
    rules.keys([some], {"a/bias": _spec(3, 4)})
  last = rules.Rule(r"last\.(2)\.bias", "a/bias", layer=1)
  assert list(rules.keys([some, last], {"a/bias": _spec(3, 4)})) == [
    "a.0.bias",
    "a.1.bias",
    "last.2.bias",
  ]


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"key": r"a\.\d+", "path": "a"}, "written back"),
    ({"key": "a(b(c))", "path": r"\1"}, "written back"),
    ({"key": "a(?:b)", "path": "a"}, "written back"),
    ({"key": "ab?", "path": "a"}, "written back"),
    ({"key": "a|b", "path": "a"}, "written back"),
    ({"key": r"a(\d)", "path": "a"}, r"must have \[1\]"),
    ({"key": r"a(\d)", "path": r"a\1\2"}, r"must have \[1\]"),
    ({"key": r"a(\d)", "path": r"a\1", "layer": 1}, r"must have \[\]"),
    ({"key": r"a(\d)", "path": "a", "layer": 2}, "one of its 1 groups"),
    ({"key": "a", "path": r"\a"}, "must have"),
  ],
)
def test_a_rule_that_has_no_inverse_is_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    rules.Rule(**kwargs)


@pytest.mark.parametrize(
  "transform, theirs, ours",
  [
    (rules.SAME, (2, 3), (2, 3)),
    (rules.LINEAR, (2, 3), (3, 2)),
    (rules.CONV2D, (2, 3, 4, 5), (4, 5, 3, 2)),
    (rules.CONV3D, (2, 3, 4, 5, 6), (4, 5, 6, 3, 2)),
  ],
)
def test_transforms_are_undone(transform, theirs, ours):
  x = np.arange(np.prod(theirs)).reshape(theirs).astype(ml_dtypes.bfloat16)
  y = transform.forward(x)
  assert y.shape == ours == rules.shape(transform.forward, theirs)
  assert rules.shape(transform.inverse, ours) == theirs
  np.testing.assert_array_equal(transform.inverse(y), x)
  if len(theirs) > 2:
    assert y[..., 1, 0].tolist() == x[0, 1].tolist()


def test_a_shape_of_another_rank_is_told():
  assert rules.shape(rules.LINEAR.forward, (2, 3, 4)) is None

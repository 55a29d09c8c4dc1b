"""What transformers 5 saves of a tokenizer, and files that are none."""

import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from vdit_jax.models.t5 import system, tokenizer
from vdit_jax.weights import diffusers_folder, tiny
from vdit_jax.weights import text_encoder as text_encoders

transformers = pytest.importorskip("transformers")

TEXTS = [
  "",
  " ",
  "a red seven moving left",
  "  two   dogs\n run\t",
  "über ½ ﬁ １２ 你好 😀 e\u0301 \u200b\x85x ガ\u3099 ﷺ",
  "<extra_id_3> and </s> <pad>x<unk>y <extra_id_99>",
  "a panda plays the guitar " * 300,
  "x" * 5000,
  "...!?",
]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  """A pipeline as released, and the same as diffusers saves it today."""
  old, new = (tmp_path_factory.mktemp("pipes") / n for n in ("old", "new"))
  tiny.write(old, "2b")
  shutil.copytree(old, new)
  theirs = transformers.T5Tokenizer.from_pretrained(old / "tokenizer")
  shutil.rmtree(new / "tokenizer")
  theirs.save_pretrained(new / "tokenizer")
  assert not (new / "tokenizer" / "spiece.model").exists()
  return old, new


@pytest.mark.parametrize("length", [1, 8, 64])
def test_a_tokenizer_json_gives_the_ids_of_transformers(released, length):
  old, new = (folder / "tokenizer" for folder in released)
  ours = system.NETWORK.read_tokenizer(new)
  theirs = transformers.AutoTokenizer.from_pretrained(new)
  want = theirs(
    TEXTS,
    padding="max_length",
    max_length=length,
    truncation=True,
    return_tensors="np",
  )
  tokens, mask = ours.encode(TEXTS, length)
  np.testing.assert_array_equal(tokens, want["input_ids"])
  np.testing.assert_array_equal(mask, want["attention_mask"])
  same = system.NETWORK.read_tokenizer(old)
  np.testing.assert_array_equal(tokens, same.encode(TEXTS, length)[0])
  assert ours.vocab_size == same.vocab_size == len(theirs)
  for text in TEXTS[2:4]:
    assert ours.cut(text, length) == same.cut(text, length)
  again, _ = pickle.loads(pickle.dumps(ours)).encode(TEXTS, length)
  np.testing.assert_array_equal(again, tokens)


def test_it_decodes_what_it_encoded(released):
  ours = system.NETWORK.read_tokenizer(released[1] / "tokenizer")
  texts = ["two dogs run along", ""]
  assert ours.decode(ours.encode(texts, 64)[0]) == texts


def test_a_pipeline_that_was_saved_today_is_whole(released):
  old, new = released
  found = diffusers_folder.read(new)
  assert found.tokenizers == {"text_encoder": new / "tokenizer"}
  texts = TEXTS[:4]
  ours, same = (text_encoders.load(path, "float32") for path in (new, old))
  want = same.encode(texts, 16)
  np.testing.assert_array_equal(ours.encode(texts, 16).embeds, want.embeds)
  assert text_encoders.fingerprint(old) != text_encoders.fingerprint(new)


def test_the_original_goes_before_the_derived(released, tmp_path):
  old, new = (folder / "tokenizer" for folder in released)
  shutil.copytree(old, tmp_path / "both")
  shutil.copy(new / "tokenizer.json", tmp_path / "both")
  found = system.NETWORK.find_tokenizer(tmp_path / "both")
  assert [file.name for file in found] == ["spiece.model"]
  os.remove(tmp_path / "both" / "spiece.model")
  found = system.NETWORK.find_tokenizer(tmp_path / "both")
  assert [file.name for file in found] == ["tokenizer.json"]
  with pytest.raises(ValueError, match="no spiece.model or tokenizer.json"):
    system.NETWORK.read_tokenizer(tmp_path)


def _model(data, change):
  proto = sentencepiece_model_pb2.ModelProto.FromString(data)
  change(proto)
  return proto.SerializeToString()


def _charsmap(proto, size=1024):
  blob = random.Random(0).randbytes(size + 99) + b"\0"
  whole = size.to_bytes(4, "little") + blob
  proto.normalizer_spec.precompiled_charsmap = whole


def _scores(value):
  return lambda proto: setattr(proto.pieces[9], "score", value)


def _json(change):
  def changed(data):
    fields = json.loads(data)
    change(fields)
    return json.dumps(fields).encode()

  return changed


NOISE = random.Random(0).randbytes(9999)
# By file, what becomes of its bytes.
BAD = {
  "spiece.model": {
    "empty": lambda data: b"",
    "noise": lambda data: NOISE,
    "cut": lambda data: data[: len(data) // 2],
    "tail": lambda data: data[:-1],
    "text": lambda data: b"a text",
    "nan": lambda data: _model(data, _scores(float("nan"))),
    "inf": lambda data: _model(data, _scores(float("-inf"))),
    "charsmap": lambda data: _model(data, _charsmap),
    "no pieces": lambda data: _model(data, lambda m: m.ClearField("pieces")),
    "char": lambda data: _model(
      data, lambda m: setattr(m.trainer_spec, "model_type", 4)
    ),
  },
  "tokenizer.json": {
    "empty": lambda data: b"",
    "noise": lambda data: NOISE,
    "cut": lambda data: data[: len(data) // 2],
    "tail": lambda data: data[:-1],
    "list": lambda data: b"[]",
    "nothing": lambda data: b"{}",
    "deep": lambda data: b"[" * 10**6,
    "nan": lambda data: data.replace(b"-1", b"NaN"),
    "no model": _json(lambda x: x.pop("model")),
    "no pieces": _json(lambda x: x["model"].update(vocab=[])),
    "unknown": _json(lambda x: x["model"].update(unk_id=10**6)),
    "words": _json(
      lambda x: x["model"].update(
        type="WordLevel",
        vocab={"<pad>": 0, "</s>": 1, "<unk>": 2},
        unk_token="<unk>",
      )
    ),
    "unsplit": _json(lambda x: x.update(pre_tokenizer=None)),
    "charsmap": _json(
      lambda x: x.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAEC"}
      )
    ),
    "order": _json(lambda x: x["model"]["vocab"].reverse()),
  },
}


@pytest.mark.parametrize(
  ("name", "harm"), [(name, harm) for name in BAD for harm in BAD[name]]
)
def test_a_bad_file_is_refused_when_it_is_loaded(
  released, tmp_path, name, harm
):
  source = released[name == "tokenizer.json"] / "tokenizer" / name
  (tmp_path / name).write_bytes(BAD[name][harm](source.read_bytes()))
  with pytest.raises(ValueError, match=name) as error:
    system.NETWORK.read_tokenizer(tmp_path)
  assert str(tmp_path) in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_file_is_refused(tmp_path, name):
  (tmp_path / name).mkdir()
  with pytest.raises(ValueError, match="must be a file, but is a folder"):
    system.NETWORK.read_tokenizer(tmp_path)
  (tmp_path / name).rmdir()
  os.mkfifo(tmp_path / name)
  with pytest.raises(ValueError, match="must be a file, but is none"):
    system.NETWORK.read_tokenizer(tmp_path)


@pytest.mark.parametrize("value", ["100", -1, 1.5, 10**9, None, [1]])
def test_a_bad_count_of_sentinels_is_refused(released, tmp_path, value):
  shutil.copy(released[0] / "tokenizer" / tokenizer.FILE, tmp_path)
  config = tmp_path / "tokenizer_config.json"
  config.write_text(json.dumps({"extra_ids": value}))
  with pytest.raises(ValueError, match="config.json: extra_ids must be"):
    system.NETWORK.read_tokenizer(tmp_path)

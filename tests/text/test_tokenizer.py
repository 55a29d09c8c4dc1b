import io
import itertools
import json
import pickle

import numpy as np
import pytest
import sentencepiece

from vdit_jax.data import digits
from vdit_jax.models.t5 import tokenizer as t5
from vdit_jax.text import tokenizer

SCENES = [(digit,) for digit in digits.singles() if not digits.held_out(digit)]
CAPTIONS = [digits.caption(scene) for scene in SCENES]
PAIRS = [f"{a} and {b}" for a, b in zip(CAPTIONS, CAPTIONS[7:], strict=False)]
HARD = [
  "",
  " ",
  " \n\t ",
  "  a   red  seven ",
  "a\tred\nseven\r\nmoving\x0bup\x85left\u2028a\xa0b\u3000c\u200bd\ufeff",
  "👍 👩\u200d👩\u200d👧 ❤\ufe0f 1\ufe0f\u20e3 🇫🇷",
  "猫が好き 日本 한국",
  "café e\u0301 İ ß ﬁ ① Ⅻ ½ ｆｕｌｌ … Привет",
  "a▁red ▁seven▁",
  "a </s> red",
  "red</s>seven</s>",
  "<pad><pad>red <pad>",
  "x<unk>猫犬<unk>",
  "<extra_id_0> a<extra_id_1>red<extra_id_99><extra_id_100>",
  "<extra_id_0></s> <s> < /s> <Pad> </S>",
  "a\x00b\x07c\ufffd\u00ad",
  "<0x41> ＜/s＞ ＜pad＞a",
  "..... !!!! ----.. standingggg sssseeven ...?!",
]
PROMPT = "a red seven moving up left and an orange two standing still"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  return tokenizer.train(CAPTIONS + PAIRS, path)


def test_training_repeats_to_the_byte(tmp_path, trained):
  path = tmp_path / "a" / "tokenizer.model"
  tokenizer.train(CAPTIONS + PAIRS, path)
  assert path.read_bytes() == trained.model
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  assert tokenizer.load(path) == trained


def test_layout(trained):
  pieces = [trained.processor.id_to_piece(i) for i in range(4)]
  assert pieces == ["<pad>", "</s>", "<unk>", "<0x00>"]
  assert trained.processor.bos_id() == -1
  assert trained.vocab_size == trained.processor.vocab_size() < 512


@pytest.mark.parametrize("captions", [CAPTIONS, CAPTIONS + PAIRS])
def test_each_word_is_one_token(tmp_path, captions):
  trained = tokenizer.train(captions, tmp_path / "tokenizer.model")
  for word in {word for caption in captions for word in caption.split()}:
    assert len(trained.processor.encode(word)) == 1, word
  held_out = digits.held_out_prompts(144, seed=0)
  _, mask = trained.encode(held_out, 20)
  words = [len(prompt.split()) for prompt in held_out]
  np.testing.assert_array_equal(mask.sum(1), np.add(words, 1))


def test_encoding_ends_pads_and_decodes_back(trained):
  texts = [PROMPT, CAPTIONS[0], "", "Schrödinger's 猫 moves"]
  tokens, mask = trained.encode(texts, 64)
  assert tokens.dtype == np.int32 and mask.dtype == bool
  assert tokens.shape == mask.shape == (4, 64)
  np.testing.assert_array_equal(tokens == tokenizer.PAD, ~mask)
  ends = mask.sum(1) - 1
  np.testing.assert_array_equal(tokens[range(4), ends], tokenizer.EOS)
  assert (tokens == tokenizer.EOS).sum(1).tolist() == [1] * 4
  assert not (tokens == tokenizer.UNK).any()
  assert trained.decode(tokens) == texts


def test_the_empty_text_is_the_end_alone(trained):
  tokens, mask = trained.encode([""], 4)
  assert tokens.tolist() == [[tokenizer.EOS, 0, 0, 0]]
  assert mask.tolist() == [[True, False, False, False]]


def test_truncation_keeps_the_end_token(trained):
  whole, _ = trained.encode([PROMPT], 13)
  tokens, mask = trained.encode([PROMPT], 5)
  assert whole[0, -1] == tokens[0, -1] == tokenizer.EOS and mask.all()
  np.testing.assert_array_equal(tokens[0, :4], whole[0, :4])


@pytest.mark.parametrize(
  "prompt", [PROMPT, f"  {PROMPT}", "猫 and 猫 and a red"]
)
def test_check_warns_of_precisely_what_is_cut(trained, caplog, prompt):
  length = len(trained.processor.encode(prompt)) + 1
  trained.check([prompt], length)
  assert not caplog.records
  trained.check([CAPTIONS[0], prompt], length - 2)
  cut = trained.cut(prompt, length - 2)
  assert prompt.endswith(cut) and cut.split() == prompt.split()[-2:]
  assert f"prompts[1] is longer than {length - 2} tokens" in caplog.text
  assert repr(cut) in caplog.text


def test_check_warns_once_of_each_prompt_by_its_name(trained, caplog):
  long = f"{PROMPT} and {PROMPT}"
  trained.check(["", long, long, PROMPT, long], 16, "negative_prompts")
  (record,) = caplog.records
  assert "negative_prompts[1] is longer than 16 tokens" in record.getMessage()


def test_what_is_cut_is_said_without_what_controls_a_terminal(trained, caplog):
  trained.check([f"{PROMPT} \x1b[2J\n\u202e" + "a" * 10_000], 5)
  message = caplog.records[0].getMessage()
  assert "\\x1b" in message and message.isprintable() and len(message) < 700


def test_bad_sizes_are_refused(trained, tmp_path):
  with pytest.raises(ValueError, match="vocab_size must be above .* got 200"):
    tokenizer.train(CAPTIONS, tmp_path / "t", vocab_size=200)
  with pytest.raises(ValueError, match="captions must have words"):
    tokenizer.train([], tmp_path / "t")
  with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
    trained.encode([PROMPT], 0)
  assert not list(tmp_path.iterdir())


def test_missing_file_names_the_command_that_trains_it(tmp_path):
  with pytest.raises(ValueError, match="vdit_jax.data.tokenizer --data="):
    tokenizer.load(tmp_path / "tokenizer.model")


def test_a_used_tokenizer_goes_to_another_process(trained):
  trained.encode([PROMPT], 20)
  again = pickle.loads(pickle.dumps(trained))
  np.testing.assert_array_equal(
    again.encode([PROMPT], 20)[0], trained.encode([PROMPT], 20)[0]
  )


def _spiece(**settings):
  """A model in T5's settings, unless told otherwise."""
  model = io.BytesIO()
  settings = {"pad_id": 0, "unk_id": 2} | settings
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([*CAPTIONS, *HARD[6:8] * 20]),
    model_writer=model,
    model_type="unigram",
    vocab_size=400,
    hard_vocab_limit=False,
    eos_id=1,
    bos_id=-1,
    character_coverage=0.995,
    num_threads=1,
    minloglevel=2,
    **settings,
  )
  return model.getvalue()


_SENTINELS = [f"<extra_id_{i}>" for i in range(3)]
RELEASES = {
  "t5": ({}, None),
  "t5_config": ({}, {"extra_ids": 100, "legacy": True}),
  "mt5": ({"byte_fallback": True}, {"extra_ids": 0}),
  "umt5": (
    {"byte_fallback": True, "user_defined_symbols": _SENTINELS[::-1]},
    {"extra_ids": 0},
  ),
}


@pytest.fixture(scope="module", params=RELEASES)
def release(request, tmp_path_factory):
  settings, config = RELEASES[request.param]
  folder = tmp_path_factory.mktemp(request.param)
  (folder / "spiece.model").write_bytes(_spiece(**settings))
  if config is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def _theirs(folder):
  transformers = pytest.importorskip("transformers")
  return transformers.T5Tokenizer.from_pretrained(folder)


def _check_equal(folder, texts, max_length):
  tokens, mask = t5.load(folder / t5.FILE).encode(texts, max_length)
  want = _theirs(folder)(
    texts,
    padding="max_length",
    truncation=True,
    max_length=max_length,
    return_tensors="np",
  )
  for text, ids, found in zip(texts, want["input_ids"], tokens, strict=True):
    assert found.tolist() == ids.tolist(), text
  np.testing.assert_array_equal(mask, want["attention_mask"])


@pytest.mark.parametrize("max_length", [1, 2, 7, 64])
def test_release_equals_transformers(release, max_length):
  _check_equal(release, HARD, max_length)


def test_release_equals_transformers_on_any_joint(release):
  parts = [*HARD, *"a猫 ▁<.", "red", "  ", "\n", "</s>", "👍", "..", "...."]
  pairs = ["".join(pair) for pair in itertools.product(parts, parts)]
  _check_equal(release, pairs, 128)


def test_special_tokens_of_a_release(tmp_path):
  (tmp_path / "spiece.model").write_bytes(_spiece())
  released = t5.load(tmp_path / t5.FILE)
  size = released.processor.vocab_size()
  assert released.vocab_size == size + 100
  text = "</s><pad><unk><extra_id_99><extra_id_0>"
  tokens, mask = released.encode([text], 6)
  assert tokens.tolist() == [[1, 0, 2, size, size + 99, 1]] and mask.all()
  assert released.decode(tokens)[0].strip() == "⁇"


def test_release_decodes_what_it_encoded(release):
  released = t5.load(release / t5.FILE)
  texts = [PROMPT, CAPTIONS[0], ""]
  assert released.decode(released.encode(texts, 64)[0]) == texts
  assert released.decode(released.encode(["a</s> red"], 9)[0]) == ["a red"]


def test_release_has_no_sentinels_beside_its_own(tmp_path):
  settings, _ = RELEASES["umt5"]
  (tmp_path / "spiece.model").write_bytes(_spiece(**settings))
  released = t5.load(tmp_path / t5.FILE)
  assert released.extra_ids == 0
  tokens, _ = released.encode(["".join(_SENTINELS)], 4)
  assert tokens.tolist() == [[5, 4, 3, 1]]


@pytest.mark.parametrize("special", ["</s>", "<extra_id_0>", "猫"])
def test_release_warns_of_precisely_what_is_cut(tmp_path, caplog, special):
  (tmp_path / "spiece.model").write_bytes(_spiece())
  released = t5.load(tmp_path / t5.FILE)
  prompt = f"  {special} and {special} {PROMPT}"
  _, mask = released.encode([prompt], 99)
  released.check([prompt], mask.sum())
  assert not caplog.records
  last = len(released.processor.encode("standing still"))
  cut = released.cut(prompt, mask.sum() - last)
  assert prompt.endswith(cut) and cut.split() == PROMPT.split()[-2:]
  released.check([prompt], mask.sum() - last)
  assert repr(cut) in caplog.text
  assert released.cut(prompt, 1).strip() == prompt.strip()


def test_a_used_release_goes_to_another_process(release):
  released = t5.load(release / t5.FILE)
  tokens, _ = released.encode(HARD, 64)
  again, _ = pickle.loads(pickle.dumps(released)).encode(HARD, 64)
  np.testing.assert_array_equal(again, tokens)


def test_what_is_no_release_is_refused(tmp_path):
  with pytest.raises(
    ValueError, match="spiece.model must be a file, but does not"
  ):
    t5.load(tmp_path / t5.FILE)
  (tmp_path / "spiece.model").write_bytes(_spiece(pad_id=3, unk_id=0))
  with pytest.raises(ValueError, match="<pad> </s> <unk> at .*, got"):
    t5.load(tmp_path / t5.FILE)
  (tmp_path / "spiece.model").write_bytes(_spiece(add_dummy_prefix=False))
  with pytest.raises(ValueError, match="must be a unigram model that puts"):
    t5.load(tmp_path / t5.FILE)

import pickle
import subprocess
import sys

import numpy as np
import pytest

from vdit_jax.data import digits, tokenizer

SCENES = [(digit,) for digit in digits.singles() if not digits.held_out(digit)]
CAPTIONS = [digits.caption(scene) for scene in SCENES]
PAIRS = [f"{a} and {b}" for a, b in zip(CAPTIONS, CAPTIONS[7:], strict=False)]
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


@pytest.mark.parametrize("blank", ["", " \n"])
def test_check_refuses_blank_prompts(trained, blank):
  with pytest.raises(ValueError, match=r"prompts\[1\] must say something"):
    trained.check([PROMPT, blank], 20)


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


def test_command_trains_from_a_data_set(data_dir, tmp_path):
  out = tmp_path / "work" / "tokenizer.model"
  command = [sys.executable, "-m", "vdit_jax.data.tokenizer", f"--out={out}"]
  command += ["--data=moving_digits/tiny", f"--data_dir={data_dir}"]
  subprocess.run(command, check=True)
  assert tokenizer.load(out).vocab_size > 259

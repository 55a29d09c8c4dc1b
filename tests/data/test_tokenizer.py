"""The command that trains a tokenizer."""

import subprocess
import sys

from vdit_jax.text import tokenizer


def test_command_trains_from_a_data_set(data_dir, tmp_path):
  out = tmp_path / "work" / "tokenizer.model"
  command = [sys.executable, "-m", "vdit_jax.data.tokenizer", f"--out={out}"]
  command += ["--data=moving_digits/tiny", f"--data_dir={data_dir}"]
  subprocess.run(command, check=True)
  assert tokenizer.load(out).vocab_size > 259

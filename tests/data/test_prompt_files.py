"""Files of prompts."""

import json
import os

import pytest

from vdit_jax.data import prompt_files


def _write(path, content):
  text = content if isinstance(content, str) else json.dumps(content)
  path.write_text(text)
  return path


def test_lines(tmp_path):
  path = _write(tmp_path / "prompts.txt", "a cat\n  two dogs \n")
  assert prompt_files.read(path) == [
    prompt_files.Prompt("a cat"),
    prompt_files.Prompt("two dogs"),
  ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lines_are_those_of_an_editor(tmp_path, encoding):
  """What else Unicode calls the end of a line stays in its prompt."""
  inner = "a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg"
  text = f"猫\r\n{inner}\ran end\nlast"
  path = tmp_path / "prompts.txt"
  path.write_bytes(text.encode(encoding))
  found = [prompt.text for prompt in prompt_files.read(path)]
  assert found == ["猫", inner, "an end", "last"]
  path.write_bytes(f"{text}\r\n".encode(encoding))
  assert [prompt.text for prompt in prompt_files.read(path)] == found


@pytest.mark.parametrize(
  "data, words",
  [
    ("a cat\nun café\n".encode("latin-1"), "line 2, is not utf-8 .byte 0xe9"),
    ("a cat\n".encode("utf-16-le"), "UTF-16 without a byte-order mark"),
    (
      "猫 cat and dog\n".encode("utf-16-be"),
      "UTF-16 without a byte-order mark",
    ),
    (b"\xff\xfea", "line 1, is not utf-16"),
  ],
)
def test_another_encoding_is_refused_by_file_and_line(tmp_path, data, words):
  path = tmp_path / "prompts.txt"
  path.write_bytes(data)
  with pytest.raises(
    ValueError, match=f"prompts.txt.*{words}.*save it as UTF-8"
  ):
    prompt_files.read(path)


def test_vbench_form(tmp_path):
  rows = [
    {"prompt_en": "a person swimming", "dimension": ["subject_consistency"]},
    {"prompt_en": "a cat", "dimension": "color", "auxiliary_info": {}},
    {"prompt_en": "a dog"},
  ]
  found = prompt_files.read(_write(tmp_path / "full_info.json", rows))
  assert [p.text for p in found] == ["a person swimming", "a cat", "a dog"]
  names = [p.dimensions for p in found]
  assert names == [("subject_consistency",), ("color",), ()]


@pytest.mark.parametrize(
  "name, content, words",
  [
    ("a.txt", "a cat\n\na dog\n", r"a.txt:2 is empty"),
    ("a.txt", "", "no prompt"),
    ("a.json", "[{", "not JSON"),
    ("a.json", "[" * 50_000, "nested too deep"),
    ("a.json", [{"prompt_en": ["x" * 10**6]}], "entry 0"),
    ("a.json", "[]", "no prompt"),
    ("a.json", {"prompt_en": "a cat"}, "holds a dict"),
    ("a.json", ["a cat"], "entry 0"),
    ("a.json", [{"prompt_en": "a cat"}, {"prompt": "a dog"}], "entry 1"),
    ("a.json", [{"prompt_en": " "}], "entry 0"),
    ("a.json", [{"prompt_en": "a cat", "dimension": 3}], "dimension 3"),
  ],
)
def test_what_is_no_prompt_is_refused_by_its_place(
  tmp_path, name, content, words
):
  with pytest.raises(ValueError, match=words) as refused:
    prompt_files.read(_write(tmp_path / name, content))
  assert len(str(refused.value)) < 400


def test_missing_file_is_said(tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    prompt_files.read(tmp_path / "none.txt")


def test_a_pipe_is_no_file_of_prompts(tmp_path):
  """It might never end."""
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(ValueError, match="prompts_file: .* must be a file"):
    prompt_files.read(tmp_path / "pipe")

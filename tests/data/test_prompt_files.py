"""Files of prompts."""

import json

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
  with pytest.raises(ValueError, match=words):
    prompt_files.read(_write(tmp_path / name, content))


def test_missing_file_is_said(tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    prompt_files.read(tmp_path / "none.txt")

"""Public functions say what they return, so that users' checkers know it."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "vdit_jax"


def _public(body, prefix=""):
  """The public functions of a module, and those of its public classes."""
  for node in body:
    if node.__class__ in (ast.ClassDef, ast.FunctionDef):
      if node.name == "__call__" or not node.name.startswith("_"):
        if isinstance(node, ast.ClassDef):
          yield from _public(node.body, f"{prefix}{node.name}.")
        else:
          yield f"{prefix}{node.name}", node


def _unsaid(path):
  tree = ast.parse(path.read_text())
  return [name for name, f in _public(tree.body) if f.returns is None]


def test_public_functions_say_what_they_return():
  found = {
    str(path.relative_to(PACKAGE)): unsaid
    for path in sorted(PACKAGE.rglob("*.py"))
    if (unsaid := _unsaid(path))
  }
  assert found == {}


def test_a_function_without_is_found(tmp_path):
  path = tmp_path / "a.py"
  path.write_text(
    "def f(): ...\ndef g() -> int: ...\ndef _h(): ...\n"
    "class A:\n  def m(self): ...\n  def __init__(self): ...\n"
  )
  assert _unsaid(path) == ["f", "A.m"]

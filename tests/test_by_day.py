"""That what is left to the night still is a test, of which some cases run by day as well where it says so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from by_day import CASES, NONE

TESTS = Path(__file__).parent


@pytest.mark.parametrize("name", CASES)
def test_its_tests_exist(name: str) -> None:
    file, test = name.split("::")
    functions = [each for each in ast.parse((TESTS / file).read_text()).body if isinstance(each, ast.FunctionDef)]
    (found,) = [each for each in functions if each.name == test]
    marks = " ".join(map(ast.unparse, found.decorator_list))
    assert CASES[name] == NONE or "parametrize" in marks or test == "test_every_family_is_exact"
    re.compile(CASES[name])

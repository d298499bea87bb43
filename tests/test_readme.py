"""What the README promises: its example runs, and its commands name things that exist."""

import ast
import re

from locations import ROOT

from pmoe_jax import cli
from pmoe_jax.config import FIELDS
from pmoe_jax.defend_config import FIELDS as DEFENCE_FIELDS

README = (ROOT / "README.md").read_text()


def test_the_python_examples_run(capsys):
    names = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(example, "README.md", "exec"), names)
    shape, rate, detected = capsys.readouterr().out.splitlines()
    assert shape == "(40, 4, 16)"
    assert 0 <= float(rate) <= 100
    assert 0 <= ast.literal_eval(detected)["far"] <= 100


def test_commands_and_fields_of_the_readme_exist():
    assert set(re.findall(r"^pmoe (\w+)", README, re.MULTILINE)) <= set(cli._commands())
    for field in re.findall(r"--config\.([\w.]+)=", README):
        assert field in FIELDS or field in DEFENCE_FIELDS
    for path in re.findall(r"configs/\w+\.py", README):
        assert (ROOT / path).is_file()
    for folder in re.findall(r"checkpoints/digits_\w+", README):
        assert (ROOT / folder / "config.json").is_file()
    for linked in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / linked).is_file()

"""The examples, in miniature, as scripts in a process and a folder of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FAMILIES = ("mace", "fairchem")


def test_examples_exist():
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_example_runs(example, tmp_path):
    text = example.read_text(encoding="utf-8")
    for family in FAMILIES:
        needed = f"stable_plugin.models.{family}" in text or f"native_{family}" in example.stem
        if needed and importlib.util.find_spec(family) is None:
            pytest.skip(f"{family} is not installed")
    for folder in ("recipes", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = {name: value for name, value in os.environ.items() if name != "STABLE_PLUGIN_EXAMPLES"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", f"examples/{example.name}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip()

"""Every shipped recipe in its small form, through the real command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_tools
import torch
import yaml
from ase.io import read

from stable_plugin.models.mace import MACEModule

ROOT = Path(__file__).parents[3]
RECIPES = {
    path.relative_to(ROOT / "recipes").with_suffix("").as_posix(): path for path in ROOT.glob("recipes/**/*.y*ml")
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipe_tools.small_data(tmp_path_factory.mktemp("data"))


def untrained_model(folder):
    """Write a model file for recipes that need one, and return its path."""
    from stable_plugin.models.mace.files import save_mace

    torch.manual_seed(0)
    module = MACEModule(r_max=4.5, hidden_irreps="4x0e", max_ell=1, correlation=1)
    module.build(read(ROOT / "recipes/data/aspirin_train.extxyz", ":2"))
    save_mace(module.model, folder / "untrained.model")
    return str(folder / "untrained.model")


def test_every_recipe_has_a_small_form():
    assert RECIPES
    assert set(recipe_tools.TINY) == set(RECIPES), "add the recipe to recipe_tools.TINY"


@pytest.mark.parametrize("name", RECIPES)
def test_train_finishes_every_recipe(name, data, tmp_path):
    if name == "peptide_esen":
        pytest.importorskip("fairchem")
    recipe = recipe_tools.tiny(name, data)
    if recipe.get("model") == "???":
        recipe["model"] = untrained_model(tmp_path)
    recipe["job"]["run_dir"] = str(tmp_path / "runs")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False))
    command = [sys.executable, "-m", "stable_plugin.cli", "train", "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    report = json.loads((folder / "report.json").read_text())
    stages = [stage for stage in ("before", "after", "evaluation") if stage in report]
    assert stages in (["before", "after"], ["evaluation"])
    for stage in stages:
        assert report[stage]["replicas"] == 2
        assert report[stage]["force_mae_mev_per_A"] > 0
    assert "<svg" in (folder / "report.html").read_text()

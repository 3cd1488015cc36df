"""The ``stable-plugin`` command."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from ase.io import read
from recipe_tools import ROOT

from stable_plugin.cli import main
from stable_plugin.integrations.recipes.shipped import shipped_recipes

DATA = ROOT / "recipes" / "data"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    toys = pytest.importorskip("toys")
    mace = pytest.importorskip("stable_plugin.models.mace")
    path = tmp_path_factory.mktemp("model") / "some.model"
    mace.save_mace(toys.tiny_mace([1, 6, 8]).float(), path)
    return str(path)


def test_main_shows_version_and_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"stable-plugin {version('stable-plugin')}\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "check", "evaluate", "recipes"))


def test_recipes_lists_shipped_recipes(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for path in (ROOT / "recipes").glob("*.yaml"):
        summary = path.read_text().splitlines()[0].removeprefix("# ")
        assert any(line.split(maxsplit=1) == [path.stem, summary] for line in lines)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_recipes_copies_a_recipe_with_its_data(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", name]) == 0
    assert f"stable-plugin train recipes/{name}.yaml" in capsys.readouterr().out
    copied = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert all((tmp_path / path).read_bytes() == (ROOT / path).read_bytes() for path in copied)
    # Every data file that the recipe names is there, wherever it names it.
    text = (tmp_path / "recipes" / f"{name}.yaml").read_text()
    named = {path.name for path in DATA.glob("*xyz") if path.name in text}
    assert named == {path.name for path in copied if path.suffix in (".xyz", ".extxyz")} != set()
    assert main(["recipes", name]) == 0, "unchanged files stay as they are"


def test_recipes_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "data").mkdir(parents=True)
    own = tmp_path / "recipes" / "data" / "aspirin_train.extxyz"
    own.write_text("mine")
    assert main(["recipes", "aspirin_mace"]) == 1
    assert "exists with other content and is not overwritten: move it away" in capsys.readouterr().err
    assert own.read_text() == "mine"
    assert not (tmp_path / "recipes" / "aspirin_mace.yaml").exists()


def test_recipes_refuses_an_unknown_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "aspirin"]) == 1
    assert "recipe 'aspirin' is not shipped: pass one of aspirin_mace," in capsys.readouterr().err


def test_evaluate_agrees_with_evaluator(model, tmp_path, capsys):
    from stable_plugin import BondDeviation, Evaluator, Langevin
    from stable_plugin.models import load_potential

    starts, reference = str(DATA / "aspirin_heldout.extxyz"), str(DATA / "aspirin_target.extxyz")
    out = tmp_path / "out"
    command = ["evaluate", model, starts, "--reference", reference, "--labeled", starts, "--temperature-K", "450"]
    command += ["--replicas", "3", "--ps", "0.01", "0.02", "--timestep-fs", "1", "--friction-per-ps", "2"]
    assert main([*command, "--threshold", "0.4", "--seed", "3", "--device", "cpu", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert shown.rstrip().endswith(f"Report: {out / 'report.html'}")
    expected = Evaluator(
        starts, reference, starts, integrator=Langevin(450.0, 1.0, 2.0), detector=BondDeviation(threshold=0.4),
        n_replicas=3, horizons_ps=[0.01, 0.02], seed=3,
    ).evaluate(load_potential(model))  # fmt: skip
    for name in ("replicas", "horizon_ps", "threshold", "unstable", "force_mae_mev_per_A", "energy_mae_mev_per_atom"):
        assert report["evaluation"][name] == pytest.approx(expected.summaries[0][name], rel=1e-6)
    assert report["extended"]["evaluation"]["horizon_ps"] == 0.02
    assert report["settings"]["temperature_K"] == 450.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.xyz"], "starts='missing.xyz' is not a file"),
        ([str(DATA / "aspirin_heldout.extxyz"), "--replicas", "0"], "n_replicas=0 is out of range"),
        ([str(DATA / "aspirin_heldout.extxyz"), "--temperature-K", "-5"], "temperature_K=-5.0 is out of range"),
        ([str(DATA / "aspirin_heldout.extxyz"), "--task-name", "omol"], "task_name='omol'"),
    ],
)
def test_evaluate_names_a_mistake(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", model, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_check_agrees_with_check_potential(model, tmp_path, capsys):
    from stable_plugin.evaluation import check_potential
    from stable_plugin.models import load_potential

    frames, findings = str(DATA / "aspirin_heldout.extxyz"), tmp_path / "findings.json"
    command = ["check", model, frames, "--temperature-K", "500", "--frames", "1", "--device", "cpu"]
    assert main([*command, "--json", str(findings)]) == 0
    found = check_potential(load_potential(model), frames, 500.0, n_frames=1)
    shown = capsys.readouterr().out
    assert shown.startswith("C9H8O4, 500 K: ") and all(f"- {problem}" in shown for problem in found.problems)
    written = json.loads(findings.read_text())["C9H8O4"]
    assert written["n_holes"] == found.n_holes and written["problems"] == found.problems
    assert main([*command, "--json", str(findings)]) == 1
    assert "exists and is not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.xyz"], "frames='missing.xyz' is not a file"),
        ([str(DATA / "aspirin_heldout.extxyz"), "--frames", "0"], "n_frames=0 is out of range"),
        ([str(DATA / "aspirin_heldout.extxyz"), "--temperature-K", "-5"], "temperature_K=-5.0 is out of range"),
    ],
)
def test_check_names_a_mistake(model, capsys, arguments, message):
    assert main(["check", model, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_train_names_a_missing_recipe(capsys):
    assert main(["train", "nowhere.yaml"]) == 1
    assert "recipe='nowhere.yaml' is not a file: pass the path of a recipe" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        main(["train", "nowhere.yaml", "--debug"])


def test_train_needs_no_fairchem(tmp_path):
    """A recipe of a MACE model imports nothing of fairchem, be it installed or not."""
    pytest.importorskip("mace")
    script = """
import sys
from stable_plugin.integrations.recipes.launch import prepare
prepare("recipes/aspirin_mace.yaml").validate()
print(sorted({name.partition(".")[0] for name in sys.modules} & {"fairchem", "torchtnt"}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr[-2000:]


def test_import_changes_no_logging():
    script = """
import logging, warnings
filters, show = warnings.filters[:], warnings.showwarning
import stable_plugin.cli
assert not logging.getLogger().handlers and warnings.showwarning is show
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_copied_data_can_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["recipes", "aspirin_mace"])
    assert len(read(tmp_path / "recipes/data/aspirin_train.extxyz", ":")) == 50

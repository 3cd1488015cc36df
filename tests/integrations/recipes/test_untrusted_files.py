"""Files that are read as data cannot run code; files that can are read only where the user names them."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import recipe_tools
import torch

from stable_plugin.integrations.recipes.instantiate import instantiate_arguments
from stable_plugin.integrations.recipes.targets import resolve_target
from stable_plugin.md.frames import read_frames
from stable_plugin.runtime.serialization import load_tensors

SOURCE = Path(__file__).parents[3] / "src" / "stable_plugin"

RUNS_CODE = re.compile(
    r"weights_only=False|pickle\.loads?\(|allow_pickle=True|yaml\.(unsafe_|full_)?load\(|\beval\(|\bexec\(|os\.system\(|subprocess"
)

EXPLICIT = {"models/mace/files.py": 1, "models/fairchem/files.py": 1, "md/files.py": 2}
"""Files that load or start code, and how often: the loaders of a potential that the user names, and the process that reads
a database first, whose program is fixed and whose argument is a path."""


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_unpickling_runs_code(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_only_model_loaders_can_run_code():
    found = {}
    for path in SOURCE.rglob("*.py"):
        # Not methods of modules, and not error messages.
        text = re.sub(r'(?<=[\w\])])\.eval\(|f?"[^"\n]*"', "", path.read_text())
        if hits := RUNS_CODE.findall(text):
            found[path.relative_to(SOURCE).as_posix()] = len(hits)
    assert found == EXPLICIT


@pytest.mark.parametrize("protocol", [2, 4])
def test_load_tensors_refuses_objects(tmp_path, protocol):
    path, mark = tmp_path / "some.ckpt", tmp_path / "mark"
    torch.save({"weights": torch.ones(2), "extra": Malicious(mark)}, path, pickle_protocol=protocol)
    with pytest.raises(
        ValueError, match=r"state '.*some\.ckpt' contains more than tensors and plain values.*not loaded"
    ):
        load_tensors(path, "state")
    assert not mark.exists()


def test_load_tensors_reads_plain_data(tmp_path):
    path = tmp_path / "some.ckpt"
    torch.save({"weights": torch.arange(3), "names": ["a"], "rate": 0.5}, path)
    assert load_tensors(path)["weights"].tolist() == [0, 1, 2]
    assert load_tensors(path)["rate"] == 0.5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipe_tools.small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def halfway(data, tmp_path_factory):
    """Return a recipe and the folder of its run, stopped after the supervised training."""
    recipe = recipe_tools.tiny("aspirin_mace", data)
    recipe["job"]["timestamp_id"] = "run"
    folder = tmp_path_factory.mktemp("halfway")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("stable_plugin.integrations.recipes.pipeline.StABlEPipeline._evaluated", stop)
        outcome = recipe_tools.run(recipe, folder / "run")
    assert isinstance(outcome.error, KeyboardInterrupt), outcome.message
    return recipe, outcome.folder


def stop(*_):
    raise KeyboardInterrupt


def resumed(halfway, tmp_path, name, damage, monkeypatch):
    """Resume a copy of the run with one damaged file; return the outcome, and whether all files are unchanged."""
    recipe, folder = halfway
    copied = tmp_path / "runs" / "run"
    shutil.copytree(folder, copied)
    damage(copied / name)
    before = contents(copied)
    monkeypatch.setattr("stable_plugin.evaluation.report.draw", lambda report, curves: [])
    outcome = recipe_tools.run(recipe, tmp_path, seconds=120.0)
    return outcome, contents(copied).items() >= before.items()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".ckpt", ".model", ".json")}


def malicious(mark):
    def damage(path):
        held = torch.load(path, weights_only=True) if path.suffix == ".ckpt" else {}
        torch.save({**held, "extra": Malicious(mark)}, path)

    return damage


@pytest.mark.parametrize("name", ["supervised/last.ckpt", "before.ckpt"])
def test_resume_refuses_a_malicious_checkpoint(halfway, tmp_path, name, monkeypatch):
    mark = tmp_path / "mark"
    outcome, untouched = resumed(halfway, tmp_path, name, malicious(mark), monkeypatch)
    assert re.search(rf"{name}' contains more than tensors and plain values", outcome.message)
    assert not mark.exists() and untouched


def test_resume_does_not_read_pickles(halfway, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    outcome, _ = resumed(halfway, tmp_path, "before.model", malicious(mark), monkeypatch)
    assert outcome.stage == "done", outcome.message
    assert not mark.exists()


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", ["supervised/last.ckpt", "before.ckpt"])
def test_resume_names_a_truncated_checkpoint(halfway, tmp_path, name, fraction, monkeypatch):
    def cut(path):
        content = path.read_bytes()
        path.write_bytes(content[: int(fraction * len(content))])

    outcome, untouched = resumed(halfway, tmp_path, name, cut, monkeypatch)
    assert re.search(rf"{name}' (is truncated or damaged|contains more than)", outcome.message), outcome.message
    assert untouched


def test_resume_refuses_weights_of_another_model(halfway, tmp_path, monkeypatch):
    def other(path):
        torch.save({"state_dict": {"weight": torch.ones(1)}, "mace_statistics": None}, path)

    outcome, untouched = resumed(halfway, tmp_path, "before.ckpt", other, monkeypatch)
    assert re.search(r"weights '.*before\.ckpt' are of another model|fine-tuned model", outcome.message), (
        outcome.message
    )
    assert untouched


def test_fairchem_checkpoint_names_only_fairchem(tmp_path):
    pytest.importorskip("fairchem")
    from fairchem_tools import network, tasks

    from stable_plugin.models.fairchem.files import FairchemModel, as_container

    model = FairchemModel.from_configs(network("esen"), tasks("esen"), task_name="omol")
    for config in (
        {**as_container(model.model_config), "_target_": "os.mkdir", "path": str(tmp_path / "mark")},
        {**as_container(model.model_config), "backbone": {"model": "os.mkdir", "path": str(tmp_path / "mark")}},
        {
            **as_container(model.model_config),
            "backbone": {"model": "subprocess.Popen", "args": ["touch", str(tmp_path / "mark")]},
        },
    ):
        with pytest.raises(ValueError, match=r"(_target_|model)='.*' is not a (part of fairchem|network)"):
            FairchemModel.from_configs(config, model.tasks_config)
    with pytest.raises(ValueError, match=r"tasks_config\[0\]\._target_='os\.mkdir' is not a part of fairchem"):
        model.set_tasks([{"_target_": "os.mkdir", "path": str(tmp_path / "mark")}])
    assert not (tmp_path / "mark").exists()


REFUSED = [
    "os.system", "posix.system", "os.mkdir", "builtins.eval", "builtins.exec", "builtins.open", "subprocess.run", "sys.exit",
    "shutil.rmtree", "importlib.import_module", "pickle.loads", "runpy.run_path", "webbrowser.open", "pathlib.Path.write_text",
    "stable_plugin.models.mace.files.os.replace", "stable_plugin.integrations.recipes.pipeline.shutil.rmtree", "torch.os.system",
    "torch.load", "torch.serialization.load", "torch.hub.load", "torch.jit.load", "torch.utils.cpp_extension.load",
    "numpy.load", "hydra.utils.get_method", "hydra.utils.instantiate",
]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_resolve_target_refuses_unsafe_names(name):
    with pytest.raises(
        ValueError, match=rf"runner\.model\._target_='{re.escape(name)}' .*may not call.*: pass a class"
    ):
        resolve_target(name, "runner.model._target_")


@pytest.mark.parametrize(
    "name", ["stable_plugin.Nothing", "nowhere.Thing", "stable_plugin", "torch.float32", "", None, 3, ".", "a..b"]
)
def test_resolve_target_refuses_invalid_names(name):
    with pytest.raises(
        ValueError, match=r"^at=.*(cannot be imported|is not a name|is a (module|dtype)).*: pass the full name"
    ):
        resolve_target(name, "at")


@pytest.mark.parametrize(
    "name",
    ["stable_plugin.StABlECallback", "pytorch_lightning.Trainer", "torch.optim.lr_scheduler.CosineAnnealingLR",
     "torch.nn.functional.mse_loss", "torchmetrics.MeanMetric", "mace.modules.WeightedEnergyForcesLoss",
     "fairchem.core.modules.loss.L2NormLoss", "lightning.pytorch.Trainer", "toys.tiny_mace"],
)  # fmt: skip
def test_resolve_target_imports_training_packages(name):
    assert callable(resolve_target(name, "at"))


def test_instantiate_validates_everything_first(tmp_path):
    from omegaconf import OmegaConf

    def takes(first=None, second=None):
        return first, second

    made_first = {"_target_": "toys.tiny_mace"}
    last = {"_target_": "os.mkdir", "path": str(tmp_path / "mark")}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("toys.tiny_mace", lambda: (tmp_path / "made").mkdir())
        with pytest.raises(ValueError, match=r"runner\.second\._target_='os\.mkdir'"):
            instantiate_arguments(takes, {"first": OmegaConf.create(made_first), "second": OmegaConf.create(last)})
    assert not list(tmp_path.iterdir())


def test_recipes_let_the_runner_validate_parts():
    for path in (SOURCE.parents[1] / "recipes").glob("*.yaml"):
        runner = path.read_text().partition("\nrunner:\n")[2]
        assert "  _recursive_: false" in runner.splitlines()[1], path.name


def test_measured_curve_refuses_objects(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([Malicious(tmp_path / "mark")], dtype=object))
    from stable_plugin.observables.measured import MeasuredCurve

    with pytest.raises(ValueError, match="target_file="):
        MeasuredCurve.from_file(tmp_path / "objects.npy")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "name", ["a.traj", "a.extxyz", "a.pckl", "a.pkl", "a.json", "a.db", "a.aselmdb", "a.py", "a.cif", "a.nc", "a"]
)
def test_read_frames_refuses_pickles(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Malicious(tmp_path / "mark"), protocol=2) + b"\n")
    with pytest.raises(
        ValueError, match=rf"structures='.*{re.escape(name)}' (cannot be read|is a \.pkl file, which is not read)"
    ):
        read_frames(tmp_path / name)
    assert not (tmp_path / "mark").exists()


def test_instantiate_shows_arguments_of_an_error():
    from omegaconf import OmegaConf

    part = [{"_target_": "stable_plugin.BondLengths"}, {"_target_": "stable_plugin.BondLengths", "extra": -0.5}]
    with pytest.raises(ValueError, match=r"runner\.first.*1.*Unexpected keyword.*extra=-0\.5"):
        instantiate_arguments(lambda first: first, {"first": OmegaConf.create(part)})

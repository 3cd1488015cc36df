"""``stable-plugin repair``: from the file of a family's own trainer to a file that its calculator opens."""

import json
import subprocess
import sys

import ase.io
import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.calculator import all_changes
from recipe_tools import ROOT

from stable_plugin.cli import main
from stable_plugin.evaluation.label_errors import mean_absolute_errors
from stable_plugin.integrations.lightning import pseudolabels
from stable_plugin.integrations.recipes import repair
from stable_plugin.md.labels import read_labeled
from stable_plugin.models import load_potential
from stable_plugin.models.pickles import is_torchscript

DATA = ROOT / "recipes" / "data"
TRAIN, VALID = str(DATA / "aspirin_train.extxyz"), str(DATA / "aspirin_heldout.extxyz")

QUICK = [
    "job.device_type=CPU",
    "runner.stable.n_replicas=2",
    "runner.stable.window_ps=0.01",
    "runner.stable.learning_rate=0.001",
    "+runner.stable.steps_per_window=3",
    "+runner.stable.record_every_fs=2.5",
    "+runner.stable.check_every_fs=2.5",
    "runner.stable.schedule.max_failures_per_ns=30000",
    "runner.stable.schedule.max_windows=1",
    # A model that has seen one epoch fails at once, and is to learn from it.
    "runner.evaluation.n_replicas=2",
    "runner.evaluation.horizons_ps=[0.01]",
    "+runner.evaluation.record_every_fs=5.0",
]

HEADS = """{
    'other': {'train_file': 'data.xyz', 'valid_file': 'data.xyz', 'E0s': '{1: -10.0, 6: -1030.0, 8: -2000.0}'},
    'Default': {'train_file': 'data.xyz', 'valid_file': 'data.xyz', 'E0s': 'average'}}"""

TINY_MACE = [
    "--name=tiny", f"--heads={HEADS}", "--model=MACE", "--r_max=3.0", "--hidden_irreps=4x0e", "--max_ell=1",
    "--correlation=1", "--num_radial_basis=4", "--MLP_irreps=4x0e", "--radial_MLP=[8]", "--max_num_epochs=1",
    "--batch_size=6", "--valid_batch_size=6", "--default_dtype=float64", "--device=cpu", "--seed=1", "--work_dir=.",
    "--energy_key=REF_energy", "--forces_key=REF_forces", "--plot=False",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a real run of ``mace_run_train`` with two heads in double precision."""
    pytest.importorskip("mace")
    folder = tmp_path_factory.mktemp("mace_run_train")
    ase.io.write(folder / "data.xyz", ase.io.read(TRAIN, ":6"))
    command = [sys.executable, "-m", "mace.cli.run_train", *TINY_MACE]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def isolated_atoms(path):
    """Return the isolated-atom energies of a file, (n_heads, n_elements) in eV."""
    return torch.load(path, weights_only=False).atomic_energies_fn.atomic_energies


def test_repair_takes_a_file_of_mace_run_train_and_returns_one(trained, tmp_path, monkeypatch, capsys):
    from mace.calculators import MACECalculator

    monkeypatch.chdir(tmp_path)
    given, data, output = trained / "tiny.model", trained / "data.xyz", tmp_path / "new" / "repaired.model"
    assert main(["repair", str(given), str(data), "-o", str(output), "--temperature-K", "450", *QUICK]) == 0
    assert f"Repaired potential: {output}" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs" / "repair").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert report["before"]["replicas"] == report["after"]["replicas"] == 2
    assert report["optimizer_steps"] > 0
    assert report["settings"]["stable"]["integrator"]["temperature_K"] == 450.0

    before, after = isolated_atoms(given), isolated_atoms(output)
    assert after.dtype == before.dtype == torch.float64
    shifts = after - before
    assert torch.allclose(shifts, shifts[:, :1].expand_as(shifts), atol=1e-9), "elements are told apart as before"
    frame, forces = ase.io.read(data, "0"), []
    for path in (given, output):
        calculator = MACECalculator(str(path), device="cpu")
        assert calculator.available_heads == ["other", "Default"]
        assert calculator.head == "Default"
        assert {parameter.dtype for parameter in calculator.models[0].parameters()} == {torch.float64}
        calculator.calculate(frame, ["energy", "forces"], all_changes)
        forces.append(calculator.results["forces"])
    # What the run started from is the given model, and not a refined one.
    started = MACECalculator(str(folder / "before.model"), device="cpu")
    started.calculate(frame, ["forces"], all_changes)
    assert np.array_equal(started.results["forces"], forces[0])
    assert not np.allclose(forces[0], forces[1], atol=1e-6), "the potential has been trained"


def test_repair_without_labels_keeps_those_of_the_model(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = ase.io.read(trained / "data.xyz", ":")
    for frame in frames:
        frame.calc = None
        frame.info.clear()
        frame.arrays = {name: frame.arrays[name] for name in ("numbers", "positions")}
    ase.io.write("bare.xyz", frames)
    given, output = trained / "tiny.model", tmp_path / "repaired.model"
    assert main(["repair", str(given), "bare.xyz", "-o", str(output), "--unlabeled", *QUICK]) == 0
    (folder,) = (tmp_path / "runs" / "repair").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert report["optimizer_steps"] > 0
    # The automatic weight would be zero: the model has no error on its own labels.
    assert report["settings"]["stable"]["margin_weight"] == 1.0
    assert main(["repair", str(given), "bare.xyz", "-o", str(tmp_path / "other.model"), *QUICK]) != 0, "no labels"


@pytest.mark.parametrize("unlabeled", [False, True])
def test_anchors_are_labeled_by_the_potential_itself(unlabeled, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    anchors = [molecule("CH3OH"), molecule("CO2")]
    ase.io.write("anchors.xyz", anchors)
    given, output = trained / "tiny.model", tmp_path / "repaired.model"
    arguments = [str(given), str(trained / "data.xyz"), "-o", str(output), "--anchors", "anchors.xyz"]
    assert main(["repair", *arguments, *QUICK, *["--unlabeled"] * unlabeled]) == 0
    (folder,) = (tmp_path / "runs" / "repair").iterdir()
    data = json.loads((folder / "report.json").read_text())["settings"]["data"]
    assert data["_target_"] == "stable_plugin.PseudoLabeledDataModule"
    assert data["train"] == (
        [str(trained / "data.xyz"), str(tmp_path / "anchors.xyz")] if unlabeled else str(tmp_path / "anchors.xyz")
    )
    assert data.get("labeled") == (None if unlabeled else str(trained / "data.xyz"))


def test_repair_takes_a_fairchem_checkpoint_and_returns_one(tmp_path, monkeypatch, capsys):
    pytest.importorskip("fairchem")
    from fairchem.core import FAIRChemCalculator
    from fairchem.core.units.mlip_unit import load_predict_unit
    from fairchem_tools import network, tasks

    from stable_plugin.models.fairchem import FairchemModel, save_fairchem

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    given, output = tmp_path / "esen.pt", tmp_path / "repaired.pt"
    save_fairchem(FairchemModel.from_configs(network("esen"), tasks("esen"), task_name="omol"), given)
    ase.io.write("data.xyz", ase.io.read(TRAIN, ":6"))
    command = [
        "repair",
        str(given),
        "data.xyz",
        "-o",
        str(output),
        "--temperature-K",
        "450",
        "+runner.model.task_name=omol",
    ]
    assert main([*command, "+runner.model.charge=0", "+runner.model.spin=1", *QUICK]) == 0
    assert f"Repaired potential: {output}" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs" / "repair").iterdir()
    assert json.loads((folder / "report.json").read_text())["optimizer_steps"] > 0
    forces = []
    for path in (given, output):
        frame = ase.io.read("data.xyz", "0")
        frame.info |= {"charge": 0, "spin": 1}
        frame.calc = FAIRChemCalculator(load_predict_unit(path, device="cpu"), task_name="omol")
        forces.append(frame.get_forces())
    assert not np.allclose(forces[0], forces[1], atol=1e-6), "the potential has been trained"


def test_repair_refuses_a_compiled_model_and_names_the_other_file(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    compiled = trained / "tiny_compiled.model"
    assert is_torchscript(compiled) and not is_torchscript(trained / "tiny.model")
    assert not is_torchscript(trained / "data.xyz")
    for command in (["repair", str(compiled), TRAIN, "-o", "new.model"], ["evaluate", str(compiled), VALID]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert "tiny_compiled.model is a compiled TorchScript model" in error
        assert "pass the .model file that mace_run_train writes beside it, without '_compiled' in its name" in error
    assert not list(tmp_path.iterdir())


def test_repair_names_a_mistake_before_anything_is_made(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, taken = str(trained / "tiny.model"), trained / "data.xyz"
    cases = [
        (["no.model", TRAIN, "-o", "new.model"], "no.model"),
        ([model, "no.xyz", "-o", "new.model"], "train='"),
        ([model, TRAIN, "-o", "new.pt"], "is not a .model file: pass a path with that suffix"),
        ([model, TRAIN, "-o", model], "tiny.model' exists and is not overwritten: pass another path"),
        ([model, TRAIN, "-o", "new.model", "runner.stable.n_replica=3"], "n_replica"),
        ([model, TRAIN, "-o", "new.model", "+runner.stable.n_replica=3"], "did you mean n_replicas?"),
        ([model, str(taken), "-o", "new.model", "--temperature-K", "-3"], "temperature_K=-3"),
    ]
    for arguments, message in cases:
        assert main(["repair", *arguments]) == 1, arguments
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_output_is_refused_before_frames_are_labeled(trained, tmp_path, monkeypatch, capsys):
    def label(*arguments):
        raise AssertionError("frames are labeled")

    monkeypatch.setattr(pseudolabels, "predictions", label)
    taken = tmp_path / "taken.model"
    taken.touch()
    for output, message in (("new.pt", "is not a .model file"), (str(taken), "exists and is not overwritten")):
        assert main(["repair", str(trained / "tiny.model"), TRAIN, "-o", output, "--unlabeled"]) == 1
        assert message in capsys.readouterr().err


def test_repair_refuses_a_family_without_a_module(monkeypatch):
    class Family:
        name = "other"

        def lightning_module(self):
            return None

    monkeypatch.setattr(repair, "find_family", lambda source: Family())
    with pytest.raises(ValueError, match="has no LightningModule in this package: add StABlECallback to the Trainer"):
        repair.repair_recipe("some.pth", TRAIN, "new.pth")


@pytest.mark.parametrize("options", [["--temperature-K", "400"], ["--debug"]])
def test_overrides_follow_options(options):
    from stable_plugin.cli import _parse

    parsed = _parse(["repair", "a.model", "b.xyz", "-o", "c.model", *options, "x=1", "y=2"])
    assert parsed.overrides == ["x=1", "y=2"]
    with pytest.raises(SystemExit):
        _parse(["repair", "a.model", "b.xyz", "-o", "c.model", "x=1", "--no-such-option"])
    with pytest.raises(SystemExit):
        _parse(["evaluate", "a.model", "b.xyz", "--seed", "1", "x=1"])


@pytest.mark.parametrize(
    ("model", "suffix", "package"), [("7net-0", ".pth", "sevenn"), ("chgnet-0.3.0", ".pth.tar", "chgnet")]
)
def test_repair_takes_a_pretrained_potential_and_returns_its_file(model, suffix, package, tmp_path, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    frames = ase.io.read(TRAIN, ":3")
    for frame in frames:
        frame.set_cell([20.0, 20.0, 20.0])
        frame.pbc = True  # CHGNet knows no molecules
    ase.io.write("data.xyz", frames)
    output = tmp_path / f"repaired{suffix}"
    assert main(["repair", model, "data.xyz", "-o", str(output), "--temperature-K", "450", *QUICK]) == 0
    (folder,) = (tmp_path / "runs" / "repair").iterdir()
    report = json.loads((folder / "report.json").read_text())
    errors = mean_absolute_errors(load_potential(output), read_labeled("data.xyz", "data"))
    for name, error in errors.items():
        assert report["after"][name] == pytest.approx(error, rel=1e-3), name

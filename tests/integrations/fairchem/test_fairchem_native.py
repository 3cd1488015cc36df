"""StABlE training within a native fairchem training, through fairchem's command line."""

import os
import shutil
from pathlib import Path

import fairchem_tools
import pytest
import torch
import yaml
from fairchem_tools import native_config, run_fairchem, write_aselmdb
from torchtnt.framework.state import PhaseState

from stable_plugin.integrations.fairchem.callback import StABlECallback, _warn_late_start

STABLE = {
    "_target_": "stable_plugin.integrations.fairchem.StABlECallback",
    "task_name": "omol",
    "charge": 0,
    "spin": 1,
    "n_replicas": 2,
    "window_ps": 0.05,
    "steps_per_window": 2,
    "schedule": {
        "_target_": "stable_plugin.Schedule",
        "max_failures_per_ns": 5000.0,
        "max_windows": 2,
    },
}


@pytest.fixture
def folder(tmp_path, aspirin_frames):
    write_aselmdb(tmp_path / "train.aselmdb", aspirin_frames[:8])
    write_aselmdb(tmp_path / "val.aselmdb", aspirin_frames[8:10])
    return tmp_path


def trained(run, name="final"):
    checkpoint = torch.load(run / "checkpoints" / name / "inference_ckpt.pt", weights_only=False)
    return checkpoint.model_state_dict, checkpoint.ema_state_dict


def without_times(windows):
    return [{name: value for name, value in record.items() if name != "wall_s"} for record in windows]


def test_native_callback_changes_nothing_before_start(folder):
    plain, _ = trained(run_fairchem(folder, native_config(folder, "esen", epochs=2)))
    with_callback = {**STABLE, "start_epoch": 99}
    attached, _ = trained(run_fairchem(folder, native_config(folder, "esen", epochs=2, callbacks=[with_callback])))
    assert plain.keys() == attached.keys()
    assert all(torch.equal(tensor, attached[name]) for name, tensor in plain.items())
    assert "start_epoch=99 is not below max_epochs=2 of the training" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"max_epochs": 3}, "max_epochs=3 of"),
        ({"max_steps": 12}, "max_steps=12 (3 epochs) of"),
        ({"max_steps": 5, "max_steps_per_epoch": 2, "max_epochs": 2}, "max_epochs=2 and max_steps=5 (2.5 epochs) of"),
        ({"max_epochs": 4}, ""),
        ({"max_steps": 13}, ""),
        ({}, ""),
    ],
)
def test_native_start_epoch_beyond_the_end_is_reported(limits, text, caplog):
    stable = StABlECallback(start_epoch=3)
    _warn_late_start(PhaseState(dataloader=range(4), **limits), stable.session)
    assert (f"start_epoch=3 is not below {text}" in caplog.text) if text else not caplog.records


def test_native_run_simulates_and_resumes(folder):
    config = native_config(folder, "uma", epochs=20, callbacks=[STABLE], checkpoint_every=1)
    run = run_fairchem(folder, config)
    weights, averaged = trained(run)
    # The averaged weights are set to those that passed the simulation.
    assert all(torch.equal(tensor, averaged[f"module.{name}"]) for name, tensor in weights.items())
    state = torch.load(run / "checkpoints" / "final" / "stable.pt", weights_only=True)
    assert state["processes"][0]["loop"]["tracker"]["phase"] == "done"
    windows = state["processes"][0]["loop"]["windows"]
    assert sum(record["steps"] for record in windows) > 0

    # Resumed from the middle, the run has the same windows and weights.
    first = min((run / "checkpoints").glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    middle = first.with_name("step_2")
    again = run_fairchem(folder, config, f"+job.runner_state_path={middle}")
    resumed, _ = trained(again)
    final = torch.load(again / "checkpoints" / "final" / "stable.pt", weights_only=True)
    repeated = final["processes"][0]["loop"]["windows"]
    for one, other in zip(windows, repeated, strict=True):
        assert one["unstable_fraction"] == other["unstable_fraction"]
        for name in (
            "observable_loss",
            "margin_loss",
        ):  # one is unknown in hotter windows, the other where nothing is learned
            assert one[name] == other[name] or one[name] == pytest.approx(other[name], rel=1e-6)
    assert all(torch.allclose(tensor, resumed[name], rtol=1e-5, atol=1e-7) for name, tensor in weights.items())


def test_native_run_refuses_second_callback(folder):
    config = native_config(folder, "esen", callbacks=[STABLE, STABLE])
    with pytest.raises(AssertionError, match=r"more than one StABlECallback"):
        run_fairchem(folder, config)
    shutil.rmtree(folder / "runs")


def test_native_run_ends_at_third_nonfinite_gradient(folder, monkeypatch):
    (folder / "nonfinite.py").write_text("def loss(mean, target):\n    return (mean - target).sum() * float('nan')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    nonfinite = {**STABLE, "objective": "boltzmann", "loss": {"_target_": "nonfinite.loss", "_partial_": True}}
    config = native_config(folder, "esen", epochs=20, callbacks=[nonfinite])
    with pytest.raises(AssertionError, match="not finite in 3 consecutive optimizer steps"):
        run_fairchem(folder, config)
    (run,) = (folder / "runs").iterdir()
    (untrained, _), (saved, _) = trained(run, "step_0"), trained(run, "step_2")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in untrained.items())
    assert (run / "checkpoints" / "step_2" / "stable.pt").is_file()


def test_resumed_native_run_can_be_interrupted(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(fairchem_tools.__file__).parent), prepend=os.pathsep)
    callbacks = [{"_target_": "fairchem_tools.SignalAtStep"}, {**STABLE, "start_epoch": 99}]
    config = native_config(folder, "esen", epochs=20, callbacks=callbacks)
    for step in (1, 3):
        monkeypatch.setenv("SIGNAL_AT_STEP", str(step))
        checkpoint = run_fairchem(folder, config) / "checkpoints" / f"step_{step}"
        assert (checkpoint / "stable.pt").is_file()
        config = yaml.safe_load((checkpoint / "resume.yaml").read_text())
        assert config["job"]["runner_state_path"] == str(checkpoint)


def two_systems(folder):
    """Return settings of two systems as plain mappings, which Hydra passes as its own kind of list."""
    own = {
        "structures": str(folder / "val.aselmdb"),
        "reference": str(folder / "train.aselmdb"),
        "detector": {"_target_": "stable_plugin.BondDeviation", "threshold": 0.1, "discard": 10.0},
    }
    hot = {"_target_": "stable_plugin.Langevin", "temperature_K": 600.0}
    systems = [{**own, "name": "cold"}, {**own, "name": "hot", "integrator": hot, "weight": 2.0}]
    execution = {"_target_": "stable_plugin.Execution", "threads": 1}
    return {**STABLE, "systems": systems, "window_ps": 0.02, "record_every_fs": 5.0, "execution": execution}


@pytest.mark.slow
def test_native_run_of_two_systems_resumes_bit_for_bit(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(fairchem_tools.__file__).parent), prepend=os.pathsep)
    callbacks = [two_systems(folder), {"_target_": "fairchem_tools.SignalInSystem"}]
    config = native_config(folder, "esen", epochs=4, callbacks=callbacks)
    whole = run_fairchem(folder, config)
    # In the second learning window of the second system, when the first one has what its next step needs.
    monkeypatch.setenv("SIGNAL_IN_SYSTEM", "hot:7")
    (checkpoint,) = (run_fairchem(folder, config) / "checkpoints").glob("step_[1-9]*")
    state = torch.load(checkpoint / "stable.pt", weights_only=True)["processes"][0]["loop"]
    assert (state["order"], list(state["estimates"])) == (["cold", "hot", "cold", "hot", "cold"], ["cold"])
    monkeypatch.delenv("SIGNAL_IN_SYSTEM")
    resumed = run_fairchem(folder, yaml.safe_load((checkpoint / "resume.yaml").read_text()))
    for one, other in zip(trained(whole), trained(resumed), strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    loops = [
        torch.load(run / "checkpoints/final/stable.pt", weights_only=True)["processes"] for run in (whole, resumed)
    ]
    (first,), (second,) = loops
    assert first["loop"]["order"] == second["loop"]["order"]
    for name, own in first["loop"]["loops"].items():
        assert without_times(own["windows"]) == without_times(second["loop"]["loops"][name]["windows"])
        assert any(record["steps"] for record in own["windows"])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [lambda folder: STABLE, two_systems], ids=["one system", "two systems"])
def test_native_run_in_two_processes(folder, settings):
    config = native_config(folder, "esen", epochs=20, callbacks=[settings(folder)])
    config["job"]["scheduler"]["ranks_per_node"] = 2
    config["runner"]["eval_dataloader"]["batch_sampler_fn"]["max_atoms"] = 21  # one batch for each process
    run = run_fairchem(folder, config)
    processes = torch.load(run / "checkpoints" / "final" / "stable.pt", weights_only=True)["processes"]
    loops = [process["loop"].get("loops", {"": process["loop"]}) for process in processes]
    assert list(loops[0]) == list(loops[1]) == (["cold", "hot"] if settings is two_systems else [""])
    for first, second in zip(*(each.values() for each in loops), strict=True):
        assert first["tracker"]["phase"] == "done"
        assert without_times(first["windows"]) == without_times(second["windows"])
        assert sum(record["steps"] for record in first["windows"]) > 0
        # Start frames are few, and may be the same.
        assert not torch.equal(first["replicas"]["state"]["velocities"], second["replicas"]["state"]["velocities"])

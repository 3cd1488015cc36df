"""StABlE training inside fairchem's own training, through its command line."""

import os
import shutil

import pytest
import torch
from fairchem_tools import native_config, run_fairchem, write_aselmdb

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
        "max_unstable_fraction": 0.5,
        "stable_ps": 0.05,
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


def test_before_its_start_the_callback_changes_no_bit(folder):
    plain, _ = trained(run_fairchem(folder, native_config(folder, "esen", epochs=2)))
    with_callback = {**STABLE, "start_epoch": 99}
    attached, _ = trained(run_fairchem(folder, native_config(folder, "esen", epochs=2, callbacks=[with_callback])))
    assert plain.keys() == attached.keys()
    assert all(torch.equal(tensor, attached[name]) for name, tensor in plain.items())


def test_a_native_run_becomes_stable_training_and_resumes_its_phase(folder):
    config = native_config(folder, "uma", epochs=20, callbacks=[STABLE], checkpoint_every=1)
    run = run_fairchem(folder, config)
    weights, averaged = trained(run)
    # The averaged weights are those that passed.
    assert all(torch.equal(tensor, averaged[f"module.{name}"]) for name, tensor in weights.items())
    state = torch.load(run / "checkpoints" / "final" / "stable.pt", weights_only=True)
    assert state["processes"][0]["loop"]["phases"]["name"] == "done"
    rounds = state["processes"][0]["loop"]["windows"]
    assert sum(entry["steps"] for entry in rounds) > 0

    # From the middle, the same windows and the same weights again.
    first = min((run / "checkpoints").glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    middle = first.with_name("step_2")
    again = run_fairchem(folder, config, f"+job.runner_state_path={middle}")
    resumed, _ = trained(again)
    final = torch.load(again / "checkpoints" / "final" / "stable.pt", weights_only=True)
    repeated = final["processes"][0]["loop"]["windows"]
    for one, other in zip(rounds, repeated, strict=True):
        assert one["unstable_fraction"] == other["unstable_fraction"]
        assert one["observable_loss"] == pytest.approx(other["observable_loss"], rel=1e-6)
    assert all(torch.allclose(tensor, resumed[name], rtol=1e-5, atol=1e-7) for name, tensor in weights.items())


def test_two_callbacks_on_one_run_are_refused(folder):
    config = native_config(folder, "esen", callbacks=[STABLE, STABLE])
    with pytest.raises(AssertionError, match=r"more than one StABlECallback"):
        run_fairchem(folder, config)
    shutil.rmtree(folder / "runs")


def test_three_gradients_in_a_row_that_are_not_finite_leave_the_weights_before_them(folder, monkeypatch):
    (folder / "spoiled.py").write_text("def loss(mean, target):\n    return (mean - target).sum() * float('nan')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    spoiled = {**STABLE, "loss": {"_target_": "spoiled.loss", "_partial_": True}}
    config = native_config(folder, "esen", epochs=20, callbacks=[spoiled])
    with pytest.raises(AssertionError, match="not finite, 3 optimizer steps in a row"):
        run_fairchem(folder, config)
    (run,) = (folder / "runs").iterdir()
    (untrained, _), (saved, _) = trained(run, "step_0"), trained(run, "step_2")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in untrained.items())
    assert (run / "checkpoints" / "step_2" / "stable.pt").is_file()


@pytest.mark.slow
def test_two_processes_train_one_model_on_replicas_of_their_own(folder):
    config = native_config(folder, "esen", epochs=20, callbacks=[STABLE])
    config["job"]["scheduler"]["ranks_per_node"] = 2
    config["runner"]["eval_dataloader"]["batch_sampler_fn"]["max_atoms"] = 21  # a batch for each
    run = run_fairchem(folder, config)
    first, second = torch.load(run / "checkpoints" / "final" / "stable.pt", weights_only=True)["processes"]
    assert first["loop"]["phases"]["name"] == "done"

    def without_times(rounds):
        return [{name: value for name, value in entry.items() if name != "wall_s"} for entry in rounds]

    assert without_times(first["loop"]["windows"]) == without_times(second["loop"]["windows"])
    assert sum(entry["steps"] for entry in first["loop"]["windows"]) > 0
    assert not torch.equal(first["loop"]["state"]["positions"], second["loop"]["state"]["positions"])

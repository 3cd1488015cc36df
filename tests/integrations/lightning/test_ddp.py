"""StABlECallback in a data-parallel Lightning training with real processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_run import TRAIN
from small_training import small_module

from stable_plugin import BondAmplitudes, BondLengths, System
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.algorithm.window_data import WindowEstimator
from stable_plugin.md.frames import read_frames
from stable_plugin.md.system import stack_positions

SCRIPT = Path(__file__).parents[2] / "support" / "ddp_run.py"


def fit(folder, n_processes, epochs, *checkpoint):
    """Train, and return what each rank saved at the end."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, str(n_processes), str(epochs), *map(str, checkpoint)],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(n_processes)]


def test_ddp_takes_equal_steps_on_different_replicas(tmp_path):
    first, second = fit(tmp_path / "run", 2, 2)
    assert first["windows"] == second["windows"]
    assert first["step"] == second["step"] == 4, (
        "two epochs of two batches, because each process has half of the frames"
    )
    assert all(torch.equal(one, other) for one, other in zip(first["weights"], second["weights"], strict=True))
    assert not torch.equal(first["positions"], second["positions"])
    assert not torch.equal(first["noise"], second["noise"])

    # The observable's part of the first step equals that of one process with the frames of both.
    frames = read_frames(str(TRAIN))[:8]
    module = small_module(dtype="float64")
    module.build(frames)
    potential = module.stable_potential(System.from_atoms(frames[0]))
    reference = stack_positions(frames, potential.system, "frames")
    observables = [BondLengths(), BondAmplitudes()]
    for observable in observables:
        observable.bind(potential.system, reference)
    estimator = WindowEstimator(BoltzmannEstimator(potential, 500.0, 64), observables)
    together = torch.cat([first["first"][2], second["first"][2]])
    data = estimator.collect(together, 8, torch.Generator())
    for own, joint, expected in zip(*first["first"][:2], estimator.estimate(data).gradients, strict=True):
        scale = float(joint.abs().max())
        torch.testing.assert_close(joint - own, expected, rtol=1e-6, atol=1e-9 * scale)


@pytest.mark.slow
@pytest.mark.parametrize(("n_processes", "tolerance"), [(2, 0.0), (4, 1e-7)])
def test_ddp_resumes_where_it_was(tmp_path, n_processes, tolerance):
    """Two processes agree to the last bit; sums over more come in an order that differs between starts."""
    whole = fit(tmp_path / "whole", n_processes, 4)
    fit(tmp_path / "half", n_processes, 2)
    resumed = fit(tmp_path / "rest", n_processes, 4, tmp_path / "half" / "last.ckpt")
    for mine, other in zip(resumed, whole, strict=True):
        assert len(mine["windows"]) == len(other["windows"]) > 1
        for one, another in zip(mine["windows"], other["windows"], strict=True):
            for name, value in one.items():
                expected = another[name]
                close = isinstance(value, float) and value == pytest.approx(expected, rel=tolerance, abs=0.0)
                assert close or value == expected, name
        assert torch.equal(mine["noise"], other["noise"])
        for one, another in zip(
            [mine["positions"], *mine["weights"]], [other["positions"], *other["weights"]], strict=True
        ):
            torch.testing.assert_close(one, another, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_ddp_refuses_another_number_of_processes(tmp_path):
    fit(tmp_path / "two", 2, 1)
    with pytest.raises(
        AssertionError, match=r"holds the replicas of 2 process\(es\), this run has 1: resume with the same number"
    ):
        fit(tmp_path / "one", 1, 2, tmp_path / "two" / "last.ckpt")

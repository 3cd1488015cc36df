"""Several processes that train one potential, against one that has all their replicas."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from several_processes import estimates, single_molecules, whole_frames

from stable_plugin.runtime.distributed import DistributedContext

SCRIPT = Path(__file__).parents[1] / "support" / "several_processes.py"


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    """What each of so many real processes found."""
    folder = tmp_path_factory.mktemp("processes")
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, str(request.param)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("case", [whole_frames, single_molecules])
def test_estimates_are_those_of_one_process_with_all_frames(found, case):
    alone = estimates(case, DistributedContext())
    for each in (process[case.__name__.replace("_", " ")] for process in found):
        assert each["share"] == pytest.approx(alone["share"], rel=1e-9)
        assert each["loss"] == pytest.approx(alone["loss"], rel=1e-9)
        for mine, expected in zip(each["estimates"], alone["estimates"], strict=True):
            assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-9)
            assert mine["ess_fraction"] == pytest.approx(expected["ess_fraction"], rel=1e-9)
            torch.testing.assert_close(mine["mean"], expected["mean"], rtol=1e-9, atol=0.0)
            for one, other in zip(mine["gradients"], expected["gradients"], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))
            assert max(float(gradient.abs().max()) for gradient in expected["gradients"]) > 0
    assert alone["share"] < 1.0, "the weights have moved"


@pytest.mark.parametrize("name", ["training", "training beside a process whose replicas all break"])
def test_all_processes_decide_alike_on_replicas_of_their_own(found, name):
    first, *others = (process[name] for process in found)
    assert {entry["phase"] for entry in first["windows"]} == {"simulate", "learn"}
    for other in others:
        assert other["windows"] == first["windows"]
        assert torch.equal(other["log_k"], first["log_k"])
        assert not torch.equal(other["first"], first["first"]), "start frames in turn, over all processes"
        assert not torch.equal(other["last"], first["last"])


def test_the_share_of_unstable_replicas_is_over_all_processes(found):
    broken = found[0]["training beside a process whose replicas all break"]
    # One process that always fails as a whole keeps the others from ever being done.
    assert min(entry["unstable_fraction"] for entry in broken["windows"]) >= 1.0 / len(found)


def test_a_process_alone_needs_nobody():
    alone = DistributedContext.present()
    assert (alone.rank, alone.size) == (0, 1)
    tensor = torch.tensor([1.0, 2.0])
    assert alone.sum(tensor) is tensor
    assert alone.gather("mine") == ["mine"]

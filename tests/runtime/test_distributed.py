"""Several processes that train one potential, compared with one process that has all their replicas."""

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
    """Run 2 or 4 real processes, and return what each one saved."""
    folder = tmp_path_factory.mktemp("processes")
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, str(request.param)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("case", [whole_frames, single_molecules])
def test_estimates_equal_those_of_one_process(found, case):
    alone = estimates(case, DistributedContext())
    for each in (process[case.__name__.replace("_", " ")] for process in found):
        assert each["ess_fraction"] == pytest.approx(alone["ess_fraction"], rel=1e-9)
        assert each["loss"] == pytest.approx(alone["loss"], rel=1e-9)
        for mine, expected in zip(each["estimates"], alone["estimates"], strict=True):
            assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-9)
            assert mine["ess_fraction"] == pytest.approx(expected["ess_fraction"], rel=1e-9)
            torch.testing.assert_close(mine["mean"], expected["mean"], rtol=1e-9, atol=0.0)
            for one, other in zip(mine["gradients"], expected["gradients"], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))
            assert max(float(gradient.abs().max()) for gradient in expected["gradients"]) > 0
    assert alone["ess_fraction"] < 1.0, "the parameters have changed"


@pytest.mark.parametrize("name", ["training", "training with a failing process", "training on two systems"])
def test_processes_decide_equally(found, name):
    first, *others = (process[name] for process in found)
    assert {entry["phase"] for entry in first["windows"]} == {"probe", "learn"}
    for other in others:
        assert other["windows"] == first["windows"]
        assert torch.equal(other["log_k"], first["log_k"])
        assert not torch.equal(other["first"], first["first"]), "start frames in turn, over all processes"
        assert not torch.equal(other["last"], first["last"])
    assert len({entry["system"] for entry in first["windows"]}) == (2 if "two" in name else 1)


def test_unstable_fraction_is_over_all_processes(found):
    failing = found[0]["training with a failing process"]
    # All replicas of one process always fail, so training cannot be done.
    assert min(entry["unstable_fraction"] for entry in failing["windows"]) >= 1.0 / len(found)


def test_single_process_reduces_nothing():
    alone = DistributedContext.current()
    assert (alone.rank, alone.size) == (0, 1)
    tensor = torch.tensor([1.0, 2.0])
    assert alone.sum(tensor) is tensor
    assert alone.gather("mine") == ["mine"]

"""Lightning runs that are killed at random moments go on from their last checkpoint as if nothing had happened."""

import csv
import signal

import pytest
import torch
from killing import Trainings, Whole, flat, kill_and_compare, stop_and_compare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trainings():
    with Trainings("lightning") as forked:
        yield forked


@pytest.fixture(scope="module")
def whole(trainings, tmp_path_factory):
    return Whole(trainings, tmp_path_factory.mktemp("whole"), result)


def result(folder):
    """Everything in the last checkpoint but wall times, and what was logged."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=False)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    kept = {name: checkpoint[name] for name in names}
    (kept["stable"],) = (state for name, state in checkpoint["callbacks"].items() if name.startswith("StABlE"))
    everything = {**dict(flat("", kept)), "logged": logged(folder)}
    assert any("rounds.8." in name for name in everything)
    return everything


def logged(folder):
    """What was logged last of each step: a run that goes on logs the steps after its checkpoint again."""
    last = {}
    for path in sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                filled = {key: value for key, value in row.items() if value}
                last[row["step"], tuple(sorted(filled))] = filled
    return last


@pytest.mark.timeout(3000)
def test_a_lightning_run_killed_again_and_again_equals_the_uninterrupted_one_to_the_last_bit(
    trainings, whole, tmp_path
):
    counts = kill_and_compare(
        trainings,
        whole,
        tmp_path.joinpath,
        result,
        half_written=lambda folder: folder.glob("*.partial"),
        lengths=lambda folder: range(20_000, (folder / "last.ckpt").stat().st_size),
    )
    assert counts["writing"] >= 5


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("number", "written"), [(signal.SIGTERM, "interrupted*.ckpt"), (signal.SIGUSR1, "hpc_ckpt_*.ckpt")]
)
def test_a_lightning_run_told_to_stop_again_and_again_equals_the_uninterrupted_one(
    trainings, whole, tmp_path, number, written
):
    slurm = number == signal.SIGUSR1
    stop_and_compare(trainings, whole, tmp_path / "told", result, number, stops=5, begun="training begins", slurm=slurm)
    assert list((tmp_path / "told").glob(written))
    assert not slurm or "requeue 7" in (tmp_path / "told" / "output.txt").read_text()

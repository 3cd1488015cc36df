"""Lightning runs that are killed at random times and resumed equal the uninterrupted run."""

import signal

import pytest
from killing import Trainings, Whole, kill_and_compare, stop_and_compare, trained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trainings():
    with Trainings("lightning") as forked:
        yield forked


@pytest.fixture(scope="module")
def whole(trainings, tmp_path_factory):
    return Whole(trainings, tmp_path_factory.mktemp("whole"), result)


def result(folder):
    everything = trained(folder)
    assert any("windows.8." in name for name in everything)
    return everything


@pytest.mark.timeout(3000)
def test_killed_lightning_run_resumes_bit_for_bit(trainings, whole, tmp_path):
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
def test_signaled_lightning_run_resumes_bit_for_bit(trainings, whole, tmp_path, number, written):
    slurm = number == signal.SIGUSR1
    stop_and_compare(
        trainings, whole, tmp_path / "signaled", result, number, stops=5, begun="training begins", slurm=slurm
    )
    assert list((tmp_path / "signaled").glob(written))
    assert not slurm or "requeue 7" in (tmp_path / "signaled" / "output.txt").read_text()

"""A training in the kernel of a notebook without ipywidgets: no error, and one line per window."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

TESTS = Path(__file__).parents[2]

CELL = f"""
import sys
sys.path[:0] = [{str(TESTS.parent / "src")!r}, {str(TESTS / "support")!r}]
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from toys import TRIATOMIC, Springs
from stable_plugin import BondDeviation, Execution, Schedule, StABlECallback
from stable_plugin.models import ModulePotential

BONDS = [(0, 1), (0, 2)]

class Water(LightningModule):
    def __init__(self):
        super().__init__()
        self.springs = Springs(BONDS, stiffness=3.0, lengths=[1.0, 1.0])

    def stable_potential(self, system):
        return ModulePotential(self.springs, system)

    def training_step(self, batch, batch_idx):
        return 0.0 * self.springs.log_k

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

frames = [TRIATOMIC.copy() for _ in range(8)]
for number, frame in enumerate(frames):
    frame.rattle(0.03, seed=number)
callback = StABlECallback(
    structures=frames,
    bonds=BONDS,
    detector=BondDeviation(0.1, 10.0),
    n_replicas=2,
    steps_per_window=1,
    window_ps=0.05,
    record_every_fs=2.5,
    check_every_fs=2.5,
    schedule=Schedule(max_windows=4),
    learning_rate=1e-3,
    observable_weight=1.0,
    execution=Execution(threads=1, compile=False),
)
trainer = Trainer(
    max_epochs=3,
    accelerator="cpu",
    callbacks=[callback, BAR()],
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
)
trainer.fit(Water(), torch.utils.data.DataLoader(torch.zeros(2)))
print("windows:", len(callback.windows))
"""


@pytest.mark.parametrize("bar", ["RichProgressBar", "TQDMProgressBar"])
def test_fit_in_notebook_logs_one_line_per_window(tmp_path, bar):
    if bar == "RichProgressBar":
        pytest.importorskip("rich")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.replace("BAR()", f"{bar}()"))])
    client = nbclient.NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()  # raises the error of a cell
    # Rich displays what is written to standard error while it shows its bar.
    outputs = notebook.cells[0].outputs
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    (n_windows,) = re.findall(r"^windows: (\d+)$", text, re.MULTILINE)
    assert int(n_windows) >= 2
    assert re.findall(r"window (\d+) \((?:probe|learn|verify), \d+ K\)", text) == [
        str(1 + index) for index in range(int(n_windows))
    ]
    assert not re.search(r"StABlE (probe|learn|verify)", text), "states of a progress line"

"""CHGNet 0.3.0 fine-tuned on labels of another zero of energy."""

import pytest
from ase.build import bulk
from ase.calculators.emt import EMT

pytest.importorskip("chgnet")

from stable_plugin.models import FineTuningModule


def test_isolated_atoms_are_those_that_are_passed():
    frame = bulk("Cu", cubic=True)
    frame.rattle(0.05, seed=0)
    frame.calc = EMT()
    frame.info["REF_energy"], frame.arrays["REF_forces"] = frame.get_potential_energy(), frame.get_forces()
    module = FineTuningModule("chgnet-0.3.0", E0s={29: -3.0})
    before = module.total_energies([frame])[0]
    kept = FineTuningModule("chgnet-0.3.0", E0s="model")
    kept.prepare([frame])
    own = kept.isolated_atoms()[29]
    module.prepare([frame])
    assert module.isolated_atoms() == pytest.approx({29: -3.0}, abs=1e-4)
    assert module.total_energies([frame])[0] - before == pytest.approx(4 * (-3.0 - own), abs=1e-3)

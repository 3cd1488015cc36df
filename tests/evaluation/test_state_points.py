"""Several systems and state points in one evaluation."""

import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from toys import SoftSpheres

from stable_plugin import Density, Evaluator, Langevin, MonteCarloBarostat, NonFinite, RadialDistribution, SystemConfig
from stable_plugin.evaluation import system_reports, write_system_reports

LATTICE = bulk("Ar", "fcc", a=3.4, cubic=True) * (2, 2, 2)
FRAMES = [LATTICE, LATTICE]
SETTINGS = {"n_replicas": 2, "horizons_ps": [0.1], "record_every_fs": 50.0, "check_every_fs": 10.0}


def state(name, temperature_K, **changes):
    values = {"integrator": Langevin(temperature_K, 2.0), "detector": NonFinite(), "observables": Density()}
    return {"name": name, "structures": FRAMES, **values, **changes}


def test_each_state_point_has_its_own_integrator_and_observables(tmp_path):
    pressed = Langevin(300.0, 2.0, barostat=MonteCarloBarostat(1.0, 20.0))
    evaluator = Evaluator(
        systems=[
            state("cold", 100.0, observables=RadialDistribution(r_max=3.0)),
            SystemConfig(**state("pressed", 300.0, integrator=pressed)),
        ],
        **SETTINGS,
    )
    assert [each.settings.integrator.temperature_K for each in (evaluator, *evaluator.others.values())] == [
        100.0,
        300.0,
    ]
    module = SoftSpheres()
    together = evaluator.evaluate(module)
    assert list(together.systems) == ["cold", "pressed"]
    assert [list(each.summaries[0]["observables"]) for each in together.systems.values()] == [
        ["radial_distribution"],
        ["density"],
    ]
    assert together.systems["pressed"].summaries[0]["observables"]["density"] > 0.0
    alone = Evaluator(FRAMES, integrator=pressed, detector=NonFinite(), observables=[Density()], **SETTINGS)
    expected = alone.evaluate(module).summaries[0]["observables"]
    assert together.systems["pressed"].summaries[0]["observables"] == expected
    reports = system_reports({"title": "state points"}, {"evaluation": together})
    write_system_reports(tmp_path, reports)
    page = (tmp_path / "report.html").read_text()
    assert "cold" in page and (tmp_path / "systems/pressed/report.html").is_file()
    assert json.loads((tmp_path / "report.json").read_text())


def molecules(*names):
    return [Atoms(name, np.arange(3.0 * len(Atoms(name))).reshape(-1, 3)) for name in names for _ in range(2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"starts=None: pass start frames, or systems="),
        ({"starts": FRAMES, "systems": [state("a", 300.0)]}, r"systems= and starts= were both passed"),
        ({"integrator": Langevin(), "systems": [state("a", 300.0)]}, r"systems= and integrator= were both passed"),
        ({"systems": []}, r"systems=\[\] is not a list of systems"),
        ({"systems": [state("a", 300.0), state("a", 400.0)]}, r"systems have the names \['a', 'a'\]: set a different"),
        ({"systems": [state("a", 300.0, temperature=1)]}, r"systems\[0\]\.temperature=1 is not a setting"),
        (
            {"systems": [state("a", 300.0), state("b", 300.0, observables=RadialDistribution(r_max=9.0))]},
            r"systems\[1\]: r_max=9 is more than the cell allows",
        ),
        (
            {"systems": [state("a", 300.0, structures=molecules("ArHe", "ArNe"))]},
            r"systems\[0\]\.structures have several systems \(ArHe, ArNe\)",
        ),
        (
            {"systems": [state("a", 300.0), state("b", 300.0, structures=molecules("ArHe", "ArNe"), observables=None)]},
            r"systems\[1\]\.structures have several systems",
        ),
    ],
)
def test_evaluator_names_what_is_wrong_with_systems(arguments, message):
    with pytest.raises(ValueError, match=message):
        Evaluator(**arguments, **SETTINGS)

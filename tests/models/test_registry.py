"""The registry: which family a module, a file or a name belongs to, and families of other packages."""

import logging
from importlib.metadata import EntryPoint

import pytest
import torch
from ase.build import molecule
from torch import nn
from toys import Oscillators

from stable_plugin import StABlEConfig, System
from stable_plugin.models import (
    ModelFamily,
    ModulePotential,
    families,
    find_potential,
    get_family,
    load_potential,
    registry,
)
from stable_plugin.models.pickles import pickled_packages

NITROGEN = System.from_atoms(molecule("N2"))


class Linear(nn.Linear):
    """A model of a package that is not installed here."""

    __module__ = "acme.nn.linear"


class AcmeFamily(ModelFamily):
    name = "acme"
    title = "Acme"
    packages = ("acme",)
    suffixes = (".acme",)
    loader_arguments = ("stiffness",)
    pretrained = "'acme-1'"

    def is_model(self, module):
        return True

    def make_potential(self, module, system):
        return ModulePotential(Oscillators(float(module.weight[0, 0])), system)

    def is_pretrained(self, name):
        return name == "acme-1"

    def load(self, source, stiffness=1.0):
        module = Linear(1, 1)
        nn.init.constant_(module.weight, stiffness)
        return module


FAMILY = AcmeFamily()


@pytest.fixture
def declared(monkeypatch):
    """Declare entry points in the place of the installed ones."""

    def declare(*values):
        points = [EntryPoint(f"point{index}", value, registry.GROUP) for index, value in enumerate(values)]
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        families.cache_clear()

    yield declare
    families.cache_clear()


def test_families_lists_built_in_ones():
    assert {"mace", "fairchem", "sevennet"} <= {family.name for family in families()}
    assert repr(get_family("mace")) == "MACEFamily(name='mace')"
    with pytest.raises(ValueError, match=r"family='gap' is not known: use one of .*mace"):
        get_family("gap")


def test_setup_cfg_declares_built_in_families():
    from configparser import ConfigParser
    from pathlib import Path

    config = ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    declared = config["options.entry_points"][registry.GROUP].split("\n")
    built_in = {f"{each.name} = {type(each).__module__}:FAMILY" for each in registry._built_in()}
    assert built_in <= set(declared)
    assert all(family.split(" = ")[0] in config["options.extras_require"] for family in built_in)


def test_families_include_other_packages(declared):
    declared(f"{__name__}:FAMILY", "stable_plugin.models.mace.family:FAMILY")
    assert [family.name for family in families()].count("mace") == 1
    assert get_family("acme") is FAMILY
    loaded = load_potential("acme-1", stiffness=3.0)
    potential = find_potential(nn.Sequential(nn.Identity(), loaded), NITROGEN)
    assert potential.module.k.item() == 3.0
    assert load_potential("some/file.acme").weight.item() == 1.0
    with pytest.raises(TypeError, match=r"color='red' is not an argument of the loader of Acme .*use stiffness"):
        load_potential("acme-1", color="red")


def test_broken_families_are_ignored_with_a_warning(declared, caplog):
    declared("no_such_package.family:FAMILY", f"{__name__}:NITROGEN", f"{__name__}:FAMILY", f"{__name__}:FAMILY")
    with caplog.at_level(logging.WARNING, "stable_plugin"):
        names = [family.name for family in families()]
    assert names.count("acme") == 1
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "point0 (no_such_package.family:FAMILY) cannot be imported" in messages[0]
    assert "point1 is ignored" in messages[1] and "is a System" in messages[1]
    assert "the name 'acme' belongs to" in messages[2]


def test_find_potential_asks_the_module_first():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Oscillators(2.0)

        def stable_potential(self, system):
            return ModulePotential(self.inner, system)

    own = Own()
    assert find_potential(own, NITROGEN).module is own.inner
    assert find_potential(nn.Sequential(nn.Identity(), own), NITROGEN).module is own.inner


def test_find_potential_reports_what_to_do():
    with pytest.raises(TypeError, match=r"no potential found in Linear: .*MACE.*method stable_potential\(system\)"):
        find_potential(nn.Linear(1, 1), NITROGEN)


def make_soft(module, system):
    return ModulePotential(module.inner, system)


def make_nothing(module, system):
    return None


class Holder(nn.Module):
    """A module that nobody can give a method ``stable_potential``."""

    def __init__(self):
        super().__init__()
        self.inner = Oscillators(2.0)


@pytest.mark.parametrize("potential", [make_soft, f"{__name__}.make_soft", f"{__name__}.make_soft.__call__"])
def test_find_potential_calls_what_it_is_given(potential):
    holder = Holder()
    assert find_potential(holder, NITROGEN, potential).module is holder.inner


def test_find_potential_takes_a_class_of_potentials():
    module = Oscillators(2.0)
    assert find_potential(module, NITROGEN, ModulePotential).module is module


def test_find_potential_takes_a_family(declared):
    declared(f"{__name__}:FAMILY")
    model = FAMILY.load("acme-1", stiffness=3.0)
    assert find_potential(nn.Sequential(Holder(), model), NITROGEN, "acme").module.k.item() == 3.0
    with pytest.raises(TypeError, match=r"potential='acme': Holder contains no model of Acme"):
        find_potential(Holder(), NITROGEN, "acme")


def test_find_potential_names_what_was_returned():
    with pytest.raises(TypeError, match=r"potential=make_nothing returned a NoneType: return a stable_plugin"):
        find_potential(Holder(), NITROGEN, make_nothing)


@pytest.mark.parametrize(
    ("potential", "message"),
    [
        ("no_such_family", r"potential='no_such_family' is not a family: use one of .*mace"),
        ("no_such_package.make", r"potential='no_such_package\.make' cannot be imported \(ModuleNotFoundError"),
        ("torch.no_such_function", r"potential='torch\.no_such_function' cannot be imported \(AttributeError"),
        ("torch.__version__", r"potential='torch\.__version__' is a string"),
        ("torch.nn.Linear", r"is not a function: pass one of \(module, system\)"),
        (Holder(), r"is not a function: pass one of \(module, system\)"),
        (3, r"potential=3 is not a function"),
    ],
)
def test_config_refuses_unusable_potentials(potential, message):
    with pytest.raises(ValueError, match=message):
        StABlEConfig(potential=potential)


def test_load_potential_lists_what_it_knows(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"model='unheard-of' is neither .*for MACE a \.model file or a pretrai"
    ):
        load_potential("unheard-of")
    path = tmp_path / "weights.bin"
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"weights\.bin' is not recognized .*set family="):
        load_potential(path)


def test_pickled_packages_runs_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "trap.pt"
    for protocol in (2, 4):
        torch.save([Trap(), nn.Linear(1, 1)], path, pickle_protocol=protocol)
        assert {"torch"} <= set(pickled_packages(path))
    path.write_bytes(path.read_bytes()[:300])
    assert list(pickled_packages(path)) == []
    path.write_text("no archive")
    assert list(pickled_packages(path)) == []


@pytest.mark.parametrize("family", ["mace", "fairchem"])
def test_lightning_module_trains_the_family(family):
    pytest.importorskip(family)
    from stable_plugin.models.lightning_module import PotentialModule

    module = get_family(family).lightning_module()
    assert issubclass(module, PotentialModule)
    assert module.potential_suffix in get_family(family).suffixes

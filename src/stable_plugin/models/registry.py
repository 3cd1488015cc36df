"""The families of models that are installed, and the choice between them."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ase.calculators.calculator import Calculator
from torch import nn

from stable_plugin import models
from stable_plugin.md.system import System
from stable_plugin.models.base import Potential
from stable_plugin.models.calculator import CalculatorPotential
from stable_plugin.models.family import ModelFamily
from stable_plugin.models.pickles import pickled_packages
from stable_plugin.models.torch_sim import TorchSimPotential, is_torch_sim_model

log = logging.getLogger(__name__)

GROUP = "stable_plugin.models"
"""Entry point group of families."""

PotentialMaker = Callable[[Any, System], Potential]
"""A function of the trained module and the simulated system that returns the potential."""


@cache
def families() -> tuple[ModelFamily, ...]:
    """Return the families of models: the built-in ones by name, then those of other installed packages.

    A family is listed whether or not its own package is installed; using it then says which extra to install.
    """
    found: dict[str, ModelFamily] = {}
    for family in (*_built_in(), *_of_other_packages()):
        if family.name in found:
            log.warning("%r is ignored: the name %r belongs to %r.", family, family.name, found[family.name])
        else:
            found[family.name] = family
    return tuple(found.values())


def get_family(name: str) -> ModelFamily:
    """Return a family by its name.

    Args:
        name: For instance ``mace``.

    Raises:
        ValueError: If there is no such family.
    """
    for family in families():
        if family.name == name:
            return family
    raise ValueError(f"family={name!r} is not known: use one of {', '.join(each.name for each in families())}.")


def find_potential(module: Any, system: System, potential: str | PotentialMaker | None = None) -> Potential:
    """Return the potential inside a module, for instance inside a LightningModule.

    Submodules are visited from the outside to the inside. One with a method ``stable_potential(system)`` is asked for its
    potential; the first model of a known family is used otherwise.

    Args:
        module: Where to look.
        system: What is simulated.
        potential: What makes the potential instead, see :func:`potential_maker`.

    Raises:
        TypeError: If no potential is found.
    """
    if potential is not None:
        made = potential_maker(potential)(module, system)
        if not isinstance(made, Potential):
            raise TypeError(
                f"potential={_shown(potential)} returned a {type(made).__name__}: return a stable_plugin.models.Potential, "
                "for instance a ModulePotential."
            )
        return made
    if isinstance(module, Calculator):
        return CalculatorPotential(module, system)
    if is_torch_sim_model(module):
        return TorchSimPotential(module, system)
    for part in _parts(module):
        if hasattr(part, "stable_potential"):
            own: Potential = part.stable_potential(system)
            return own
        for family in families():
            if family.owns(part):
                return family.make_potential(part, system)
    titles = ", ".join(family.title for family in families())
    raise TypeError(
        f"no potential found in {type(module).__name__}: it contains no model of a known family ({titles}). Add a method "
        "stable_potential(system) to the module that returns a stable_plugin.models.Potential, for instance a "
        "ModulePotential, or pass potential=, a function of module and system that does."
    )


def family_of(module: nn.Module) -> ModelFamily | None:
    """Return the family of the first model inside a module, or None if it contains no model of a known family.

    Args:
        module: Where to look.
    """
    return next((family for part in module.modules() for family in families() if family.owns(part)), None)


def potential_maker(potential: str | PotentialMaker) -> PotentialMaker:
    """Return the function that makes a potential.

    Args:
        potential: A function ``(module, system)`` that returns a :class:`~stable_plugin.models.Potential`; its full name,
            such as ``my_package.my_module.my_function``; or the name of a family, whose first model in the module is used.

    Raises:
        ValueError: If it is none of them.
    """
    if isinstance(potential, str):
        return _imported(potential) if "." in potential else _maker_of_family(potential)
    if isinstance(potential, type) and issubclass(potential, Potential):
        return potential
    if not callable(potential) or isinstance(potential, type | nn.Module):
        raise ValueError(
            f"potential={potential!r} is not a function: pass one of (module, system) that returns a "
            "stable_plugin.models.Potential, its full name, or the name of a family."
        )
    return potential


def load_potential(source: str | Path, family: str | None = None, **arguments: Any) -> nn.Module:
    """Load a model of a known family.

    Such files are pickles, which can run code: load files you trust.

    Args:
        source: Path of a file, or the name of a pretrained model.
        family: Name of the family; recognized by the content and the suffix of the file, or by the name, if not given.
        arguments: Further arguments of the family's loader, such as ``task_name`` for fairchem.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If the source is neither a file nor a known name.
        TypeError: If the loader has no argument of that name.
        ValueError: If the file is of another kind, or the family is not known.
    """
    chosen = get_family(family) if family is not None else find_family(source)
    for name, value in arguments.items():
        if name not in chosen.loader_arguments:
            raise TypeError(
                f"{name}={value!r} is not an argument of the loader of {chosen.title} models: remove it, or use "
                f"{', '.join(chosen.loader_arguments) or 'no arguments'}."
            )
    return chosen.load(source, **arguments)


def find_family(source: str | Path) -> ModelFamily:
    """Return the family of a model file, recognized by content and suffix, or of the name of a pretrained model.

    Args:
        source: Path of a file, or a name.

    Raises:
        FileNotFoundError: If the source is neither a file nor a known name.
        ValueError: If the file is of no known family.
    """
    path, name = Path(source), str(source)
    exists = path.is_file()
    if exists:
        for package in pickled_packages(path):
            for family in families():
                if package in family.packages:
                    return family
    for family in families():
        if name.endswith(family.suffixes) or (not exists and family.is_pretrained(name)):
            return family
    known = "; ".join(f"for {family.title} {family.describe_sources()}" for family in families())
    if exists:
        raise ValueError(f"model={name!r} is not recognized as a file of a known family: pass {known}, or set family=.")
    raise FileNotFoundError(f"model={name!r} is neither a file nor the name of a pretrained model: pass {known}.")


def _parts(module: Any) -> Iterable[Any]:
    return module.modules() if isinstance(module, nn.Module) else [module]


def _imported(name: str) -> PotentialMaker:
    try:
        found: Any = pkgutil.resolve_name(name)
    except Exception as error:  # importing runs a module, which can raise anything
        raise ValueError(
            f"potential={name!r} cannot be imported ({type(error).__name__}: {error}): pass the full name of a function of "
            "(module, system)."
        ) from error
    if isinstance(found, str):
        raise ValueError(f"potential={name!r} is a string: pass the full name of a function of (module, system).")
    return potential_maker(found)


def _maker_of_family(name: str) -> PotentialMaker:
    known = {family.name: family for family in families()}
    if name not in known:
        raise ValueError(
            f"potential={name!r} is not a family: use one of {', '.join(known)}, or pass the full name of a function of "
            "(module, system), such as my_package.my_function."
        )

    def make(module: Any, system: System) -> Potential:
        for part in _parts(module):
            if known[name].owns(part):
                return known[name].make_potential(part, system)
        raise TypeError(f"potential={name!r}: {type(module).__name__} contains no model of {known[name].title}.")

    return make


def _shown(potential: Any) -> str:
    return getattr(potential, "__qualname__", repr(potential))


def _built_in() -> Iterator[ModelFamily]:
    """Yield the family of every folder beside this file that defines one."""
    for entry in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        if entry.ispkg and find_spec(f"{entry.name}.family") is not None:
            family: ModelFamily = importlib.import_module(f"{entry.name}.family").FAMILY
            yield family


def _of_other_packages() -> Iterator[ModelFamily]:
    for point in entry_points(group=GROUP):
        # The built-in ones are declared too, for tools that list entry points.
        if not point.value.startswith(f"{models.__name__}."):
            yield from _loaded(point)


def _loaded(point: EntryPoint) -> Iterator[ModelFamily]:
    """Yield the family of an entry point; another package's mistake must not keep the other families from working."""
    try:
        family = point.load()
    except Exception as error:
        log.warning(
            "the model family %s (%s) cannot be imported and is ignored: %s: %s",
            point.name,
            point.value,
            type(error).__name__,
            error,
        )
        return
    if isinstance(family, ModelFamily):
        yield family
    else:
        log.warning(
            "the model family %s is ignored: %s is a %s, and must be an instance of stable_plugin.models.ModelFamily.",
            point.name,
            point.value,
            type(family).__name__,
        )

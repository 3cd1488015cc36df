"""What the package has to know about a family of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase import Atoms
from torch import nn

from stable_plugin.md.system import System
from stable_plugin.models.averages import WeightAverage
from stable_plugin.models.base import Potential

if TYPE_CHECKING:
    from stable_plugin.models.lightning_module import PotentialModule


class ModelFamily(ABC):
    """A family of models: how its modules are recognized, simulated, loaded and trained.

    A family is found by the registry in one of two ways. A built-in one is a folder ``stable_plugin/models/NAME`` with a
    module ``family`` that defines ``FAMILY``. Any other package declares an entry point in the group
    ``stable_plugin.models`` whose value is an instance of a subclass::

        [options.entry_points]
        stable_plugin.models =
            mymodel = my_package.stable:FAMILY

    The instance is created in every program that looks for a potential, so the module that defines it must not import
    the family's own package at its top. Only the methods that need it do.

    Attributes:
        name: Name of the family, which is also that of the extra to install.
        title: Name in messages.
        packages: Top-level packages that define the classes of its models.
        suffixes: Suffixes of its files.
        loader_arguments: Names of the arguments that :meth:`load` takes besides the source.
        pretrained: Description of its pretrained models in messages, such as ``'small', 'medium'``; empty if none.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    suffixes: tuple[str, ...] = ()
    loader_arguments: tuple[str, ...] = ()
    pretrained: str = ""

    def owns(self, module: nn.Module) -> bool:
        """Return whether a module is a model of this family.

        Classes are compared by the package that defines them, so the package is not imported here.

        Args:
            module: Any torch module.
        """
        defined_in = {base.__module__.partition(".")[0] for base in type(module).__mro__}
        return not defined_in.isdisjoint(self.packages) and self.is_model(module)

    @abstractmethod
    def is_model(self, module: nn.Module) -> bool:
        """Return whether a module of the family's packages is a whole model, as opposed to one of its layers.

        Args:
            module: A module whose class comes from one of :attr:`packages`.
        """

    @abstractmethod
    def make_potential(self, module: nn.Module, system: System) -> Potential:
        """Return the potential that simulates with a model of this family.

        Args:
            module: A module for which :meth:`owns` is true.
            system: What is simulated.
        """

    def is_pretrained(self, name: str) -> bool:
        """Return whether a name is that of a pretrained model.

        Args:
            name: What the user passed instead of a path.
        """
        return False

    def load(self, source: str | Path, **arguments: Any) -> nn.Module:
        """Load a model from a file, or a pretrained one by its name.

        Args:
            source: Path or name.
            arguments: Some of :attr:`loader_arguments`.

        Returns:
            The model.

        Raises:
            ValueError: If the family has no files.
        """
        raise ValueError(f"model={str(source)!r} cannot be loaded: the family {self.name!r} has no loader.")

    def file_suffix(self, module: nn.Module) -> str | None:
        """Return the suffix of the file that :meth:`save` writes of a module, or None if it cannot write one.

        Args:
            module: What :meth:`load` returned, or a module that contains a model of this family.
        """
        return None

    def save(self, module: nn.Module, path: Path) -> None:
        """Write a file of the family.

        Args:
            module: A module for which :meth:`file_suffix` is not None.
            path: A path that does not exist yet.

        Raises:
            ValueError: If the family writes no files.
        """
        raise ValueError(f"path={str(path)!r} cannot be written: the family {self.name!r} writes no files.")

    def structures(self, module: nn.Module, items: Sequence[Any]) -> list[Atoms] | None:
        """Return the structures behind the graphs that a model is trained on.

        Args:
            module: What is trained.
            items: Items of the training dataset, at least one.

        Returns:
            ASE structures, or None if these are not graphs of this family.
        """
        return None

    def lightning_module(self) -> type[PotentialModule] | None:
        """Return the LightningModule that trains a model of this family, or None if there is none."""
        return None

    def average(self, holder: Any) -> WeightAverage | None:
        """Return the average of weights that the family's own trainer keeps, or None if there is none.

        Args:
            holder: The LightningModule, or a callback of the Trainer.
        """
        return None

    def export_again(self, callback: Any, module: Any, suffix: str) -> str | None:
        """Replace the model file that a callback of the family's own trainer has written; called in one process.

        Args:
            callback: A callback of the Trainer.
            module: The LightningModule, with the weights to write.
            suffix: Added to the name of the file that is replaced.

        Returns:
            Path of the file; None if the callback writes none.
        """
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r})"

    def describe_sources(self) -> str:
        """Return what :meth:`load` accepts, in words."""
        files = f"a {' or '.join(self.suffixes)} file" if self.suffixes else ""
        names = f"a pretrained model such as {self.pretrained}" if self.pretrained else ""
        return " or ".join(part for part in (files, names) if part) or "no files"


def not_installed(extra: str, title: str, package: str) -> ImportError:
    """Return the error for a family whose package is missing.

    Args:
        extra: Extra that installs it.
        title: Name of the family in messages.
        package: Name of the distribution that is missing.
    """
    return ImportError(
        f"{title} models need the package {package}, which is not installed: pip install 'stable-plugin[{extra}]', or see "
        "the README for several families in one environment."
    )

"""The recipes that come with the package."""

from __future__ import annotations

import filecmp
import re
import shutil
from importlib import resources
from pathlib import Path

FOLDER = "recipes"
"""Name of the folder of recipes: in the repository, in the package, and where they are copied."""


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: that of the installed package, or of the repository.

    Raises:
        FileNotFoundError: If neither exists.
    """
    package = Path(str(resources.files("stable_plugin")))
    for folder in (package / FOLDER, package.parents[1] / FOLDER):
        if any(folder.glob("*.yaml")):
            return folder
    raise FileNotFoundError(f"no recipes in {str(package / FOLDER)!r}: reinstall stable-plugin.")


def shipped_recipes() -> dict[str, str]:
    """Return the first comment line of each shipped recipe by its name."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        for path in sorted(recipes_folder().glob("*.yaml"))
    }


def copy_recipe(name: str, destination: str | Path = ".") -> list[Path]:
    """Copy a shipped recipe and its data into ``recipes/`` of a folder. Nothing is overwritten.

    Args:
        name: Name of the recipe.
        destination: Folder.

    Returns:
        The files of the recipe, the recipe first; those that were there already included.

    Raises:
        ValueError: If there is no such recipe.
        FileExistsError: If one of the files exists with other content. Then nothing is copied.
    """
    source, names = recipes_folder(), shipped_recipes()
    if name not in names:
        raise ValueError(f"recipe {name!r} is not shipped: pass one of {', '.join(names)}.")
    files = [source / f"{name}.yaml", *_data(source, name)]
    targets = [Path(destination) / FOLDER / file.relative_to(source) for file in files]
    for file, target in zip(files, targets, strict=True):
        if target.exists() and not filecmp.cmp(file, target, shallow=False):
            raise FileExistsError(
                f"{str(target)!r} exists with other content and is not overwritten: move it away, or change to another folder."
            )
    for file, target in zip(files, targets, strict=True):
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return targets


def _data(source: Path, name: str) -> list[Path]:
    """Return the data files that a recipe mentions, and their description."""
    mentioned = set(re.findall(r"[\w-]+\.(?:ext)?xyz\b", (source / f"{name}.yaml").read_text(encoding="utf-8")))
    return [path for path in sorted((source / "data").iterdir()) if path.name in mentioned or path.name == "README.md"]

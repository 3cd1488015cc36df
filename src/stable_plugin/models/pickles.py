"""Look into files of ``torch.save`` without running them."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path

STRINGS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE")


def pickled_packages(path: Path) -> Iterator[str]:
    """Yield the top-level packages of the classes in a file of ``torch.save``, in the order they occur.

    Opcodes are read and not executed, so this is safe for files of unknown origin. A damaged file yields what could be
    read before the damage.

    Args:
        path: An existing file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            content = archive.read(name)
        previous = ""
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "GLOBAL":  # protocol 2, the default of torch.save: "module name"
                yield str(argument).partition(" ")[0].partition(".")[0]
            elif opcode.name in STRINGS:
                # Protocol 4 pushes module and name as strings before STACK_GLOBAL: a dotted one may be the module.
                previous = str(argument)
                if "." in previous:
                    yield previous.partition(".")[0]
    except Exception:  # a file of another kind or a damaged one: its own loader reports what is wrong
        return


def is_torchscript(path: Path) -> bool:
    """Return whether a file is an archive of TorchScript, which holds code beside the weights.

    Args:
        path: An existing file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:  # another format, or a damaged file, which its reader names
        return False

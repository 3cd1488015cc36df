"""The setting of the C library that keeps freed memory."""

from types import SimpleNamespace

import pytest

from stable_plugin.runtime import allocator


@pytest.mark.parametrize(("platform", "library"), [("darwin", {}), ("linux", {}), ("linux", {"mallopt": None})])
def test_keep_freed_memory_needs_mallopt(platform, library, monkeypatch):
    calls = []
    if "mallopt" in library:
        library = {"mallopt": lambda *setting: calls.append(setting)}
    monkeypatch.setattr(allocator.sys, "platform", platform)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: SimpleNamespace(**library))
    allocator.keep_freed_memory()
    assert calls == ([(-3, 32 << 20), (-1, 1 << 30)] if library else [])

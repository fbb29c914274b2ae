"""Raw sets that several tests read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import raw_layouts as layouts


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    """One folder per layout, all of the same pictures, `layouts.imagenet_pictures()`."""
    folders = {name: tmp_path_factory.mktemp("set") for name in layouts.LAYOUTS}
    pictures = layouts.imagenet_pictures()
    for name, folder in folders.items():
        layouts.LAYOUTS[name](folder, pictures)
    return folders


@pytest.fixture
def closed(monkeypatch) -> str:
    """The name of folders that may not be read, as any are by root alone; tests may be run by root."""
    name = "lost+found"

    def refusing(call):
        def refuse(path, *args, **options):
            if not isinstance(path, int):
                seen = Path(os.fsdecode(path))
                if name in (seen.parent.name, seen.name * (call is not stat)):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *args, **options)

        return refuse

    stat = os.stat
    for function in (os.listdir, os.scandir, os.stat):
        monkeypatch.setattr(os, function.__name__, refusing(function))
    return name

"""Raw sets that several tests read."""

from __future__ import annotations

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

"""A small Python package with one of everything that a docstring can hang on."""

from __future__ import annotations

import textwrap
from pathlib import Path

GARDEN = {
    "__init__.py": '''
        """Grow things in rows and beds.

        More about it.
        """
        from ._soil import Bed, _Worm
        from .tools import *
        ''',
    "_soil.py": '''
        """Private, so named by nobody."""

        class Bed:
            """A raised bed with good soil."""

            def turn(self, depth):
                """Turn the soil to a depth."""

        class Clay:
            """Nobody passes this one on."""
        ''',
    "tools.py": '''
        """Tools that you hold in a hand."""
        __all__ = ["dig"]
        __all__ += ["rake"]

        def dig(place: str, depth: float = 0.5, /, *others: int, spade, quiet=False, **how) -> bool:
            """Dig a hole in `place`.

            :param place: not part of the answer
            """

        def rake(*, width=3):
            """Rake the leaves from the lawn. It takes all afternoon."""

        def sharpen(blade):
            """Sharpen a blade on the stone."""
        ''',
    "plants.py": '''
        """Plants, from seed to harvest."""
        from typing import overload

        class Plant:
            """Something green that grows."""

            def __init__(self, name, height=0.0):
                """Not the class's own docstring."""

            @property
            def height(self) -> float:
                """Height over ground, in metres."""

            @height.setter
            def height(self, value):
                """Set the height by hand, of all things."""

            def water(self, litres):
                """Give it some water."""

            async def bloom(self, colour="white"):
                """Wait until the flowers open."""

            @classmethod
            def from_seed(cls, seed):
                """Grow a plant from one seed."""

            @staticmethod
            def is_green(colour):
                """Tell whether a colour is green."""

            def __repr__(self):
                """Return what repr shows."""

            class Leaf:
                """The part that drinks light."""

                def fall(self):
                    """Drop to the ground in autumn."""

        @overload
        def graft(a: int):
            """One of several ways to graft."""
        def graft(a, b):
            """Join two plants into one."""

        def undocumented(): ...
        def todo():
            """TODO: say what this does"""
        def short():
            """Short."""
        def harvest_time():
            """The harvest time of this class."""
        def uproot():
            """Pull a plant out with its roots.

            This function is deprecated, let it stand.
            """
        def again(a, b):
            """Join two plants into one."""
        def _hidden():
            """Nobody should read about this."""

        if __name__ == "__main__":
            def main():
                """Run as a script and never imported."""
        ''',
}


def lay(folder: Path, files: dict[str, str]) -> Path:
    """Write the files, given by their names relative to `folder`; returns `folder`."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
    return folder

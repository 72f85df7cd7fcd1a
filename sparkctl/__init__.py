"""The command line. One file for each family of verbs: it parses, calls, prints.

Importing this package puts our own `cluster` and `launch` in place, because other software (ROS 2 has a `launch`) may own those
names on PYTHONPATH, which stands before the installed packages.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

__version__ = "0.1.0"

# What else is installed must not have a say in how our files are checked; and to look for it takes pydantic 40 ms.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


def _claim_room(name: str) -> None:
    """Register the package `name` that lies beside this one, whatever else is called so."""
    folder = Path(__file__).resolve().parent.parent / name
    loaded = sys.modules.get(name)
    if loaded is not None and list(getattr(loaded, "__path__", [])) == [str(folder)]:
        return
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"sparkctl is not whole: {folder} is missing; install it again")
    for stranger in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
        del sys.modules[stranger]
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_claim_room("cluster")
_claim_room("launch")

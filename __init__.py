"""Stand-in for the package where a clone named fastvq is imported from the folder around it.

It returns the installed package, or else the one in the clone.

Without this file Python would take the clone for an empty namespace package.
"""

import importlib.machinery
import importlib.util
import pathlib
import sys

if __name__ == "fastvq":
    _clone = pathlib.Path(__file__).parent
    _elsewhere = [entry for entry in sys.path if pathlib.Path(entry).resolve() != _clone.parent.resolve()]
    _spec = importlib.machinery.PathFinder.find_spec("fastvq", _elsewhere)
    if _spec is None or _spec.loader is None:
        _folder = _clone / "fastvq"
        _spec = importlib.util.spec_from_file_location(
            "fastvq", _folder / "__init__.py", submodule_search_locations=[str(_folder)]
        )
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["fastvq"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["fastvq"])

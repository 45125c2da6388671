"""Stand-in for the package where a clone named fastvq is imported from the folder around it.

It returns the installed package, or else the one in the clone.

Without this file Python would take the clone for an empty namespace package.
"""

import importlib.util
import pathlib
import sys

if __name__ == "fastvq":
    _clone = pathlib.Path(__file__).parent
    _elsewhere = [entry for entry in sys.path if pathlib.Path(entry).resolve() != _clone.parent.resolve()]
    # An editable installation has a finder of its own, which takes no path.
    _specs = (finder.find_spec("fastvq", _elsewhere) for finder in sys.meta_path)
    _spec = next((spec for spec in _specs if spec is not None and spec.loader is not None), None)
    if _spec is None:
        _folder = _clone / "fastvq"
        _spec = importlib.util.spec_from_file_location(
            "fastvq", _folder / "__init__.py", submodule_search_locations=[str(_folder)]
        )
    assert _spec is not None
    assert _spec.loader is not None
    # In this module, not in another one that takes its place: a thread that waits for this import gets this one.
    for _name in ("origin", "loader", "cached", "submodule_search_locations"):
        setattr(__spec__, _name, getattr(_spec, _name))
    assert _spec.origin is not None
    __file__, __loader__, __cached__ = _spec.origin, _spec.loader, _spec.cached
    __path__ = list(_spec.submodule_search_locations or ())
    _spec.loader.exec_module(sys.modules[__name__])

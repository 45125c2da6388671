"""`fastvq data`: the data sets that have names, and the cache of decoded files."""

from __future__ import annotations

import argparse

SUMMARY = "list the data sets that have names, and the cache of decoded files"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--clear", action="store_true", help="delete the cache, which is made again where it is needed")


def run(options: argparse.Namespace) -> int:
    """Print one line for each data set, and one about the cache."""
    from fastvq.data import DATA_SETS
    from fastvq.data.decoded import cache_folder, cache_size, clear_cache
    from fastvq.errors import counted
    from fastvq.modalities import plural

    width = max(map(len, DATA_SETS))
    for name, data in DATA_SETS.items():
        counts = f"{data.count[0]} + {data.count[1]} held out"
        missing = data.missing()
        print(
            f"{name:{width}}  {plural(data.modality)}, {data.form}, {counts}, {data.license}"
            + (f"; missing: {missing}" if missing else "")
        )
    print(f"{'FOLDER':{width}}  any folder of files (subfolders are classes), or of tar shards")
    entries, size = cache_size()
    print(f"cache: {cache_folder()}: {counted(entries, 'data set')}, {size / 1e6:.1f} MB")
    if options.clear:
        clear_cache()
        print("cleared")
    return 0

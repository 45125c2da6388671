"""The benchmark suite: `fastvq bench` for one shape, `fastvq bench --suite` for the report in docs/benchmarks.md.

    data.py       shapes, and the vectors that are searched
    peers.py      who searches: fastvq's backends and what else there is
    measure.py    interleaved timing, checked results, memory in a fresh process
    training.py   training steps beside vector_quantize_pytorch
    suite.py      everything, as one JSON document
    targets.py    what the document must show
    report.py     the document as a page with plots

No time is reported whose result wasn't checked in the same run.
"""

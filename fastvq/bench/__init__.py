"""The benchmark suite: `fastvq bench` for one shape, `fastvq bench --suite` for the report in docs/benchmarks.md.

    data.py       shapes, and the vectors that are searched
    peers.py      contestants: fastvq's backends and other libraries
    measure.py    interleaved timing, checked results, memory in a fresh process
    training.py   training steps beside vector_quantize_pytorch
    suite.py      the whole suite, as one JSON document
    targets.py    targets, compared with the document
    report.py     the document as a page with plots
    model.py      predicted times on GPUs, with cuda_model.py and devices.py

No time is reported unless the result was checked in the same run.
"""

"""One command for a GPU that is at hand for minutes: `make gpu OUT=DIR`, or `python -m fastvq.bench.gpu DIR`.

    run.py         steps in processes of their own, each within its time, each result on disk at once
    steps.py       the steps, the most important first
    step.py        one step: its process, its cases, its results
    sizes.py       what the steps take on a GPU, and tiny sizes for a rehearsal on the CPU
    build.py       the package and both native libraries, built into a folder; Triton's kernels compiled
    machine.py     the device, its rates, the versions
    exactness.py   indices compared with the definition
    suites.py      tests that run on the device, by recorder.py, a plugin of pytest
    times.py       times beside other methods
    tuning.py      other launch configurations and other kernels
    prediction.py  predictions beside measurements
    report.py      the page, which `fastvq bench --render` writes too

It takes the interpreter and the packages that are there, and needs no network. A step that fails, hangs or crashes is
recorded with the end of its output, and the next one begins.
"""

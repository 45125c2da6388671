"""A script on several ranks, in the environment that torchrun gives it: `python tests/forked.py RANKS SCRIPT ...`.

The ranks are forks of one process that has imported torch and fastvq: in a short script the imports take most of the
time, and torchrun, which starts each rank anew, imports torch once more itself.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path


def run_forked(ranks: int, script: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Return the outcome of a script on `ranks` processes of one thread each."""
    command = [sys.executable, __file__, str(ranks), str(script), *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, text=True, capture_output=True, timeout=600, env=one_thread)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_rank(script: str, arguments: list[str]) -> int:
    """Run the script as `python SCRIPT ...` does, and return its exit status."""
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main(ranks: int, script: str, *arguments: str) -> int:
    """Fork the ranks and wait for them; once one has failed, the others are ended."""
    for name in ("torch._dynamo", "torch.distributed", "fastvq.quantizers"):
        importlib.import_module(name)
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = set()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            own = shared | {"RANK": rank, "LOCAL_RANK": rank}
            os.environ |= {name: str(value) for name, value in own.items()}
            os._exit(run_rank(script, list(arguments)))
        running.add(child)
    failed = False
    while running:
        child, status = os.wait()
        running.discard(child)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGTERM)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))

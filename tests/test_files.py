"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastvq import files
from fastvq.errors import CheckpointError
from fastvq.files import check_new, exclusive, whole, whole_folder, write_whole


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    with whole(path) as file:
        file.write(b"first")
        assert not path.exists()
    with whole(str(path)) as file:
        file.write(b"second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    write_whole(path, "dritte \N{LATIN SMALL LETTER U WITH DIAERESIS}")
    assert path.read_bytes() == b"dritte \xc3\xbc"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("first")

    def fails_half_way():
        with whole(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fails_half_way()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []

    def recording(name):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, **k: (calls.append((name, a)), original(*a, **k))[1])

    for name in ("fsync", "replace", "rename"):
        recording(name)
    write_whole(tmp_path / "file", "content")
    assert [name for name, _ in calls] == ["fsync", "replace", "fsync"]
    calls.clear()
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "one").touch()
        (partial / "inner").mkdir()
        (partial / "inner" / "two").touch()
    # Two files, the folder in the folder, the folder itself; then its name.
    assert [name for name, _ in calls] == ["fsync"] * 4 + ["rename", "fsync"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_in_the_place_of_a_temporary_is_not_followed(tmp_path, monkeypatch, kind):
    victim = tmp_path / "victim"
    victim.write_text("precious") if kind == "file" else victim.mkdir()
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * 2 * count)
    (tmp_path / f".fastvq-{16 * '0'}.tmp").symlink_to(victim)
    context = whole if kind == "file" else whole_folder
    with pytest.raises(FileExistsError), context(tmp_path / "other"):
        pytest.fail("it was followed")
    assert victim.read_text() == "precious" if kind == "file" else not list(victim.iterdir())


def test_a_link_in_the_place_of_an_output_is_replaced(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "folder").mkdir()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "folder")
    for path in (tmp_path / "link", tmp_path / "elsewhere" / "file"):
        write_whole(path, "new")
        assert not path.is_symlink()
        assert path.read_text() == "new"
    assert (tmp_path / "target").read_text() == "precious"
    assert (tmp_path / "folder" / "file").read_text() == "new"


def test_names_of_temporaries_are_random(tmp_path):
    names = set()
    for _ in range(3):
        with whole(tmp_path / "file") as file:
            names.add(file.name)
    assert len(names) == 3


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", "content")
        with whole_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="is not a file that could be replaced"):
        write_whole(tmp_path / "pipe", "content")
    assert (tmp_path / "pipe").is_fifo()


def test_the_longest_name_can_be_written(tmp_path):
    write_whole(tmp_path / ("x" * 255), "content")
    assert len(list(tmp_path.iterdir())) == 1


def in_threads(function, count=4):
    """Call a function in several threads at once; return the errors."""
    errors = []

    def call(number):
        try:
            function(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_threads_that_write_one_file_all_succeed(tmp_path):
    def write(number):
        for _ in range(50):
            write_whole(tmp_path / "file", bytes([number]) * 5000)

    assert not in_threads(write)
    content = (tmp_path / "file").read_bytes()
    assert len(content) == 5000
    assert len(set(content)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_of_threads_that_write_one_folder_one_succeeds(tmp_path):
    ready = threading.Barrier(4)

    def write(number):
        with whole_folder(tmp_path / "folder") as partial:
            (partial / str(number)).touch()
            ready.wait(10)

    errors = in_threads(write)
    assert [type(error) for error in errors] == [FileExistsError] * 3
    assert all("exists: choose another folder" in str(error) for error in errors)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert len(list((tmp_path / "folder").iterdir())) == 1


def test_what_dead_processes_left_is_deleted_and_nothing_else(tmp_path):
    dead = [tmp_path / f".fastvq-{digit * 16}.tmp" for digit in "ab"]
    dead[0].touch()
    dead[1].mkdir()
    (dead[1] / "inner").touch()
    others = [tmp_path / name for name in (".fastvq-0123.tmp", ".fastvq-aaaaaaaaaaaaaaaa.tmp.bak", "fastvq-x.tmp")]
    for path in others:
        path.touch()
    link = tmp_path / f".fastvq-{'c' * 16}.tmp"
    link.symlink_to(tmp_path / "nowhere")
    with whole(tmp_path / "one") as outer, whole_folder(tmp_path / "two") as folder:
        write_whole(tmp_path / "three", "content")
        assert os.path.exists(outer.name)
        assert folder.exists()
    assert sorted(tmp_path.iterdir()) == sorted([*others, link, *(tmp_path / name for name in ("one", "two", "three"))])


WITHOUT_TORCH = f"""
import sys, time, types
sys.modules["fastvq"] = package = types.ModuleType("fastvq")
package.__path__ = [{str(Path(files.__file__).parent)!r}]
from fastvq.files import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder, seconds):
    """Start a process that holds the right to write to a folder for some seconds."""
    command = [sys.executable, "-c", WITHOUT_TORCH, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_folder_has_one_writer_until_it_ends_or_dies(tmp_path):
    folder = tmp_path / "folder"
    process = holder(folder, 60)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError) as said, exclusive(folder):
            pass
        assert f"{folder} is being written by process {process.pid} on " in str(said.value)
        with exclusive(tmp_path / "other"):
            pass
    finally:
        process.kill()
        process.communicate()
    with exclusive(folder), exclusive(folder / ".." / "folder"):
        errors = in_threads(lambda _: exclusive(folder).__enter__(), 1)
        assert "another thread of this process" in str(errors[0])
        refused = holder(folder, 0)
        assert f"{folder} is being written by process {os.getpid()} on " in refused.communicate()[1]
    assert holder(folder, 0).communicate()[0] == "held\n"


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="no locks on this file system"), exclusive(tmp_path):
        write_whole(tmp_path / "file", "content")
    assert (tmp_path / "file").exists()


def test_all_files_are_written_here():
    """Only logs that grow, and files inside of a folder that appears as a whole, are written by others."""
    root = Path(files.__file__).parent
    allowed = {"files.py", "training/metrics.py", "training/checkpoint.py", "bench/measure.py"}
    allowed |= {"bench/gpu/recorder.py", "bench/gpu/run.py", "data/decoded.py", "training/loggers.py"}
    allowed |= {"data/video_io.py", "demo/sizes.py"}  # PyAV, in a file that is open
    found = set()
    for path in [*root.rglob("*.py"), *(root.parent / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                opens = name == "open" and any(set(mode) & set("wax+") and len(mode) < 4 for mode in modes)
                if opens or name in ("write_text", "write_bytes"):
                    found.add(path.relative_to(root if root in path.parents else root.parent).as_posix())
    assert found == allowed


def test_a_folder_appears_at_the_end(tmp_path):
    folder = tmp_path / "new" / "folder"
    with whole_folder(folder) as partial:
        (partial / "file").write_text("content")
        assert not folder.exists()
    assert (folder / "file").read_text() == "content"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_no_folder(tmp_path, error):
    def fails_half_way():
        with whole_folder(tmp_path / "folder") as partial:
            (partial / "file").write_text("half")
            raise error

    with pytest.raises(error):
        fails_half_way()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_is_no_new_folder(tmp_path, kind):
    path = tmp_path / kind
    path.mkdir() if kind == "folder" else path.touch()
    with pytest.raises(FileExistsError, match="exists: choose another folder"):
        check_new(path)
    with pytest.raises(FileExistsError), whole_folder(path):
        pass
    assert list(tmp_path.iterdir()) == [path]

"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import pytest

from fastvq.files import check_new, whole, whole_folder


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    with whole(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with whole(path) as partial:
        partial.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("first")

    def fails_half_way():
        with whole(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fails_half_way()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole(tmp_path / "file"):
        pass


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

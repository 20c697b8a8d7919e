"""A new folder is there completely or not at all."""

import pytest

from transformer_lens_rome.files.new_folder import new_folder


def test_it_is_moved_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "er" / "folder"
    with new_folder(path) as part:
        (part / "file").write_text("text")
        assert not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["folder"]
    assert (path / "file").read_text() == "text"
    (tmp_path / "plain").mkdir()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it, too


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "x") as part:
        (part / "file").write_text("text")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full", [False, True])
def test_what_others_make_meanwhile_stays(tmp_path, full):
    """The system would replace an empty folder."""
    path = tmp_path / "x"
    with pytest.raises(FileExistsError, match="nothing is written over it"), new_folder(path):
        path.mkdir()
        if full:
            (path / "theirs").touch()
    assert [p.name for p in path.iterdir()] == ["theirs"] * full
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("path", [".", "..", ""])
def test_a_folder_that_is_always_there(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError), new_folder(path):
        pass

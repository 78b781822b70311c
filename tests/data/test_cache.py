from __future__ import annotations

import logging
import os

import pytest
import torch

from ackd_lightning.data.cache import cached, fingerprint
from ackd_lightning.data.path_table import PathTable
from ackd_lightning.data.sources import Pixels


def test_fingerprint_sees_names_sizes_times_and_settings(tmp_path, write_classes):
    write_classes(tmp_path, {"a": 2})
    paths = [tmp_path / "a" / "0000.png", tmp_path / "a" / "0001.png"]

    def mark(count=2, setting=32):
        return fingerprint(PathTable.of_paths(tmp_path, paths[:count]), tmp_path, setting)

    marks = [mark(), mark(setting=16), mark(count=1)]
    assert mark() == marks[0]
    os.utime(paths[1], ns=(1, 1))
    marks.append(mark())
    paths[1].write_bytes(b"0")
    os.utime(paths[1], ns=(1, 1))
    marks.append(mark())
    assert len(set(marks)) == 5


def pixels(value):
    return Pixels(("a",), torch.full((2, 3, 4, 4), value, dtype=torch.uint8), torch.tensor([0, 0]))


def test_cache_is_used_while_it_is_fresh_and_never_when_it_is_stale(tmp_path, caplog):
    path = tmp_path / "cache.pt"
    made = cached(path, "one", lambda: pixels(1))
    again = cached(path, "one", lambda: pytest.fail("decoded again"))
    assert torch.equal(made.images, again.images)
    assert again.class_names == ("a",)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert cached(path, "two", lambda: pixels(2)).images.unique().tolist() == [2]
    assert "is stale" in caplog.text
    assert cached(path, "two", lambda: pytest.fail("decoded again")).images.unique().tolist() == [2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.pt"]


def test_a_damaged_cache_is_made_again(tmp_path, caplog):
    path = tmp_path / "cache.pt"
    cached(path, "one", lambda: pixels(1))
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert cached(path, "one", lambda: pixels(3)).images.unique().tolist() == [3]
    assert "cannot be read" in caplog.text


def test_a_cache_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    path = tmp_path / "cache.pt"
    torch.save({"fingerprint": "one", "images": Bomb()}, path)
    assert cached(path, "one", lambda: pixels(3)).images.unique().tolist() == [3]
    assert not (tmp_path / "owned").exists()


def test_without_a_writable_folder_it_continues_with_one_warning(tmp_path):
    with pytest.warns(UserWarning, match="could not write the cache") as caught:
        result = cached(tmp_path / "nowhere" / "cache.pt", "one", lambda: pixels(1))
    assert len(caught) == 1
    assert result.images.unique().tolist() == [1]


def test_others_who_may_read_the_folder_may_read_the_cache(tmp_path):
    path = tmp_path / "cache.pt"
    cached(path, "one", lambda: pixels(1))
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_cache_file_is_left_whole_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "cache.pt"
    cached(path, "one", lambda: pixels(1))

    def full(content, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="No space left"):
        cached(path, "two", lambda: pixels(2))
    monkeypatch.undo()
    assert cached(path, "one", lambda: pytest.fail("lost")).images.unique().tolist() == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.pt"]

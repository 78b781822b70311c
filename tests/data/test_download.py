from __future__ import annotations

import hashlib
import http.server
import io
import logging
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from ackd_lightning.data.download import Archive, extract, fetch
from ackd_lightning.errors import ACKDError

CONTENT = bytes(range(256)) * 4000
ARCHIVE = Archive("Toy", "http://127.0.0.1:9/toy.bin", "toy.bin", hashlib.md5(CONTENT).hexdigest(), len(CONTENT))


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True
        self.cut = []  # bytes after which the connection is dropped, one entry for each request
        self.status = None
        self.asked = []
        self.pause = threading.Event()  # after the first bytes of an answer, until it is set
        self.pause.set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/toy.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.server.status:
            self.send_error(self.server.status)
            return
        content = self.server.content
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = self.server.cut.pop(0) if self.server.cut else len(content)
        self.wfile.write(content[start : start + min(stop, 1000)])
        self.wfile.flush()
        self.server.pause.wait(20)
        self.wfile.write(content[start + 1000 : start + stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_download_verifies_and_names_the_file(server, tmp_path):
    path = fetch(ARCHIVE, tmp_path / "new", url=server.url)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["toy.bin"]
    fetch(ARCHIVE, tmp_path / "new", url=server.url)
    assert server.asked == [None]


def test_file_address(tmp_path):
    (tmp_path / "mirror").write_bytes(CONTENT)
    path = fetch(ARCHIVE, tmp_path / "data", url=(tmp_path / "mirror").as_uri())
    assert path.read_bytes() == CONTENT


def test_a_part_is_continued(server, tmp_path):
    (tmp_path / "toy.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(ARCHIVE, tmp_path, url=server.url).read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"]


def test_a_dropped_connection_is_continued(server, tmp_path):
    server.cut = [5000, 300_000]
    assert fetch(ARCHIVE, tmp_path, url=server.url).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=5000-", "bytes=305000-"]


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "toy.bin.part").write_bytes(b"old bytes")
    assert fetch(ARCHIVE, tmp_path, url=server.url).read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more", b"another file" * 9], ids=["whole", "longer", "other"])
def test_a_part_of_any_kind_ends_in_the_right_file(server, tmp_path, part):
    (tmp_path / "toy.bin.part").write_bytes(part)
    assert fetch(ARCHIVE, tmp_path, url=server.url).read_bytes() == CONTENT
    assert not (tmp_path / "toy.bin.part").exists()


def test_giving_up_keeps_the_part_and_names_the_remedy(server, tmp_path):
    server.cut = [5000, 5000, 5000]
    with pytest.raises(
        ACKDError, match=r"could not download Toy from http.*closed after 15,000 of 1,024,000"
    ) as caught:
        fetch(ARCHIVE, tmp_path, url=server.url)
    assert "set url to a mirror" in str(caught.value)
    assert f"put the file at {tmp_path / 'toy.bin'}" in str(caught.value)
    assert (tmp_path / "toy.bin.part").stat().st_size == 15_000
    assert not (tmp_path / "toy.bin").exists()


def test_a_wrong_file_is_not_kept(server, tmp_path):
    server.content = b"<html>moved</html>"
    with pytest.raises(ACKDError, match=f"has 18 bytes and checksum .* instead of {ARCHIVE.md5}"):
        fetch(ARCHIVE, tmp_path, url=server.url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [404, 503])
def test_an_error_of_the_server_is_named(server, tmp_path, status):
    server.status = status
    with pytest.raises(ACKDError, match=f"could not download Toy .*HTTP Error {status}"):
        fetch(ARCHIVE, tmp_path, url=server.url)


def test_no_server(server, tmp_path):
    with pytest.raises(ACKDError, match=r"could not download Toy from http://127\.0\.0\.1:1/x"):
        fetch(ARCHIVE, tmp_path, url="http://127.0.0.1:1/x")


@pytest.mark.parametrize("url", ["ftp://host/toy.bin", "toy.bin", "data:,x"])
def test_other_addresses_are_refused(tmp_path, url):
    with pytest.raises(ACKDError, match="is not a web address"):
        fetch(ARCHIVE, tmp_path, url=url)


def test_a_half_file_put_there_by_hand_is_refused(tmp_path):
    (tmp_path / "toy.bin").write_bytes(CONTENT[:10])
    with pytest.raises(ACKDError, match=r"toy\.bin is not the official file of Toy \(10 of 1,024,000 bytes"):
        fetch(ARCHIVE, tmp_path)
    assert (tmp_path / "toy.bin").exists()


def tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("make", [tar, zipped])
@pytest.mark.parametrize("top", ["", "inner/"], ids=["flat", "one folder"])
def test_extract(tmp_path, make, top):
    archive = make(tmp_path / "x", {f"{top}train/a.txt": b"a", f"{top}b.txt": b"b"})
    extract(archive, tmp_path / "deep" / "out")
    found = sorted(p.relative_to(tmp_path / "deep").as_posix() for p in (tmp_path / "deep").rglob("*") if p.is_file())
    assert found == ["out/b.txt", "out/train/a.txt"]


def test_a_tar_archive_without_filters_of_python(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter", raising=False)  # as before 3.10.12 and 3.11.4
    members = {"a": (tarfile.DIRTYPE, ""), "a/b.txt": (tarfile.REGTYPE, ""), "c/d.txt": (tarfile.REGTYPE, "")}
    for name in ("files", "link"):
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            for path, (kind, link) in members.items():
                info = tarfile.TarInfo(path)
                info.type, info.linkname, info.size, info.mode = kind, link, int(kind == tarfile.REGTYPE), 0o6777
                archive.addfile(info, io.BytesIO(b"x"))
        members["link.txt"] = (tarfile.SYMTYPE, "a/b.txt")
    extract(tmp_path / "files", tmp_path / "out")
    assert [(tmp_path / "out" / name).read_text() for name in ("a/b.txt", "c/d.txt")] == ["x", "x"]
    assert not any(path.stat().st_mode & 0o6002 for path in (tmp_path / "out").rglob("*"))
    with pytest.raises(ACKDError, match=r"'link.txt' is no file, which Python \S+ cannot check"):
        extract(tmp_path / "link", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_two_processes_that_download_one_file_take_turns(server, tmp_path, caplog):
    server.pause.clear()
    code = (
        "import sys; from pathlib import Path; from ackd_lightning.data.download import Archive, fetch; "
        f"fetch(Archive('Toy', '', 'toy.bin', {ARCHIVE.md5!r}, 0), Path(sys.argv[1]), url=sys.argv[2])"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path), server.url]) as other:
        _until(lambda: server.asked)
        with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.WARNING):
            mine = pool.submit(fetch, ARCHIVE, tmp_path, url=server.url)
            _until(lambda: caplog.messages or mine.done())
            server.pause.set()
            assert mine.result().read_bytes() == CONTENT
        assert other.wait() == 0
    assert "waiting for another process that downloads Toy" in caplog.text
    assert server.asked == [None]
    assert [each.name for each in tmp_path.iterdir()] == ["toy.bin"]


def test_a_download_that_another_process_gave_up_is_continued(server, tmp_path, caplog):
    server.pause.clear()
    server.cut = [5000, 0, 0]
    with ThreadPoolExecutor(2) as pool, caplog.at_level(logging.WARNING):
        first = pool.submit(fetch, ARCHIVE, tmp_path, url=server.url)
        _until(lambda: server.asked)
        second = pool.submit(fetch, ARCHIVE, tmp_path, url=server.url)
        _until(lambda: caplog.messages)
        server.pause.set()
        assert "closed after 5,000" in str(first.exception())
        assert second.result().read_bytes() == CONTENT
    assert server.asked == [None, *["bytes=5000-"] * 3]


def _until(done):
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_download_that_never_began_leaves_nothing(server, tmp_path):
    server.status = 404
    with pytest.raises(ACKDError, match="could not download"):
        fetch(ARCHIVE, tmp_path, url=server.url)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_has_unpacked_is_taken(tmp_path):
    archive = tar(tmp_path / "x", {f"{part}/{number}.txt": b"a" for part in ("train", "test") for number in range(200)})
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(extract, archive, tmp_path / "deep" / "out") for _ in range(2)]:
            done.result()
    extract(archive, tmp_path / "deep" / "out")
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["out"]
    assert len(list((tmp_path / "deep" / "out").rglob("*.txt"))) == 400


def test_a_folder_that_is_not_whole_is_not_taken_for_the_archive(tmp_path):
    archive = tar(tmp_path / "x", {"train/a.txt": b"a", "test/a.txt": b"a"})
    (tmp_path / "out" / "test").mkdir(parents=True)
    with pytest.raises(ACKDError, match=r"out exists and lacks train of the archive: delete it or move it"):
        extract(archive, tmp_path / "out")


@pytest.mark.parametrize("make", [tar, zipped])
def test_an_archive_cannot_write_outside(tmp_path, make):
    archive = make(tmp_path / "x", {"good.txt": b"a", "../../evil.txt": b"b"})
    with pytest.raises(ACKDError, match="could not unpack"):
        extract(archive, tmp_path / "deep" / "er" / "out")
    assert not list(tmp_path.rglob("evil.txt"))
    assert list((tmp_path / "deep" / "er").iterdir()) == []


@pytest.mark.parametrize("make", [tar, zipped])
def test_a_cut_off_archive_leaves_no_folder(tmp_path, make):
    noise = hashlib.shake_128(b"x").digest(50_000)
    archive = make(tmp_path / "x", {"a": noise, "b": noise})
    archive.write_bytes(archive.read_bytes()[:40_000])
    with pytest.raises(ACKDError, match="could not unpack"):
        extract(archive, tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []

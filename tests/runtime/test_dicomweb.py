"""`cdt-dicomweb` against an archive of this test's own."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.filewriter import dcmwrite

from cdt_runtime.dicomweb_cli import VARIABLE, dicomweb_command
from cdt_runtime.reading import scan_series

pytest.importorskip("dicomweb_client")

Shell = Callable[..., tuple[int, str, str]]
TOKEN = "archive-token"


class Archive:
    """Holds instances, and answers QIDO, WADO and STOW."""

    def __init__(self, files: list[Path]) -> None:
        self.held = {str(one.SOPInstanceUID): one for one in map(pydicom.dcmread, files)}
        self.asked: list[str] = []
        archive = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def _known(self) -> bool:
                archive.asked.append(self.path)
                if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                    return True
                self.send_error(401)
                return False

            def _answer(self, kind: str, content: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                if not self._known():
                    return
                asked = re.search(r"/series/([\d.]+)(/instances)?$", self.path)
                if asked and asked[2]:
                    listed = [
                        {} for one in archive.held.values() if one.SeriesInstanceUID == asked[1]
                    ]
                    self._answer("application/dicom+json", json.dumps(listed).encode())
                elif asked and all(
                    one.SeriesInstanceUID != asked[1] for one in archive.held.values()
                ):
                    self.send_error(404)
                elif asked:
                    self._answer(*archive.multipart(asked[1]))
                elif "odd" in self.path:
                    self._answer("text/html", b"<html>")
                else:
                    self._answer("application/dicom+json", json.dumps(archive.series()).encode())

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self._known():
                    self._answer("application/dicom+json", json.dumps(archive.store(body)).encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/dicom-web"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def series(self) -> list[dict[str, Any]]:
        found: dict[tuple[str, ...], int] = {}
        for one in self.held.values():
            key = (one.StudyInstanceUID, one.SeriesInstanceUID, one.Modality)
            found[key] = found.get(key, 0) + 1
        return [
            {
                "0020000D": {"vr": "UI", "Value": [study]},
                "0020000E": {"vr": "UI", "Value": [series]},
                "00080060": {"vr": "CS", "Value": [modality]},
                "00201209": {"vr": "IS", "Value": [count]},
            }
            for (study, series, modality), count in found.items()
        ]

    def multipart(self, series: str) -> tuple[str, bytes]:
        content = b""
        for one in self.held.values():
            if one.SeriesInstanceUID == series:
                file = io.BytesIO()
                dcmwrite(file, one, enforce_file_format=True)
                content += b"--b\r\nContent-Type: application/dicom\r\n\r\n"
                content += file.getvalue() + b"\r\n"
        return 'multipart/related; type="application/dicom"; boundary=b', content + b"--b--\r\n"

    def store(self, body: bytes) -> dict[str, Any]:
        start = body.index(b"\0" * 128 + b"DICM")
        data = pydicom.dcmread(io.BytesIO(body[start:]))
        self.held[str(data.SOPInstanceUID)] = data
        item = {"00081155": {"vr": "UI", "Value": [str(data.SOPInstanceUID)]}}
        return {"00081199": {"vr": "SQ", "Value": [item]}}


@pytest.fixture
def archive(phantom_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Archive]:
    monkeypatch.setenv(VARIABLE, TOKEN)
    found = Archive(sorted((phantom_dir / "new_patient" / "ct").rglob("*.dcm")))
    yield found
    found.server.shutdown()
    found.thread.join()
    found.server.server_close()


def test_a_series_is_found_and_fetched_as_it_was(
    archive: Archive, phantom_dir: Path, tmp_path: Path, shell: Shell
) -> None:
    code, out, err = shell(dicomweb_command, "find", archive.url, "--patient", "X", "--json")
    assert (code, err) == (0, "1 series\n")
    record = json.loads(out)
    assert "PatientID=X" in archive.asked[0]
    words = (record["study"], record["series"], tmp_path / "ct")
    code, out, err = shell(dicomweb_command, "fetch", archive.url, *words)
    assert (code, err) == (0, "")
    assert out == f"fetched   {record['instances']} instances into {tmp_path / 'ct'}\n"
    ours = scan_series(tmp_path / "ct")
    theirs = scan_series(phantom_dir / "new_patient" / "ct")
    assert (ours.volume().hu == theirs.volume().hu).all()
    code, _, err = shell(dicomweb_command, "fetch", archive.url, *words)
    assert code == 2
    assert "is there and not empty" in err


def test_a_file_is_stored(
    archive: Archive, phantom_dir: Path, tmp_path: Path, shell: Shell
) -> None:
    data = pydicom.dcmread(next((phantom_dir / "new_patient" / "ct").rglob("*.dcm")))
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    data.save_as(tmp_path / "new.dcm")
    code, out, err = shell(dicomweb_command, "store", archive.url, tmp_path / "new.dcm")
    assert (code, out, err) == (0, "stored    1 of 1 files\n", "")
    assert "1.2.3.4" in archive.held


def test_what_goes_wrong_is_one_line(
    archive: Archive, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "note.dcm"
    note.write_text("a note")
    closed = "http://127.0.0.1:9/dicom-web"
    cases = [
        (("find", archive.url), "give --patient or --study"),
        (("fetch", archive.url, "1.2", "1.3", tmp_path / "gone"), "archive answers 404: check"),
        (("find", closed, "--patient", "1"), "the archive can't be reached (ConnectionError)"),
        (("find", "pacs", "--patient", "1"), "the archive"),
        (("store", archive.url, note), "can't be read as DICOM"),
        (("store", archive.url, tmp_path / "none.dcm"), "can't be read as DICOM"),
        (("find", f"{archive.url}/odd", "--study", "1.2.3"), "the archive's answer can't be used"),
    ]
    for words, said in cases:
        code, out, err = shell(dicomweb_command, *words)
        assert (code, out) == (2, ""), words
        assert said in err
        assert err.count("\n") == 1
        assert TOKEN not in err
    assert [path.name for path in tmp_path.iterdir()] == ["note.dcm"]
    monkeypatch.delenv(VARIABLE)
    code, _, err = shell(dicomweb_command, "find", archive.url, "--patient", "1")
    assert (code, err) == (2, f"error: the archive answers 401: set {VARIABLE}\n")

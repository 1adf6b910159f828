"""The command `cdt-dicomweb`: the one place that talks to an archive, and only when it is called.

QIDO-RS finds series, WADO-RS fetches one into a folder, STOW-RS stores reports; all through
dicomweb-client.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from cdt_runtime import __version__
from cdt_runtime.console import run
from cdt_runtime.errors import InputError
from cdt_runtime.files import new_folder
from cdt_runtime.progress import Progress

VARIABLE = "CDT_DICOMWEB_TOKEN"
SECONDS = 60
TRIES, WAIT_MS = 3, 200
"""How often, and how soon, an archive is asked again that did not answer."""
MOST = 1000
"""Series that are listed."""

EXAMPLES = f"""
\b
Examples:
  cdt-dicomweb find https://pacs/dicom-web --patient 4711
  cdt-dicomweb fetch https://pacs/dicom-web STUDY SERIES ct/4711
  cdt-infer ct/4711 tile.tif --dicom-sr report.dcm
  cdt-dicomweb store https://pacs/dicom-web report.dcm

\b
Nothing else of CDT Edge talks to a network by itself. The token of the
archive, where it wants one, is taken from {VARIABLE}.
Research use only: not a medical device.
"""


def dicomweb() -> NoReturn:
    """Entry point of `cdt-dicomweb`."""
    run(dicomweb_command, extra="dicom")


@click.group(
    "cdt-dicomweb", epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="cdt-dicomweb")
def dicomweb_command() -> None:
    """Find, fetch and store DICOM in an archive that speaks DICOMweb."""


@dicomweb_command.command("find")
@click.argument("url")
@click.option("--patient", metavar="ID", help="Of this patient.")
@click.option("--study", metavar="UID", help="Of this study.")
@click.option("--modality", default="CT", show_default=True, help="CT, or SM for slides.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def find_command(
    url: str, patient: str | None, study: str | None, modality: str, as_json: bool
) -> None:
    """List series: study, series, modality, date and number of instances."""
    if not (patient or study):
        raise InputError("give --patient or --study: a whole archive is not listed")
    filters = {"Modality": modality, **({"PatientID": patient} if patient else {})}
    fields = ["StudyDate", "NumberOfSeriesRelatedInstances"]
    with _asking(url) as client:
        found = client.search_for_series(
            study_instance_uid=study, search_filters=filters, fields=fields, limit=MOST
        )
    for one in found:
        record = {
            "study": _value(one, "0020000D"),
            "series": _value(one, "0020000E"),
            "modality": _value(one, "00080060"),
            "date": _value(one, "00080020"),
            "instances": _value(one, "00201209"),
        }
        shown = "  ".join("-" if value is None else str(value) for value in record.values())
        click.echo(json.dumps(record) if as_json else shown)
    click.echo(f"{len(found)} series", err=True)


@dicomweb_command.command("fetch")
@click.argument("url")
@click.argument("study")
@click.argument("series")
@click.argument("folder", type=click.Path(path_type=Path))
def fetch_command(url: str, study: str, series: str, folder: Path) -> None:
    """Fetch a series into a new FOLDER, a file an instance."""
    count = 0
    try:
        with new_folder(folder) as staging:
            with _asking(url) as client:
                total = len(client.search_for_instances(study, series))
                progress = Progress("instances", total)
                for count, data in enumerate(client.iter_series(study, series), start=1):
                    data.save_as(staging / f"{count:06d}.dcm", enforce_file_format=True)
                    progress.add(1)
                progress.close()
            if not count:
                raise InputError("the archive has no instance of that series: check both UIDs")
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: give another folder") from error
    click.echo(f"fetched   {count} instances into {folder}")


@dicomweb_command.command("store")
@click.argument("url")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def store_command(url: str, files: tuple[Path, ...]) -> None:
    """Store FILES, such as the reports of cdt-infer --dicom-sr."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    data = []
    for path in files:
        try:
            data.append(pydicom.dcmread(path))
        except (OSError, InvalidDicomError) as error:
            raise InputError(f"{path}: can't be read as DICOM: check the file") from error
    with _asking(url) as client:
        answer = client.store_instances(data)
    stored = len(answer.get("ReferencedSOPSequence", ()))
    refused = len(answer.get("FailedSOPSequence", ()))
    click.echo(f"stored    {stored} of {len(files)} files")
    if refused or stored < len(files):
        raise InputError(f"the archive refused {len(files) - stored} of {len(files)} files")


@contextmanager
def _asking(url: str) -> Iterator[Any]:
    """A client of an archive; what goes wrong with the archive is one line.

    Raises:
        InputError: it can't be reached, refuses, or gives no DICOM.
    """
    import requests
    from dicomweb_client import DICOMwebClient
    from pydicom.errors import InvalidDicomError

    token = os.environ.get(VARIABLE)
    headers = {"Authorization": f"Bearer {token}"} if token else None
    logging.getLogger("retrying").setLevel(logging.CRITICAL)
    try:
        with requests.Session() as session:
            client = DICOMwebClient(url=url, session=session, headers=headers, timeout=SECONDS)
            client.set_http_retry_params(max_attempts=TRIES, wait_exponential_multiplier=WAIT_MS)
            yield client
    except requests.HTTPError as error:
        status = error.response.status_code
        error.response.close()
        cure = f"set {VARIABLE}" if status in (401, 403) else "check the address and the UIDs"
        raise InputError(f"the archive answers {status}: {cure}") from None
    except (ValueError, TypeError, KeyError, AttributeError, InvalidDicomError) as error:
        raise InputError(
            f"the archive's answer can't be used ({type(error).__name__}): check the address"
        ) from None
    except requests.RequestException as error:
        raise InputError(
            f"the archive can't be reached ({type(error).__name__}): check the address"
        ) from None


def _value(record: dict[str, Any], tag: str) -> Any:
    values = record.get(tag, {}).get("Value") or [None]
    return values[0]

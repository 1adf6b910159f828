"""The command `cdt-infer`. Its options are declared here alone; heavy imports wait."""

from __future__ import annotations

from typing import Any, NoReturn

import click

from cdt_runtime import __version__
from cdt_runtime.console import PlaneChoice, run

EXAMPLES = """
\b
Examples:
  cdt-infer ct/R_001 tile.tif              class, probabilities, distances
  cdt-infer ct/R_001 *.tif --json          one JSON object a line
  cdt-infer ct/R_001 tiles/                every tile of a folder
  cdt-infer ct/R_001 slide.svs --slide     a whole slide: table, areas, map
  cdt-infer --no-ct tile.tif               the tile alone
  cdt-infer --manifest cohort.csv          a table of patients, row by row

\b
CT_DIR is a folder that holds one DICOM CT series, at any depth. A TILE is a
TIFF, PNG or JPEG file, a folder with one image file a marker, or a folder of
tiles. With --slide it is an OME-TIFF, SVS, other tiled TIFF, or a slide in
DICOM, a file or the folder of its files; a run that was stopped goes on where
it was. Exit code 2 means that an input could not be used; the line on stderr
says what to do.
Research use only: not a medical device.
"""


def infer() -> NoReturn:
    """Entry point of `cdt-infer`."""
    run(infer_command, extra="wsi")


@click.command(
    "cdt-infer", epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.argument("paths", nargs=-1, metavar="CT_DIR TILE [TILE ...]")
@click.option("--bundle", metavar="DIR", help="Bundle folder.  [default: the newest in ./engines]")
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    help="auto (the fastest that passes the self-test), tensorrt, cuda, openvino or onnxruntime.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32"]),
    default="auto",
    show_default=True,
    help="fp32: never below that of the bundle.",
)
@click.option("--tta", is_flag=True, help="The mean of four orientations: four times the work.")
@click.option("--transductive", is_flag=True, help="Draw the classes towards all TILEs first.")
@click.option(
    "--coverage",
    metavar="SHARE",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Also the set of classes that holds the right one this often, such as 0.9.",
)
@click.option("--card", metavar="FILE", help="Also a page of evidence on the one TILE (HTML).")
@click.option(
    "--dicom-sr", metavar="FILE", help="Also a DICOM structured report that cites CT and slide."
)
@click.option(
    "--embeddings",
    metavar="FILE",
    help="Also the embeddings as AnnData, .h5ad or .zarr; of a slide with places.",
)
@click.option("--codes", metavar="CSV", help="Codes of classes in it: class,value,scheme,meaning.")
@click.option("--trust", metavar="KEY", help="Refuse a bundle that this public key did not sign.")
@click.option("--audit", metavar="FILE", help="Also a line an answer in an append-only log.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a tile, one a line.")
@click.option("--no-ct", is_flag=True, help="Ignore the CT; CT_DIR may then be left out.")
@click.option("--series", metavar="UID", help="Which series, where CT_DIR holds several.")
@click.option("--allow-resample", is_flag=True, help="Accept missing slices by resampling.")
@click.option("--channels", metavar="A,B,...", help="Channel names of tiles that carry none.")
@click.option("--fill-missing", is_flag=True, help="Fill channels a tile lacks with zeros.")
@click.option(
    "--mpp",
    type=click.FloatRange(min=0, min_open=True),
    help="Microns a pixel: of the tile files; with --slide those to look at it with.  [default: "
    "what the file says; with --slide what the model was trained at]",
)
@click.option(
    "--z",
    type=PlaneChoice(),
    metavar="N|max",
    help="Which plane of an OME-TIFF's stack, counted from 1, or max: of all.",
)
@click.option("--slide", "as_slide", is_flag=True, help="Cut the one TILE, a whole slide, up.")
@click.option("--manifest", metavar="FILE", help="A table of patients in place of CT_DIR and TILE.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Rows of a manifest on this Ray cluster; without ADDRESS: on one of this machine.",
)
@click.option("--parquet", is_flag=True, help="Also the table of answers of --out as Parquet.")
@click.option(
    "--out",
    metavar="DIR",
    help="Folder for the results of a slide or manifest.  [default: ./NAME.cdt]",
)
@click.version_option(__version__, prog_name="cdt-infer")
def infer_command(**given: Any) -> int:
    """Classify pathology tiles or a whole slide, with the patient's CT as context.

    Without training anything: the bundle's prototypes decide, and "can't tell"
    is an answer.
    """
    from cdt_runtime.infer_asked import Asked
    from cdt_runtime.infer_run import run_asked

    return run_asked(Asked(**given))

"""Tables of answers as Parquet, for data tools that would guess the types of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from cdt_runtime.files import replace_synced


def write_parquet(table: Path, text: Sequence[str], whole: Sequence[str]) -> Path:
    """Write a CSV file of answers again as Parquet, beside it; an empty cell is a missing value.

    Args:
        table: the CSV file.
        text: columns that hold text, also where it looks like a number.
        whole: columns that hold whole numbers; all others hold probabilities and shares.

    Returns:
        The Parquet file.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """
    import pyarrow as pa
    from pyarrow import csv as reader
    from pyarrow import parquet

    with table.open(encoding="utf-8", newline="") as file:
        names = next(csv.reader(file))
    kinds = {name: pa.float64() for name in names}
    kinds |= dict.fromkeys(text, pa.string()) | dict.fromkeys(whole, pa.int32())
    found = reader.read_csv(
        table,
        parse_options=reader.ParseOptions(newlines_in_values=True),
        convert_options=reader.ConvertOptions(
            column_types=kinds, null_values=[""], strings_can_be_null=True
        ),
    )
    content = BytesIO()
    parquet.write_table(found, content)
    path = table.with_suffix(".parquet")
    replace_synced(path, content.getvalue())
    return path

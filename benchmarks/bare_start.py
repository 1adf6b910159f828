"""What a cold start can't do without: read the slices' bytes, open two graphs, run them once.

`python bare_start.py BUNDLE CT WORK BACKEND PRECISION`; WORK holds the ready inputs.
"""

import sys
from pathlib import Path

import numpy as np

from cdt_runtime.backends import open_session


def main() -> None:
    """Run it, and print the answer."""
    bundle, ct, work = (Path(word) for word in sys.argv[1:4])
    backend, precision = sys.argv[4:6]
    size = max(file.stat().st_size for file in ct.iterdir())
    buffer = bytearray(size)
    for file in ct.iterdir():
        with file.open("rb", buffering=0) as stream:
            stream.readinto(buffer)
    encoder = open_session(backend, (bundle / "ct_encoder.onnx").read_bytes(), precision)
    tokens = encoder.run({"ct": np.load(work / "ct.npy")})["ct_tokens"]
    classifier = open_session(backend, (bundle / "tile_classifier.onnx").read_bytes(), precision)
    inputs = dict(np.load(work / "tile.npz"))
    present = np.ones(1, np.float32)
    print(classifier.run(inputs | {"ct_tokens": tokens, "ct_present": present})["logits"])


main()

"""How doubt holds on lung tiles: `python benchmarks/doubt.py CHECKPOINT [--data DATA]`.

CHECKPOINT is a fold's of `benchmarks/accuracy.py lung`. Exports it and, on its test tiles, measures
sets of classes by tiles left out, the mean of four orientations, what foreign input is refused,
what a site's other stain does, and enrolment. Writes `benchmarks/results/doubt.json` and the table
of the README.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import doubt_tiles
import numpy as np
from numpy.typing import NDArray
from records import README, ROOT, markdown, with_block, write_result

from cdt_export.build import export_bundle
from cdt_export.inputs import open_data
from cdt_runtime import FewShotClassifier
from cdt_runtime.bundle import Bundle
from cdt_runtime.classifier import orientations
from cdt_runtime.conformal import certify
from cdt_runtime.enroll import adding, removing, write_change
from cdt_runtime.prototypes import fit_prototypes, softmax, transduced
from cdt_runtime.review import left_out
from cdt_runtime.support import calibrated_scale
from cdt_train.trained import Trained, load_trained

Float = NDArray[Any]
EPISODES = 300
LEVELS = (0.8, 0.9, 0.95)
SHOTS = (2, 3, 5, 10, 20)
REFUSED = ("unlike", "blurred", "no tissue")


class Test:
    """The test tiles of a checkpoint's fold, embedded by its exported bundle.

    Attributes:
        classifier: of the bundle.
        arrays: `(n, M, S, S)`.
        labels: `(n,)` class indices.
        groups: of each.
        views: `(4, n, E)`, embeddings of four orientations; the first is the tile as it is.
    """

    def __init__(self, trained: Trained, classifier: FewShotClassifier) -> None:
        self.classifier = classifier
        data = open_data(trained, None)
        self.data, self.names = data, sorted(trained.info["split"]["test"])
        tiles = data.plain_tiles(self.names)
        self.arrays, self.labels = tiles.tiles.numpy(), tiles.labels
        self.groups = np.array(data.owners(self.names))
        context = classifier.context(None)
        self.views = np.stack(
            [
                np.concatenate(
                    [
                        classifier.embed_tokens(
                            classifier._session("path_encoder").run({"tile": part})["tile_tokens"],
                            context,
                        )
                        for part in np.array_split(view, len(view) // 32 + 1)
                    ]
                )
                for view in orientations(self.arrays)
            ]
        )

    @property
    def paths(self) -> list[Path]:
        """The file of each tile."""
        return [Path(self.data.by_name[name].path) for name in self.names]

    def scale(self, shots: int) -> float:
        """Factor of the logits that training calibrated for so many tiles a class."""
        return calibrated_scale(self.classifier.prototypes.calibration, "temperatures", shots)

    def episodes(self, shots: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Support and queries of different groups: places of tiles, one a group."""
        kinds = range(len(self.classifier.classes))
        for number in range(EPISODES):
            rng = np.random.default_rng((shots, number))
            support, queries = [], []
            for kind in kinds:
                mine = np.unique(self.groups[self.labels == kind])
                for place, group in enumerate(rng.permutation(mine)):
                    tile = rng.choice(np.flatnonzero(self.groups == group))
                    (support if place < shots else queries).append(tile)
            yield np.array(support), np.array(queries)


def sets(test: Test) -> dict[str, Any]:
    """Coverage and size of sets, certified by leaving each support tile out in turn."""
    kinds, embedded = len(test.classifier.classes), test.views[0]
    fit = test.classifier.prototypes.fit
    found: dict[str, Any] = {}
    for shots in SHOTS:
        held: dict[float, list[tuple[float, float]]] = {level: [] for level in LEVELS}
        needed = {}
        for support, queries in test.episodes(shots):
            known, scale = test.labels[support], test.scale(shots)
            own = left_out(embedded[support], known, kinds, fit, scale)
            means = fit_prototypes(embedded[support], known, kinds, fit)
            chances = softmax(-scale * (2 - 2 * embedded[queries] @ means.T))
            for level in LEVELS:
                certificate = certify(own[np.arange(len(known)), known], level)
                needed[level] = certificate.needed
                if certificate.least is not None:
                    inside = chances >= certificate.least
                    right = inside[np.arange(len(queries)), test.labels[queries]]
                    held[level].append((right.mean(), inside.sum(axis=1).mean()))
        found[str(shots)] = {
            str(level): dict(zip(("coverage", "size"), np.mean(ones, axis=0).tolist(), strict=True))
            if ones
            else {"needed": needed[level]}
            for level, ones in held.items()
        }
    return found


def views(test: Test) -> dict[str, Any]:
    """Accuracy of tiles as they are, and of the mean of four orientations."""
    kinds, fit = len(test.classifier.classes), test.classifier.prototypes.fit
    found = {}
    for shots in (1, 3, 5, 10):
        right: dict[str, list[float]] = {"plain": [], "tta": []}
        for support, queries in test.episodes(shots):
            means = fit_prototypes(test.views[0][support], test.labels[support], kinds, fit)
            scores = test.views[:, queries] @ means.T
            for name, each in (("plain", scores[0]), ("tta", scores.mean(axis=0))):
                right[name].append((each.argmax(axis=1) == test.labels[queries]).mean())
        gain = np.subtract(right["tta"], right["plain"])
        found[str(shots)] = {
            **{name: float(np.mean(ones)) for name, ones in right.items()},
            "gain": float(gain.mean()),
            "ci95": float(1.96 * gain.std(ddof=1) / np.sqrt(len(gain))),
        }
    return found


def transduction(test: Test) -> dict[str, Any]:
    """Gain of prototypes drawn towards the queries, balanced or not (Dirichlet, .5)."""
    kinds, fit, embedded = (
        len(test.classifier.classes),
        test.classifier.prototypes.fit,
        test.views[0],
    )
    found: dict[str, Any] = {}
    for shots in (1, 3, 5):
        gains: dict[str, list[float]] = {"balanced": [], "unbalanced": []}
        for number, (support, queries) in enumerate(test.episodes(shots)):
            rng = np.random.default_rng((9, shots, number))
            known, scale = test.labels[support], test.scale(shots)
            means = fit_prototypes(embedded[support], known, kinds, fit)
            for name, shares in (
                ("balanced", np.full(kinds, 1 / kinds)),
                ("unbalanced", rng.dirichlet(np.full(kinds, 0.5))),
            ):
                counts = np.round(60 * shares).astype(int)
                some = np.concatenate(
                    [queries[test.labels[queries] == k][:n] for k, n in enumerate(counts)]
                )
                drawn = transduced(means, embedded[support], known, embedded[some], scale)
                right = [
                    (embedded[some] @ one.T).argmax(axis=1) == test.labels[some]
                    for one in (drawn, means)
                ]
                gains[name].append(float(right[0].mean() - right[1].mean()))
        found[str(shots)] = {
            name: {
                "gain": float(np.mean(ones)),
                "ci95": float(1.96 * np.std(ones, ddof=1) / np.sqrt(len(ones))),
            }
            for name, ones in gains.items()
        }
    return found


def foreign(test: Test, data: Path) -> dict[str, Any]:
    """Share of foreign input, and of the test tiles, that gets no answer for what it is."""
    pictures = [np.asarray(tile.transpose(1, 2, 0)) for tile in test.arrays]
    found = {}
    for name, tiles in {"test tiles": pictures, **doubt_tiles.foreign(pictures, data)}.items():
        said = test.classifier.predict(tiles)
        refused = [(one.reason or "").startswith(REFUSED) for one in said]
        found[name] = {"tiles": len(tiles), "refused": float(np.mean(refused))}
    return found


def enrolment(test: Test, bundle: Path) -> dict[str, Any]:
    """A class taken out and enrolled again from the tiles that training shipped for it."""
    classes = test.classifier.classes
    name = classes[-1]
    shipped = set(test.classifier.prototypes.support_sha256)
    by_hash = {
        test.data.trained.info["tile_facts"][one][0]: test.data.by_name[one].path
        for one in test.data.by_name
    }
    mine = [str(by_hash[one]) for one in shipped if test_label(test, one) == name]
    before = accuracy(test, bundle)
    graphs = graph_hashes(bundle)
    opened = Bundle.open(bundle)
    write_change(opened, removing(FewShotClassifier(opened, backend="onnxruntime"), name))
    opened = Bundle.open(bundle)
    classifier = FewShotClassifier(opened, backend="onnxruntime")
    classifier.encode([classifier.read(mine[0])])  # warm
    started = time.perf_counter()
    write_change(opened, adding(classifier, [(path, name) for path in mine]))
    seconds = time.perf_counter() - started
    return {
        "tiles": len(mine),
        "seconds": seconds,
        "accuracy_of_training": before,
        "accuracy_enrolled": accuracy(test, bundle),
        "graphs_untouched": graph_hashes(bundle) == graphs,
    }


def test_label(test: Test, sha256: str) -> str:
    """The class of a support tile."""
    support = test.classifier.prototypes
    return support.classes[support.labels[support.support_sha256.index(sha256)]]


def accuracy(test: Test, bundle: Path) -> float:
    """Of the likeliest class, on the test tiles."""
    classifier = FewShotClassifier.open(bundle, backend="onnxruntime")
    said = classifier.predict([str(path) for path in test.paths])
    likeliest = [max(one.probabilities, key=lambda k: one.probabilities[k]) for one in said]
    truth = [test.classifier.classes[label] for label in test.labels]
    return float(np.mean([a == b for a, b in zip(likeliest, truth, strict=True)]))


def graph_hashes(bundle: Path) -> dict[str, str]:
    """Hash of every file that is not a prototypes file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.glob("*.onnx")
    }


def block(found: Mapping[str, Any]) -> str:
    """What the README says of it."""
    levels = [f"{100 * level:.0f} % asked" for level in LEVELS]
    rows = [
        (
            f"K = {shots}",
            *(
                f"{100 * one['coverage']:.1f} %, {one['size']:.2f} classes"
                if "coverage" in one
                else f"none: {one['needed']} tiles needed"
                for one in by_level.values()
            ),
        )
        for shots, by_level in found["sets"].items()
    ]
    gains = ", ".join(
        f"{100 * one['gain']:+.1f} ± {100 * one['ci95']:.1f}" for one in found["views"].values()
    )
    drawn = {
        name: ", ".join(
            f"{100 * one[name]['gain']:+.1f} ± {100 * one[name]['ci95']:.1f}"
            for one in found["transduction"].values()
        )
        for name in ("balanced", "unbalanced")
    }
    kinds = [
        (name, str(one["tiles"]), f"{100 * one['refused']:.1f} %")
        for name, one in found["foreign"].items()
    ]
    enrolled = found["enrolment"]
    return "\n".join(
        [
            "",
            markdown(("sets, by tiles left out", *levels), rows),
            "",
            f"`--tta`, points at K = {', '.join(found['views'])}: {gains}. `--transductive`, "
            f"points at K = {', '.join(found['transduction'])}, classes equally frequent: "
            f"{drawn['balanced']}; unequally: {drawn['unbalanced']}.",
            "",
            markdown(("shown", "tiles", "refused"), kinds),
            "",
            f"A class taken out and enrolled again from the {enrolled['tiles']} tiles that were "
            f"shipped for it: held-out accuracy {enrolled['accuracy_enrolled']:.3f}, before "
            f"{enrolled['accuracy_of_training']:.3f}; {enrolled['seconds']:.1f} s in a process "
            "that had the bundle open; the graphs are untouched.",
            "",
            "",
        ]
    )


@click.command("doubt.py")
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--data",
    default=ROOT.parent / "shared" / "data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The folder with ct/ and mif/.",
)
def main(checkpoint: Path, data: Path) -> None:
    """Measure doubt with the fold's CHECKPOINT of a lung model."""
    started, trained = time.monotonic(), load_trained(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        made = export_bundle(trained, Path(folder) / "b", precision="fp16", data_dir=None).path
        own = Path(shutil.copytree(made, Path(folder) / "own"))
        test = Test(trained, FewShotClassifier.open(made, backend="onnxruntime"))
        parts: dict[str, Callable[[], Any]] = {
            "sets": lambda: sets(test),
            "views": lambda: views(test),
            "transduction": lambda: transduction(test),
            "foreign": lambda: foreign(test, data),
            "enrolment": lambda: enrolment(test, own),
        }
        found = {name: part() for name, part in parts.items()}
    found["reference"] = test.classifier.bundle.manifest["reference"]
    path = write_result(
        "doubt", ["python benchmarks/doubt.py CHECKPOINT"], time.monotonic() - started, found
    )
    README.write_text(with_block(README.read_text("utf-8"), "doubt", block(found)), "utf-8")
    click.echo(f"written: {path}")


if __name__ == "__main__":
    main()

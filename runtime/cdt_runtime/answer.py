"""From what the engine says of a tile to a prediction, or to the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cdt_runtime.conformal import Certificate
from cdt_runtime.doubt import Look
from cdt_runtime.prediction import Context, CtChange, Prediction, TileInput, nearest


@dataclass(frozen=True)
class Answer:
    """What the engine says of one tile in one context.

    Attributes:
        chances: calibrated probability of each class.
        distances: to each prototype.
        share_ms: of the time of its batch.
        look: how the tile looks beside those that are known.
    """

    chances: dict[str, float]
    distances: dict[str, float]
    share_ms: float
    look: Look

    @property
    def best(self) -> str:
        """The likeliest class."""
        return max(self.chances, key=lambda name: self.chances[name])


@dataclass(frozen=True)
class Judge:
    """Decides whether an answer is one.

    Attributes:
        classes: their names.
        min_confidence: least probability that an answer needs.
        marks: what every answer has to say, one line each.
        certificate: for sets of classes; None where none were asked for.
    """

    classes: tuple[str, ...]
    min_confidence: float
    marks: tuple[str, ...]
    certificate: Certificate | None = None

    def prediction(
        self,
        tile: TileInput,
        answer: Answer,
        beside: Answer | None,
        context: Context,
        off: str | None,
    ) -> Prediction:
        """Make a prediction of what the engine said.

        Args:
            tile: that was classified.
            answer: which counts.
            beside: what the engine says with the CT, where the answer does not rest on it.
            context: the CT's.
            off: why the answer does not rest on the CT, if it does not.
        """
        reason = self._reason(tile, answer)
        timings = {**context.timings_ms, "tile_read": tile.read_ms, "classify": answer.share_ms}
        if beside:
            timings["classify_with_ct"] = beside.share_ms
        return Prediction(
            tile=tile.name,
            sha256=tile.sha256,
            label=None if reason else answer.best,
            probabilities=answer.chances,
            distances=answer.distances,
            abstained=reason is not None,
            reason=reason,
            ct=context.used and replace(context.used, off=off),
            ct_change=self._change(tile, answer, beside) if beside else None,
            channels=tile.channels,
            warnings=(*tile.warnings, *self.marks),
            unlikeness=answer.look.unlikeness,
            prediction_set=self._set(tile, answer),
            timings_ms={name: round(value, 3) for name, value in timings.items()},
        )

    def _reason(self, tile: TileInput, answer: Answer) -> str | None:
        """Say why there is no answer, if there is none."""
        if tile.blank:
            return "no tissue: every channel is almost flat"
        if answer.look.reason:
            return answer.look.reason
        chance, least = answer.chances[answer.best], self.min_confidence
        if not chance >= least:
            return (
                f"low confidence: {chance:.2f} for {answer.best}, at least {least:.2f} is asked for"
            )
        return None

    def _set(self, tile: TileInput, answer: Answer) -> tuple[str, ...] | None:
        if self.certificate is None or tile.blank or answer.look.word:
            return None
        return self.certificate.classes(answer.chances)

    def _change(self, tile: TileInput, answer: Answer, beside: Answer) -> CtChange:
        return CtChange(
            label=None if self._reason(tile, beside) else beside.best,
            nearest=nearest(beside.distances),
            shift={name: beside.chances[name] - answer.chances[name] for name in self.classes},
        )

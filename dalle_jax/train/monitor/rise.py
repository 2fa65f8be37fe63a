"""A lasting rise of the validation error after something new began, such as an adversary: said once, with a way back.

The checkpoint that was best before is kept from deletion, since by the time a rise is seen to last, the newest ones
are all of what came after. What it knows are the lines of metrics.jsonl, so that a resumed run goes on knowing it.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping

PATIENCE = 3  # validations in a row that make a rise a lasting one


@dataclasses.dataclass(frozen=True)
class Onset:
    """Something that begins during a training and may spoil it.

    metric: of the validation, the lower the better, e.g. 'error'. start: updates before the first that it touches.
    what: its name in a sentence, and advice: how to mend it, as the end of one.
    """

    metric: str
    start: int
    what: str
    advice: str


class Rise:
    """Watches for a rise after an onset; None watches for nothing."""

    def __init__(self, onset: Onset | None):
        self._onset = onset
        self._errors: dict[int, float] = {}  # step of a validation -> its error
        self._said = False

    def recall(self, lines: Iterable[Mapping[str, float]]) -> None:
        """Forget everything, and learn from these lines of metrics.jsonl; what they show to rise has been said."""
        self._errors, self._said = {}, False
        for line in lines:
            self._note(int(line["step"]), line)
        self._said = self._lasts()

    def see(self, n: int, metrics: Mapping[str, float], checkpoints: Callable[[], Collection[int]]) -> str | None:
        """Take the metrics of a validation after n updates; a sentence where a rise has come to last.

        checkpoints: steps of the complete ones; called for the sentence alone.
        """
        self._note(n, metrics)
        lasts, said = self._lasts(), self._said
        self._said = lasts and said  # said again only after it was gone
        if not lasts or said or self._onset is None:
            return None
        self._said = True
        before = min(self._before(), key=self._errors.__getitem__)
        best = self.best(checkpoints())
        way_back = (
            f"the best checkpoint is that of step {best}, which stays" if best else "no earlier checkpoint is left"
        )
        return (
            f"the validation's {self._onset.metric} is {self._errors[n]:.4g}, and above its best of "
            f"{self._errors[before]:.4g} at step {before} in {PATIENCE} validations in a row since {self._onset.what} "
            f"at step {self._onset.start}: {way_back}; {self._onset.advice}"
        )

    def best(self, steps: Collection[int]) -> int | None:
        """The best of these checkpoints of before the onset, by the validation at it or the last before it."""
        if self._onset is None:
            return None
        errors = {}
        for step in steps:
            seen = [n for n in self._before() if n <= step <= self._onset.start]
            if seen:
                errors[step] = self._errors[max(seen)]
        return min(errors, key=lambda step: (errors[step], -step), default=None)

    def _note(self, n: int, metrics: Mapping[str, float]) -> None:
        if self._onset and (name := f"validation/{self._onset.metric}") in metrics:
            self._errors[n] = metrics[name]

    def _before(self) -> list[int]:
        return [n for n in self._errors if self._onset and n <= self._onset.start]

    def _lasts(self) -> bool:
        before = self._before()
        after = sorted(n for n in self._errors if n not in before)[-PATIENCE:]
        best = min((self._errors[n] for n in before), default=None)
        return best is not None and len(after) == PATIENCE and all(self._errors[n] > best for n in after)

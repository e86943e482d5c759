"""Which run comes next, and whether it would still end in time."""

from collections.abc import Callable
from pathlib import Path
from threading import Condition
from time import time

import results
from plan import BASELINE, Stage, Try

OVERHEAD = 8.0
"""Seconds a run takes besides training and evaluating."""
ROOM = 1.05
"""Predictions are stretched by this."""


class Queue:
    """The runs of some stages, shared by the threads that wait for them.

    adapt: what is done to a run before anything else, such as naming its data. speed: tokens a second of a
    run of which nothing is known.
    """

    def __init__(
        self, stages: list[Stage], out: Path, adapt: Callable[[Try], Try], *, deadline: float, speed: float
    ) -> None:
        self.stages, self.out, self.adapt = stages, out, adapt
        self.deadline, self.speed = deadline, speed
        self.speeds: dict[str, float] = {}
        self.left: list[Try] = []
        self.running: list[Try] = []
        self.changed = Condition()
        self.recipes: dict[str, str | None] = {}
        self.promoted: set[str] = set()
        for stage in stages:
            self._add(stage.tries)

    def take(self) -> Try | None:
        """The next run that would end in time, waiting for what depends on others; None for none."""
        with self.changed:
            while True:
                self._grow()
                for made in self.left:
                    if self._fits(made):
                        self.left.remove(made)
                        self.running.append(made)
                        return made
                if not self.running or not self._more_to_come():
                    return None
                self.changed.wait(timeout=1.0)

    def done(self, made: Try) -> None:
        """A run has ended, however; its speed is noted: training and evaluations, not what comes before."""
        found = results.read(self.path(made))
        with self.changed:
            self.running.remove(made)
            if found.get("status") == "done":
                occupied = max(found["occupied_seconds"] - OVERHEAD / 2, found["seconds"])
                self.speeds[_shape(made)] = made.tokens / occupied
            self.changed.notify_all()

    def seconds(self, made: Try) -> float:
        """Predicted time of a run."""
        return OVERHEAD + ROOM * made.tokens / self.speeds.get(_shape(made), self.speed)

    def path(self, made: Try) -> Path:
        """Where a run's result lies."""
        return self.out / made.stage / f"{made.name}.json"

    def _fits(self, made: Try) -> bool:
        return time() + self.seconds(made) <= self.deadline

    def _add(self, tries: list[Try]) -> None:
        known = {(made.stage, made.name) for made in [*self.left, *self.running]}
        adapted = [self.adapt(made) for made in tries if (made.stage, made.name) not in known]
        self.left += [made for made in adapted if not results.finished(self.path(made), made.config)]
        self.left.sort(key=lambda made: (made.priority, -made.tokens))

    def _more_to_come(self) -> bool:
        return any(
            (stage.waiting and stage.name not in self.recipes)
            or (stage.promotions and stage.name not in self.promoted)
            for stage in self.stages
        )

    def _grow(self) -> None:
        """Add what has waited for other runs, once they have ended."""
        for stage in self.stages:
            open_runs = [made for made in [*self.left, *self.running] if made.stage == stage.name]
            sides = {made.side for made in open_runs if self._fits(made) or made in self.running}
            if stage.waiting and stage.name not in self.recipes and BASELINE not in sides:
                self.recipes[stage.name] = recipe = self._best_recipe(stage)
                self._add(stage.with_recipe(recipe))
                continue
            if stage.promotions and stage.name not in self.promoted and (not sides or self._late(stage)):
                recipe = self.recipes.get(stage.name) or self._best_recipe(stage)
                self.promoted.add(stage.name)
                self._add(stage.promote(self._losses(stage), recipe))

    def _late(self, stage: Stage) -> bool:
        """Whether a longer run has to start with the next slot that becomes free."""
        speed = min(self.speeds.values(), default=self.speed)
        longest = OVERHEAD + ROOM * max(float(entry["tokens"]) for entry in stage.promotions) / speed
        running = max((self.seconds(made) for made in self.running), default=0.0)
        return time() + longest + running > self.deadline

    def _losses(self, stage: Stage) -> dict[str, float]:
        found = [results.read(path) for path in (self.out / stage.name).glob("*.json")]
        return {run["name"]: results.final(run) for run in found if run["status"] == "done"}

    def _best_recipe(self, stage: Stage) -> str | None:
        losses = self._losses(stage)
        mamba = [made for made in stage.tries if made.side == BASELINE and made.name in losses]
        best = min(mamba, key=lambda made: losses[made.name], default=None)
        return None if best is None else best.recipe


def _shape(made: Try) -> str:
    """Runs of equal speed."""
    return made.config.model.model_dump_json(exclude={"init"}) + made.config.train.model_dump_json(
        include={"optimizer", "batch_size", "precision", "average"}
    )

"""Which run comes next, and whether it would still end in time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Condition
from time import time
from typing import Any

import results
from plan import BASELINE, Stage, Try

OVERHEAD = 8.0
"""Seconds a run takes besides training and evaluating."""
ROOM = 1.05
"""Predictions are stretched by this."""


class Queue:
    """The runs of some stages, shared by the threads that wait for them.

    adapt: what is done to a run before anything else, such as naming its data. speed: tokens a second of a
    run of which nothing is known. dry: write nothing. known: results that
    lie elsewhere, whose runs are not made again.
    """

    def __init__(
        self,
        stages: list[Stage],
        out: Path,
        adapt: Callable[[Try], Try],
        *,
        deadline: float,
        speed: float,
        dry: bool = False,
        known: Sequence[results.Result] = (),
    ) -> None:
        self.stages, self.out, self.adapt, self.dry = stages, out, adapt, dry
        self.deadline, self.speed, self.known = deadline, speed, known
        self.speeds: dict[str, float] = {}
        self.left: list[Try] = []
        self.running: list[Try] = []
        self.changed = Condition()
        self.recipes: dict[str, str | None] = {}
        self.promoted: set[tuple[str, int]] = set()
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
                if not self.running or not self.more_to_come():
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
        for made in (self.adapt(one) for one in tries if (one.stage, one.name) not in known):
            if not results.finished(results.read(self.path(made)), made.config) and not self._taken_over(
                made
            ):
                self.left.append(made)
        self.left.sort(key=lambda made: (made.priority, -made.tokens))

    def _taken_over(self, made: Try) -> bool:
        """A run with the same configuration that has ended is not made again; another's is named."""
        for found in [*self.known, *results.collect(self.out)]:
            if results.finished(found, made.config):
                head = {"name": made.name, "stage": made.stage, "entry": made.entry["name"]}
                if (found["stage"], found["name"]) != (made.stage, made.name):
                    head["run_as"] = f"{found['stage']}/{found['name']}"
                if not self.dry:
                    self.path(made).parent.mkdir(parents=True, exist_ok=True)
                    self.path(made).write_text(results.compact(found | head))
                return True
        return False

    def more_to_come(self) -> bool:
        """Whether runs are waiting for the results of others."""
        return any(
            (stage.waiting and stage.name not in self.recipes)
            or any((stage.name, number) not in self.promoted for number in range(len(stage.promotions)))
            for stage in self.stages
        )

    def _grow(self) -> None:
        """Add what has waited for other runs, once they have ended."""
        for stage in self.stages:
            if stage.waiting and stage.name not in self.recipes and BASELINE not in self._open_sides(stage):
                self.recipes[stage.name] = recipe = self._best_recipe(stage)
                self._add(stage.with_recipe(recipe))
            for number, entry in enumerate(stage.promotions):
                known = stage.one_recipe or (not stage.waiting or stage.name in self.recipes)
                needed = {entry["side"]} if stage.one_recipe else {entry["side"], BASELINE}
                ready = known and not needed & self._open_sides(stage)
                if (stage.name, number) not in self.promoted and (ready or self._late(entry)):
                    self.promoted.add((stage.name, number))
                    recipe = self.recipes.get(stage.name) or self._best_recipe(stage)
                    self._add(stage.promote(entry, self._losses(stage), recipe))

    def _open_sides(self, stage: Stage) -> set[str]:
        """The sides of which the stage has runs under way or still to come."""
        left = [made for made in self.left if made.stage == stage.name and self._fits(made)]
        return {
            made.side for made in [*left, *self.running] if made.stage == stage.name and not made.promoted
        }

    def _late(self, entry: dict[str, Any]) -> bool:
        """Whether a longer run has to start with the next slot that becomes free."""
        speed = min(self.speeds.values(), default=self.speed)
        longest = OVERHEAD + ROOM * float(entry["tokens"]) / speed
        running = max((self.seconds(made) for made in self.running), default=0.0)
        return time() + longest + running > self.deadline

    def _losses(self, stage: Stage) -> dict[str, float]:
        found = [results.read(path) for path in (self.out / stage.name).glob("*.json")]
        return {run["name"]: results.final(run) for run in found if run["status"] == "done"}

    def _best_recipe(self, stage: Stage) -> str | None:
        """Of the baseline's runs; that of all runs where they have but one."""
        if stage.one_recipe:
            return stage.tries[0].recipe
        losses = self._losses(stage)
        mamba = [made for made in stage.tries if made.side == BASELINE and made.name in losses]
        best = min(mamba, key=lambda made: losses[made.name], default=None)
        return None if best is None else best.recipe


def _shape(made: Try) -> str:
    """Runs of equal speed."""
    return made.config.model.model_dump_json(exclude={"init"}) + made.config.train.model_dump_json(
        include={"optimizer", "batch_size", "precision", "average"}
    )

"""Watching a run from within: diagnostics, kNN, collapse, the reference curve, pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from sklearn.preprocessing import normalize

from selfsup_jax.data import inputs
from selfsup_jax.data.inputs import Data
from selfsup_jax.devices import hosts, parallel
from selfsup_jax.evaluation.features import Features
from selfsup_jax.evaluation.knn import knn_accuracy
from selfsup_jax.method import Method
from selfsup_jax.run.metrics import Recorder
from selfsup_jax.run.progress import Progress
from selfsup_jax.state import Outputs, TrainState, encoder_variables
from selfsup_jax.training import diagnostics, reference
from selfsup_jax.viz import plots


class Look(NamedTuple):
    """What the encoder of one step makes of some images."""

    step: int
    bank: Features
    queries: Features
    bank_images: np.ndarray  # [N, h, w, 3] uint8, small
    query_images: np.ndarray


class Monitor:
    """Looks at a run every so many steps (`config.monitor`), and says so when something is wrong.

    Args:
        config: the run's.
        run: its flat config, as the reference has it.
        data: its splits.
        method: for its `augment_views`.
        extract: see `features.Extractor`.
        recorder: whose history is judged and drawn.
        progress: which tells the news.
        workdir: takes `plots/`.

    Raises:
        UserError: `config.monitor.reference` names none.
    """

    def __init__(
        self,
        config: ConfigDict,
        run: dict[str, Any],
        data: Data,
        method: Method,
        extract: Any,
        recorder: Recorder,
        progress: Progress,
        workdir: str,
    ):
        self._config = config
        self._data = data
        self._augment_views = jax.jit(method.augment_views)
        self._extract = extract
        self._history = recorder.history
        self._progress = progress
        self._folder = os.path.join(workdir, "plots")
        self._reference = reference.load(config.monitor.reference)
        self._differs = reference.differences(self._reference, run) if self._reference else []
        self._look: Look | None = None
        self._told: set[str] = set()
        if self.collapsed_at is not None:  # an earlier process has said it, and the rest
            self._told.add("collapse")
        self._told.update(self._far_outside())

    # ------------------------------------------------------------------------- measuring

    def diagnose(
        self, outputs: Outputs, state: TrainState, batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Diagnostics of what a step made of a batch; all hosts must call it.

        Args:
            outputs: of the step, on the devices.
            state: after it, replicated.
            batch: what this host gave to it.
        """
        rows = Outputs(*parallel.gather_rows(tuple(outputs), batch["index"]))
        found = diagnostics.of_outputs(rows, self._config.monitor.max_rows)
        if state.target_params:
            params = parallel.local_copy((state.online_params, state.target_params))
            found["target_distance"] = float(diagnostics.target_distance(*params))
        return found

    def knn(self, step: int, state: TrainState) -> dict[str, float]:
        """kNN of the encoder on held-out images, if there are any; all hosts must call it."""
        if self._data.test is None:
            return {}
        look = self._look_at(step, state)
        if not hosts.is_writer():
            return {}
        settings = self._config.eval
        top1 = knn_accuracy(
            look.bank, look.queries, k=settings.knn_k, temperature=settings.knn_temperature
        )
        return {"knn_top1": top1}

    def _look_at(self, step: int, state: TrainState) -> Look:
        """Features and small images of both splits; of the training images alone without labels."""
        if self._look is not None and self._look.step == step:
            return self._look
        variables = parallel.unreplicate(encoder_variables(state))
        sources = {"bank": (self._data.train, self._config.monitor.knn_train_images)}
        if self._data.test is not None:
            sources["queries"] = (self._data.test, self._config.monitor.knn_test_images)
        found = {}
        for name, (source, limit) in sources.items():
            images: list[np.ndarray] = []
            batches = inputs.eval_batches(
                self._config.data, source, self._config.eval.batch_size, limit
            )()
            features = self._extract(variables, _with_small_images(batches, images))
            found[name] = (features, hosts.gather_hosts(np.concatenate(images)))
        bank, bank_images = found["bank"]
        queries, query_images = found.get("queries", found["bank"])
        self._look = Look(step, bank, queries, bank_images, query_images)
        return self._look

    # --------------------------------------------------------------------------- judging

    @property
    def collapsed_at(self) -> int | None:
        """The step at which the run was seen to have collapsed, as far as it is recorded."""
        return diagnostics.collapsed_at(
            self._history,
            min_std=self._config.monitor.collapse_std,
            min_rank=self._config.monitor.collapse_rank,
        )

    def judge(self) -> None:
        """Says, once each, that the run has collapsed or lies far outside its reference."""
        if not hosts.is_writer():
            return
        collapsed = self.collapsed_at
        if collapsed is not None and "collapse" not in self._told:
            self._told.add("collapse")
            self._progress.news(
                diagnostics.collapse_warning(
                    collapsed, self._history, min_std=self._config.monitor.collapse_std
                )
            )
        elif collapsed is None and "collapse" in self._told:
            self._told.remove("collapse")
            spread = self._history["projection_std"][1][-1]
            self._progress.news(
                f"NOTE: the run has recovered from its collapse: projection_std {spread:.3f}"
            )
        for name, note in self._far_outside().items():
            if name not in self._told:
                self._told.add(name)
                self._progress.news(f"NOTE: {note}")

    def _far_outside(self) -> dict[str, str]:
        if self._reference is None or self._differs:
            return {}
        return reference.far_outside(self._reference, self._history)

    def results(self) -> dict[str, Any]:
        """The fields of `results.json` that tell how the run went."""
        collapsed = self.collapsed_at
        found: dict[str, Any] = {"collapsed": collapsed is not None}
        if collapsed is not None:
            found["collapsed_at_step"] = collapsed
        for name in ("projection_std", "effective_rank", "loss"):
            if name in self._history:
                found[name] = self._history[name][1][-1]
        return found

    # --------------------------------------------------------------------------- drawing

    def draw(self, step: int, state: TrainState, batch: dict[str, np.ndarray] | None) -> None:
        """Renews the pictures in `plots/`; all hosts must call it.

        Args:
            step: the step just done.
            state: after it, replicated.
            batch: what this host gave to it; without one the view pairs stay as they are.
        """
        look = self._look_at(step, state)
        if not hosts.is_writer():
            return
        try:
            self._draw(step, state, batch, look)
        except Exception as e:  # no picture is worth a run
            logging.warning("the pictures of step %d could not be drawn: %r", step, e)

    def _draw(
        self, step: int, state: TrainState, batch: dict[str, np.ndarray] | None, look: Look
    ) -> None:
        self.draw_curves()
        if batch is not None:
            key = jax.random.fold_in(parallel.unreplicate(state.rng), step - 1)  # the step's own
            pairs = {k: v[: self._config.monitor.view_pairs] for k, v in batch.items()}
            views = np.asarray(self._augment_views(key, pairs))
            plots.view_pairs(self._path("view_pairs"), views[0], views[1], step=step)
        self._draw_map(look)
        self._draw_neighbours(look)

    def draw_curves(self) -> None:
        """Renews the learning curves alone."""
        if not self._history:
            return
        title = f"{self._config.method}: {self._data.train.name}"
        bands = None
        if self._reference is not None:
            bands = self._reference.bands
            title += f"; reference {self._reference.name}"
            if self._differs:
                title += f" (differs in {_some(self._differs)})"
        plots.learning_curves(
            self._path("learning_curves"),
            self._history,
            title=title,
            reference=bands,
            collapsed_at=self.collapsed_at,
        )

    def _draw_map(self, look: Look) -> None:
        names = self._data.train.class_names
        rows = slice(None, self._config.monitor.map_images)
        points = plots.map_points(look.queries.x[rows], seed=self._config.seed)
        plots.representation_map(
            self._path("representation_map"),
            points,
            look.queries.labels[rows] if names else None,
            names,
            title=f"Representation of {len(points):,} images, step {look.step:,} (t-SNE)",
        )

    def _draw_neighbours(self, look: Look) -> None:
        queries, bank = normalize(look.queries.x), normalize(look.bank.x)
        rows = np.linspace(0, len(queries) - 1, min(8, len(queries))).astype(int)
        similarity = queries[rows] @ bank.T
        if look.queries is look.bank:
            similarity[np.arange(len(rows)), rows] = -np.inf  # an image is not its own neighbour
        nearest = np.argsort(-similarity, axis=1)[:, : min(8, len(bank) - 1)]
        names = self._data.train.class_names
        plots.nearest_neighbours(
            self._path("nearest_neighbours"),
            look.query_images[rows],
            look.bank_images[nearest],
            np.take_along_axis(similarity, nearest, axis=1),
            query_names=[names[i] for i in look.queries.labels[rows]] if names else None,
            neighbour_names=(
                [[names[i] for i in row] for row in look.bank.labels[nearest]] if names else None
            ),
            title=f"Nearest training images, step {look.step:,}",
        )

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, f"{name}.png")


def _with_small_images(
    batches: Iterable[dict[str, np.ndarray]], images: list[np.ndarray], largest: int = 96
) -> Iterator[dict[str, np.ndarray]]:
    """The same batches; every few pixels of their images are kept in `images`."""
    for batch in batches:
        stride = -(-batch["image"].shape[1] // largest)
        images.append(batch["image"][:, ::stride, ::stride].copy())
        yield batch


def _some(fields: list[str]) -> str:
    return ", ".join(fields[:3]) + (f" and {len(fields) - 3} more" if len(fields) > 3 else "")

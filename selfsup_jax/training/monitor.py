"""Monitors a run during training: diagnostics, kNN, collapse, the reference curve, plots."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from selfsup_jax import paths
from selfsup_jax.data import inputs
from selfsup_jax.data.augment import augment_views
from selfsup_jax.data.inputs import Data
from selfsup_jax.devices import hosts, parallel
from selfsup_jax.errors import some_of
from selfsup_jax.evaluation import probes
from selfsup_jax.method import Method
from selfsup_jax.run import identity
from selfsup_jax.run.metrics import Recorder
from selfsup_jax.run.progress import Progress
from selfsup_jax.run.workdir import config_json
from selfsup_jax.state import Outputs, TrainState, encoder_variables
from selfsup_jax.training import diagnostics, reference, snapshots
from selfsup_jax.training.attention import AttentionMaps
from selfsup_jax.training.snapshots import Snapshot
from selfsup_jax.viz import plots


class Monitor:
    """Measures and plots a run every few steps (`config.monitor`), and warns about problems.

    Args:
        config: the config of the run.
        run: see `workdir.describe_run`.
        data: the splits of the run.
        feed: how the views are made from a batch.
        method: its augmentation and its pairs of outputs are used.
        extract: see `features.Extractor`.
        recorder: its history is checked and plotted.
        progress: prints the warnings.
        workdir: the directory that contains `plots/`.
        untrained: variables of the encoder before the first step, whose neighbours are drawn
            beside those of the trained one; None for none.

    Raises:
        UserError: there is no reference named `config.monitor.reference`.
    """

    def __init__(
        self,
        config: ConfigDict,
        run: dict[str, Any],
        data: Data,
        feed: inputs.Feed,
        method: Method,
        extract: Any,
        recorder: Recorder,
        progress: Progress,
        workdir: str,
        untrained: Any = None,
    ):
        self._config = config
        self._data = data
        self._feed = feed
        self._augment_views = jax.jit(
            functools.partial(augment_views, groups=method.augment.groups)
        )
        self._pairs, self._signs = method.pairs, method.signs
        self._extract = extract
        self._attention = AttentionMaps(method, config, data.test or data.train)
        self._recorder, self._history = recorder, recorder.history
        self._progress = progress
        self._folder = os.path.join(workdir, "plots")
        self._reference = reference.load(config.monitor.reference)
        flat = identity.flat(config_json(run))
        self._differs = reference.differences(self._reference, flat) if self._reference else []
        self._snapshot: Snapshot | None = None
        self._untrained = untrained
        self._untrained_snapshot: Snapshot | None = None
        self._announced: set[str] = set()
        if self.collapsed_at is not None:  # announced by an earlier process, as the rest
            self._announced.add("collapse")
        self._announced.update(self._far_outside())

    # ------------------------------------------------------------------------- measuring

    def diagnose(
        self, outputs: Outputs, state: TrainState, batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Diagnostics of one step; all hosts must call it.

        Args:
            outputs: the outputs of the step, on the devices.
            state: the state after the step, replicated.
            batch: this host's batch of the step.
        """
        rows = Outputs(*parallel.gather_rows(tuple(outputs), batch["index"]))
        values = diagnostics.of_outputs(rows, self._pairs, self._config.monitor.max_rows)
        if state.target_params:
            params = parallel.local_copy((state.online_params, state.target_params))
            values["target_distance"] = float(diagnostics.target_distance(*params))
        return values

    def knn(self, step: int, state: TrainState) -> dict[str, float]:
        """kNN accuracy on the held-out images, if there are any; all hosts must call it."""
        if self._data.test is None:
            return {}
        snapshot = self._take_snapshot(step, state)
        bank, queries = snapshot.bank.features, snapshot.queries.features
        classes = self._data.train.num_classes or 0
        measured = probes.knn_of_run(bank, queries, classes, self._config.eval)
        return {"knn_top1": measured.results["knn_top1"]}

    def _take_snapshot(self, step: int, state: TrainState) -> Snapshot:
        """Features and small images of the training split and, if there is one, the test split."""
        if self._snapshot is None or self._snapshot.step != step:
            variables = parallel.unreplicate(encoder_variables(state, self._config.eval.network))
            self._snapshot = self._snapshot_of(step, variables)
        return self._snapshot

    def _snapshot_of(self, step: int, variables: Any) -> Snapshot:
        sources = {"bank": (self._data.train, self._config.monitor.knn_train_images)}
        if self._data.test is not None:
            sources["queries"] = (self._data.test, self._config.monitor.knn_test_images)
        parts = {}
        for name, (source, limit) in sources.items():
            batches = inputs.eval_batches(
                self._config.data, source, self._config.eval.batch_size, limit
            )()
            parts[name] = snapshots.described(self._extract, variables, batches)
        return Snapshot(step, parts["bank"], parts.get("queries", parts["bank"]))

    # -------------------------------------------------------------------------- checking

    @property
    def collapsed_at(self) -> int | None:
        """The step at which the recorded history shows a collapse, or None."""
        return diagnostics.collapsed_at(
            self._history,
            min_std=self._config.monitor.collapse_std,
            min_rank=self._config.monitor.collapse_rank,
            signs=self._signs,
        )

    def judge(self) -> None:
        """Announces a collapse, a recovery, and quantities far outside the reference, once each."""
        if not hosts.is_writer():
            return
        collapsed = self.collapsed_at
        if collapsed is not None and "collapse" not in self._announced:
            self._announced.add("collapse")
            self._progress.announce(
                diagnostics.collapse_warning(
                    collapsed,
                    self._history,
                    min_std=self._config.monitor.collapse_std,
                    signs=self._signs,
                )
            )
        elif collapsed is None and "collapse" in self._announced:
            self._announced.remove("collapse")
            spread = self._history["projection_std"][1][-1]
            self._progress.announce(
                f"NOTE: the run has recovered from its collapse: projection_std {spread:.3f}"
            )
        for name, note in self._far_outside().items():
            if name not in self._announced:
                self._announced.add(name)
                self._progress.announce(f"NOTE: {note}")

    def _far_outside(self) -> dict[str, str]:
        if self._reference is None or self._differs:
            return {}
        return reference.far_outside(self._reference, self._history)

    def results(self) -> dict[str, Any]:
        """The fields of `results.json` that describe the course of the run."""
        collapsed = self.collapsed_at
        values: dict[str, Any] = {"collapsed": collapsed is not None}
        if collapsed is not None:
            values["collapsed_at_step"] = collapsed
        own = (sign.metric for sign in self._signs)
        for name in ("projection_std", "effective_rank", "loss", *own):
            if name in self._history:
                values[name] = self._history[name][1][-1]
        return values

    # -------------------------------------------------------------------------- plotting

    def draw(self, step: int, state: TrainState, batch: dict[str, np.ndarray] | None) -> None:
        """Updates the plots in `plots/`; all hosts must call it.

        Args:
            step: the current step.
            state: the state after the step, replicated.
            batch: this host's batch of the step; None leaves the plot of view pairs unchanged.
        """
        snapshot = self._take_snapshot(step, state)
        if self._untrained is not None:  # once: it stays as it is
            self._untrained_snapshot = self._snapshot_of(0, self._untrained)
            self._untrained = None
        if not hosts.is_writer():
            return
        try:
            self._draw(step, state, batch, snapshot)
        except Exception as e:  # a failed plot must not stop the run
            logging.warning("the pictures of step %d could not be drawn: %r", step, e)

    def _draw(
        self, step: int, state: TrainState, batch: dict[str, np.ndarray] | None, snapshot: Snapshot
    ) -> None:
        self.draw_curves()
        if batch is not None:
            key = jax.random.fold_in(parallel.unreplicate(state.rng), step - 1)  # the step's key
            rows = {k: v[: self._config.monitor.view_pairs] for k, v in batch.items()}
            crops = inputs.with_views(self._feed, step - 1, rows)
            views = jax.device_get(self._augment_views(key, crops))
            first, second = views["global"][:2]
            path, local = self._path("view_pairs"), views.get("local")
            plots.view_pairs(path, first, second, local, step=step)
        self._draw_map(snapshot)
        self._draw_neighbours(snapshot)
        self._attention.draw(self._path("attention"), step, state)  # nothing, of a ResNet
        if batch is not None:  # else those of the step may be recorded already
            self._recorder.pictures(step, self._pictures())

    def _pictures(self) -> dict[str, np.ndarray]:
        """The plots of the run, `[H, W, 3]` uint8 by name."""
        pictures = {}
        for path in paths.glob(self._folder, "*.png"):
            with paths.open(path, "rb") as f, Image.open(f) as image:
                name = os.path.basename(path).removesuffix(".png")
                pictures[name] = np.asarray(image.convert("RGB"))
        return pictures

    def draw_curves(self) -> None:
        """Updates only the learning curves."""
        if not self._history:
            return
        title = f"{self._config.method}: {self._data.train.name}"
        bands = None
        if self._reference is not None:
            bands = self._reference.bands
            title += f"; reference {self._reference.name}"
            if self._differs:
                title += f" (differs in {some_of(self._differs)})"
        plots.learning_curves(
            self._path("learning_curves"),
            self._history,
            title=title,
            reference=bands,
            collapsed_at=self.collapsed_at,
        )

    def _draw_map(self, snapshot: Snapshot) -> None:
        names = self._data.train.class_names
        rows = slice(None, self._config.monitor.map_images)
        points = plots.map_points(snapshot.queries.features.x[rows], seed=self._config.seed)
        plots.representation_map(
            self._path("representation_map"),
            points,
            snapshot.queries.features.labels[rows] if names else None,
            names,
            title=f"Representation of {len(points):,} images, step {snapshot.step:,} (t-SNE)",
            images=snapshot.queries.images[rows],
        )

    def _draw_neighbours(self, snapshot: Snapshot) -> None:
        count = len(snapshot.queries.images)
        rows = np.linspace(0, count - 1, min(8, count)).astype(int)
        classes, before = self._data.train.class_names, self._untrained_snapshot
        neighbours = snapshot.neighbours(rows, 8, classes)
        plots.nearest_neighbours(
            self._path("nearest_neighbours"),
            snapshot.queries.images[rows],
            neighbours.images,
            neighbours.similarities,
            query_names=snapshot.queries.names(rows, classes),
            neighbour_names=neighbours.names,
            files=not classes,
            untrained=before.neighbours(rows, 4, classes) if before is not None else None,
            title=f"Nearest training images, step {snapshot.step:,}",
        )

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, f"{name}.png")

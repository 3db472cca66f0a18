"""CIFAR-10 pretraining with the project's training steps, on one device, without TensorFlow.

In the project's root:

    python -m benchmarks.gpu.cifar --method=byol --epochs=200 --data=TFDS_DIR

The recipe is that of lightly's CIFAR-10 benchmark (its published kNN after 200 epochs, batch 128,
best epoch on the test set: BYOL 86.9, MoCo 83.8, SimCLR 84.7). An epoch is one call of a compiled
function (`lax.scan` over its steps). There are no checkpoints: after --minutes the run stops and
reports its results so far, as JSON lines. If $OUT is set, they are also written to METHOD.json.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import device_crops, tfree_cifar
from configs import parsing
from selfsup_jax.state import encoder_variables

CLASSES = 10
TRIES = 10  # candidate boxes per crop


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="byol", choices=("byol", "moco", "simclr"))
    parser.add_argument("--data", required=True, help="a TFDS data_dir with cifar10/3.0.2")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--limit", type=int, default=50000, help="training images")
    parser.add_argument("--test_limit", type=int, default=10000)
    parser.add_argument("--knn_every", type=int, default=20, help="epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of the method's config"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="stop after this many, with what there is"
    )
    return parser.parse_args()


def config_of(args: argparse.Namespace) -> Any:
    """The method's `cifar10` preset, which is lightly's recipe, with the command line's fields."""
    config = importlib.import_module(f"configs.{args.method}").get_config("cifar10")
    config.batch_size, config.epochs = args.batch, float(args.epochs)
    config.compute_dtype, config.encoder.width = args.dtype, args.width
    if args.method == "moco" and args.batch >= 512:
        config.queue_size = 8192
    for item in args.set:
        field, _, text = item.partition("=")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        parsing.set_field(config, field, value)
    return config.copy_and_resolve_references()


def epoch_function(train_step: Any, config: Any, examples: int) -> Any:
    """`(state, key, images, labels) -> (state, mean loss)`: one epoch of full batches, shuffled."""
    size, batch_size = config.data.image_size, config.batch_size
    steps = examples // batch_size

    def epoch(state, key, images, labels):
        order_key, step_key = jax.random.split(key)
        order = jax.random.permutation(order_key, examples)[: steps * batch_size].reshape(
            steps, batch_size
        )

        def one_step(state, rows):
            batch = {"index": jnp.arange(batch_size, dtype=jnp.int32), "label": labels[rows]}
            for i in (1, 2):
                draws_key = jax.random.fold_in(jax.random.fold_in(step_key, state.step), i)
                draws = jax.random.uniform(draws_key, (batch_size, TRIES, 4))
                box = device_crops.boxes(draws, *images.shape[1:3], config.views["global"].area)
                batch[f"view_{i}"] = device_crops.crop(
                    images[rows], box, size, config.data.resize_method
                )
            state, metrics = train_step(state, batch, axis_name=None)
            return state, metrics["loss"]

        state, losses = jax.lax.scan(one_step, state, order)
        return state, losses.mean()

    return jax.jit(epoch, donate_argnums=0)


class Knn:
    """Weighted kNN on whole images, as in lightly: k 200, temperature 0.1, cosine similarity."""

    def __init__(self, represent: Any, views: Any, train: tuple, test: tuple):
        self.train, self.test = train, test
        mean, std = jnp.asarray(tuple(views.mean)), jnp.asarray(tuple(views.std))

        @jax.jit
        def features(variables, images):
            f = represent(variables, (images.astype(jnp.float32) / 255 - mean) / std)
            return f / jnp.linalg.norm(f, axis=1, keepdims=True)

        @jax.jit
        def correct(f, bank, bank_labels, labels):
            similarity, where = jax.lax.top_k(f @ bank.T, min(200, len(bank)))
            votes = (
                jnp.exp(similarity / 0.1)[..., None] * jax.nn.one_hot(bank_labels[where], CLASSES)
            ).sum(1)
            return (votes.argmax(1) == labels).sum()

        self.features, self.correct = features, correct

    def top1(self, state: Any, block: int = 1000) -> float:
        """The top-1 accuracy on the test images."""
        variables = encoder_variables(state)

        def encode(images):
            starts = range(0, len(images), block)
            return jnp.concatenate(
                [self.features(variables, images[i : i + block]) for i in starts]
            )

        bank, f = encode(self.train[0]), encode(self.test[0])
        correct = [
            self.correct(f[i : i + block], bank, self.train[1], self.test[1][i : i + block])
            for i in range(0, len(f), block)
        ]
        return sum(int(n) for n in correct) / len(f)


def main() -> None:
    """Trains, evaluates with kNN, and prints the results."""
    start = time.time()
    args = arguments()
    config = config_of(args)
    train = tfree_cifar.load(args.data, "train", args.limit)
    test = tfree_cifar.load(args.data, "test", args.test_limit)
    steps = len(train[0]) // args.batch
    build = importlib.import_module(f"{args.method}_jax.method").build
    method = build(config, CLASSES, steps * args.epochs, 0)
    device = jax.devices()[0].device_kind
    ready = f"data ready {time.time() - start:.1f} s"
    print(f"{device}: {args.method}, {args.epochs} epochs of {steps} steps; {ready}", flush=True)

    images, labels = jax.device_put(train[0]), jax.device_put(train[1])
    epoch = epoch_function(method.train_step, config, len(train[0]))
    knn = Knn(method.represent, config.views, (train[0], labels), test)
    state = jax.jit(method.init_state)(jax.random.PRNGKey(args.seed))
    rows, timed_epochs, timed_seconds = [], 0, 0.0
    for e in range(args.epochs):
        began = time.time()
        state, loss = epoch(
            state, jax.random.fold_in(jax.random.PRNGKey(1000 + args.seed), e), images, labels
        )
        loss = float(loss)  # waits for the device
        if e == 0:  # this epoch includes the compilation
            print(f"first epoch done {time.time() - start:.1f} s", flush=True)
        else:
            timed_epochs, timed_seconds = timed_epochs + 1, timed_seconds + time.time() - began
        late = time.time() - start > 60 * args.minutes
        if (e + 1) % args.knn_every == 0 or e + 1 == args.epochs or late:
            rate = timed_epochs * steps * args.batch / timed_seconds if timed_epochs else None
            row = {"epoch": e + 1, "loss": loss, "knn": knn.top1(state), "images_per_s": rate}
            rows.append(row | {"seconds": round(time.time() - start, 1)})
            print(json.dumps(rows[-1]), flush=True)
        if late:
            print("out of time", flush=True)
            break
    summary = {"method": args.method, "epochs": rows[-1]["epoch"], "knn_last": rows[-1]["knn"]}
    print(json.dumps(summary | {"knn_best": max(row["knn"] for row in rows), "device": device}))
    if os.environ.get("OUT"):
        record = {"args": vars(args), "device": device, "rows": rows, "config": config.to_dict()}
        pathlib.Path(os.environ["OUT"], f"{args.method}.json").write_text(
            json.dumps(record, default=str)
        )


if __name__ == "__main__":
    main()

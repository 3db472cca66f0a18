#!/usr/bin/env bash
# All measurements on an accelerator, in an order and within a time; see accelerator.py.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" -m benchmarks.accelerator "$@"

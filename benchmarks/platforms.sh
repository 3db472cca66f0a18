#!/usr/bin/env bash
# Do wheels of all dependencies exist where people are? Resolves what the package needs for other systems and
# Pythons, whose markers it follows (`pip download --platform` takes those of the machine that it runs on).
#
#     benchmarks/platforms.sh          # needs uv and build; prints a line for each system and Python
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m build --quiet --wheel --outdir "$folder" . > "$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
unzip -p "$folder"/*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' | grep -v 'extra ==' > "$folder/needs.in"
status=0
for system in aarch64-apple-darwin aarch64-unknown-linux-gnu x86_64-unknown-linux-gnu; do
    for python in 3.11 3.12 3.13; do
        # promise, which TFDS needs, has no wheels; it is pure Python.
        if uv pip compile "$folder/needs.in" --quiet --no-header --no-annotate --only-binary :all: --no-binary promise \
            --python-platform "$system" --python-version "$python" > "$folder/found" 2> "$folder/why"; then
            echo "$system, Python $python: $(wc -l < "$folder/found") packages;" \
                "$(grep -E '^(jax|tensorflow|tensorflow-cpu)==' "$folder/found" | tr '\n' ' ')"
        else
            echo "$system, Python $python: no: $(tail -3 "$folder/why" | tr '\n' ' ')"
            status=1
        fi
    done
done
exit $status

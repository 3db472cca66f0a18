#!/usr/bin/env bash
# Do wheels of all dependencies exist where people are? uv resolves what the package needs for other systems and
# Pythons, whose markers it follows (pip takes those of the machine that it runs on); then pip, of that Python where
# it is there, looks for a wheel of each for that system, as `pip download --platform` does, but downloads none.
#
#     benchmarks/platforms.sh          # needs uv and build; prints a line for each system and Python
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m build --quiet --wheel --outdir "$folder" . > "$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
unzip -p "$folder"/*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' | grep -v 'extra ==' > "$folder/needs.in"

# `pip: all wheels found`, or what pip says; for systems as new as uv takes them to be.
by_pip() {
    local tags=() version
    command -v "python$2" > /dev/null && "python$2" -c "" 2> /dev/null || { echo "pip: no Python $2 here"; return; }
    case $1 in
        *darwin) for version in 14 13 12 11; do tags+=(--platform "macosx_${version}_0_arm64"); done
            for version in 11_0 10_13 10_9; do tags+=(--platform "macosx_${version}_universal2"); done ;;
        *) for version in 28 27 24 17; do tags+=(--platform "manylinux_2_${version}_${1%%-*}"); done
            tags+=(--platform "manylinux2014_${1%%-*}") ;;
    esac
    grep -v '^promise==' "$folder/found" > "$folder/wheels.txt"
    if "python$2" -m pip install --quiet --dry-run --ignore-installed --no-deps --only-binary :all: --target "$folder/none" \
        "${tags[@]}" -r "$folder/wheels.txt" > "$folder/pip" 2>&1; then
        echo "pip: all wheels found"
    else
        echo "pip: $(grep ERROR "$folder/pip" | tail -1)"
    fi
}

status=0
for system in aarch64-apple-darwin aarch64-unknown-linux-gnu x86_64-unknown-linux-gnu; do
    for python in 3.11 3.12 3.13; do
        # promise, which TFDS needs, has no wheels; it is pure Python.
        if uv pip compile "$folder/needs.in" --quiet --no-header --no-annotate --only-binary :all: --no-binary promise \
            --python-platform "$system" --python-version "$python" > "$folder/found" 2> "$folder/why"; then
            wheels=$(by_pip "$system" "$python")
            echo "$system, Python $python: $(wc -l < "$folder/found") packages;" \
                "$(grep -E '^(jax|tensorflow|tensorflow-cpu)==' "$folder/found" | tr '\n' ' ')" "$wheels"
            case $wheels in *ERROR*) status=1 ;; esac
        else
            echo "$system, Python $python: no: $(tail -3 "$folder/why" | tr '\n' ' ')"
            status=1
        fi
    done
done
exit $status

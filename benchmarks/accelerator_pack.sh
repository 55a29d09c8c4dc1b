#!/usr/bin/env bash
# Pack what `benchmarks.accelerator` needs on a machine without a network.
#
#   bash benchmarks/accelerator_pack.sh FOLDER
#
# FOLDER gets `wheels/`, the packages of setup.cfg that the machine lacks, and
# `tree/`, this checkout's code. The machine has Python 3.12 on x86-64 Linux and
# jax 0.11 with its CUDA plugin, flax, optax, orbax-checkpoint, torch and
# transformers with what they need. There:
#
#   bash FOLDER/tree/benchmarks/accelerator_pack.sh --unpack FOLDER SITE
#   cd FOLDER/tree && PYTHONPATH=SITE:. python3 -m benchmarks.accelerator --out=OUT
#
# PIP says which pip downloads; 60 MiB in all are asked for.
set -euo pipefail

if [ "$1" = --unpack ]; then
  exec "${PYTHON:-python3}" -m pip install -q --no-index --no-deps \
    --no-compile --no-cache-dir --upgrade --target "$3" "$2"/wheels/*.whl
fi

# Packages, and those that they need and such a machine does not have.
WHEELS=(
  array_record==0.8.6 av==19.0.2 diffusers==0.42.1 dm-tree==0.1.10
  docstring-parser==0.18.0 ftfy==6.3.1 googleapis-common-protos==1.76.0
  grain==0.2.18 immutabledict==4.3.1 importlib-metadata==10.2.0
  lazy-importer==0.1.0
  ml-collections==1.1.0 mlxtend==0.25.0 portpicker==1.6.0
  simple-parsing==0.1.9 tensorboardX==2.6.5 tensorflow-datasets==4.9.10
  tensorflow-metadata==1.21.0 termcolor==3.3.0 toml==0.10.2 wcwidth==0.9.4
)
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1/wheels"
platforms=()
for n in 34 28 27 24 17; do
  platforms+=(--platform "manylinux_2_${n}_x86_64")
done
${PIP:-python3 -m pip} download -q --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp "${platforms[@]}" \
  --platform manylinux2014_x86_64 -d "$1/wheels" \
  "${WHEELS[@]}"
# It has no wheel; what is made is of no platform.
${PIP:-python3 -m pip} wheel -q --no-deps -w "$1/wheels" promise==2.3
rm -rf "$1/tree"
mkdir -p "$1/tree"
(cd "$root" && tar c --exclude=__pycache__ --exclude='*.png' \
  benchmarks configs vdit_jax train.py sample.py) | tar x -C "$1/tree"
size=$(du -sm "$1" | cut -f1)
echo "$1: $size MiB"
[ "$size" -le 60 ]

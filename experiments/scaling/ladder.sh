#!/usr/bin/env bash
# The runs behind docs/results/scaling.md: a ladder of MoE-Mamba runs, repeats of two of them, and the page.
#
#   JOBS=16 experiments/scaling/ladder.sh OUT RESULTS [key=value ...]
#
# key=value goes to every run: train.precision=bfloat16, data.sources=FOLDER, ... JOBS runs share the device.
# RESULTS gets the CSV files, the picture and, where it holds a scaling.md with markers, the tables
# (docs/results rewrites the page). Interrupted, it goes on with the runs that are not finished. Keep the largest
# D below the tokens of the text: the law knows no repeated data.
set -euo pipefail
out=${1:?folder for presets and runs} results=${2:?folder for the tables, such as docs/results}
shift 2
here=$(dirname "$0")
train() { python "$here/train.py" "$out/presets" "$@"; }

if [ ! -d "$out/presets" ]; then
  ssmoe plan --ladder "$out/presets" --flops 2.55e15 --expansion 8 --widths 64 128 192 \
    --granularities 1 2 4 --held-out-levels 4 6
  # G = 2 at the most tokens would cost a fifth of the ladder; its ends show what G does there
  rm "$out"/presets/fit-*-g002-t08.toml
fi
train "$out/runs" --jobs "${JOBS:-1}" "$@"
for seed in 1 2; do
  for name in fit-d0064-g002-t02 fit-d0128-g002-t01; do
    train "$out/repeat-$seed" --only "$name" "$@" train.seed=$seed
  done
done
python "$here/page.py" --results "$results" --collect "$out"/runs/* "$out"/repeat-*/*

#!/usr/bin/env bash
# The runs behind docs/results/scaling.md: a ladder of MoE-Mamba runs, its fit and its held-out check.
#
#   experiments/scaling/ladder.sh FLOPS OUT [key=value ...]
#
# FLOPS is for all runs together; key=value goes to every run (train.precision=bfloat16, data.sources=...).
# Interrupted, it goes on where it stopped. Keep the largest D below the tokens of the corpus: the law knows no
# repeated data.
set -euo pipefail
flops=${1:?FLOPS of the whole ladder, such as 1e16} out=${2:?output folder}
shift 2

if [ ! -d "$out/presets" ]; then
  ssmoe plan --ladder "$out/presets" --flops "$flops" --expansion 8 --widths 64 96 128 192 --granularities 1 2 4 8
fi
for preset in "$out"/presets/*.toml; do
  run="$out/runs/$(basename "$preset" .toml)"
  if [ -f "$run/report.html" ]; then continue; fi
  if [ -d "$run" ]; then resume=--resume; else resume=; fi
  ssmoe train "$preset" --out "$run" $resume "$@"
done
for c in 0.472 free; do
  for method in paper multistart; do
    ssmoe fit "$out"/runs/fit-* --held-out "$out"/runs/held-out-* --c "$c" --method "$method" --json \
      > "$out/fit-$c-$method.json" || echo "c = $c, $method: no fit, see above"
  done
done
ssmoe fit "$out"/runs/fit-* --held-out "$out"/runs/held-out-* --output "$out/law.json" --plot "$out/fit.png"

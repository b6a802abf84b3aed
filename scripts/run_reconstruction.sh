#!/usr/bin/env bash
# Accuracy straight after pruning, before any training: plain, recalibrated, reconstructed, and both; then the page of it.
#   scripts/run_reconstruction.sh --teachers saves/a/model_best.pt saves/b/model_best.pt --dataset cifar10 --test-images 1000
# Arguments are those of benchmarks/reconstruction.py. OUTPUT is the file of results, of which none is measured twice; PAGE the
# page; PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUTPUT=${OUTPUT:-report/reconstruction.jsonl} PAGE=${PAGE:-report/reconstruction/pruning_without_training.md}
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
mkdir -p "$(dirname "$OUTPUT")" "$(dirname "$PAGE")"
"$PYTHON" -m benchmarks.reconstruction --output "$OUTPUT" "$@"
"$PYTHON" -m benchmarks.reconstruction --report "$OUTPUT" --page "$PAGE"

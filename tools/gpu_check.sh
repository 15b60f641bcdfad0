#!/usr/bin/env bash
# Check the kernels, training and their speed on a machine with a GPU, unattended, in at most 570 seconds.
#
# From the repository's root: bash tools/gpu_check.sh
# The most valuable steps come first. A step that fails, or runs out of its own time, does not stop the others; steps
# for which no time is left are skipped. The page of results is printed last, and is in $OUT/page.md. The exit status is
# 1 if a step failed or was skipped.
#
# PY        Python with PyTorch, Triton and this project's dependencies (python3)
# OUT       folder of the logs and results, which is emptied (runs/gpu-check)
# LIMIT     seconds for everything (560)
# WHEELS    folder of wheels that are installed for this check alone, for a machine without a network
# REHEARSE  if set, run the same lines without a GPU, at tiny sizes
set -u
PY=${PY:-python3}
OUT=${OUT:-runs/gpu-check}
LIMIT=${LIMIT:-560}
WHEELS=${WHEELS:-}
REHEARSE=${REHEARSE:-}
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
began=$SECONDS
[ -d "$OUT" ] && ! [ -e "$OUT/steps.tsv" ] && [ -n "$(ls -A "$OUT")" ] && {
  echo "OUT is '$OUT', which has files that no check left there; name another folder" >&2
  exit 2
}
rm -rf "$OUT"
mkdir -p "$OUT/site/thresher"
OUT=$(cd "$OUT" && pwd)
: > "$OUT/steps.tsv"
[ -n "$REHEARSE" ] && echo rehearsed > "$OUT/rehearsal"

step() { # step NAME SECONDS LOG COMMAND...
  local name=$1 own=$2 log=$3
  shift 3
  local left=$((LIMIT - 10 - (SECONDS - began)))
  if [ "$left" -lt 15 ]; then
    printf '%s\tskipped\t0\n' "$name" >> "$OUT/steps.tsv"
    return
  fi
  local start=$SECONDS
  echo "==== $name" >> "$OUT/$log"
  timeout -k 5 $((own < left ? own : left)) "$@" >> "$OUT/$log" 2>&1
  local status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - start)) >> "$OUT/steps.tsv"
  [ "$status" = 0 ] || printf '%s\t%s\n' "$name" "$log" >> "$OUT/failures.tsv"
  echo "[$((SECONDS - began)) s] $name: exit status $status" >&2
}

# Links to this source are the package, whether or not one is installed.
for part in configs models shared harvest train evaluate; do ln -s "$PWD/$part" "$OUT/site/thresher/"; done
ln -s "$PWD"/thresher/*.py "$OUT/site/thresher/"
if [ -n "$WHEELS" ]; then
  # One by one, so that a wheel for another Python costs itself only.
  for wheel in "$WHEELS"/*.whl; do
    step "install $(basename "$wheel" | cut -d- -f1)" 30 setup.log \
      "$PY" -m pip install --quiet --no-index --no-deps --no-cache-dir --target "$OUT/site" "$wheel"
  done
fi
export PYTHONPATH="$OUT/site${PYTHONPATH:+:$PYTHONPATH}"

benchmark=("$PY" -W ignore benchmarks/gpu_step.py)
if [ -n "$REHEARSE" ]; then
  step kernels 120 kernels.log "$PY" -W ignore tools/gpu/kernels.py "$OUT/kernels.json" --rehearse
  step "whole steps" 120 times.log "${benchmark[@]}" --rehearse --sections card step --output "$OUT/step.json"
  step trainers 120 trainers.log "$PY" -W ignore tools/gpu/trainers.py "$OUT/trainers.json" --rehearse
else
  step kernels 110 kernels.log "$PY" -W ignore tools/gpu/kernels.py "$OUT/kernels.json"
  step "whole steps" 110 times.log "${benchmark[@]}" --sections card step --output "$OUT/step.json"
  # Warnings are shown and are no errors, so that newer libraries than the project's own hide nothing.
  step tests 160 tests.log "$PY" -m pytest -m gpu -p no:cacheprovider -n 4 --dist loadfile --timeout 60 \
    -W default -W ignore::DeprecationWarning -rfE --basetemp "$OUT/pytest" tests
  step trainers 60 trainers.log "$PY" -W ignore tools/gpu/trainers.py "$OUT/trainers.json"
  step "kernels' times" 90 times.log "${benchmark[@]}" --sections kernels --output "$OUT/by_kernel.json"
  step "training from a store" 75 times.log \
    "${benchmark[@]}" --sections stream --store-tokens 524288 --output "$OUT/stream.json"
  if command -v compute-sanitizer > /dev/null; then
    small=("$PY" -W ignore tools/gpu/kernels.py "$OUT/sanitized.json" --here --smallest)
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    step memcheck 60 sanitizer.log compute-sanitizer --error-exitcode 1 --tool memcheck --print-limit 20 "${small[@]}"
    step racecheck 50 sanitizer.log compute-sanitizer --error-exitcode 1 --tool racecheck --print-limit 20 "${small[@]}"
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
  fi
fi
stage() { # stage NAME OPTIONS...
  local name=$1
  shift
  step "$name" "$stage_seconds" stages.log "$PY" -W ignore -m "thresher.$name" "configs/$name/demo.toml" --store "$OUT/demo/store" "$@"
}
few=(--tokens 400000) less=() stage_seconds=45
if [ -n "$REHEARSE" ]; then
  stage_seconds=150
  few=(--tokens 8192 --holdout contexts)
  less=(--feature_rows 0 --model_rows 256 --max_rows 256 --dictionary false)
fi
stage harvest "${few[@]}"
stage train --output "$OUT/demo/saes"
stage evaluate --saes "$OUT/demo/saes" --output "$OUT/demo/evaluation" "${less[@]}"
"$PY" tools/gpu/page.py "$OUT" > "$OUT/page.md"
cat "$OUT/page.md"
[ -s "$OUT/page.md" ] && ! grep -qvP '\t0\t' "$OUT/steps.tsv"

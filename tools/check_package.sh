#!/usr/bin/env bash
# Install the built wheel into an empty environment, and run it in an empty folder: the demo, or a small first run.
#   bash tools/check_package.sh dist/thresher-*.whl [PYTHON [demo|first-run]]
set -euo pipefail
wheel=$(realpath "$1")
python=${2:-python3}
what=${3:-demo}
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

"$python" -m venv environment
environment/bin/python -m pip install --quiet --disable-pip-version-check --constraint "$constraints" "$wheel"
echo "installed in $SECONDS s: $(environment/bin/thresher --version), Python $(environment/bin/python -c 'import platform; print(platform.python_version())')"

mkdir work
cd work
started=$SECONDS
if [ "$what" = demo ]; then
  ../environment/bin/thresher demo
  report=runs/demo/evaluation/report.html
else
  ../environment/bin/thresher init --model stdlib-lm --dataset python-stdlib --tokens 500_000 --output first
  for stage in harvest train evaluate; do
    ../environment/bin/thresher "$stage" "first/$stage.toml"
  done
  report=first/evaluation/report.html
fi
test -s "$report"
echo "the $what ran from the wheel in $((SECONDS - started)) s"

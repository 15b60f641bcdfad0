#!/usr/bin/env bash
# Install the built wheel into an empty environment, and run the demo with it in an empty folder.
#   bash tools/check_package.sh dist/thresher-*.whl [PYTHON]
set -euo pipefail
wheel=$(realpath "$1")
python=${2:-python3}
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
../environment/bin/thresher demo
test -s runs/demo/evaluation/report.html
echo "the demo ran from the wheel in $((SECONDS - started)) s"

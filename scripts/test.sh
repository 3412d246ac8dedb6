#!/usr/bin/env bash
# Runs the linter, the type checker and all tests, after setting up what they need.
#
#   bash scripts/test.sh [--peers] [--python 3.12] [pytest arguments]
#
#   bash scripts/test.sh                            # everything
#   bash scripts/test.sh --peers                    # also what compares with timm, torchvision, open_clip
#   bash scripts/test.sh --python 3.12              # the same on another Python, in .venv-3.12
#   bash scripts/test.sh tests/run/test_telemetry.py    # lint, and the tests of one file
#   bash scripts/test.sh -n 0 -m slow               # what takes minutes or gigabytes, one at a time
#
# Exits with 0 only if the linter, the formatter, the type checker and every test are content.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup=(--test)
pytest=()
while (($#)); do
  case $1 in
    --python)
      setup+=("$1" "${2:-}")
      shift "$(($# > 1 ? 2 : 1))"
      ;;
    --peers | --python=*) setup+=("$1") && shift ;;
    *) pytest+=("$1") && shift ;;
  esac
done
unset PYTHONDONTWRITEBYTECODE  # or each of the processes that tests start compiles the sources again
venv=$(bash "$root/scripts/setup.sh" "${setup[@]}")
cd "$root"

status=0
"$venv/bin/ruff" check --output-format concise . || status=1
"$venv/bin/ruff" format --check . || status=1
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$venv/bin/mypy" >"$types" 2>&1 &  # its minute fits into the pauses of the tests
checking=$!
# Two workers: the suite is made for two cores. An argument of the same name overrides (-n 0: in
# this process; -m '': slow tests, too). A worker that dies ends the run: the next would wait for ever.
"$venv/bin/python" -m pytest -n 2 --max-worker-restart 0 --durations=15 --dist loadfile --no-loadscope-reorder \
  -m 'not slow' ${pytest[@]+"${pytest[@]}"} || status=$?
wait "$checking" || status=1
cat "$types"
exit "$status"

#!/usr/bin/env bash
# Sets up what the project runs on, once: a virtual environment, the pinned packages, the project itself (editable).
#
#   bash scripts/setup.sh [--test] [--peers] [--python 3.12]
#
#   --test          also what the tests and the linter need
#   --peers         the same, and timm, torchvision and open_clip, which some tests compare with
#   --python X.Y    use this Python (3.11 to 3.13) and the environment .venv-X.Y instead of .venv
#
# The CUDA build of JAX is installed where nvidia-smi finds a GPU, the CPU build elsewhere. A second run finds its stamp
# and is done within a second. Messages go to standard error; the only line on standard output is the environment's folder.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
oldest=3.11
newest=3.13
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*" >&2; }
fail() { say "setup.sh: $*"; exit 1; }

# Prints the version (X.Y) of a Python if it runs at all: a command of that name may be a shim without a Python behind it.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

is_supported() { [[ $1 =~ ^3\.([0-9]+)$ ]] && ((BASH_REMATCH[1] >= ${oldest#3.} && BASH_REMATCH[1] <= ${newest#3.})); }

# Prints the path of a Python of version $1: from the PATH, else from pyenv's folder.
find_python() {
  local candidate
  for candidate in "python$1" python3 python "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if [[ $(version_of "$candidate" || true) == "$1" ]]; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  return 1
}

wanted=''
with_tests=false
with_peers=false
while (($#)); do
  case $1 in
    --test) with_tests=true ;;
    --peers) with_tests=true && with_peers=true ;;
    --python)
      wanted=${2:-none}
      shift "$(($# > 1))"
      ;;
    --python=*) wanted=${1#--python=} && wanted=${wanted:-none} ;;
    *) fail "unknown argument '$1'; usage: bash scripts/setup.sh [--test] [--peers] [--python 3.12]" ;;
  esac
  shift
done
if [[ -n $wanted ]]; then
  is_supported "$wanted" || fail "--python: got $wanted, expected a version from $oldest to $newest, such as --python 3.12"
  venv=$root/.venv-$wanted
else
  venv=$root/.venv
fi

# 1. The virtual environment: the one that is there, if it works and its Python will do.
found=$(version_of "$venv/bin/python" || true)
if [[ -z $found ]] || ! is_supported "$found" || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
  python=''
  for version in ${wanted:-3.11 3.12 3.13}; do
    python=$(find_python "$version") && break
  done
  if [[ -z $python ]]; then
    fail "no Python ${wanted:-$oldest to $newest} was found on the PATH or in pyenv's folder.
Install one (for example: apt install python3.12 python3.12-venv, brew install python@3.12, or pyenv install 3.12) and run this again."
  fi
  say "Making ${venv#"$root"/} with $python"
  "$python" -m venv --clear "$venv" >&2 ||
    fail "$python could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv"
fi
python=$venv/bin/python

# 2. The packages, pinned.
requirements=(requirements-cpu.txt)
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
  requirements=(requirements.txt)
fi
run_requirements=("${requirements[@]}")
if $with_tests; then
  requirements+=(requirements-test.txt)
fi

# The name of the stamp that says that these requirement files, as they are now, are installed for this checkout.
stamp_of() {
  (cd "$root" && "$python" - "$root" "$@") <<'PY'
import hashlib
import pathlib
import sys

text = sys.argv[1].encode()
for name in [*sys.argv[2:], 'requirements-cpu.txt', 'pyproject.toml']:
    text += b'\0' + name.encode() + b'\0' + pathlib.Path(name).read_bytes()
print('.set-up-' + hashlib.sha256(text).hexdigest()[:16])
PY
}

stamp=$venv/$(stamp_of "${requirements[@]}")
if [[ ! -e $stamp ]]; then
  say "Installing the packages of ${requirements[*]} (the first time takes some minutes)"
  arguments=()
  for file in "${requirements[@]}"; do
    arguments+=(-r "$root/$file")
  done
  "$python" -m pip install "${arguments[@]}" >&2 || fail "pip could not install ${requirements[*]}; its message is above"
  # Its warnings about editable installs are for packagers: shown only if it fails.
  output=$("$python" -m pip install --no-deps --no-build-isolation --editable "$root" 2>&1) ||
    fail "pip could not install the project:
$output"
  rm -f "$venv"/.set-up-*
  # What the tests need includes what a run needs.
  touch "$stamp" "$venv/$(stamp_of "${run_requirements[@]}")"
  say "Ready: ${venv#"$root"/}. To use it: source ${venv#"$root"/}/bin/activate"
fi

# 3. The libraries that tests compare with, without what they ask for: they run on the PyTorch that is there.
folder_of() { "$python" -c 'import importlib.util as u, sys; print(u.find_spec(sys.argv[1]).submodule_search_locations[0])' "$1" 2>/dev/null; }

if $with_peers && ! folder_of torch >/dev/null; then
  say "PyTorch is not among the packages for Python $(version_of "$python"): timm, torchvision and open_clip are left out, and their tests skip."
elif $with_peers; then
  stamp=$venv/$(stamp_of "${requirements[@]}" requirements-peers.txt)
  if [[ ! -e $stamp ]]; then
    say "Installing the packages of requirements-peers.txt"
    "$python" -m pip install --no-deps -r "$root/requirements-peers.txt" >&2 ||
      fail "pip could not install requirements-peers.txt; its message is above"
    # It describes operators of torchvision's compiled part, which is built for CUDA: beside the CPU
    # build of PyTorch that part does not load, and describing what is not there is an error.
    folder=$(folder_of torchvision) || fail "torchvision is not there after its installation"
    : >"$folder/_meta_registrations.py"
    touch "$stamp"
  fi
fi
printf '%s\n' "$venv"

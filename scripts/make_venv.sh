#!/bin/sh
# Makes .venv: Python >= 3.11, this package (editable) and its test tools. Does nothing when that is already so.
# PYTHON names the interpreter to build with (the first usable one on the path, when empty); LOCK names the file of
# pinned releases (the newest releases, when empty). Exits 1 and says what is missing when there is no way.
set -eu
cd "$(dirname "$0")/.."

unfinished=.venv/.unfinished  # there from the first step to the last, so that a stopped install is recognised
installed=.venv/.installed    # what was installed, written last
wanted="$(pwd) ${LOCK:-newest} $(cat pyproject.toml ${LOCK:-} | cksum)"

works() {
  .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints why $1 cannot build the environment; nothing when it can.
fault() {
  command -v "$1" >/dev/null 2>&1 || { echo 'not found'; return; }
  "$1" -c 'import sys
version = "%d.%d" % sys.version_info[:2]
if sys.version_info < (3, 11):
  print("too old: Python " + version)
else:
  try:
    import venv, ensurepip
  except ImportError:
    print("has no venv module (Debian, Ubuntu: apt install python%s-venv)" % version)' 2>/dev/null || echo 'does not run'
}

find_python() {
  tried=''
  for python in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do
    reason="$(fault "$python")"
    if [ -z "$reason" ]; then return; fi
    tried="$tried
  $python: $reason"
  done
  echo "error: no usable Python. Needed: Python 3.11 or newer with its venv module. Tried:$tried" >&2
  echo 'Install one, or name it: make venv PYTHON=path/to/python3.12' >&2
  exit 1
}

if [ -e .venv ] && [ ! -e "$unfinished" ] && works; then
  if [ "$(cat "$installed" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
  # An environment that was made elsewhere and moved here still runs files of the old place.
  case "$(cat "$installed" 2>/dev/null)" in '' | "$(pwd) "*) ;; *) rm -rf .venv ;; esac
elif [ -e .venv ]; then
  echo 'make venv: .venv is half-made or broken; making it again'
  rm -rf .venv
fi

trap 'exit 130' INT TERM
fresh=''
if [ ! -e .venv ]; then
  fresh=yes
  find_python
  echo "make venv: making .venv with $("$python" -c 'import sys; print("Python %d.%d.%d" % sys.version_info[:3])')"
  mkdir .venv
  touch "$unfinished"
  "$python" -m venv .venv
fi
touch "$unfinished"
rm -f "$installed"
if ! .venv/bin/python -m pip install --disable-pip-version-check --no-input ${LOCK:+-c "$LOCK"} -e '.[test]'; then
  [ "$fresh" ] || rm "$unfinished" # pip undoes an update that it cannot finish
  echo 'error: the packages could not be installed (pip says why above). The same command starts again.' >&2
  exit 1
fi
echo "$wanted" >"$installed"
rm "$unfinished"
echo 'make venv: .venv is ready'

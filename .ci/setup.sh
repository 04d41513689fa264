#!/bin/sh
# Makes .venv ready: `setup.sh run` for the program, `setup.sh dev` with the tools of its makers.
#
# Chooses the Python and says in one line what is missing; setup.py, beside this file, installs.
# Ready means that the stamp in .venv names these very files, this folder and a Python that starts:
# then nothing is done, so that every target of the Makefile can ask first.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
cd "$root"
level=${1:-run}
PYTHON=${PYTHON:-}

give_up() {
    printf 'coase: %s\n' "$1" >&2
    exit 2
}

case $level in run | dev) ;; *) give_up "setup.sh takes run or dev, not '$level'" ;; esac

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

uv=$(command -v uv || true)
if [ -z "$PYTHON" ] && [ -n "${UV_PYTHON:-}" ] && [ -n "$uv" ]; then
    PYTHON=$(uv python find --system --no-python-downloads "$UV_PYTHON" 2>/dev/null || true)
fi

# ---- Ready already? --------------------------------------------------------------------------

sum=$(cat pyproject.toml constraints.txt .ci/setup.sh .ci/setup.py | cksum)
have=$(version_of .venv/bin/python)
key="$sum|$have|$root"
if [ -n "$have" ] && [ -x .venv/bin/coase ] && [ "$(cat ".venv/coase-$level" 2>/dev/null)" = "$key" ]
then
    [ -z "$PYTHON" ] || [ "$(version_of "$PYTHON")" = "$have" ] || have=
    [ -z "$have" ] || exit 0
fi

# ---- Which Python? ---------------------------------------------------------------------------

# Prints one word and the version. Runs on any Python, so it keeps to what all of them know.
probe='
import sys
version = "%d.%d" % sys.version_info[:2]
def verdict():
    if sys.version_info[:2] < (3, 11):
        return "old"
    if sys.version_info[:2] > (3, 13):
        return "new"
    if sys.implementation.name != "cpython" or hasattr(sys, "_is_gil_enabled") and "t" in sys.abiflags:
        return "kind"
    try:
        import ctypes, venv
        if not sys.argv[1]:
            import ensurepip
    except ImportError:
        return "venv"
    try:
        if sys.platform.startswith("linux"):
            ctypes.CDLL("libgomp.so.1")
    except OSError:
        return "gomp"
    return "good"
print(verdict() + " " + version)
'

python=
trouble=
candidates=${PYTHON:-python3.13 python3.12 python3.11 python3}
if [ -z "$PYTHON" ] && [ -n "$uv" ]; then
    candidates="$candidates uv"
fi
[ -z "$PYTHON" ] || IFS='
'
for candidate in $candidates; do
    if [ "$candidate" = uv ]; then
        candidate=$(uv python find --system --no-python-downloads '>=3.11,<3.14' 2>/dev/null || true)
    fi
    found=$("$candidate" -c "$probe" "$uv" 2>/dev/null || true)
    case $found in
        good\ *) python=$candidate && break ;;
        # A missing package is a better hint than a Python of the wrong age.
        venv\ * | gomp\ *) case $trouble in venv* | gomp*) ;; *) trouble=$found ;; esac ;;
        ?*) [ -n "$trouble" ] || trouble=$found ;;
    esac
done

if [ -z "$python" ]; then
    version=${trouble#* }
    instead="install Python 3.11, 3.12 or 3.13 beside it, or name one with make PYTHON=/path/to/python"
    case $trouble in
        venv*) give_up "Python $version cannot make environments: apt-get install python$version-venv" ;;
        gomp*) give_up "libgomp.so.1 is missing, which the embedded model needs: apt-get install libgomp1" ;;
        new*) give_up "Python $version is too new, some packages are not built for it yet: $instead" ;;
        old*) give_up "Python $version is too old: $instead" ;;
        kind*) give_up "this Python $version is not the usual CPython: $instead" ;;
    esac
    [ -z "$PYTHON" ] || give_up "'$PYTHON' does not start: $instead"
    give_up "no Python was found: apt-get install python3 python3-venv (3.11, 3.12 or 3.13)"
fi

exec "$python" .ci/setup.py "$level" "$sum" "$root" ${PYTHON:+--exactly}

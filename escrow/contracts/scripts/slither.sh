#!/bin/sh
# slither over src/, in an environment of its own: every finding has its reason in
# slither-accepted.txt, or this fails.
set -eu
cd "$(dirname "$0")/.."

list=scripts/slither-requirements.txt
folder=.slither
stamp=$folder/installed
python=${PYTHON:-$(ls ../../.venv/bin/python 2>/dev/null || echo python3)}

with_pip() {
    rm -rf "$folder"
    "$python" -m venv "$folder" &&
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$list"
}

with_uv() {
    rm -rf "$folder"
    "$1" venv --quiet --no-project --python "$python" "$folder" &&
        "$1" pip install --quiet --python "$folder/bin/python" -r "$list"
}

# A machine may be set up for one of them only, and a Python may lack what makes environments.
install() {
    { command -v uv >/dev/null && with_uv uv; } || with_pip ||
        { [ -x ../../.venv/bin/uv ] && with_uv ../../.venv/bin/uv; }
}

if ! cmp -s "$list" "$stamp"; then
    # A registry may be out of reach for a moment: three tries.
    for pause in 5 20 0; do
        if install; then break; fi
        [ "$pause" -gt 0 ] || { echo "slither could not be installed" >&2; exit 1; }
        echo "slither is not installed; next try in $pause s" >&2
        sleep "$pause"
    done
    cp "$list" "$stamp"
fi

node scripts/syntax.js
rm -f out/slither/report.json
# It asks forge for the settings, and fails by its exit code at any finding: the list decides.
PATH="$PWD/$folder/bin:$PWD/node_modules/.bin:$PATH" slither . --ignore-compile \
    --foundry-build-info-directory out/slither --filter-paths node_modules --fail-none \
    --json out/slither/report.json >out/slither/said.txt 2>&1 || {
    cat out/slither/said.txt >&2
    exit 1
}
node scripts/findings.js out/slither/report.json

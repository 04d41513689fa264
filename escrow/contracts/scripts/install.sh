#!/bin/sh
# Installs what package-lock.json names. A registry may be out of reach for a moment: three tries.
set -eu
cd "$(dirname "$0")/.."
for pause in 5 20 0; do
    if npm ci --no-audit --no-fund --loglevel=error; then exit 0; fi
    [ "$pause" -gt 0 ] && echo "npm ci failed; next try in $pause s" >&2 && sleep "$pause"
done
echo "npm ci failed three times" >&2
exit 1

#!/bin/sh
# Installs what package-lock.json names. A registry may be out of reach for a moment: three tries.
#
# forge and anvil are named by platform, without npm's launchers of those names: these exit with 0
# whatever forge says, so that failing tests would pass.
set -eu
cd "$(dirname "$0")/.."
for pause in 5 20 0; do
    # What is optional may be left out silently, and forge is optional for npm alone.
    if npm ci --no-audit --no-fund --loglevel=error && node_modules/.bin/forge --version; then exit 0; fi
    if [ "$pause" -gt 0 ]; then
        echo "not installed; next try in $pause s" >&2
        sleep "$pause"
    fi
done
echo "npm ci failed three times" >&2
exit 1

#!/bin/sh
# Compiles the sources and rewrites artifacts/.
set -eu
cd "$(dirname "$0")"
[ -x node_modules/.bin/forge ] || ./scripts/install.sh
PATH="$PWD/node_modules/.bin:$PATH"
forge build --quiet
node scripts/artifacts.js

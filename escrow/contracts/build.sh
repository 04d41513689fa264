#!/bin/sh
# Compiles the sources and rewrites what is committed of them: artifacts/ and gas-snapshot.json.
set -eu
cd "$(dirname "$0")"
[ -x node_modules/.bin/forge ] || ./scripts/install.sh
PATH="$PWD/node_modules/.bin:$PATH"
forge build --quiet
node scripts/artifacts.js
FOUNDRY_PROFILE=gas forge test --quiet
node scripts/gas.js --write

#!/bin/sh
# Compiles the sources and rewrites what is committed of them: artifacts/ and gas-snapshot.json.
set -eu
cd "$(dirname "$0")"
[ -d node_modules/solc ] || ./scripts/install.sh
node_modules/.bin/forge build --quiet
node scripts/artifacts.js
FOUNDRY_PROFILE=gas node_modules/.bin/forge test --quiet
node scripts/gas.js --write

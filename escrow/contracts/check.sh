#!/bin/sh
# Everything that must hold of this folder, from a fresh clone: the sources compile to the committed
# artifacts, slither finds nothing new, the tests pass, no path has become dearer. Takes a few minutes
# on two cores.
#
# COASE_FUZZ_SEED picks other random walks than the usual ones.
set -eu
cd "$(dirname "$0")"

./scripts/install.sh
node_modules/.bin/forge build --quiet
node scripts/artifacts.js --check
./scripts/slither.sh
rm -rf cache/invariant # Walks that failed once would be walked again instead of these.
FOUNDRY_PROFILE=test node_modules/.bin/forge test --fuzz-seed "${COASE_FUZZ_SEED:-0xc0a5e}"
FOUNDRY_PROFILE=gas node_modules/.bin/forge test
node scripts/gas.js

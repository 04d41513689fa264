#!/usr/bin/env node
// Compares out/gas.json, just measured, with the committed gas-snapshot.json; --write replaces it.
"use strict";

const fs = require("fs");
const path = require("path");

const ROOT = path.join(__dirname, "..");
const DRIFT_MAX = 0.01;

const measured = JSON.parse(fs.readFileSync(path.join(ROOT, "out", "gas.json"), "utf8"));
const file = path.join(ROOT, "gas-snapshot.json");

const names = Object.keys(measured).sort();
const text = JSON.stringify(measured, names, 2) + "\n";
if (process.argv.includes("--write")) {
  fs.writeFileSync(file, text);
  console.log(`gas-snapshot.json: ${names.length} paths written`);
  process.exit(0);
}

const expected = JSON.parse(fs.readFileSync(file, "utf8"));
let drifted = 0;
for (const name of new Set([...names, ...Object.keys(expected)])) {
  const [now, before] = [measured[name], expected[name]];
  if (now === undefined || before === undefined || Math.abs(now - before) > before * DRIFT_MAX) {
    console.error(`gas of ${name}: ${now} measured, ${before} committed`);
    drifted += 1;
  }
}
if (drifted > 0) {
  console.error("if that is meant: escrow/contracts/build.sh writes gas-snapshot.json anew");
  process.exit(1);
}
console.log(`gas: ${names.length} paths within ${DRIFT_MAX * 100} % of gas-snapshot.json`);

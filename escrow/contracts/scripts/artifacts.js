#!/usr/bin/env node
// Writes artifacts/NAME.json from forge's output, or with --check compares them byte for byte.
//
// An artifact holds what a program needs to deploy and to call, and nothing that depends on the
// machine: keys sorted, no metadata, no source ids.
"use strict";

const fs = require("fs");
const path = require("path");

const ROOT = path.join(__dirname, "..");
const NAMES = [
  "JobEscrow", "EscrowFactory", "CoaseToken", "StakeVault", "ArbiterPanel", "PanelFactory",
  "PaymentChannels", "ERC3009Collector", "Permit2Collector", "Permit2", "Multicall3",
  "IdentityRegistry", "ReputationRegistry",
];
const RUNTIME_SIZE_MAX_BYTES = 24576; // EIP-170

/** Sorts keys at every depth, so that equal content is equal text. */
function sorted(value) {
  if (Array.isArray(value)) return value.map(sorted);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.keys(value).sort().map((key) => [key, sorted(value[key])]));
}

/** Parameters without the compiler's names for types: those are not part of the interface. */
function parameter({ name, type, indexed, components }) {
  const kept = { name, type };
  if (indexed !== undefined) kept.indexed = indexed;
  if (components !== undefined) kept.components = components.map(parameter);
  return kept;
}

function entry(item) {
  const kept = { ...item };
  if (item.inputs) kept.inputs = item.inputs.map(parameter);
  if (item.outputs) kept.outputs = item.outputs.map(parameter);
  return kept;
}

/** Immutables by position alone: the compiler's ids of syntax nodes change with every source. */
function immutables(references) {
  const places = Object.values(references || {});
  places.sort((a, b) => a[0].start - b[0].start);
  return Object.fromEntries(places.map((list, index) => [String(index), list]));
}

function render(name) {
  const file = path.join(ROOT, "out", "src", `${name}.sol`, `${name}.json`);
  const built = JSON.parse(fs.readFileSync(file, "utf8"));
  const size = (built.deployedBytecode.object.length - 2) / 2;
  if (size > RUNTIME_SIZE_MAX_BYTES) throw new Error(`${name}: runtime code of ${size} bytes is too large`);
  const artifact = {
    contractName: name,
    abi: built.abi.map(entry),
    bytecode: built.bytecode.object,
    deployedBytecode: built.deployedBytecode.object,
    immutableReferences: immutables(built.deployedBytecode.immutableReferences),
  };
  return { size, text: JSON.stringify(sorted(artifact)) + "\n" };
}

const check = process.argv.includes("--check");
let stale = 0;
for (const name of NAMES) {
  const target = path.join(ROOT, "artifacts", `${name}.json`);
  const { size, text } = render(name);
  if (!check) {
    fs.writeFileSync(target, text);
    console.log(`${name}: ${size} bytes of runtime code`);
  } else if (!fs.existsSync(target) || fs.readFileSync(target, "utf8") !== text) {
    console.error(`artifacts/${name}.json is not what the sources compile to`);
    stale += 1;
  } else {
    console.log(`artifacts/${name}.json is what the sources compile to (${size} bytes of runtime code)`);
  }
}
if (stale > 0) {
  console.error("rebuild with: escrow/contracts/build.sh");
  process.exit(1);
}

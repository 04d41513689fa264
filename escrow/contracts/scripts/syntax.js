#!/usr/bin/env node
// Writes out/slither/build.json: the syntax trees of src/, in the form of forge's build info.
//
// slither reads nothing else of a compilation, and trees alone take a second where code takes a
// minute.
"use strict";

const fs = require("fs");
const path = require("path");
const solc = require("solc");

const ROOT = path.join(__dirname, "..");
const SOURCES = path.join(ROOT, "src");
const OUT = path.join(ROOT, "out", "slither");
const NO_CODE = { object: "", sourceMap: "", linkReferences: {} };

const found = (name) => ({ contents: fs.readFileSync(path.join(ROOT, name), "utf8") });
const names = fs.readdirSync(SOURCES).filter((name) => name.endsWith(".sol")).sort();
const input = {
  language: "Solidity",
  sources: Object.fromEntries(names.map((name) => [`src/${name}`, { content: found(`src/${name}`).contents }])),
  settings: {
    remappings: ["@openzeppelin/=node_modules/@openzeppelin/"],
    evmVersion: "cancun",
    outputSelection: { "*": { "*": ["abi"], "": ["ast"] } },
  },
};
const output = JSON.parse(solc.compile(JSON.stringify(input), { import: found }));
const errors = (output.errors || []).filter((each) => each.severity === "error");
if (errors.length > 0) {
  for (const each of errors) console.error(each.formattedMessage);
  process.exit(1);
}
for (const contracts of Object.values(output.contracts)) {
  for (const contract of Object.values(contracts)) {
    contract.evm = { bytecode: NO_CODE, deployedBytecode: NO_CODE };
  }
}
const solcVersion = solc.version().split("+")[0];
fs.rmSync(OUT, { recursive: true, force: true });
fs.mkdirSync(OUT, { recursive: true });
fs.writeFileSync(path.join(OUT, "build.json"), JSON.stringify({ solcVersion, input, output }));

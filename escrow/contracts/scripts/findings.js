#!/usr/bin/env node
// Holds what slither found against slither-accepted.txt: fails on a finding that is not there, on
// one that is there and was not found, and on one without a reason.
//
// A finding is known by its check, its place and a hash of slither's whole description without line
// numbers: the same words about other code are another finding.
"use strict";

const crypto = require("crypto");
const fs = require("fs");
const path = require("path");

const ACCEPTED = path.join(__dirname, "..", "slither-accepted.txt");
const LOCATION = / ?\((?:src|node_modules)\/[^()]*#[^()]*\)/g;

/** Contract, function and variable, as far as they are. */
function placeOf(element) {
  const within = (element.type_specific_fields || {}).parent;
  return within ? `${placeOf(within)}.${element.name}` : element.name;
}

const report = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
if (!report.success) {
  console.error(`slither did not get through: ${report.error}`);
  process.exit(1);
}

const found = new Map();
for (const finding of report.results.detectors || []) {
  // The order of what is listed in it is not slither's promise.
  const said = finding.description.replace(LOCATION, "").split("\n").map((line) => line.trim()).sort();
  const id = crypto.createHash("sha256").update(said.join("\n")).digest("hex").slice(0, 12);
  found.set(`${finding.check} ${placeOf(finding.elements[0])} ${id}`, finding.description.trim());
}

const accepted = new Set();
let reason = false;
let wrong = 0;
for (const line of fs.readFileSync(ACCEPTED, "utf8").split("\n")) {
  if (line.startsWith("#")) reason = true;
  else if (line.trim() === "") reason = false;
  else if (!reason) {
    console.error(`slither-accepted.txt: no reason above ${line}`);
    wrong += 1;
  } else accepted.add(line.trim().replace(/\s+/g, " "));
}

for (const [key, description] of found) {
  if (accepted.has(key)) continue;
  console.error(`slither: ${key}\n${description}\n`);
  wrong += 1;
}
for (const key of accepted) {
  if (found.has(key)) continue;
  console.error(`slither-accepted.txt: not found any more: ${key}`);
  wrong += 1;
}
if (wrong > 0) {
  console.error("mend the source, or write into slither-accepted.txt why it is right as it is");
  process.exit(1);
}
console.log(`slither: ${found.size} findings, each with its reason in slither-accepted.txt`);

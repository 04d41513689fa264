#!/usr/bin/env node
// Plants one fault at a time in a copy of the sources and looks whether the tests find it.
//
//   scripts/mutants.js            every fault, all tests
//   scripts/mutants.js --walks    only those that the random walks must find, by the walks alone
//   scripts/mutants.js NAME...    these
//
// Takes minutes, so check.sh leaves it out. Run it after every change of the rules or of the tests.
"use strict";

const { spawnSync } = require("child_process");
const fs = require("fs");
const os = require("os");
const path = require("path");

const ROOT = path.join(__dirname, "..");
const FORGE = path.join(ROOT, "node_modules", ".bin", "forge");
const KERNEL = "src/ERC8183Kernel.sol";
const EVALUATOR = "src/OptimisticEvaluator.sol";
const CONSENT = "src/Consent.sol";
const VAULT = "src/StakeVault.sol";
const PANEL = "src/ArbiterPanel.sol";
const PANELS = "src/PanelFactory.sol";
const CHANNELS = "src/PaymentChannels.sol";
const COLLECTOR = "src/Collector.sol";
const PERMIT2 = "src/Permit2.sol";
const IDENTITY = "src/IdentityRegistry.sol";
const REPUTATION = "src/ReputationRegistry.sol";

// name, file, what stands there, what the fault makes of it, whether the walks must find it
const FAULTS = [
  ["expiry pays the buyer", EVALUATOR,
    "if (block.timestamp <= limit) revert TooEarly(id, limit);",
    "if (block.timestamp <= limit) revert TooEarly(id, limit); if (job.status == Status.Expired) toSeller = 0;", true],
  ["dispute after its window", EVALUATOR,
    "_checkInTime(id, job.clock + terms.disputeSecs);", "", true],
  ["poke one second early", EVALUATOR,
    "if (block.timestamp <= limit) revert TooEarly", "if (block.timestamp < limit) revert TooEarly", true],
  ["acts one second short", EVALUATOR,
    "if (block.timestamp > limit) revert TooLate(id, limit);\n    }",
    "if (block.timestamp >= limit) revert TooLate(id, limit);\n    }", true],
  ["seller's bond is kept", EVALUATOR,
    "uint256 sellerBond = job.phase == ANSWERED ? terms.bond : 0;", "uint256 sellerBond = 0;", true],
  ["the winner pays the arbiter", EVALUATOR,
    "buyerBond = (terms.bond * toBuyer) / terms.price;", "buyerBond = (terms.bond * toSeller) / terms.price;", true],
  ["one ruling, two fees", EVALUATOR, "fee = terms.bond;", "fee = 2 * terms.bond;", true],
  ["a nonce opens twice", EVALUATOR, "_useNonce(terms.seller, terms.nonce);", "", true],
  ["seller not asked before delivery", EVALUATOR,
    "if (job.phase == WORKING || toSeller < terms.price) _checkConsent",
    "if (toSeller < terms.price) _checkConsent", true],
  ["buyer not asked", EVALUATOR,
    "_checkConsent(terms.buyer, digest, buyerSig);\n        // Nobody", "// Nobody", true],
  ["settled after expiry", EVALUATOR,
    "if (job.status == Status.Expired) revert WrongStatus(id, job.status);", "", true],
  ["silent arbiter gives all", EVALUATOR,
    "terms.defaultToSeller, How.SilentArbiter", "terms.price, How.SilentArbiter", true],
  ["paid and still open", EVALUATOR, "job.phase = CLOSED + uint8(how);", "", true],
  ["a failed payment blocks", KERNEL,
    "if (!IERC20(token).trySafeTransfer(to, amount)) {", "IERC20(token).safeTransfer(to, amount); if (false) {", true],
  ["a debt is paid twice", KERNEL, "owed[to] = 0;", "", true],
  ["an open job is refunded", KERNEL,
    "if (status != Status.Open) _refund(id, client);", "_refund(id, client);", true],
  ["refund before expiry", KERNEL,
    "if (block.timestamp < job.expiredAt) revert TooEarly(id, job.expiredAt);", "", true],
  ["poke lets in again", EVALUATOR,
    "function poke(Terms calldata terms) external nonReentrant {", "function poke(Terms calldata terms) external {", true],
  ["short payment is taken", KERNEL,
    "if (balanceAfter < balanceBefore || balanceAfter - balanceBefore != amount) {", "if (false) {", false],
  ["arbiter may be the buyer", EVALUATOR, "|| arbiter == buyer ", "", false],
  ["a stake is not reserved", EVALUATOR,
    "if (terms.stake != 0) IStakeVault(terms.vault).reserve(terms.seller, terms.stake, id);", "", true],
  ["a stake without an arbiter", EVALUATOR,
    "|| (arbiter == address(0) && terms.stake != 0)", "", false],
  ["anybody reserves", VAULT, "if (reserved > maxReserved || amount > maxReserved - reserved) {", "if (false) {", true],
  ["one slice for two deals", VAULT, "stake.free -= uint128(amount);\n        stake.reserved", "stake.reserved", true],
  ["the allowance is never used up", VAULT, "allowance.reserved += uint128(amount);", "", true],
  ["silence slashes without an Ack", VAULT,
    "if (!Consent.isBy(terms.seller, Consent.digestFor(escrow, structHash), ackSig)) {", "if (false) {", true],
  ["an Ack of the buyer's", VAULT, "Consent.isBy(terms.seller,", "Consent.isBy(terms.buyer,", true],
  ["an Ack slashes for ever", VAULT, "if (block.timestamp <= limit) {", "if (ackSig.length > 0 || block.timestamp <= limit) {", true],
  ["an Ack one second short", VAULT, "if (block.timestamp <= limit) {", "if (block.timestamp < limit) {", false],
  ["a silent arbiter slashes", VAULT, "} else if (how == IJobEscrow.How.SilentSeller) {",
    "} else if (how == IJobEscrow.How.SilentSeller || how == IJobEscrow.How.SilentArbiter) {", true],
  ["a silent seller goes free", VAULT, "} else if (how == IJobEscrow.How.SilentSeller) {", "} else if (false) {", true],
  ["a slice closes twice", VAULT, "sliceOf[escrow][jobId] = 0;", "", true],
  ["a slice closes before the deal", VAULT,
    "if (how == IJobEscrow.How.Open) revert DealIsOpen(jobId);", "", true],
  ["what is slashed is kept too", VAULT, "stake.free += uint128(freed);", "stake.free += uint128(amount);", true],
  ["no wait", VAULT, "if (block.timestamp < stake.unbondAt) revert", "if (false) revert", true],
  ["a buyer who cannot be paid blocks", VAULT,
    "if (!IERC20(token).trySafeTransfer(to, amount)) {", "IERC20(token).safeTransfer(to, amount); if (false) {", true],
  ["the vault lets in again", VAULT, "        external\n        nonReentrant\n", "        external\n", true],
  ["one vote too few", PANEL, "if (count < needed)", "if (count + 1 < needed)", true],
  ["any signature is a member's", PANEL, "if (!Consent.isBy(all[i], digest, sigs[i])) revert BadSignature(all[i]);", "", false],
  ["a panel rules anywhere", PANEL, "if (!IEscrows(escrows).isEscrow(escrow)) revert NotAnEscrow(escrow);", "", false],
  ["dust stays with the panel", PANEL, "i == 0 ? part + dust : part", "part", true],
  ["members twice", PANELS, "if (members[i] <= last)", "if (members[i] < last)", false],
  ["a domain of any chain", CONSENT, "block.chainid, escrow", "1, escrow", false],
  ["authorisation of any nonce", EVALUATOR,
    "_collect(terms.seller, terms.bond, funding, keccak256(abi.encode(id, 2)));",
    "_collect(terms.seller, terms.bond, funding, keccak256(abi.encode(id, 1)));", false],
  ["contract wallets cannot sign", CONSENT, "return signer.code.length > 0 && ", "return false && ", false],
  ["a used permit stops the deal", EVALUATOR, "{} catch {}", "{} catch { revert(); }", false],
  ["a plain job may look like a deal", KERNEL, "|| evaluator == address(this)", "", false],
  ["budget changed under the client", KERNEL,
    "if (budget != expectedBudget) revert BudgetChanged(expectedBudget, budget);", "", false],
  ["a claim above the balance", CHANNELS,
    "if (row.totalClaimed > channel.balance) revert ClaimExceedsBalance();", "", false],
  ["a claim above the voucher", CHANNELS,
    "if (row.totalClaimed > row.voucher.maxClaimableAmount) revert ClaimExceedsCeiling();", "", false],
  ["anybody's voucher", CHANNELS,
    "} else if (ECDSA.recoverCalldata(digest, row.signature) != config.payerAuthorizer) {", "} else if (false) {", false],
  ["a foreign row in a signed batch", CHANNELS,
    "if (voucherClaims[i].voucher.channel.receiverAuthorizer != authorizer) revert NotReceiverAuthorizer();", "", false],
  ["a receiver is paid twice", CHANNELS, "account.totalSettled = total;", "", false],
  ["a withdrawal one second early", CHANNELS,
    "if (block.timestamp < uint256(pending.initiatedAt) + config.withdrawDelay)",
    "if (block.timestamp + 1 < uint256(pending.initiatedAt) + config.withdrawDelay)", false],
  ["withdrawal of what was claimed", CHANNELS,
    "uint128 amount = _atMost(pending.amount, _free(channels[id]));", "uint128 amount = pending.amount;", false],
  ["refund of what was claimed", CHANNELS,
    "uint128 amount = _atMost(asked, _free(channels[id]));", "uint128 amount = asked;", false],
  ["a refund nonce again", CHANNELS, "++refundNonce[id];", "", false],
  ["a deposit ends a withdrawal", CHANNELS,
    "channel.balance = before + amount;", "channel.balance = before + amount; delete pendingWithdrawals[id];", false],
  ["a deposit that does not come", CHANNELS,
    "if (IERC20(config.token).balanceOf(address(this)) != held + amount) revert DepositCollectionFailed();", "", false],
  ["anybody collects", COLLECTOR, "if (msg.sender != channels) revert OnlyChannels(msg.sender);", "", false],
  ["a Permit2 nonce again", PERMIT2, "if (used & bit != 0) revert InvalidNonce();", "", false],
  ["a wallet that did not agree", IDENTITY, "revert InvalidWalletSignature(newWallet);", "", false],
  ["a sold agent pays its old owner", IDENTITY,
    "if (from != address(0) && from != to) _setMetadata(agentId, WALLET, \"\");", "", false],
  ["an agent praises itself", REPUTATION,
    "if (_identities.isAuthorizedOrOwner(msg.sender, agentId)) revert OwnFeedback(agentId, msg.sender);", "", false],
];

function run(folder, profile, args) {
  return spawnSync(FORGE, args, {
    cwd: folder,
    env: { ...process.env, FOUNDRY_PROFILE: profile },
    encoding: "utf8",
    maxBuffer: 1 << 28,
  });
}

const names = process.argv.slice(2).filter((argument) => !argument.startsWith("--"));
const walks = process.argv.includes("--walks");
const chosen = FAULTS.filter((fault) => (names.length ? names.includes(fault[0]) : !walks || fault[4]));
const folder = fs.mkdtempSync(path.join(os.tmpdir(), "mutants-"));
let missed = 0;
try {
  for (const part of ["src", "test", "scripts", "foundry.toml", "package.json"]) {
    fs.cpSync(path.join(ROOT, part), path.join(folder, part), { recursive: true });
  }
  fs.mkdirSync(path.join(folder, "artifacts"));
  fs.symlinkSync(path.join(ROOT, "node_modules"), path.join(folder, "node_modules"));

  for (const [name, file, there, fault] of chosen) {
    const original = fs.readFileSync(path.join(ROOT, file), "utf8");
    if (original.split(there).length !== 2) throw new Error(`${name}: its place is not there once`);
    fs.writeFileSync(path.join(folder, file), original.replace(there, () => fault));
    const built = run(folder, "default", ["build", "--quiet"]);
    if (built.status !== 0) throw new Error(`${name}: does not compile\n${built.stdout}${built.stderr}`);
    spawnSync("node", ["scripts/artifacts.js"], { cwd: folder });
    fs.rmSync(path.join(folder, "cache", "invariant"), { recursive: true, force: true });
    const tested = run(folder, "test", walks ? ["test", "--match-path", "test/*Invariants.t.sol"] : ["test"]);
    const failures = [...new Set(tested.stdout.match(/^\[FAIL.*$/gm) || [])];
    console.log(`${tested.status !== 0 ? "found " : "MISSED"} ${name} (${failures.length} failing)`);
    if (failures.length > 0) console.log(`       ${failures[0].slice(0, 150)}`);
    if (tested.status === 0) missed += 1;
    fs.writeFileSync(path.join(folder, file), original);
  }
} finally {
  fs.rmSync(folder, { recursive: true, force: true });
}
console.log(`${chosen.length - missed} of ${chosen.length} faults found`);
process.exit(missed > 0 ? 1 : 0);

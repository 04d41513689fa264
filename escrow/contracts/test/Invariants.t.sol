// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC8183, IJobEscrow} from "../src/IJobEscrow.sol";
import {Base} from "./Base.sol";
import {MoodyToken} from "./mocks/Tokens.sol";
import {vm} from "./Vm.sol";

/// @notice Plays the escrow at random and keeps a model of it. Before each call the model says
/// whether it will pass and whose wealth will change by how much; after it the two are compared.
///
/// Parties: buyers, sellers, arbiters and a stranger, who is allowed to send anything. The token
/// refuses some receivers, in several ways, and calls back into the escrow.
contract Handler is Base {
    struct Deal {
        IJobEscrow.Terms terms;
        uint256 id;
        uint256 buyerKey;
        uint256 sellerKey;
        uint256 arbiterKey;
        uint8 phase; // as in the contract; 0 not opened yet
        uint256 clock;
        bool expired;
        uint256 paidIn;
        uint256 paidOut;
        uint256 toSeller;
        uint256 fee;
        bool submitted;
        bool disputed;
        bool signedBelow; // the seller agreed to less, or to an end before delivery
    }

    struct Plain {
        uint256 id;
        address client;
        address provider;
        address evaluator;
        uint256 budget;
        uint256 expiredAt;
        IERC8183.Status status;
        uint256 paidIn;
        uint256 paidOut;
    }

    uint256 public constant PARTIES = 6;
    uint256 private constant DEALS_MAX = 40;
    uint256 private constant PLAIN_MAX = 10;

    Deal[] private _deals;
    Plain[] private _plain;
    uint256[PARTIES] private _keys;
    address[] public everyone;
    mapping(address => int256) private _expected; // change of wealth in the call under way
    mapping(address => uint256) private _before;
    mapping(address => int256) public worstFall;
    mapping(address seller => mapping(uint256 nonce => bool)) private _nonceGone;

    uint256 public minted;
    uint256 public calls;
    mapping(string => uint256) public passed;

    MoodyToken private _moody;

    constructor() {
        vm.warp(START);
        _moody = new MoodyToken();
        useToken(address(_moody));
        for (uint256 i = 0; i < PARTIES; ++i) {
            _keys[i] = 0x1000 + i;
            address party = vm.addr(_keys[i]);
            everyone.push(party);
            _moody.mint(party, 1_000_000);
            minted += 1_000_000;
            allow(party);
        }
        everyone.push(stranger);
        _moody.mint(stranger, 1_000_000);
        minted += 1_000_000;
        allow(stranger);
    }

    function setUp() public override {}

    // -------------------------------------------------------------------------------- the deals

    /// @dev The first two parties buy, the next two sell, the last two judge.
    function openDeal(uint256 seed) external {
        if (_deals.length == DEALS_MAX || _pick(seed, 17, 3) == 0) return;
        Deal storage d = _deals.push();
        d.buyerKey = _keys[_pick(seed, 1, 2)];
        d.sellerKey = _keys[2 + _pick(seed, 2, 2)];
        d.arbiterKey = _keys[4 + _pick(seed, 3, 2)];
        IJobEscrow.Terms memory t = someTerms();
        t.buyer = vm.addr(d.buyerKey);
        t.seller = vm.addr(d.sellerKey);
        t.arbiter = vm.addr(d.arbiterKey);
        t.price = _pick(seed, 4, 4) == 0 ? 1 : 1 + _pick(seed, 5, 2000);
        t.bond = _pick(seed, 6, 4) == 0 ? 0 : _pick(seed, 7, t.price + 1);
        t.defaultToSeller = _pick(seed, 8, t.price + 1);
        t.lockBy = block.timestamp + _pick(seed, 9, 100);
        t.deliverBy = t.lockBy + 1 + _pick(seed, 10, 2000);
        t.disputeSecs = 1 + _pick(seed, 11, 2000);
        t.answerSecs = 1 + _pick(seed, 12, 2000);
        t.ruleSecs = 1 + _pick(seed, 13, 2000);
        t.nonce = _pick(seed, 14, 600); // Few enough that some meet twice.
        if (_pick(seed, 15, 5) == 0) (t.arbiter, t.bond) = (address(0), 0);
        d.terms = t;
        d.id = idOf(t);

        bool passes = !_nonceGone[t.seller][t.nonce] && _payable(t.buyer, t.price);
        for (uint256 i = 0; i + 1 < _deals.length; ++i) {
            if (_deals[i].id == d.id) passes = false;
        }
        if (passes) _expect(t.buyer, -int256(t.price));
        address caller = everyone[_pick(seed, 16, everyone.length)];
        bytes memory data = abi.encodeCall(
            IJobEscrow.open, (t, signTerms(d.buyerKey, t), signTerms(d.sellerKey, t), byAllowance())
        );
        if (!_send(caller, data, passes, "open")) {
            _deals.pop();
            return;
        }
        _nonceGone[t.seller][t.nonce] = true;
        (d.phase, d.clock, d.paidIn) = (WORKING, t.deliverBy, t.price);
        vm.assertEq(uint256(phaseOf(d.id)), uint256(WORKING), "opened");
    }

    function submitDeal(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, WORKING);
        if (!any) return;
        address caller = _callerOf(seed, d.terms.seller);
        bool signed = _pick(seed, 3, 2) == 0;
        bool passes = d.phase == WORKING && !d.expired && block.timestamp <= d.clock;
        bytes memory data;
        if (signed) {
            bytes memory sig = sign(d.sellerKey, deliveryDigest(d.id, RESULT));
            data = abi.encodeCall(IJobEscrow.deliver, (d.terms, RESULT, sig));
        } else {
            passes = passes && caller == d.terms.seller;
            data = abi.encodeCall(IERC8183.submit, (d.id, RESULT, ""));
        }
        if (!_send(caller, data, passes, "submit")) return;
        (d.phase, d.clock, d.submitted) = (DELIVERED, block.timestamp, true);
    }

    function settle(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, 0);
        if (!any) return;
        uint256 toSeller = _pick(seed, 3, 3) == 0 ? d.terms.price : _pick(seed, 4, d.terms.price + 1);
        uint256 sigs = _pick(seed, 5, 32); // The buyer signs 3 times in 4, the seller too; half in a batch.
        address caller = _pick(seed, 7, 2) == 0 ? d.terms.buyer : _callerOf(seed, d.terms.seller);
        bool asked = d.phase == WORKING || toSeller < d.terms.price;
        bool passes = _live(d) && !d.expired && (sigs & 3 != 0 || caller == d.terms.buyer)
            && (!asked || sigs & 12 != 0 || caller == d.terms.seller);

        if (passes) _expectClose(d, toSeller, IJobEscrow.How.Settled);
        bytes memory data = _settleCall(d, toSeller, sigs);
        if (!_send(caller, data, passes, "settle")) return;
        d.signedBelow = asked;
        _closed(d, toSeller, IJobEscrow.How.Settled);
    }

    function decline(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, WORKING);
        if (!any) return;
        if (_pick(seed, 9, 3) != 0) return; // Rarer, or few deals live long.
        address caller = _callerOf(seed, d.terms.seller);
        bool passes = d.phase == WORKING && !d.expired && block.timestamp <= d.clock && caller == d.terms.seller;
        if (passes) _expectClose(d, 0, IJobEscrow.How.Declined);
        if (!_send(caller, abi.encodeCall(IJobEscrow.decline, (d.terms)), passes, "decline")) return;
        _closed(d, 0, IJobEscrow.How.Declined);
    }

    function dispute(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, DELIVERED);
        if (!any) return;
        IJobEscrow.Terms memory t = d.terms;
        address caller = _callerOf(seed, t.buyer);
        bool signed = _pick(seed, 3, 2) == 0;
        bool passes = d.phase == DELIVERED && !d.expired && block.timestamp <= d.clock + t.disputeSecs
            && t.arbiter != address(0) && (signed || caller == t.buyer) && _payable(t.buyer, t.bond);
        bytes memory sig = signed ? sign(d.buyerKey, disputeDigest(d.id, EVIDENCE)) : bytes("");
        if (passes) _expect(t.buyer, -int256(t.bond));
        bytes memory data = abi.encodeCall(IJobEscrow.dispute, (t, EVIDENCE, sig, byAllowance()));
        if (!_send(caller, data, passes, "dispute")) return;
        (d.phase, d.clock, d.disputed) = (t.bond == 0 ? ANSWERED : DISPUTED, block.timestamp, true);
        d.paidIn += t.bond;
    }

    function answer(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, DISPUTED);
        if (!any) return;
        IJobEscrow.Terms memory t = d.terms;
        address caller = _callerOf(seed, t.seller);
        bool signed = _pick(seed, 3, 2) == 0;
        bool passes = d.phase == DISPUTED && !d.expired && block.timestamp <= d.clock + t.answerSecs
            && (signed || caller == t.seller) && _payable(t.seller, t.bond);
        bytes memory sig = signed ? sign(d.sellerKey, answerDigest(d.id, EVIDENCE)) : bytes("");
        if (passes) _expect(t.seller, -int256(t.bond));
        bytes memory data = abi.encodeCall(IJobEscrow.answer, (t, EVIDENCE, sig, byAllowance()));
        if (!_send(caller, data, passes, "answer")) return;
        (d.phase, d.clock) = (ANSWERED, block.timestamp);
        d.paidIn += t.bond;
    }

    function rule(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, ANSWERED);
        if (!any) return;
        IJobEscrow.Terms memory t = d.terms;
        address caller = _callerOf(seed, t.arbiter);
        bool signed = _pick(seed, 3, 2) == 0;
        uint256 toSeller = _pick(seed, 4, t.price + 1);
        bool passes = d.phase == ANSWERED && !d.expired && block.timestamp <= d.clock + t.ruleSecs
            && (signed || caller == t.arbiter);
        bytes memory sig = signed ? sign(d.arbiterKey, rulingDigest(d.id, toSeller, 0, EVIDENCE)) : bytes("");
        if (passes) _expectClose(d, toSeller, IJobEscrow.How.Ruled);
        bytes memory data = abi.encodeCall(IJobEscrow.rule, (t, toSeller, 0, EVIDENCE, sig));
        if (!_send(caller, data, passes, "rule")) return;
        d.fee = t.bond;
        _closed(d, toSeller, IJobEscrow.How.Ruled);
    }

    function poke(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, 0);
        if (!any) return;
        _poke(d, _callerOf(seed, d.terms.buyer));
    }

    function claimRefund(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, 0);
        if (!any) return;
        // At times to expiry itself: chance alone seldom gets there.
        if (_pick(seed, 9, 6) == 0 && block.timestamp < expiry(d.terms)) vm.warp(expiry(d.terms));
        bool passes = _live(d) && !d.expired && block.timestamp >= expiry(d.terms);
        address caller = _callerOf(seed, d.terms.buyer);
        if (!_send(caller, abi.encodeCall(IERC8183.claimRefund, (d.id)), passes, "claimRefund")) return;
        d.expired = true;
    }

    /// @notice Plain functions, and deals that are over, tried on a deal: nothing may pass.
    function meddle(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, 0);
        if (!any) return;
        address caller = _callerOf(seed, d.terms.buyer);
        bytes[6] memory data = [
            abi.encodeCall(IERC8183.setProvider, (d.id, caller, "")),
            abi.encodeCall(IERC8183.setBudget, (d.id, 1, "")),
            abi.encodeCall(IERC8183.fund, (d.id, d.terms.price, "")),
            abi.encodeCall(IERC8183.complete, (d.id, RESULT, "")),
            abi.encodeCall(IERC8183.reject, (d.id, RESULT, "")),
            abi.encodeCall(IJobEscrow.cancel, (d.terms))
        ];
        _send(caller, data[_pick(seed, 3, 6)], false, "meddle");
    }

    // --------------------------------------------------------------------------------- the rest

    function withdraw(uint256 seed) external {
        uint256 first = _pick(seed, 1, everyone.length);
        address to = everyone[first];
        for (uint256 i = 0; i < everyone.length && escrow.owed(to) == 0; ++i) {
            to = everyone[(first + i) % everyone.length];
        }
        if (_pick(seed, 2, 2) == 0) _moody.setMood(to, MoodyToken.Mood.Fine);
        bool passes = escrow.owed(to) > 0 && _moody.moodFor(to) == MoodyToken.Mood.Fine;
        _send(stranger, abi.encodeCall(IJobEscrow.withdraw, (to)), passes, "withdraw");
    }

    function invalidate(uint256 seed) external {
        if (_pick(seed, 1, 8) != 0) return;
        uint256 key = _keys[2 + _pick(seed, 2, 2)];
        uint256 nonce = _pick(seed, 3, 600);
        bytes memory data = abi.encodeCall(IJobEscrow.invalidate, (nonce >> 8, 1 << (nonce & 0xff)));
        if (_send(vm.addr(key), data, true, "invalidate")) _nonceGone[vm.addr(key)][nonce] = true;
    }

    function mood(uint256 seed) external {
        // Not BurnsGas: of three in a row no finite gas is enough, which is the token's fault.
        MoodyToken.Mood[4] memory moods = [
            MoodyToken.Mood.Fine, MoodyToken.Mood.Reverts, MoodyToken.Mood.ReturnsFalse, MoodyToken.Mood.LongAnswer
        ];
        _moody.setMood(everyone[_pick(seed, 1, everyone.length)], moods[_pick(seed, 2, 4)]);
    }

    function calm(uint256 seed) external {
        _moody.setMood(everyone[_pick(seed, 1, everyone.length)], MoodyToken.Mood.Fine);
    }

    /// @notice From now on every move of the token tries this again from within.
    function reenter(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, 0);
        if (!any || _pick(seed, 3, 3) == 0) return _moody.attack(address(0), "");
        bytes[4] memory data = [
            abi.encodeCall(IJobEscrow.poke, (d.terms)),
            abi.encodeCall(IERC8183.claimRefund, (d.id)),
            abi.encodeCall(IJobEscrow.withdraw, (d.terms.seller)),
            abi.encodeCall(IJobEscrow.invalidate, (0, 0))
        ];
        _moody.attack(address(escrow), data[_pick(seed, 4, 4)]);
    }

    function warp(uint256 seed) external {
        uint256[4] memory steps = [uint256(1), 20, 100, 800];
        vm.warp(block.timestamp + 1 + _pick(seed, 2, steps[_pick(seed, 1, 4)]));
    }

    /// @notice To the last moment of some limit, or to the first after it.
    function warpToLimit(uint256 seed) external {
        (bool any, Deal storage d) = _some(seed, 0);
        if (!any || !_live(d)) return;
        uint256 to = _limitOf(d) + _pick(seed, 2, 2);
        if (to > block.timestamp) vm.warp(to);
    }

    // ------------------------------------------------------------------------------- plain jobs

    function createPlain(uint256 seed) external {
        if (_plain.length == PLAIN_MAX) return;
        Plain storage p = _plain.push();
        p.client = everyone[_pick(seed, 1, 2)];
        p.provider = everyone[2 + _pick(seed, 2, 2)];
        p.evaluator = _pick(seed, 3, 2) == 0 ? p.client : everyone[4];
        p.expiredAt = block.timestamp + 1 + _pick(seed, 4, 4000);
        p.id = escrow.jobCounter() + 1;
        bytes memory data =
            abi.encodeCall(IERC8183.createJob, (p.provider, p.evaluator, p.expiredAt, "plain", address(0)));
        _send(p.client, data, true, "createJob");
    }

    function stepPlain(uint256 seed) external {
        if (_plain.length == 0) return;
        // Mostly the newest, which is the one alive.
        Plain storage p = _plain[_pick(seed, 6, 2) == 0 ? _plain.length - 1 : _pick(seed, 1, _plain.length)];
        address[5] memory callers = [p.client, p.provider, p.evaluator, stranger, p.client];
        address caller = callers[_pick(seed, 2, 5)];
        uint256 act = _pick(seed, 3, 6);
        if (_pick(seed, 5, 2) == 0) {
            // The step that leads on, by the one who may take it.
            if (p.status == IERC8183.Status.Open) (act, caller) = (p.budget == 0 ? 0 : 1, p.client);
            if (p.status == IERC8183.Status.Funded) (act, caller) = (2, p.provider);
            if (p.status == IERC8183.Status.Submitted) (act, caller) = (3 + _pick(seed, 7, 3), p.evaluator);
        }
        IERC8183.Status s = p.status;
        bool funded = s == IERC8183.Status.Funded || s == IERC8183.Status.Submitted;
        if (act == 0) {
            uint256 budget = _pick(seed, 4, 1000);
            bool passes = s == IERC8183.Status.Open && (caller == p.client || caller == p.provider);
            bytes memory data = abi.encodeCall(IERC8183.setBudget, (p.id, budget, ""));
            if (_send(caller, data, passes, "setBudget")) p.budget = budget;
        } else if (act == 1) {
            bool passes = s == IERC8183.Status.Open && caller == p.client && p.budget != 0
                && _payable(caller, p.budget);
            if (passes) _expect(caller, -int256(p.budget));
            if (_send(caller, abi.encodeCall(IERC8183.fund, (p.id, p.budget, "")), passes, "fund")) {
                (p.status, p.paidIn) = (IERC8183.Status.Funded, p.budget);
            }
        } else if (act == 2) {
            bool passes = s == IERC8183.Status.Funded && caller == p.provider;
            bytes memory data = abi.encodeCall(IERC8183.submit, (p.id, RESULT, ""));
            if (_send(caller, data, passes, "submit plain")) p.status = IERC8183.Status.Submitted;
        } else if (act == 3) {
            bool passes = s == IERC8183.Status.Submitted && caller == p.evaluator;
            if (passes) _expect(p.provider, int256(p.budget));
            bytes memory data = abi.encodeCall(IERC8183.complete, (p.id, RESULT, ""));
            if (_send(caller, data, passes, "complete")) {
                (p.status, p.paidOut) = (IERC8183.Status.Completed, p.paidOut + p.budget);
            }
        } else if (act == 4) {
            bool passes = (s == IERC8183.Status.Open && caller == p.client) || (funded && caller == p.evaluator);
            if (passes && funded) _expect(p.client, int256(p.budget));
            bytes memory data = abi.encodeCall(IERC8183.reject, (p.id, RESULT, ""));
            if (_send(caller, data, passes, "reject")) {
                (p.status, p.paidOut) = (IERC8183.Status.Rejected, p.paidOut + (funded ? p.budget : 0));
            }
        } else {
            bool passes = funded && block.timestamp >= p.expiredAt;
            if (passes) _expect(p.client, int256(p.budget));
            bytes memory data = abi.encodeCall(IERC8183.claimRefund, (p.id));
            if (_send(caller, data, passes, "claimRefund plain")) {
                (p.status, p.paidOut) = (IERC8183.Status.Expired, p.paidOut + p.budget);
            }
        }
    }

    // ---------------------------------------------------------------------------------- sums

    /// @notice What the model says the escrow must hold for deals and jobs, apart from `owed`.
    function locked() external view returns (uint256 sum) {
        for (uint256 i = 0; i < _deals.length; ++i) sum += _deals[i].paidIn - _deals[i].paidOut;
        for (uint256 i = 0; i < _plain.length; ++i) sum += _plain[i].paidIn - _plain[i].paidOut;
    }

    function owedToAll() public view returns (uint256 sum) {
        for (uint256 i = 0; i < everyone.length; ++i) sum += escrow.owed(everyone[i]);
    }

    function held() external view returns (uint256) {
        return token.balanceOf(address(escrow));
    }

    function allTokens() external view returns (uint256 sum) {
        sum = token.balanceOf(address(escrow));
        for (uint256 i = 0; i < everyone.length; ++i) sum += token.balanceOf(everyone[i]);
    }

    function reentered() external view returns (bool) {
        return _moody.reentered();
    }

    /// @notice Each deal against its own story: 2, 3, 7 and 9 of the specification.
    function checkDeals() external view {
        for (uint256 i = 0; i < _deals.length; ++i) {
            Deal storage d = _deals[i];
            (IERC8183.Status status, uint8 phase,, uint256 clock, uint256 budget, uint256 penalty,) = escrow.deal(d.id);
            vm.assertEq(uint256(phase), uint256(d.phase), "phase as in the model");
            vm.assertEq(budget, d.terms.price, "budget is the price");
            vm.assertEq(penalty, 0, "no penalty");
            vm.assertLe(d.paidOut, d.paidIn, "no more out than in");
            if (_live(d)) {
                vm.assertEq(clock, d.clock, "clock as in the model");
                vm.assertTrue((status == IERC8183.Status.Expired) == d.expired, "expired as in the model");
                continue;
            }
            vm.assertEq(d.paidOut, d.paidIn, "a closed deal is paid out");
            if (d.submitted && !d.disputed && !d.signedBelow) {
                vm.assertEq(d.toSeller, d.terms.price, "delivered, undisputed: the seller has the price");
            }
            if (!d.submitted && !d.signedBelow) vm.assertEq(d.toSeller, 0, "undelivered: the buyer has it");
            if (!d.expired) {
                IERC8183.Status end = d.toSeller > 0 ? IERC8183.Status.Completed : IERC8183.Status.Rejected;
                vm.assertEq(uint256(status), uint256(end), "Completed iff the seller got something");
            } else {
                vm.assertEq(uint256(status), uint256(IERC8183.Status.Expired), "expired for good");
            }
        }
        for (uint256 i = 0; i < _plain.length; ++i) {
            Plain storage p = _plain[i];
            vm.assertLe(p.paidOut, p.paidIn, "plain: no more out than in");
            vm.assertEq(uint256(statusOf(p.id)), uint256(p.status), "plain: status as in the model");
        }
    }

    /// @notice 4 and 5: long after, everything ends, half of it by way of `claimRefund`, whoever calls.
    function endAll() external {
        _moody.attack(address(0), "");
        vm.warp(block.timestamp + 200 days);
        for (uint256 i = 0; i < _deals.length; ++i) {
            Deal storage d = _deals[i];
            if (!_live(d)) continue;
            if (!d.expired && i % 2 == 0) {
                _send(stranger, abi.encodeCall(IERC8183.claimRefund, (d.id)), true, "last claimRefund");
                d.expired = true;
            }
            _poke(d, everyone[i % everyone.length]);
            vm.assertTrue(!_live(d), "every deal ends");
        }
        for (uint256 i = 0; i < _plain.length; ++i) {
            Plain storage p = _plain[i];
            if (p.status != IERC8183.Status.Funded && p.status != IERC8183.Status.Submitted) continue;
            _expect(p.client, int256(p.budget));
            _send(stranger, abi.encodeCall(IERC8183.claimRefund, (p.id)), true, "last claimRefund");
            (p.status, p.paidOut) = (IERC8183.Status.Expired, p.paidOut + p.budget);
        }
        for (uint256 i = 0; i < everyone.length; ++i) {
            _moody.setMood(everyone[i], MoodyToken.Mood.Fine);
            if (escrow.owed(everyone[i]) > 0) escrow.withdraw(everyone[i]);
        }
    }

    function everyoneCount() external view returns (uint256) {
        return everyone.length;
    }

    // --------------------------------------------------------------------------------- helpers

    function _settleCall(Deal storage d, uint256 toSeller, uint256 sigs) private view returns (bytes memory) {
        IJobEscrow.Settle[] memory rows = new IJobEscrow.Settle[](1);
        bytes32 digest = settlementDigest(d.id, RESULT, toSeller);
        rows[0] = IJobEscrow.Settle(d.terms, RESULT, toSeller, "", "");
        if (sigs & 3 != 0) rows[0].buyerSig = sign(d.buyerKey, digest);
        if (sigs & 12 != 0) rows[0].sellerSig = sign(d.sellerKey, digest);
        if (sigs & 16 != 0) return abi.encodeCall(IJobEscrow.settleMany, (rows));
        return abi.encodeCall(IJobEscrow.settle, (d.terms, RESULT, toSeller, rows[0].buyerSig, rows[0].sellerSig));
    }

    function _poke(Deal storage d, address caller) private {
        bool passes = _live(d) && block.timestamp > _limitOf(d);
        uint256 toSeller = 0;
        IJobEscrow.How how = IJobEscrow.How.Undelivered;
        if (d.phase == DELIVERED) (toSeller, how) = (d.terms.price, IJobEscrow.How.SilentBuyer);
        if (d.phase == DISPUTED) how = IJobEscrow.How.SilentSeller;
        if (d.phase == ANSWERED) (toSeller, how) = (d.terms.defaultToSeller, IJobEscrow.How.SilentArbiter);
        if (passes) _expectClose(d, toSeller, how);
        if (_send(caller, abi.encodeCall(IJobEscrow.poke, (d.terms)), passes, "poke")) _closed(d, toSeller, how);
    }

    function _expectClose(Deal storage d, uint256 toSeller, IJobEscrow.How how) private {
        IJobEscrow.Terms memory t = d.terms;
        uint256 buyerGets = t.price - toSeller;
        uint256 sellerGets = toSeller;
        if (how == IJobEscrow.How.Ruled) {
            uint256 back = t.bond * (t.price - toSeller) / t.price;
            buyerGets += back;
            sellerGets += t.bond - back;
            _expect(t.arbiter, int256(t.bond));
        } else {
            if (d.phase >= DISPUTED) buyerGets += t.bond;
            if (d.phase >= ANSWERED) sellerGets += t.bond;
        }
        _expect(t.buyer, int256(buyerGets));
        _expect(t.seller, int256(sellerGets));
    }

    function _closed(Deal storage d, uint256 toSeller, IJobEscrow.How how) private {
        d.phase = CLOSED + uint8(how);
        d.toSeller = toSeller;
        d.paidOut = d.paidIn; // `_expectClose` was met, or we would not be here.
    }

    function _live(Deal storage d) private view returns (bool) {
        return d.phase >= WORKING && d.phase <= ANSWERED;
    }

    function _limitOf(Deal storage d) private view returns (uint256) {
        if (d.phase == DELIVERED) return d.clock + d.terms.disputeSecs;
        if (d.phase == DISPUTED) return d.clock + d.terms.answerSecs;
        if (d.phase == ANSWERED) return d.clock + d.terms.ruleSecs;
        return d.clock;
    }

    function _payable(address from, uint256 amount) private view returns (bool) {
        return amount == 0
            || (token.balanceOf(from) >= amount && _moody.moodFor(address(escrow)) == MoodyToken.Mood.Fine);
    }

    function _expect(address who, int256 change) private {
        _expected[who] += change;
    }

    /// @dev Sends, and compares outcome and everybody's wealth with what the model expects.
    function _send(address caller, bytes memory data, bool passes, string memory what) private returns (bool) {
        uint256 count = everyone.length;
        for (uint256 i = 0; i < count; ++i) _before[everyone[i]] = wealth(everyone[i]);
        vm.prank(caller);
        // Plenty of gas, yet finite: a token that burns all it is given leaves a 64th.
        (bool done,) = address(escrow).call{gas: 30_000_000}(data);
        ++calls;
        if (done) ++passed[what];
        vm.assertTrue(done == passes, string.concat(what, passes ? ": refused" : ": allowed"));
        for (uint256 i = 0; i < count; ++i) {
            address who = everyone[i];
            int256 change = int256(wealth(who)) - int256(_before[who]);
            vm.assertEq(change, _expected[who], string.concat(what, ": change of wealth"));
            delete _expected[who];
        }
        return done;
    }

    /// @dev Three times in four one that is alive, and in the wanted phase if one is named (not 0);
    /// else any, the dead among them.
    function _some(uint256 seed, uint8 wanted) private view returns (bool any, Deal storage d) {
        assembly ("memory-safe") {
            d.slot := 0
        }
        uint256 count = _deals.length;
        if (count == 0) return (false, d);
        uint256 first = _pick(seed, 1, count);
        d = _deals[first];
        if (_pick(seed, 20, 4) == 0) return (true, d);
        for (uint256 i = 0; i < count; ++i) {
            Deal storage other = _deals[(first + i) % count];
            if (wanted == 0 ? _live(other) : other.phase == wanted) return (true, other);
        }
        return (true, d);
    }

    /// @dev Mostly the one who may, at times anybody.
    function _callerOf(uint256 seed, address who) private view returns (address) {
        if (who != address(0) && _pick(seed, 21, 3) != 0) return who;
        return everyone[_pick(seed, 22, everyone.length)];
    }

    function _pick(uint256 seed, uint256 salt, uint256 count) private pure returns (uint256) {
        return uint256(keccak256(abi.encode(seed, salt))) % count;
    }
}

contract InvariantsTest {
    struct FuzzSelector {
        address addr;
        bytes4[] selectors;
    }

    Handler internal handler;

    function setUp() public {
        handler = new Handler();
    }

    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    /// @dev Only these; the handler's views are not steps. What leads on stands more than once.
    function targetSelectors() public view returns (FuzzSelector[] memory targets) {
        bytes4[] memory s = new bytes4[](37);
        s[0] = Handler.openDeal.selector;
        s[1] = Handler.openDeal.selector;
        s[2] = Handler.openDeal.selector;
        s[3] = Handler.openDeal.selector;
        s[4] = Handler.submitDeal.selector;
        s[5] = Handler.submitDeal.selector;
        s[6] = Handler.submitDeal.selector;
        s[7] = Handler.settle.selector;
        s[8] = Handler.decline.selector;
        s[9] = Handler.dispute.selector;
        s[10] = Handler.dispute.selector;
        s[11] = Handler.dispute.selector;
        s[12] = Handler.answer.selector;
        s[13] = Handler.answer.selector;
        s[14] = Handler.answer.selector;
        s[15] = Handler.rule.selector;
        s[16] = Handler.rule.selector;
        s[17] = Handler.rule.selector;
        s[18] = Handler.poke.selector;
        s[19] = Handler.poke.selector;
        s[20] = Handler.claimRefund.selector;
        s[21] = Handler.meddle.selector;
        s[22] = Handler.withdraw.selector;
        s[23] = Handler.withdraw.selector;
        s[24] = Handler.invalidate.selector;
        s[25] = Handler.mood.selector;
        s[26] = Handler.mood.selector;
        s[27] = Handler.calm.selector;
        s[28] = Handler.reenter.selector;
        s[29] = Handler.warp.selector;
        s[30] = Handler.warpToLimit.selector;
        s[31] = Handler.createPlain.selector;
        s[32] = Handler.stepPlain.selector;
        s[33] = Handler.stepPlain.selector;
        s[34] = Handler.stepPlain.selector;
        s[35] = Handler.stepPlain.selector;
        s[36] = Handler.stepPlain.selector;
        targets = new FuzzSelector[](1);
        targets[0] = FuzzSelector(address(handler), s);
    }

    /// @notice The escrow holds exactly the open deals, the open jobs, the bonds and what it owes;
    /// nothing is made or lost; every deal is where its own story says; nobody got in twice. One
    /// campaign for all of them: four would walk the same ways.
    function invariant_ofTheEscrow() public view {
        vm.assertEq(handler.held(), handler.locked() + handler.owedToAll(), "held");
        vm.assertEq(handler.allTokens(), handler.minted(), "minted");
        handler.checkDeals();
        vm.assertTrue(!handler.reentered(), "re-entered");
    }

    /// @notice At the end of every walk all deals end, and all the money can be taken out.
    function afterInvariant() public {
        handler.endAll();
        vm.assertEq(handler.owedToAll(), 0, "all withdrawn");
        vm.assertEq(handler.locked(), 0, "all closed");
        vm.assertEq(handler.held(), 0, "the escrow is empty");
        vm.assertEq(handler.allTokens(), handler.minted(), "all there");
    }
}

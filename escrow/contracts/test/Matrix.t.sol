// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC8183, IJobEscrow} from "../src/IJobEscrow.sol";
import {Base} from "./Base.sol";
import {vm} from "./Vm.sol";

/// @notice Every state of a deal, every caller, every function: allowed exactly where the table of
/// the specification has a row, and then with that row's result.
abstract contract Matrix is Base {
    /// @dev A live phase is tried at four times: at its limit, one second after it, at expiry, and
    /// after `claimRefund`.
    enum When {
        AtLimit,
        Late,
        Old,
        Expired
    }

    enum Caller {
        Buyer,
        Seller,
        Arbiter,
        Stranger
    }

    /// @dev The suffix says whose signature goes along: a caller needs none of his own.
    enum Act {
        OpenUnsigned,
        OpenByBuyerSig,
        OpenBySellerSig,
        OpenByBoth,
        Submit,
        DeliverUnsigned,
        DeliverSigned,
        SettleWholeUnsigned,
        SettleWholeByBuyerSig,
        SettleWholeBySellerSig,
        SettleWholeByBoth,
        SettlePartUnsigned,
        SettlePartByBuyerSig,
        SettlePartBySellerSig,
        SettlePartByBoth,
        SettleAbovePrice,
        Decline,
        DisputeUnsigned,
        DisputeSigned,
        AnswerUnsigned,
        AnswerSigned,
        RuleUnsigned,
        RuleSigned,
        RuleAbovePrice,
        RuleWithPenalty,
        Poke,
        ClaimRefund,
        Cancel,
        SetProvider,
        SetBudget,
        Fund,
        Complete,
        Reject
    }

    /// @dev What a state is, as far as the table cares.
    struct State {
        string name;
        bool opened;
        bool openable;
        uint8 phase; // 0 where there is no deal, 16 and more where it has ended
        When when;
    }

    struct Expected {
        bool allowed;
        IERC8183.Status status;
        uint8 phase;
    }

    uint256 internal constant PART = 600;

    IJobEscrow.Terms internal terms;
    uint256 internal id;
    uint256 internal cells;

    function setUp() public override {
        super.setUp();
        terms = someTerms();
        adjust();
        id = idOf(terms);
    }

    function adjust() internal virtual {}

    // ---------------------------------------------------------------------------------- states

    function test_beforeOpening() public {
        _tryAll(State("none", false, true, 0, When.AtLimit));
        vm.warp(terms.lockBy);
        _tryAll(State("none at lockBy", false, true, 0, When.AtLimit));
        vm.warp(terms.lockBy + 1);
        _tryAll(State("none after lockBy", false, false, 0, When.AtLimit));
    }

    function test_cancelled() public {
        vm.prank(buyer);
        escrow.cancel(terms);
        _tryAll(State("cancelled", true, false, CANCELLED, When.AtLimit));
    }

    function test_nonceInvalidated() public {
        vm.prank(seller);
        escrow.invalidate(terms.nonce >> 8, 1 << (terms.nonce & 0xff));
        _tryAll(State("nonce invalidated", false, false, 0, When.AtLimit));
    }

    function test_working() public {
        open(terms);
        _tryTimes("working", WORKING, terms.deliverBy);
    }

    function test_delivered() public {
        openSubmitted(terms);
        _tryTimes("delivered", DELIVERED, block.timestamp + terms.disputeSecs);
    }

    // ----------------------------------------------------------------------------------- table

    function expectedOf(State memory s, Caller caller, Act act) internal view returns (Expected memory e) {
        bool byBuyer = caller == Caller.Buyer;
        bool bySeller = caller == Caller.Seller;
        bool byArbiter = caller == Caller.Arbiter;
        bool live = s.phase >= WORKING && s.phase <= ANSWERED;
        bool inTime = s.when == When.AtLimit;
        bool expired = s.when == When.Expired;

        if (act == Act.OpenByBuyerSig) e.allowed = s.openable && bySeller;
        if (act == Act.OpenBySellerSig) e.allowed = s.openable && byBuyer;
        if (act == Act.OpenByBoth) e.allowed = s.openable;
        if (e.allowed) return Expected(true, IERC8183.Status.Funded, WORKING);

        if (act == Act.Submit || act == Act.DeliverUnsigned) e.allowed = bySeller;
        if (act == Act.DeliverSigned) e.allowed = true;
        if (e.allowed) return Expected(s.phase == WORKING && inTime, IERC8183.Status.Submitted, DELIVERED);

        if (act >= Act.SettleWholeUnsigned && act <= Act.SettlePartByBoth) {
            bool whole = act <= Act.SettleWholeByBoth;
            uint256 sigs = (uint256(act) - uint256(Act.SettleWholeUnsigned)) % 4; // 1 buyer's, 2 seller's
            bool buyerConsents = byBuyer || sigs & 1 != 0;
            bool sellerConsents = bySeller || sigs & 2 != 0 || (whole && s.phase != WORKING);
            bool allowed = live && !expired && buyerConsents && sellerConsents;
            return Expected(allowed, IERC8183.Status.Completed, CLOSED + uint8(IJobEscrow.How.Settled));
        }

        if (act == Act.Decline) {
            bool allowed = bySeller && s.phase == WORKING && inTime;
            return Expected(allowed, IERC8183.Status.Rejected, CLOSED + uint8(IJobEscrow.How.Declined));
        }
        if (act == Act.DisputeUnsigned) e.allowed = byBuyer;
        if (act == Act.DisputeSigned) e.allowed = true;
        if (e.allowed) {
            bool allowed = s.phase == DELIVERED && inTime && terms.arbiter != address(0);
            return Expected(allowed, IERC8183.Status.Submitted, terms.bond == 0 ? ANSWERED : DISPUTED);
        }
        if (act == Act.AnswerUnsigned) e.allowed = bySeller;
        if (act == Act.AnswerSigned) e.allowed = true;
        if (e.allowed) return Expected(s.phase == DISPUTED && inTime, IERC8183.Status.Submitted, ANSWERED);

        if (act == Act.RuleUnsigned) e.allowed = byArbiter;
        if (act == Act.RuleSigned) e.allowed = true;
        if (e.allowed) {
            bool allowed = s.phase == ANSWERED && inTime;
            return Expected(allowed, IERC8183.Status.Completed, CLOSED + uint8(IJobEscrow.How.Ruled));
        }

        if (act == Act.Poke && live && !inTime) return _silenceOf(s.phase, expired);
        if (act == Act.ClaimRefund) {
            return Expected(live && s.when == When.Old, IERC8183.Status.Expired, s.phase);
        }
        if (act == Act.Cancel) {
            return Expected(!s.opened && (byBuyer || bySeller), IERC8183.Status.Rejected, CANCELLED);
        }
        // All else, the plain functions among it, is never allowed on a deal.
    }

    function _silenceOf(uint8 phase, bool expired) private view returns (Expected memory e) {
        e.allowed = true;
        IJobEscrow.How how;
        bool sellerGets = false;
        if (phase == WORKING) how = IJobEscrow.How.Undelivered;
        if (phase == DELIVERED) (how, sellerGets) = (IJobEscrow.How.SilentBuyer, true);
        if (phase == DISPUTED) how = IJobEscrow.How.SilentSeller;
        if (phase == ANSWERED) (how, sellerGets) = (IJobEscrow.How.SilentArbiter, terms.defaultToSeller > 0);
        e.phase = CLOSED + uint8(how);
        e.status = sellerGets ? IERC8183.Status.Completed : IERC8183.Status.Rejected;
        if (expired) e.status = IERC8183.Status.Expired;
    }

    // ----------------------------------------------------------------------------------- calls

    function callOf(Act act) internal view returns (bytes memory) {
        IJobEscrow.Terms memory t = terms;
        IJobEscrow.Funding memory f = byAllowance();
        bytes memory none = "";

        if (act <= Act.OpenByBoth) {
            uint256 sigs = uint256(act);
            bytes memory buyerSig = sigs & 1 != 0 ? signTerms(BUYER_KEY, t) : none;
            bytes memory sellerSig = sigs & 2 != 0 ? signTerms(SELLER_KEY, t) : none;
            return abi.encodeCall(IJobEscrow.open, (t, buyerSig, sellerSig, f));
        }
        if (act == Act.Submit) return abi.encodeCall(IERC8183.submit, (id, RESULT, none));
        if (act == Act.DeliverUnsigned) return abi.encodeCall(IJobEscrow.deliver, (t, RESULT, none));
        if (act == Act.DeliverSigned) {
            return abi.encodeCall(IJobEscrow.deliver, (t, RESULT, sign(SELLER_KEY, deliveryDigest(id, RESULT))));
        }
        if (act >= Act.SettleWholeUnsigned && act <= Act.SettlePartByBoth) {
            uint256 sigs = (uint256(act) - uint256(Act.SettleWholeUnsigned)) % 4;
            return _settleCall(act <= Act.SettleWholeByBoth ? PRICE : PART, sigs);
        }
        if (act == Act.SettleAbovePrice) return _settleCall(PRICE + 1, 3);
        if (act == Act.Decline) return abi.encodeCall(IJobEscrow.decline, (t));
        if (act == Act.DisputeUnsigned) return abi.encodeCall(IJobEscrow.dispute, (t, EVIDENCE, none, f));
        if (act == Act.DisputeSigned) {
            return abi.encodeCall(
                IJobEscrow.dispute, (t, EVIDENCE, sign(BUYER_KEY, disputeDigest(id, EVIDENCE)), f)
            );
        }
        if (act == Act.AnswerUnsigned) return abi.encodeCall(IJobEscrow.answer, (t, EVIDENCE, none, f));
        if (act == Act.AnswerSigned) {
            return abi.encodeCall(
                IJobEscrow.answer, (t, EVIDENCE, sign(SELLER_KEY, answerDigest(id, EVIDENCE)), f)
            );
        }
        if (act == Act.RuleUnsigned) return abi.encodeCall(IJobEscrow.rule, (t, PART, 0, EVIDENCE, none));
        if (act == Act.RuleSigned) return _ruleCall(PART, 0);
        if (act == Act.RuleAbovePrice) return _ruleCall(PRICE + 1, 0);
        if (act == Act.RuleWithPenalty) return _ruleCall(PART, 1);
        return _plainCall(act);
    }

    function _plainCall(Act act) private view returns (bytes memory) {
        if (act == Act.Poke) return abi.encodeCall(IJobEscrow.poke, (terms));
        if (act == Act.Cancel) return abi.encodeCall(IJobEscrow.cancel, (terms));
        if (act == Act.ClaimRefund) return abi.encodeCall(IERC8183.claimRefund, (id));
        if (act == Act.SetProvider) return abi.encodeCall(IERC8183.setProvider, (id, stranger, ""));
        if (act == Act.SetBudget) return abi.encodeCall(IERC8183.setBudget, (id, PRICE, ""));
        if (act == Act.Fund) return abi.encodeCall(IERC8183.fund, (id, PRICE, ""));
        if (act == Act.Complete) return abi.encodeCall(IERC8183.complete, (id, RESULT, ""));
        if (act == Act.Reject) return abi.encodeCall(IERC8183.reject, (id, RESULT, ""));
        revert("no such act");
    }

    function _settleCall(uint256 toSeller, uint256 sigs) private view returns (bytes memory) {
        bytes32 digest = settlementDigest(id, RESULT, toSeller);
        bytes memory buyerSig = sigs & 1 != 0 ? sign(BUYER_KEY, digest) : bytes("");
        bytes memory sellerSig = sigs & 2 != 0 ? sign(SELLER_KEY, digest) : bytes("");
        return abi.encodeCall(IJobEscrow.settle, (terms, RESULT, toSeller, buyerSig, sellerSig));
    }

    function _ruleCall(uint256 toSeller, uint256 penalty) private view returns (bytes memory) {
        bytes memory sig = sign(ARBITER_KEY, rulingDigest(id, toSeller, penalty, EVIDENCE));
        return abi.encodeCall(IJobEscrow.rule, (terms, toSeller, penalty, EVIDENCE, sig));
    }

    // ---------------------------------------------------------------------------------- trying

    function _tryTimes(string memory name, uint8 phase, uint256 limit) internal {
        uint256 state = vm.snapshotState();
        vm.warp(limit);
        _tryAll(State(string.concat(name, " at the limit"), true, false, phase, When.AtLimit));
        vm.warp(limit + 1);
        _tryAll(State(string.concat(name, " after the limit"), true, false, phase, When.Late));
        vm.warp(expiry(terms) - 1);
        _tryAll(State(string.concat(name, " before expiry"), true, false, phase, When.Late));
        vm.warp(expiry(terms));
        _tryAll(State(string.concat(name, " at expiry"), true, false, phase, When.Old));
        escrow.claimRefund(id);
        _tryAll(State(string.concat(name, ", expired"), true, false, phase, When.Expired));
        vm.revertToState(state);
    }

    function _tryClosed(string memory name, IJobEscrow.How how, uint256 goBackTo) internal {
        uint8 phase = CLOSED + uint8(how);
        vm.assertEq(uint256(phaseOf(id)), uint256(phase), name);
        uint256 now_ = block.timestamp;
        _tryAll(State(name, true, false, phase, When.AtLimit));
        vm.warp(expiry(terms) + 1);
        _tryAll(State(string.concat(name, ", later"), true, false, phase, When.Old));
        vm.warp(now_);
        vm.revertToState(goBackTo);
    }

    function _tryAll(State memory s) internal {
        for (uint256 caller = 0; caller <= uint256(type(Caller).max); ++caller) {
            for (uint256 act = 0; act <= uint256(type(Act).max); ++act) {
                // A call from outside, so that memory does not pile up over the cells.
                this.tryCell(s, Caller(caller), Act(act));
            }
        }
    }

    function tryCell(State memory s, Caller caller, Act act) external {
        address[4] memory callers = [buyer, seller, arbiter, stranger];
        string memory cell = string.concat(
            s.name, ", caller ", vm.toString(uint256(caller)), ", act ", vm.toString(uint256(act))
        );
        bytes memory data = callOf(act);
        Expected memory e = expectedOf(s, caller, act);
        uint256 state = vm.snapshotState();
        uint256 all = token.balanceOf(address(escrow));

        vm.prank(callers[uint256(caller)]);
        (bool done,) = address(escrow).call(data);
        vm.assertTrue(done == e.allowed, string.concat(cell, e.allowed ? ": refused" : ": allowed"));
        if (done) {
            vm.assertEq(uint256(statusOf(id)), uint256(e.status), string.concat(cell, ": status"));
            vm.assertEq(uint256(phaseOf(id)), uint256(e.phase), string.concat(cell, ": phase"));
        } else {
            vm.assertEq(token.balanceOf(address(escrow)), all, string.concat(cell, ": balance"));
            vm.assertEq(uint256(phaseOf(id)), uint256(s.phase), string.concat(cell, ": phase"));
        }
        vm.revertToState(state);
    }

    // ----------------------------------------------------------------------------------- steps

    function _settle(uint256 toSeller) internal {
        bytes memory sellerSig = sign(SELLER_KEY, settlementDigest(id, RESULT, toSeller));
        vm.prank(buyer);
        escrow.settle(terms, RESULT, toSeller, "", sellerSig);
    }

    function _pokeAt(uint256 time) internal {
        vm.warp(time);
        escrow.poke(terms);
    }

    function _expireAndPoke() internal {
        vm.warp(expiry(terms));
        escrow.claimRefund(id);
        escrow.poke(terms);
    }
}

/// @notice With arbiter and bonds: all phases and all ends.
contract MatrixTest is Matrix {
    function test_disputed() public {
        openDisputed(terms);
        _tryTimes("disputed", DISPUTED, block.timestamp + terms.answerSecs);
    }

    function test_answered() public {
        openAnswered(terms);
        _tryTimes("answered", ANSWERED, block.timestamp + terms.ruleSecs);
    }

    function test_closed() public {
        uint256 fresh = vm.snapshotState();
        open(terms);
        uint256 working = vm.snapshotState();
        _settle(PRICE);
        _tryClosed("settled for the price", IJobEscrow.How.Settled, working);
        _settle(0);
        _tryClosed("settled for nothing", IJobEscrow.How.Settled, working);
        vm.prank(seller);
        escrow.decline(terms);
        _tryClosed("declined", IJobEscrow.How.Declined, working);
        _pokeAt(terms.deliverBy + 1);
        _tryClosed("undelivered", IJobEscrow.How.Undelivered, working);
        _expireAndPoke();
        _tryClosed("expired, undelivered", IJobEscrow.How.Undelivered, working);

        vm.revertToState(fresh);
        openSubmitted(terms);
        uint256 delivered = vm.snapshotState();
        _settle(PART);
        _tryClosed("settled for a part", IJobEscrow.How.Settled, delivered);
        _pokeAt(block.timestamp + terms.disputeSecs + 1);
        _tryClosed("silent buyer", IJobEscrow.How.SilentBuyer, delivered);
        _expireAndPoke();
        _tryClosed("expired, silent buyer", IJobEscrow.How.SilentBuyer, delivered);

        vm.revertToState(fresh);
        openDisputed(terms);
        uint256 disputed = vm.snapshotState();
        _pokeAt(block.timestamp + terms.answerSecs + 1);
        _tryClosed("silent seller", IJobEscrow.How.SilentSeller, disputed);
        _expireAndPoke();
        _tryClosed("expired, silent seller", IJobEscrow.How.SilentSeller, disputed);

        vm.revertToState(fresh);
        openAnswered(terms);
        uint256 answered = vm.snapshotState();
        vm.prank(arbiter);
        escrow.rule(terms, PART, 0, EVIDENCE, "");
        _tryClosed("ruled", IJobEscrow.How.Ruled, answered);
        _pokeAt(block.timestamp + terms.ruleSecs + 1);
        _tryClosed("silent arbiter", IJobEscrow.How.SilentArbiter, answered);
        _expireAndPoke();
        _tryClosed("expired, silent arbiter", IJobEscrow.How.SilentArbiter, answered);
    }
}

/// @notice The same without bonds: a dispute goes to the arbiter at once, nobody is asked to answer.
contract MatrixWithoutBondTest is Matrix {
    function adjust() internal override {
        terms.bond = 0;
        terms.defaultToSeller = 0;
    }

    function test_disputed() public {
        openDisputed(terms);
        vm.assertEq(uint256(phaseOf(id)), uint256(ANSWERED), "no bond, no answer");
        _tryTimes("disputed without bond", ANSWERED, block.timestamp + terms.ruleSecs);
    }

    function test_closed() public {
        openDisputed(terms);
        uint256 answered = vm.snapshotState();
        _pokeAt(block.timestamp + terms.ruleSecs + 1);
        _tryClosed("silent arbiter", IJobEscrow.How.SilentArbiter, answered);
    }
}

/// @notice The same without an arbiter: delivery plus silence pays, there is no dispute.
contract MatrixWithoutArbiterTest is Matrix {
    function adjust() internal override {
        terms.arbiter = address(0);
        terms.bond = 0;
        terms.answerSecs = 0;
        terms.ruleSecs = 0;
    }

    function test_closed() public {
        openSubmitted(terms);
        uint256 delivered = vm.snapshotState();
        _pokeAt(block.timestamp + terms.disputeSecs + 1);
        _tryClosed("silent buyer", IJobEscrow.How.SilentBuyer, delivered);
    }
}

// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IJobEscrow} from "../src/IJobEscrow.sol";
import {IStakeVault} from "../src/IStakeVault.sol";
import {StakeBase} from "./StakeBase.sol";
import {vm} from "./Vm.sol";

/// @notice Every state of a staked deal, every caller, every function of the vault: allowed exactly
/// where the table of IStakeVault has a row, and then with that row's result to the last unit.
contract StakeMatrixTest is StakeBase {
    enum Caller {
        Buyer,
        Seller,
        Arbiter,
        Stranger,
        Escrow
    }

    /// @dev The suffix says which acknowledgement goes along.
    enum Act {
        CloseBare,
        CloseAcked,
        CloseAckedByBuyer,
        CloseAckOfOtherInput,
        CloseAckOfOtherJob,
        CloseOtherTerms,
        Reserve,
        ReserveTooMuch,
        Unbond,
        UnbondTooMuch,
        Release,
        Withdraw
    }

    /// @dev What a state is, as far as the table cares.
    struct State {
        string name;
        bool reserved; // the slice is there
        IJobEscrow.How how;
        uint256 penalty;
        bool late; // after deliverBy + ACK_SECS
    }

    uint256 private constant PENALTY = 120;
    uint256 private constant UNBONDED = 200;

    IJobEscrow.Terms private _terms;
    IJobEscrow.Terms private _other;
    uint256 private _id;

    function setUp() public override {
        super.setUp();
        _terms = stakedTerms();
        _id = idOf(_terms);
        _other = stakedTerms();
        _other.nonce = 8;
        // Something waits to be released, not yet.
        vm.prank(seller);
        vault.unbond(UNBONDED);
    }

    // ---------------------------------------------------------------------------------- states

    function test_none() public {
        _tryAll(State("none", false, IJobEscrow.How.Open, 0, false));
    }

    function test_open() public {
        uint256 fresh = vm.snapshotState();
        open(_terms);
        _tryOpen("working");
        vm.revertToState(fresh);
        openSubmitted(_terms);
        _tryOpen("delivered");
        vm.revertToState(fresh);
        openDisputed(_terms);
        _tryOpen("disputed");
        vm.revertToState(fresh);
        openAnswered(_terms);
        _tryOpen("answered");
    }

    function test_closedFromWorking() public {
        open(_terms);
        uint256 working = vm.snapshotState();
        _settle(PRICE);
        _tryClosed("settled", IJobEscrow.How.Settled, 0, working);
        _settle(0);
        _tryClosed("settled for nothing", IJobEscrow.How.Settled, 0, working);
        vm.prank(seller);
        escrow.decline(_terms);
        _tryClosed("declined", IJobEscrow.How.Declined, 0, working);
        pokeAt(_terms, _terms.deliverBy + 1);
        _tryClosed("undelivered", IJobEscrow.How.Undelivered, 0, working);
        _expireAndPoke();
        _tryClosed("expired, undelivered", IJobEscrow.How.Undelivered, 0, working);
    }

    function test_closedAfterDelivery() public {
        uint256 fresh = vm.snapshotState();
        openSubmitted(_terms);
        pokeAt(_terms, block.timestamp + _terms.disputeSecs + 1);
        _tryClosed("silent buyer", IJobEscrow.How.SilentBuyer, 0, fresh);
        openDisputed(_terms);
        uint256 disputed = vm.snapshotState();
        _settle(1);
        _tryClosed("settled in dispute", IJobEscrow.How.Settled, 0, disputed);
        pokeAt(_terms, block.timestamp + _terms.answerSecs + 1);
        _tryClosed("silent seller", IJobEscrow.How.SilentSeller, 0, disputed);
        _expireAndPoke();
        _tryClosed("expired, silent seller", IJobEscrow.How.SilentSeller, 0, disputed);
    }

    function test_ruled() public {
        openAnswered(_terms);
        uint256 answered = vm.snapshotState();
        ruleIt(_terms, 0, 0);
        _tryClosed("ruled without penalty", IJobEscrow.How.Ruled, 0, answered);
        ruleIt(_terms, 600, PENALTY);
        _tryClosed("ruled", IJobEscrow.How.Ruled, PENALTY, answered);
        ruleIt(_terms, PRICE, STAKE);
        _tryClosed("ruled, all", IJobEscrow.How.Ruled, STAKE, answered);
        pokeAt(_terms, block.timestamp + _terms.ruleSecs + 1);
        _tryClosed("silent arbiter", IJobEscrow.How.SilentArbiter, 0, answered);
    }

    // ----------------------------------------------------------------------------------- trying

    /// @dev Before and after the last moment for an Ack, and once more after `claimRefund`.
    function _tryOpen(string memory name) private {
        uint256 state = vm.snapshotState();
        _tryAll(State(name, true, IJobEscrow.How.Open, 0, false));
        vm.warp(_terms.deliverBy + ACK_SECS + 1);
        _tryAll(State(string.concat(name, ", late"), true, IJobEscrow.How.Open, 0, true));
        vm.warp(expiry(_terms) > block.timestamp ? expiry(_terms) : block.timestamp);
        escrow.claimRefund(_id);
        _tryAll(State(string.concat(name, ", expired"), true, IJobEscrow.How.Open, 0, true));
        vm.revertToState(state);
    }

    function _tryClosed(string memory name, IJobEscrow.How how, uint256 penalty, uint256 goBackTo) private {
        (IJobEscrow.How told,) = escrow.outcome(_id);
        vm.assertEq(uint256(told), uint256(how), name);
        _tryAll(State(name, true, how, penalty, false));
        vm.warp(_terms.deliverBy + ACK_SECS);
        _tryAll(State(string.concat(name, ", at the limit"), true, how, penalty, false));
        vm.warp(block.timestamp + 1);
        _tryAll(State(string.concat(name, ", late"), true, how, penalty, true));
        closeSlice(_terms, "");
        _tryAll(State(string.concat(name, ", slice closed"), false, how, penalty, true));
        vm.revertToState(goBackTo);
    }

    function _tryAll(State memory s) private {
        for (uint256 caller = 0; caller <= uint256(type(Caller).max); ++caller) {
            for (uint256 act = 0; act <= uint256(type(Act).max); ++act) {
                // A call from outside, so that memory does not pile up over the cells.
                this.tryCell(s, Caller(caller), Act(act));
            }
        }
    }

    function tryCell(State memory s, Caller caller, Act act) external {
        address[5] memory callers = [buyer, seller, arbiter, stranger, address(escrow)];
        string memory cell = string.concat(
            s.name, ", caller ", vm.toString(uint256(caller)), ", act ", vm.toString(uint256(act))
        );
        bytes memory data = _callOf(act);
        (bool allowed, uint256 slashed) = _expectedOf(s, caller, act);
        uint256 state = vm.snapshotState();
        uint256[4] memory was = _picture();

        vm.prank(callers[uint256(caller)]);
        (bool done,) = address(vault).call(data);
        vm.assertTrue(done == allowed, string.concat(cell, allowed ? ": refused" : ": allowed"));
        uint256[4] memory is_ = _picture();
        if (done) {
            if (act <= Act.CloseOtherTerms) {
                was = [was[0] + STAKE - slashed, was[1] - STAKE, was[2], was[3] + slashed];
            } else if (act == Act.Reserve) {
                was = [was[0] - 1, was[1] + 1, was[2], was[3]];
            } else {
                was = [was[0] - 1, was[1], was[2] + 1, was[3]]; // Unbond; the rest never passes here.
            }
        }
        for (uint256 i = 0; i < 4; ++i) vm.assertEq(is_[i], was[i], cell);
        uint256 due = is_[0] + is_[1] + is_[2] + vault.owed(buyer);
        vm.assertEq(token.balanceOf(address(vault)), due, string.concat(cell, ": held"));
        vm.revertToState(state);
    }

    /// @dev Free, reserved and unbonding of the seller, and what the buyer has.
    function _picture() private view returns (uint256[4] memory p) {
        (p[0], p[1], p[2],) = vault.stakeOf(seller);
        p[3] = token.balanceOf(buyer) + vault.owed(buyer);
    }

    // ------------------------------------------------------------------------------------ table

    function _expectedOf(State memory s, Caller caller, Act act)
        private
        pure
        returns (bool allowed, uint256 slashed)
    {
        if (act < Act.CloseOtherTerms) {
            if (!s.reserved || s.how == IJobEscrow.How.Open) return (false, 0);
            if (s.how == IJobEscrow.How.Ruled) return (true, s.penalty);
            if (s.how == IJobEscrow.How.SilentSeller) return (true, STAKE);
            if ((s.how == IJobEscrow.How.Undelivered || s.how == IJobEscrow.How.Declined) && !s.late) {
                return (act == Act.CloseAcked, STAKE);
            }
            return (true, 0);
        }
        if (act == Act.Reserve) return (caller == Caller.Escrow, 0);
        if (act == Act.Unbond) return (caller == Caller.Seller, 0);
        // Nothing waits for release or withdrawal, no other deal was opened, more than all is too much.
        return (false, 0);
    }

    function _callOf(Act act) private view returns (bytes memory) {
        if (act == Act.CloseBare) return _close(_terms, "");
        if (act == Act.CloseAcked) return _close(_terms, ackOf(SELLER_KEY, _id));
        if (act == Act.CloseAckedByBuyer) return _close(_terms, ackOf(BUYER_KEY, _id));
        if (act == Act.CloseAckOfOtherInput) return _close(_terms, sign(SELLER_KEY, ackDigest(_id, RESULT)));
        if (act == Act.CloseAckOfOtherJob) return _close(_terms, ackOf(SELLER_KEY, idOf(_other)));
        if (act == Act.CloseOtherTerms) return _close(_other, ackOf(SELLER_KEY, idOf(_other)));
        if (act == Act.Reserve) return abi.encodeCall(IStakeVault.reserve, (seller, 1, 1));
        if (act == Act.ReserveTooMuch) return abi.encodeCall(IStakeVault.reserve, (seller, BONDED, 1));
        if (act == Act.Unbond) return abi.encodeCall(IStakeVault.unbond, (1));
        if (act == Act.UnbondTooMuch) return abi.encodeCall(IStakeVault.unbond, (BONDED));
        if (act == Act.Release) return abi.encodeCall(IStakeVault.release, ());
        return abi.encodeCall(IStakeVault.withdraw, (buyer));
    }

    function _close(IJobEscrow.Terms memory t, bytes memory ackSig) private view returns (bytes memory) {
        return abi.encodeCall(IStakeVault.close, (address(escrow), t, INPUT, ackSig));
    }

    // ------------------------------------------------------------------------------------ steps

    function _settle(uint256 toSeller) private {
        bytes memory sellerSig = sign(SELLER_KEY, settlementDigest(_id, RESULT, toSeller));
        vm.prank(buyer);
        escrow.settle(_terms, RESULT, toSeller, "", sellerSig);
    }

    function _expireAndPoke() private {
        vm.warp(expiry(_terms));
        escrow.claimRefund(_id);
        escrow.poke(_terms);
    }
}

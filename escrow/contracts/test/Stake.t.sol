// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

import {IJobEscrow} from "../src/IJobEscrow.sol";
import {IStakeVault} from "../src/IStakeVault.sol";
import {FeeToken, LyingToken, MoodyToken, PlainToken} from "./mocks/Tokens.sol";
import {Wallet} from "./mocks/Wallets.sol";
import {StakeBase} from "./StakeBase.sol";
import {vm} from "./Vm.sol";

/// @notice Gives whatever answer somebody likes, as an escrow that no factory knows.
contract FalseEscrow {
    uint256 private immutable _id;
    IJobEscrow.How private immutable _how;

    constructor(uint256 id, IJobEscrow.How how) {
        (_id, _how) = (id, how);
    }

    function jobId(IJobEscrow.Terms calldata) external view returns (uint256) {
        return _id;
    }

    function outcome(uint256) external view returns (IJobEscrow.How, uint256) {
        return (_how, type(uint128).max);
    }

    function reserve(IStakeVault vault, address seller, uint256 amount) external {
        vault.reserve(seller, amount, _id);
    }
}

/// @notice What is bonded, reserved and lost, and all that must not cost a seller anything.
contract StakeTest is StakeBase {
    event SliceClosed(
        address indexed escrow,
        uint256 indexed jobId,
        address indexed seller,
        IJobEscrow.How how,
        uint256 freed,
        uint256 slashed
    );

    // -------------------------------------------------------------------------- in and out again

    function test_bondAndUnbond() public {
        checkStake(seller, BONDED, 0, 0);
        uint256 before = token.balanceOf(seller);
        vm.startPrank(seller);
        vault.unbond(400);
        checkStake(seller, 600, 0, 400);
        vm.warp(START + UNBOND_SECS - 1);
        vm.expectRevert(
            abi.encodeWithSelector(IStakeVault.StillUnbonding.selector, seller, START + UNBOND_SECS)
        );
        vault.release();
        // A second part makes the first wait again: there is one clock.
        vault.unbond(1);
        vm.warp(START + UNBOND_SECS);
        vm.expectPartialRevert(IStakeVault.StillUnbonding.selector);
        vault.release();
        vm.warp(START + 2 * UNBOND_SECS - 1);
        vault.release();
        vm.stopPrank();
        vm.assertEq(token.balanceOf(seller) - before, 401, "released");
        checkStake(seller, 599, 0, 0);
        vm.assertEq(token.balanceOf(address(vault)), 599, "held");
        vm.expectRevert(abi.encodeWithSelector(IStakeVault.NothingToRelease.selector, seller));
        vm.prank(seller);
        vault.release();
    }

    function test_onlyWhatIsFree() public {
        vm.startPrank(seller);
        vm.expectRevert(abi.encodeWithSelector(IStakeVault.NotEnoughFree.selector, seller, BONDED, BONDED + 1));
        vault.unbond(BONDED + 1);
        vm.expectRevert(abi.encodeWithSelector(IStakeVault.BadAmount.selector, 0));
        vault.unbond(0);
        vm.expectRevert(abi.encodeWithSelector(IStakeVault.BadAmount.selector, 0));
        vault.deposit(0);
        vm.expectPartialRevert(IStakeVault.BadAmount.selector);
        vault.deposit(uint256(type(uint128).max) - BONDED + 1);
        vm.expectPartialRevert(IStakeVault.BadAmount.selector);
        vault.allow(address(token), uint256(type(uint128).max) + 1);
        vm.stopPrank();

        IJobEscrow.Terms memory t = stakedTerms();
        open(t);
        checkStake(seller, BONDED - STAKE, STAKE, 0);
        vm.startPrank(seller);
        vm.expectPartialRevert(IStakeVault.NotEnoughFree.selector);
        vault.unbond(BONDED - STAKE + 1);
        vault.unbond(BONDED - STAKE);
        vm.stopPrank();
        // What is unbonding cannot be promised a second time.
        t.nonce = 8;
        t.stake = 1;
        _doesNotOpen(t, abi.encodeWithSelector(IStakeVault.NotEnoughFree.selector, seller, 0, 1));
    }

    function test_tokenThatTakesAFeeOrLies() public {
        FeeToken fee = new FeeToken();
        _refusesDeposit(address(fee));
        LyingToken liar = new LyingToken();
        liar.lie(true);
        _refusesDeposit(address(liar));
    }

    function test_constructorWantsContracts() public {
        bytes memory code = creationCode("StakeVault");
        (bool done,) = address(this).call(abi.encodeCall(this.tryCreate, (code, address(factory), stranger)));
        vm.assertTrue(!done, "no token");
        (done,) = address(this).call(abi.encodeCall(this.tryCreate, (code, stranger, address(token))));
        vm.assertTrue(!done, "no factory");
        (done,) = address(this).call(abi.encodeCall(this.tryCreate, (code, address(factory), address(token))));
        vm.assertTrue(done, "both");
    }

    // -------------------------------------------------------------------------------- reserving

    function test_openChecksTheStake() public {
        IJobEscrow.Terms memory t = stakedTerms();
        t.vault = address(0);
        _doesNotOpen(t, abi.encodeWithSelector(IJobEscrow.BadStake.selector, t.vault, t.stake, t.arbiter));
        t = stakedTerms();
        t.stake = 0;
        _doesNotOpen(t, abi.encodeWithSelector(IJobEscrow.BadStake.selector, t.vault, 0, t.arbiter));
        t = stakedTerms();
        t.stake = uint256(1) << 128;
        _doesNotOpen(t, abi.encodeWithSelector(IJobEscrow.BadStake.selector, t.vault, t.stake, t.arbiter));
        t = stakedTerms();
        (t.arbiter, t.bond) = (address(0), 0);
        _doesNotOpen(t, abi.encodeWithSelector(IJobEscrow.BadStake.selector, t.vault, t.stake, address(0)));
        t = stakedTerms();
        t.vault = stranger; // No code there.
        _doesNotOpen(t, "");
        t.vault = address(escrow);
        _doesNotOpen(t, "");
    }

    /// @notice All or nothing: a refused reservation leaves no job, no nonce, no payment.
    function test_noSliceNoDeal() public {
        IJobEscrow.Terms memory t = stakedTerms();
        t.stake = BONDED + 1;
        vm.prank(seller);
        vault.allow(address(token), BONDED + 1);
        _doesNotOpen(t, abi.encodeWithSelector(IStakeVault.NotEnoughFree.selector, seller, BONDED, BONDED + 1));
        vm.assertEq(uint256(phaseOf(idOf(t))), 0, "no job");
        vm.assertEq(escrow.nonceBitmap(seller, 0), 0, "no nonce");
        // And a buyer who cannot pay reserves nothing.
        t.stake = STAKE;
        bytes memory sellerSig = signTerms(SELLER_KEY, t);
        vm.startPrank(buyer);
        token.approve(address(escrow), 0);
        vm.expectRevert();
        escrow.open(t, "", sellerSig, byAllowance());
        vm.stopPrank();
        checkStake(seller, BONDED, 0, 0);
        vm.assertEq(vault.sliceOf(address(escrow), idOf(t)), 0, "no slice");
    }

    function test_everyDealItsOwnSlice() public {
        IJobEscrow.Terms memory t = stakedTerms();
        uint256 first = open(t);
        t.nonce = 8;
        uint256 second = open(t);
        vm.assertEq(vault.sliceOf(address(escrow), first), STAKE, "first");
        vm.assertEq(vault.sliceOf(address(escrow), second), STAKE, "second");
        checkStake(seller, BONDED - 2 * STAKE, 2 * STAKE, 0);
        t.nonce = 9;
        t.stake = BONDED - 2 * STAKE + 1;
        _doesNotOpen(
            t,
            abi.encodeWithSelector(
                IStakeVault.NotAllowedToReserve.selector, seller, address(escrow), 2 * STAKE, BONDED, t.stake
            )
        );
    }

    function test_allowance() public {
        IJobEscrow.Terms memory t = stakedTerms();
        vm.prank(seller);
        vault.allow(address(token), STAKE);
        open(t);
        t.nonce = 8;
        t.stake = 1;
        _doesNotOpen(
            t,
            abi.encodeWithSelector(
                IStakeVault.NotAllowedToReserve.selector, seller, address(escrow), STAKE, STAKE, 1
            )
        );
        // Less than is reserved already: nothing more, and what is there stays and can be closed.
        vm.prank(seller);
        vault.allow(address(token), 1);
        _doesNotOpen(
            t,
            abi.encodeWithSelector(IStakeVault.NotAllowedToReserve.selector, seller, address(escrow), STAKE, 1, 1)
        );
        t = stakedTerms();
        _settle(t, PRICE);
        closeSlice(t, "");
        (uint256 reserved, uint256 maxReserved) = vault.allowanceOf(seller, address(escrow));
        vm.assertEq(reserved, 0, "reserved");
        vm.assertEq(maxReserved, 1, "at most");
    }

    function test_onlyTheEscrowsThatTheSellerAllowed() public {
        // The escrow of another token, from the same factory: an honest one, but not asked for.
        PlainToken other = new PlainToken();
        token = IERC20(address(other));
        useFactory();
        other.mint(buyer, PRICE);
        IJobEscrow.Terms memory t = stakedTerms();
        _doesNotOpen(
            t,
            abi.encodeWithSelector(
                IStakeVault.NotAllowedToReserve.selector, seller, address(escrow), 0, 0, STAKE
            )
        );
        // An escrow of the same code that the factory did not deploy.
        address bare = create("JobEscrow", abi.encode(address(other)));
        escrow = IJobEscrow(bare);
        allow(buyer);
        vm.prank(seller);
        vault.allow(address(other), BONDED);
        _doesNotOpen(
            t, abi.encodeWithSelector(IStakeVault.NotAllowedToReserve.selector, seller, bare, 0, 0, STAKE)
        );
        // Anybody else, and a false escrow.
        vm.expectPartialRevert(IStakeVault.NotAllowedToReserve.selector);
        vault.reserve(seller, 1, 1);
        FalseEscrow liar = new FalseEscrow(1, IJobEscrow.How.SilentSeller);
        vm.expectPartialRevert(IStakeVault.NotAllowedToReserve.selector);
        liar.reserve(vault, seller, 1);
        checkStake(seller, BONDED, 0, 0);
        // With the seller's leave the other honest escrow may.
        useFactory();
        open(t);
        checkStake(seller, BONDED - STAKE, STAKE, 0);
    }

    /// @notice Allowed before the token's escrow exists.
    function test_allowBeforeTheEscrow() public {
        PlainToken other = new PlainToken();
        vm.prank(seller);
        vault.allow(address(other), STAKE);
        (, uint256 maxReserved) = vault.allowanceOf(seller, factory.escrowOf(address(other)));
        vm.assertEq(maxReserved, STAKE, "allowed");
        vm.assertTrue(!factory.isEscrow(factory.escrowOf(address(other))), "not there yet");
    }

    /// @notice The stake may be in another token than the price.
    function test_stakeInAnotherToken() public {
        PlainToken other = new PlainToken();
        other.mint(seller, BONDED);
        useVault(address(other));
        bondAll(seller, BONDED);
        IJobEscrow.Terms memory t = stakedTerms();
        openAnswered(t);
        ruleIt(t, 0, STAKE);
        closeSlice(t, "");
        vm.assertEq(other.balanceOf(buyer), STAKE, "penalty");
        checkStake(seller, BONDED - STAKE, 0, 0);
    }

    // ---------------------------------------------------------------------------------- closing

    function test_rulingSlashes() public {
        IJobEscrow.Terms memory t = stakedTerms();
        uint256 id = openAnswered(t);
        ruleIt(t, 600, 120);
        uint256 before = token.balanceOf(buyer);
        vm.expectEmit(true, true, true, true, address(vault));
        emit SliceClosed(address(escrow), id, seller, IJobEscrow.How.Ruled, STAKE - 120, 120);
        vm.prank(stranger);
        closeSlice(t, "");
        vm.assertEq(token.balanceOf(buyer) - before, 120, "penalty");
        checkStake(seller, BONDED - 120, 0, 0);
        vm.expectRevert(abi.encodeWithSelector(IStakeVault.NothingReserved.selector, address(escrow), id));
        closeSlice(t, "");
    }

    function test_penaltyIsAtMostTheStake() public {
        IJobEscrow.Terms memory t = stakedTerms();
        openAnswered(t);
        vm.expectRevert(abi.encodeWithSelector(IJobEscrow.PenaltyAboveStake.selector, STAKE + 1, STAKE));
        ruleIt(t, 0, STAKE + 1);
        ruleIt(t, 0, STAKE);
        closeSlice(t, "");
        checkStake(seller, BONDED - STAKE, 0, 0);
    }

    /// @notice Garbage and silence must not be a cheap way out.
    function test_silentSeller() public {
        IJobEscrow.Terms memory t = stakedTerms();
        openDisputed(t);
        uint256 limit = clockOf(idOf(t)) + t.answerSecs;
        pokeAt(t, limit + 1);
        uint256 before = token.balanceOf(buyer);
        closeSlice(t, "");
        vm.assertEq(token.balanceOf(buyer) - before, STAKE, "slashed");
        checkStake(seller, BONDED - STAKE, 0, 0);
    }

    /// @notice A buyer who withholds the input gets nothing of the stake, whatever he signs.
    function test_ghostJob() public {
        IJobEscrow.Terms memory t = stakedTerms();
        uint256 id = open(t);
        uint256 limit = t.deliverBy + ACK_SECS;
        vm.expectRevert(abi.encodeWithSelector(IStakeVault.DealIsOpen.selector, id));
        closeSlice(t, "");
        pokeAt(t, t.deliverBy + 1);
        uint256 wealthBefore = token.balanceOf(buyer);
        bytes[5] memory wrong = [
            bytes(""),
            ackOf(BUYER_KEY, id),
            ackOf(SELLER_KEY, id + 1),
            sign(SELLER_KEY, ackDigest(id, RESULT)),
            sign(SELLER_KEY, _ackDigestOf(address(vault), id))
        ];
        vm.assertEq(_ackDigestOf(address(escrow), id), ackDigest(id, INPUT), "the right one would be this");
        vm.warp(limit);
        for (uint256 i = 0; i < wrong.length; ++i) {
            vm.prank(i % 2 == 0 ? buyer : seller); // A caller is no acknowledgement of his own.
            vm.expectRevert(abi.encodeWithSelector(IStakeVault.AckNeeded.selector, id, limit));
            closeSlice(t, wrong[i]);
        }
        vm.warp(limit + 1);
        closeSlice(t, ackOf(BUYER_KEY, id));
        vm.assertEq(token.balanceOf(buyer), wealthBefore, "nothing for the buyer");
        checkStake(seller, BONDED, 0, 0);
    }

    function test_acknowledgedSilence() public {
        IJobEscrow.Terms memory t = stakedTerms();
        uint256 id = open(t);
        pokeAt(t, t.deliverBy + 1);
        vm.warp(t.deliverBy + ACK_SECS);
        uint256 before = token.balanceOf(buyer);
        vm.prank(stranger);
        closeSlice(t, ackOf(SELLER_KEY, id));
        vm.assertEq(token.balanceOf(buyer) - before, STAKE, "slashed");
        checkStake(seller, BONDED - STAKE, 0, 0);
    }

    /// @notice One second too late the Ack is worth nothing: at each instant one side can act.
    function test_acknowledgedTooLate() public {
        IJobEscrow.Terms memory t = stakedTerms();
        uint256 id = open(t);
        pokeAt(t, t.deliverBy + 1);
        vm.warp(t.deliverBy + ACK_SECS + 1);
        closeSlice(t, ackOf(SELLER_KEY, id));
        checkStake(seller, BONDED, 0, 0);
    }

    function test_declined() public {
        IJobEscrow.Terms memory t = stakedTerms();
        uint256 id = open(t);
        vm.prank(seller);
        escrow.decline(t);
        vm.expectRevert(abi.encodeWithSelector(IStakeVault.AckNeeded.selector, id, t.deliverBy + ACK_SECS));
        closeSlice(t, "");
        closeSlice(t, ackOf(SELLER_KEY, id));
        checkStake(seller, BONDED - STAKE, 0, 0);
    }

    /// @notice The silence of others costs the seller nothing, his Ack or not.
    function test_othersAreSilent() public {
        IJobEscrow.Terms memory t = stakedTerms();
        uint256 id = openSubmitted(t);
        pokeAt(t, block.timestamp + t.disputeSecs + 1);
        closeSlice(t, ackOf(SELLER_KEY, id));
        checkStake(seller, BONDED, 0, 0);

        t = stakedTerms();
        t.nonce = 8;
        id = openAnswered(t);
        pokeAt(t, block.timestamp + t.ruleSecs + 1);
        closeSlice(t, ackOf(SELLER_KEY, id));
        checkStake(seller, BONDED, 0, 0);
    }

    function test_settledFreesAtOnce() public {
        IJobEscrow.Terms memory t = stakedTerms();
        uint256 id = open(t);
        _settle(t, 0);
        closeSlice(t, ackOf(SELLER_KEY, id));
        checkStake(seller, BONDED, 0, 0);
    }

    /// @notice Expiry moves nothing and frees nothing: the deal must be poked first, by anybody.
    function test_expired() public {
        IJobEscrow.Terms memory t = stakedTerms();
        uint256 id = openDisputed(t);
        vm.warp(expiry(t));
        escrow.claimRefund(id);
        vm.expectRevert(abi.encodeWithSelector(IStakeVault.DealIsOpen.selector, id));
        closeSlice(t, "");
        escrow.poke(t);
        closeSlice(t, "");
        checkStake(seller, BONDED - STAKE, 0, 0);
    }

    function test_ackOfAContractWallet() public {
        Wallet wallet = new Wallet(seller);
        token.transfer(address(wallet), BONDED);
        IJobEscrow.Terms memory t = stakedTerms();
        vm.startPrank(address(wallet));
        token.approve(address(vault), BONDED);
        vault.deposit(BONDED);
        vault.allow(address(token), BONDED);
        vm.stopPrank();
        t.seller = address(wallet);
        uint256 id = open(t);
        pokeAt(t, t.deliverBy + 1);
        closeSlice(t, ackOf(SELLER_KEY, id));
        checkStake(address(wallet), BONDED - STAKE, 0, 0);
    }

    // ----------------------------------------------------------------------------------- attacks

    /// @notice A false escrow may answer what it likes: it has no slice, and none of another's.
    function test_falseEscrow() public {
        IJobEscrow.Terms memory t = stakedTerms();
        uint256 id = open(t);
        FalseEscrow liar = new FalseEscrow(id, IJobEscrow.How.SilentSeller);
        vm.expectRevert(abi.encodeWithSelector(IStakeVault.NothingReserved.selector, address(liar), id));
        vault.close(address(liar), t, INPUT, "");
        vm.expectRevert();
        vault.close(stranger, t, INPUT, "");
        checkStake(seller, BONDED - STAKE, STAKE, 0);
    }

    /// @notice Terms of another deal, or bent ones, close nothing.
    function test_bentTerms() public {
        IJobEscrow.Terms memory t = stakedTerms();
        uint256 id = open(t);
        pokeAt(t, t.deliverBy + 1);
        IJobEscrow.Terms memory bent = stakedTerms();
        bent.lockBy = t.lockBy;
        bent.buyer = stranger;
        bent.deliverBy = t.deliverBy;
        vm.expectPartialRevert(IStakeVault.NothingReserved.selector);
        closeSlice(bent, ackOf(SELLER_KEY, id));
        bent = stakedTerms();
        (bent.lockBy, bent.deliverBy) = (t.lockBy, t.deliverBy - ACK_SECS);
        vm.expectPartialRevert(IStakeVault.NothingReserved.selector);
        closeSlice(bent, "");
    }

    /// @notice A buyer who cannot be paid holds up neither the seller's rest nor the others.
    function test_buyerWhoCannotBePaid() public {
        MoodyToken moody = new MoodyToken();
        moody.mint(seller, BONDED);
        useVault(address(moody));
        bondAll(seller, BONDED);
        IJobEscrow.Terms memory t = stakedTerms();
        openAnswered(t);
        ruleIt(t, 0, 100);
        moody.setMood(buyer, MoodyToken.Mood.Reverts);
        closeSlice(t, "");
        checkStake(seller, BONDED - 100, 0, 0);
        vm.assertEq(vault.owed(buyer), 100, "owed");
        vm.expectRevert();
        vault.withdraw(buyer);
        moody.setMood(buyer, MoodyToken.Mood.Fine);
        vm.prank(stranger);
        vault.withdraw(buyer);
        vm.assertEq(moody.balanceOf(buyer), 100, "paid");
        vm.expectRevert(abi.encodeWithSelector(IStakeVault.NothingOwed.selector, buyer));
        vault.withdraw(buyer);
    }

    function test_noWayBackIn() public {
        MoodyToken moody = new MoodyToken();
        moody.mint(seller, 2 * BONDED);
        useVault(address(moody));
        bondAll(seller, BONDED);
        IJobEscrow.Terms memory t = stakedTerms();
        openAnswered(t);
        ruleIt(t, 0, 100);
        moody.attack(address(vault), abi.encodeCall(IStakeVault.close, (address(escrow), t, INPUT, "")));
        closeSlice(t, "");
        vm.prank(seller);
        vault.deposit(1);
        vm.assertTrue(!moody.reentered(), "re-entered");
        checkStake(seller, BONDED - 99, 0, 0);
    }

    /// @notice Whoever plays both sides moves his own free stake and nobody else's.
    function test_splitIdentity() public {
        address other = vm.addr(0xD0B);
        token.transfer(other, BONDED);
        bondAll(other, BONDED);
        IJobEscrow.Terms memory t = stakedTerms();
        (t.buyer, t.arbiter, t.stake) = (stranger, buyer, BONDED);
        token.transfer(stranger, PRICE);
        allow(stranger);
        openSubmitted(t);
        vm.prank(stranger);
        token.approve(address(escrow), type(uint256).max);
        token.transfer(stranger, BOND);
        dispute(t);
        answer(t);
        ruleIt(t, 0, BONDED);
        closeSlice(t, "");
        checkStake(seller, 0, 0, 0);
        checkStake(other, BONDED, 0, 0);
        vm.assertEq(token.balanceOf(address(vault)), BONDED, "the other's is all there");
    }

    /// @notice Whatever happened, in the end the seller takes out all that was not slashed.
    function testFuzz_allComesOut(uint256 stake, uint256 penalty, uint256 bonded, uint256 toSeller) public {
        bonded = 1 + bonded % 100_000;
        stake = 1 + stake % (BONDED + bonded);
        penalty = penalty % (stake + 1);
        vm.startPrank(seller);
        vault.deposit(bonded);
        vault.allow(address(token), type(uint128).max);
        vm.stopPrank();
        IJobEscrow.Terms memory t = stakedTerms();
        t.stake = stake;
        openAnswered(t);
        ruleIt(t, toSeller % (t.price + 1), penalty);
        uint256 before = token.balanceOf(buyer);
        closeSlice(t, "");
        vm.assertEq(token.balanceOf(buyer) - before, penalty, "the buyer's");
        uint256 left = BONDED + bonded - penalty;
        checkStake(seller, left, 0, 0);
        if (left == 0) return;
        vm.startPrank(seller);
        vault.unbond(left);
        vm.warp(block.timestamp + UNBOND_SECS);
        before = token.balanceOf(seller);
        vault.release();
        vm.stopPrank();
        vm.assertEq(token.balanceOf(seller) - before, left, "the seller's");
        vm.assertEq(token.balanceOf(address(vault)), 0, "empty");
    }

    // ----------------------------------------------------------------------------------- helpers

    function tryCreate(bytes memory code, address factory_, address token_) external {
        bytes memory all = bytes.concat(code, abi.encode(factory_, token_));
        address deployed;
        assembly ("memory-safe") {
            deployed := create(0, add(all, 0x20), mload(all))
        }
        require(deployed != address(0), "not deployed");
    }

    function _ackDigestOf(address verifier, uint256 id) private view returns (bytes32) {
        bytes32 structHash = keccak256(abi.encode(keccak256("Ack(uint256 jobId,bytes32 input)"), id, INPUT));
        return keccak256(abi.encodePacked(hex"1901", separatorOf(verifier, block.chainid), structHash));
    }

    function _refusesDeposit(address odd) private {
        PlainToken(odd).mint(seller, BONDED);
        useVault(odd);
        vm.startPrank(seller);
        PlainToken(odd).approve(address(vault), BONDED);
        vm.expectPartialRevert(IStakeVault.WrongAmountReceived.selector);
        vault.deposit(BONDED);
        vm.stopPrank();
        checkStake(seller, 0, 0, 0);
    }

    /// @param reason what it reverts with; empty for a revert without data
    function _doesNotOpen(IJobEscrow.Terms memory t, bytes memory reason) private {
        bytes memory sellerSig = signTerms(SELLER_KEY, t);
        vm.expectRevert(reason);
        vm.prank(t.buyer);
        escrow.open(t, "", sellerSig, byAllowance());
    }

    function _settle(IJobEscrow.Terms memory t, uint256 toSeller) private {
        bytes memory sellerSig = sign(SELLER_KEY, settlementDigest(idOf(t), RESULT, toSeller));
        vm.prank(t.buyer);
        escrow.settle(t, RESULT, toSeller, "", sellerSig);
    }
}

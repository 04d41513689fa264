// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

import {IPaymentChannels as Channels} from "../src/IPaymentChannels.sol";
import {ChannelsBase} from "./ChannelsBase.sol";
import {SilentCollector} from "./mocks/Collectors.sol";
import {FeeToken, LyingToken, MoodyToken, SilentToken} from "./mocks/Tokens.sol";
import {Wallet} from "./mocks/Wallets.sol";
import {vm} from "./Vm.sol";

interface IDomain {
    function eip712Domain()
        external
        view
        returns (bytes1, string memory, string memory, uint256, address, bytes32, uint256[] memory);
}

contract ChannelsTest is ChannelsBase {
    function test_domainAndDigestsAreThoseOfTheScheme() public {
        (bytes1 fields, string memory name, string memory version, uint256 chain, address where,,) =
            IDomain(address(channels)).eip712Domain();
        vm.assertTrue(fields == hex"0f", "fields");
        vm.assertEq(name, "x402 Batch Settlement", "name");
        vm.assertEq(version, "1", "version");
        vm.assertEq(chain, block.chainid, "chain");
        vm.assertEq(where, address(channels), "contract");
        bytes32 id = channels.getChannelId(someConfig());
        vm.assertEq(id, channelOf(someConfig()), "id");
        vm.chainId(block.chainid + 1);
        vm.assertTrue(channels.getChannelId(someConfig()) != id, "another chain, another channel");
    }

    function testFuzz_digestsOfRandomChannels(Channels.ChannelConfig memory c, uint128 most, uint128 total, uint256 n)
        public
        view
    {
        vm.assertEq(channels.getChannelId(c), channelOf(c), "channel");
        vm.assertEq(channels.getVoucherDigest(c.salt, most), voucherDigest(c.salt, most), "voucher");
        vm.assertEq(channels.getRefundDigest(c.salt, n, most), refundDigest(c.salt, n, most), "refund");
        Channels.VoucherClaim[] memory rows = new Channels.VoucherClaim[](n % 4);
        for (uint256 i = 0; i < rows.length; ++i) {
            rows[i] = Channels.VoucherClaim(Channels.Voucher(c, most), "", total);
        }
        vm.assertEq(channels.getClaimBatchDigest(rows), batchDigest(rows), "batch");
    }

    function test_itWorksWithoutAConstructor() public {
        address canonical = 0x4020074e9dF2ce1deE5A9C1b5c3f541D02a10003;
        vm.etch(canonical, runtimeCode("PaymentChannels"));
        channels = Channels(canonical);
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = depositPlain(c, 100);
        claimAs(seller, voucher(c, BUYER_KEY, 60, 60));
        checkChannel(id, 100, 60);
    }

    // --------------------------------------------------------------------------------- deposit

    function test_deposit() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = channelOf(c);
        vm.expectEmit(true, true, true, true, address(channels));
        emit Channels.ChannelCreated(id, c);
        vm.expectEmit(true, true, true, true, address(channels));
        emit Channels.Deposited(id, address(this), 100, 100);
        depositPlain(c, 100);
        checkChannel(id, 100, 0);

        vm.recordLogs();
        depositPlain(c, 50);
        vm.assertEq(vm.getRecordedLogs().length, 2, "a top-up creates nothing: a transfer and a deposit");
        checkChannel(id, 150, 0);
    }

    function test_depositRefusesConfigurationsThatCannotWork() public {
        for (uint256 i = 0; i < 5; ++i) {
            Channels.ChannelConfig memory c = someConfig();
            if (i == 0) c.payer = address(0);
            if (i == 1) c.receiver = address(0);
            if (i == 2) c.receiverAuthorizer = address(0);
            if (i == 3) c.token = address(0);
            if (i == 4) c.payerAuthorizer = address(0); // This one can: the payer signs himself.
            if (i < 4) vm.expectRevert(Channels.InvalidChannel.selector);
            channels.deposit(c, 1, address(plain), "");
        }
    }

    function test_depositBounds() public {
        uint40[4] memory delays = [uint40(899), 900, 30 days, 30 days + 1];
        for (uint256 i = 0; i < 4; ++i) {
            Channels.ChannelConfig memory c = someConfig();
            c.withdrawDelay = delays[i];
            if (i == 0 || i == 3) vm.expectRevert(Channels.WithdrawDelayOutOfRange.selector);
            channels.deposit(c, 1, address(plain), "");
        }
        vm.expectRevert(Channels.ZeroDeposit.selector);
        channels.deposit(someConfig(), 0, address(plain), "");
        vm.expectRevert(Channels.InvalidCollector.selector);
        channels.deposit(someConfig(), 1, address(0), "");
        vm.expectRevert(Channels.DepositOverflow.selector);
        channels.deposit(someConfig(), type(uint128).max, address(plain), "");
    }

    function test_depositCountsWhatArrives() public {
        for (int256 off = -1; off <= 1; ++off) {
            plain.setOff(off);
            if (off != 0) vm.expectRevert(Channels.DepositCollectionFailed.selector);
            channels.deposit(someConfig(), 100, address(plain), "");
        }
        plain.setOff(0);
        FeeToken fee = new FeeToken();
        LyingToken lying = new LyingToken();
        fee.mint(buyer, 1000);
        lying.mint(buyer, 1000);
        lying.lie(true);
        refuseDepositOf(address(fee));
        refuseDepositOf(address(lying));
    }

    function refuseDepositOf(address token_) private {
        vm.prank(buyer);
        IERC20(token_).approve(address(plain), type(uint256).max);
        Channels.ChannelConfig memory c = someConfig();
        c.token = token_;
        vm.expectRevert(Channels.DepositCollectionFailed.selector);
        channels.deposit(c, 100, address(plain), "");
        checkChannel(channelOf(c), 0, 0);
    }

    // ----------------------------------------------------------------------------------- claim

    function test_claimByReceiverOrItsAuthorizerOnly() public {
        Channels.ChannelConfig memory c = someConfig();
        c.receiverAuthorizer = arbiter;
        bytes32 id = depositPlain(c, 100);
        Channels.VoucherClaim memory row = voucher(c, BUYER_KEY, 40, 30);
        address[2] memory others = [buyer, stranger];
        for (uint256 i = 0; i < 2; ++i) {
            vm.expectRevert(Channels.NotAuthorizedToClaim.selector);
            claimAs(others[i], row);
        }
        vm.expectEmit(true, true, true, true, address(channels));
        emit Channels.Claimed(id, seller, 30, 30);
        claimAs(seller, row);
        row.totalClaimed = 40;
        vm.expectEmit(true, true, true, true, address(channels));
        emit Channels.Claimed(id, arbiter, 10, 40);
        claimAs(arbiter, row);
        checkChannel(id, 100, 40);
        vm.assertEq(token.balanceOf(seller), 1_000_000, "a claim moves nothing");
    }

    function test_claimTakesNoMoreThanSignedAndNoMoreThanThere() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = depositPlain(c, 100);
        vm.expectRevert(Channels.ClaimExceedsCeiling.selector);
        claimAs(seller, voucher(c, BUYER_KEY, 40, 41));
        vm.expectRevert(Channels.ClaimExceedsBalance.selector);
        claimAs(seller, voucher(c, BUYER_KEY, 101, 101));
        claimAs(seller, voucher(c, BUYER_KEY, 101, 100));
        checkChannel(id, 100, 100);
    }

    function test_oldVouchersChangeNothing() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = depositPlain(c, 100);
        claimAs(seller, voucher(c, BUYER_KEY, 40, 40));
        vm.recordLogs();
        claimAs(seller, voucher(c, BUYER_KEY, 40, 40));
        claimAs(seller, voucher(c, STRANGER_KEY, 39, 39)); // Not even looked at.
        vm.assertEq(vm.getRecordedLogs().length, 0, "nothing said");
        checkChannel(id, 100, 40);
    }

    function test_vouchersOfOthersAreRefused() public {
        Channels.ChannelConfig memory c = someConfig();
        depositPlain(c, 100);
        vm.expectRevert(Channels.InvalidSignature.selector);
        claimAs(seller, voucher(c, SELLER_KEY, 40, 40));
        Channels.VoucherClaim memory row = voucher(c, BUYER_KEY, 40, 40);
        row.voucher.maxClaimableAmount = 41;
        vm.expectRevert(Channels.InvalidSignature.selector);
        claimAs(seller, row);
        row = voucher(c, BUYER_KEY, 40, 40);
        row.signature = hex"00";
        vm.expectRevert();
        claimAs(seller, row);
        vm.chainId(block.chainid + 1);
        row = voucher(c, BUYER_KEY, 40, 40);
        vm.chainId(block.chainid - 1);
        vm.expectRevert(Channels.InvalidSignature.selector);
        claimAs(seller, row);
    }

    function test_withoutPayerAuthorizerThePayerSigns() public {
        Channels.ChannelConfig memory c = someConfig();
        c.payerAuthorizer = address(0);
        bytes32 id = depositPlain(c, 100);
        claimAs(seller, voucher(c, BUYER_KEY, 40, 40));
        checkChannel(id, 100, 40);

        Wallet wallet = new Wallet(buyer);
        vm.prank(buyer);
        token.transfer(address(wallet), 100);
        wallet.call(address(token), abi.encodeCall(token.approve, (address(plain), 100)));
        c.payer = address(wallet);
        id = depositPlain(c, 100);
        claimAs(seller, voucher(c, BUYER_KEY, 40, 40));
        checkChannel(id, 100, 40);
        wallet.revoke(); // Why no seller takes vouchers of such a channel.
        vm.expectRevert(Channels.InvalidSignature.selector);
        claimAs(seller, voucher(c, BUYER_KEY, 50, 50));
    }

    function test_aPoisonedBatchIsUndoneWhole() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = depositPlain(c, 100);
        Channels.ChannelConfig memory poisoned = someConfig();
        poisoned.salt = bytes32(uint256(1));
        depositPlain(poisoned, 10);
        Channels.VoucherClaim[] memory rows = new Channels.VoucherClaim[](2);
        rows[0] = voucher(c, BUYER_KEY, 40, 40);
        rows[1] = voucher(poisoned, BUYER_KEY, 11, 11);
        vm.prank(seller);
        vm.expectRevert(Channels.ClaimExceedsBalance.selector);
        channels.claim(rows);
        checkChannel(id, 100, 0);
        vm.prank(seller);
        vm.expectRevert(Channels.EmptyBatch.selector);
        channels.claim(new Channels.VoucherClaim[](0));
    }

    function test_claimWithSignatureOfTheOneAuthorizer() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = depositPlain(c, 100);
        Channels.ChannelConfig memory foreign = someConfig();
        foreign.receiverAuthorizer = stranger;
        depositPlain(foreign, 100);
        Channels.VoucherClaim[] memory rows = one(voucher(c, BUYER_KEY, 40, 40));
        bytes memory signature = sign(SELLER_KEY, batchDigest(rows));

        rows[0].totalClaimed = 39;
        vm.expectRevert(Channels.InvalidSignature.selector);
        channels.claimWithSignature(rows, signature);
        rows[0].totalClaimed = 40;
        vm.prank(stranger);
        channels.claimWithSignature(rows, signature);
        checkChannel(id, 100, 40);

        rows = new Channels.VoucherClaim[](2);
        rows[0] = voucher(c, BUYER_KEY, 50, 50);
        rows[1] = voucher(foreign, BUYER_KEY, 50, 50);
        signature = sign(SELLER_KEY, batchDigest(rows));
        vm.expectRevert(Channels.NotReceiverAuthorizer.selector);
        channels.claimWithSignature(rows, signature);
        vm.expectRevert(Channels.EmptyBatch.selector);
        channels.claimWithSignature(new Channels.VoucherClaim[](0), signature);
    }

    // ---------------------------------------------------------------------------------- settle

    function test_settlePaysTheReceiverOnceForAllChannels() public {
        Channels.ChannelConfig memory c = someConfig();
        depositPlain(c, 100);
        claimAs(seller, voucher(c, BUYER_KEY, 40, 40));
        c.salt = bytes32(uint256(1));
        depositPlain(c, 100);
        claimAs(seller, voucher(c, BUYER_KEY, 2, 2));
        vm.expectEmit(true, true, true, true, address(channels));
        emit Channels.Settled(seller, address(token), stranger, 42);
        vm.prank(stranger);
        channels.settle(seller, address(token));
        vm.assertEq(token.balanceOf(seller), 1_000_042, "paid");
        vm.recordLogs();
        channels.settle(seller, address(token));
        vm.assertEq(vm.getRecordedLogs().length, 0, "nothing left, nothing said");
        (uint128 claimed, uint128 settled) = channels.receivers(seller, address(token));
        vm.assertEq(uint256(claimed), uint256(settled), "even");
    }

    function test_claimAndSettleInOneTransaction() public {
        Channels.ChannelConfig memory c = someConfig();
        depositPlain(c, 100);
        bytes[] memory calls = new bytes[](2);
        calls[0] = abi.encodeCall(Channels.claim, (one(voucher(c, BUYER_KEY, 40, 40))));
        calls[1] = abi.encodeCall(Channels.settle, (seller, address(token)));
        vm.prank(seller);
        channels.multicall(calls);
        vm.assertEq(token.balanceOf(seller), 1_000_040, "paid");

        calls[0] = abi.encodeCall(Channels.claim, (one(voucher(c, BUYER_KEY, 101, 101))));
        vm.prank(seller);
        vm.expectRevert(Channels.ClaimExceedsBalance.selector);
        channels.multicall(calls);
    }

    // -------------------------------------------------------------------------------- withdraw

    function test_withdrawAfterTheDelay() public {
        Channels.ChannelConfig memory c = someConfig();
        c.payerAuthorizer = arbiter;
        bytes32 id = depositPlain(c, 100);
        vm.expectRevert(Channels.InvalidChannel.selector);
        vm.prank(seller);
        channels.initiateWithdraw(c, 100);
        vm.startPrank(arbiter);
        vm.expectRevert(Channels.NothingToWithdraw.selector);
        channels.initiateWithdraw(c, 0);
        vm.expectRevert(Channels.WithdrawAmountExceedsAvailable.selector);
        channels.initiateWithdraw(c, 101);
        vm.expectRevert(Channels.WithdrawalNotPending.selector);
        channels.finalizeWithdraw(c);
        vm.expectEmit(true, true, true, true, address(channels));
        emit Channels.WithdrawInitiated(id, 100, uint40(START) + DELAY);
        channels.initiateWithdraw(c, 100);
        vm.expectRevert(Channels.WithdrawalAlreadyPending.selector);
        channels.initiateWithdraw(c, 1);
        vm.warp(START + DELAY - 1);
        vm.expectRevert(Channels.WithdrawDelayNotElapsed.selector);
        channels.finalizeWithdraw(c);
        vm.warp(START + DELAY);
        vm.stopPrank();
        vm.expectRevert(Channels.NotAuthorizedToFinalizeWithdraw.selector);
        vm.prank(seller);
        channels.finalizeWithdraw(c);
        vm.expectEmit(true, true, true, true, address(channels));
        emit Channels.WithdrawFinalized(id, buyer, 100);
        vm.expectEmit(true, true, true, true, address(channels));
        emit Channels.ChannelClosed(id, c);
        vm.prank(buyer);
        channels.finalizeWithdraw(c);
        vm.assertEq(token.balanceOf(buyer), 1_000_000, "all back, to the payer");
        checkChannel(id, 0, 0);
        checkPending(id, 0, 0);
    }

    function test_claimsInTheDelayComeFirst() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = depositPlain(c, 100);
        vm.prank(buyer);
        channels.initiateWithdraw(c, 100);
        vm.warp(START + DELAY);
        claimAs(seller, voucher(c, BUYER_KEY, 70, 70));
        vm.prank(buyer);
        channels.finalizeWithdraw(c);
        checkChannel(id, 70, 70);
        channels.settle(seller, address(token));
        vm.assertEq(token.balanceOf(seller), 1_000_070, "the seller has his");
        vm.assertEq(token.balanceOf(buyer), 1_000_000 - 70, "the buyer the rest");
    }

    function test_aWithdrawalStaysArmedThroughDepositsAndClaims() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = depositPlain(c, 100);
        vm.prank(buyer);
        channels.initiateWithdraw(c, 100);
        vm.warp(START + 30 days);
        depositPlain(c, 50);
        claimAs(seller, voucher(c, BUYER_KEY, 20, 20));
        checkPending(id, 100, START);
        Channels.VoucherClaim memory last = voucher(c, BUYER_KEY, 120, 120);
        vm.prank(buyer);
        channels.finalizeWithdraw(c); // Before the claim, and without any notice.
        checkChannel(id, 50, 20);
        vm.expectRevert(Channels.ClaimExceedsBalance.selector);
        claimAs(seller, last);
    }

    function test_withdrawalOfWhatIsGoneByThenTakesNothing() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = depositPlain(c, 100);
        vm.prank(buyer);
        channels.initiateWithdraw(c, 100);
        claimAs(seller, voucher(c, BUYER_KEY, 100, 100));
        vm.warp(START + DELAY);
        vm.prank(buyer);
        channels.finalizeWithdraw(c);
        checkChannel(id, 100, 100);
        checkPending(id, 0, 0);
    }

    // ---------------------------------------------------------------------------------- refund

    function test_refund() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = depositPlain(c, 100);
        claimAs(seller, voucher(c, BUYER_KEY, 40, 40));
        vm.expectRevert(Channels.NotAuthorizedToRefund.selector);
        vm.prank(buyer);
        channels.refund(c, 1);
        vm.startPrank(seller);
        vm.expectRevert(Channels.ZeroRefund.selector);
        channels.refund(c, 0);
        vm.expectEmit(true, true, true, true, address(channels));
        emit Channels.Refunded(id, seller, 10);
        channels.refund(c, 10);
        channels.refund(c, 1000);
        checkChannel(id, 40, 40);
        vm.recordLogs();
        channels.refund(c, 1);
        vm.assertEq(vm.getRecordedLogs().length, 0, "nothing free, nothing said");
        vm.assertEq(channels.refundNonce(id), 3, "but the nonce is gone");
        vm.assertEq(token.balanceOf(buyer), 1_000_000 - 40, "to the payer");
    }

    function test_aRefundLowersAWithdrawalOrEndsIt() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = depositPlain(c, 100);
        vm.prank(buyer);
        channels.initiateWithdraw(c, 60);
        vm.startPrank(seller);
        channels.refund(c, 20);
        checkPending(id, 40, START);
        channels.refund(c, 40);
        checkPending(id, 0, 0);
        vm.expectEmit(true, true, true, true, address(channels));
        emit Channels.ChannelClosed(id, c);
        channels.refund(c, 40);
        vm.stopPrank();
        vm.expectEmit(true, true, true, true, address(channels));
        emit Channels.ChannelCreated(id, c);
        depositPlain(c, 1);
    }

    function test_refundWithSignatureOnce() public {
        Channels.ChannelConfig memory c = someConfig();
        c.receiverAuthorizer = arbiter;
        bytes32 id = depositPlain(c, 100);
        bytes memory signature = sign(ARBITER_KEY, refundDigest(id, 0, 30));
        vm.expectRevert(Channels.InvalidRefundNonce.selector);
        channels.refundWithSignature(c, 30, 1, signature);
        vm.expectRevert(Channels.InvalidSignature.selector);
        channels.refundWithSignature(c, 31, 0, signature);
        bytes memory receivers = sign(SELLER_KEY, refundDigest(id, 0, 30)); // The receiver's own is not enough.
        vm.expectRevert(Channels.InvalidSignature.selector);
        channels.refundWithSignature(c, 30, 0, receivers);
        vm.prank(stranger);
        channels.refundWithSignature(c, 30, 0, signature);
        checkChannel(id, 70, 0);
        vm.expectRevert(Channels.InvalidRefundNonce.selector);
        channels.refundWithSignature(c, 30, 0, signature);

        signature = sign(ARBITER_KEY, refundDigest(id, 1, 30));
        vm.prank(seller);
        channels.refund(c, 1); // Takes the nonce of what was signed.
        vm.expectRevert(Channels.InvalidRefundNonce.selector);
        channels.refundWithSignature(c, 30, 1, signature);
    }

    // ---------------------------------------------------------------------------------- tokens

    function test_tokensThatSayNothing() public {
        SilentToken silent = new SilentToken();
        silent.mint(buyer, 100);
        SilentCollector brings = new SilentCollector();
        vm.prank(buyer);
        silent.approve(address(brings), 100);
        Channels.ChannelConfig memory c = someConfig();
        c.token = address(silent);
        channels.deposit(c, 100, address(brings), "");
        claimAs(seller, voucher(c, BUYER_KEY, 40, 40));
        channels.settle(seller, address(silent));
        vm.assertEq(silent.balanceOf(seller), 40, "paid");
    }

    function test_noWayBackInWhileTokensMove() public {
        MoodyToken moody = new MoodyToken();
        moody.mint(buyer, 1000);
        vm.prank(buyer);
        moody.approve(address(plain), type(uint256).max);
        Channels.ChannelConfig memory c = someConfig();
        c.token = address(moody);
        c.receiverAuthorizer = address(moody);
        c.payerAuthorizer = buyer;
        bytes32 id = depositPlain(c, 500);
        claimAs(seller, voucher(c, BUYER_KEY, 100, 100));
        bytes[] memory inner = new bytes[](1);
        inner[0] = abi.encodeCall(Channels.settle, (seller, address(moody)));
        bytes[5] memory calls = [
            inner[0],
            abi.encodeCall(Channels.refund, (c, 10)),
            abi.encodeCall(Channels.claim, (one(voucher(c, BUYER_KEY, 200, 200)))),
            abi.encodeCall(Channels.deposit, (c, 1, address(plain), "")),
            abi.encodeCall(Channels.multicall, (inner))
        ];
        for (uint256 i = 0; i < calls.length; ++i) {
            moody.attack(address(channels), calls[i]);
            depositPlain(c, 1);
            vm.prank(seller);
            channels.refund(c, 1);
            vm.assertTrue(!moody.reentered(), "not let in");
        }
        channels.settle(seller, address(moody));
        vm.assertTrue(!moody.reentered(), "not let in");
        checkChannel(id, 500, 100);
        vm.assertEq(moody.balanceOf(address(channels)), 400, "held");
    }
}

// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC8183, IJobEscrow} from "../src/IJobEscrow.sol";
import {Base} from "./Base.sol";
import {FeeToken, LyingToken, MoodyToken, PlainToken, SilentToken} from "./mocks/Tokens.sol";
import {vm} from "./Vm.sol";

/// @notice Tokens that take fees, lie, stay silent, refuse receivers or call back.
contract WeirdTokensTest is Base {
    function test_notAToken() public {
        bytes memory code = bytes.concat(creationCode("JobEscrow"), abi.encode(stranger));
        address at_;
        assembly ("memory-safe") {
            at_ := create(0, add(code, 0x20), mload(code))
        }
        vm.assertEq(at_, address(0), "no escrow of nothing");
    }

    function test_feeOnTransfer() public {
        _use(new FeeToken());
        _openRefused(IERC8183.WrongAmountReceived.selector);
        vm.startPrank(buyer);
        uint256 id = escrow.createJob(seller, arbiter, START + 1, "", address(0));
        escrow.setBudget(id, PRICE, "");
        vm.expectPartialRevert(IERC8183.WrongAmountReceived.selector);
        escrow.fund(id, PRICE, "");
        vm.stopPrank();
    }

    function test_saysYesAndMovesNothing() public {
        LyingToken lying = new LyingToken();
        _use(lying);
        lying.lie(true);
        _openRefused(IERC8183.WrongAmountReceived.selector);
    }

    function test_saysNothing() public {
        _use(new SilentToken());
        IJobEscrow.Terms memory t = someTerms();
        openSubmitted(t);
        vm.warp(START + t.disputeSecs + 1);
        escrow.poke(t);
        vm.assertEq(token.balanceOf(seller), 1_000_000 + PRICE, "paid");
    }

    function test_noPermitAndNoAuthorization() public {
        _use(new PlainToken());
        IJobEscrow.Terms memory t = someTerms();
        bytes memory sig = signTerms(SELLER_KEY, t);
        vm.prank(buyer);
        vm.expectRevert();
        escrow.open(t, "", sig, IJobEscrow.Funding(2, 0, START + 1, new bytes(65)));
        // A permit that cannot be: the allowance decides.
        vm.prank(buyer);
        escrow.open(t, "", sig, IJobEscrow.Funding(1, 0, START + 1, new bytes(65)));
    }

    /// @notice One party that cannot be paid does not hold the other's money, and gets its own later.
    function test_receiverRefuses() public {
        uint256 state = vm.snapshotState();
        for (uint256 mood = 1; mood <= uint256(type(MoodyToken.Mood).max); ++mood) {
            MoodyToken moody = new MoodyToken();
            _use(moody);
            IJobEscrow.Terms memory t = someTerms();
            openSubmitted(t);
            moody.setMood(seller, MoodyToken.Mood(mood));
            bytes memory sig = sign(SELLER_KEY, settlementDigest(idOf(t), RESULT, 600));
            vm.prank(buyer);
            escrow.settle{gas: 10_000_000}(t, RESULT, 600, "", sig);
            vm.assertEq(token.balanceOf(buyer), 1_000_000 - 600, "the buyer has his rest");
            vm.assertEq(escrow.owed(seller), 600, "the seller's part waits");

            vm.expectRevert();
            escrow.withdraw{gas: 10_000_000}(seller);
            vm.assertEq(escrow.owed(seller), 600, "and still waits");
            moody.setMood(seller, MoodyToken.Mood.Fine);
            vm.prank(stranger);
            escrow.withdraw(seller);
            vm.assertEq(token.balanceOf(seller), 1_000_000 + 600, "here it is");
            vm.expectRevert(abi.encodeWithSelector(IJobEscrow.NothingOwed.selector, seller));
            escrow.withdraw(seller);
            vm.revertToState(state);
        }
    }

    function test_plainReceiverRefuses() public {
        MoodyToken moody = new MoodyToken();
        _use(moody);
        vm.startPrank(buyer);
        uint256 id = escrow.createJob(seller, arbiter, START + 1, "", address(0));
        escrow.setBudget(id, PRICE, "");
        escrow.fund(id, PRICE, "");
        vm.stopPrank();
        moody.setMood(buyer, MoodyToken.Mood.Reverts);
        vm.warp(START + 1);
        escrow.claimRefund(id);
        vm.assertEq(escrow.owed(buyer), PRICE, "the client's money waits");
    }

    /// @notice From within a transfer nothing of the escrow can be called.
    function test_reentry() public {
        IJobEscrow.Terms memory t;
        MoodyToken moody = new MoodyToken();
        _use(moody);
        t = someTerms();
        IJobEscrow.Terms memory other = someTerms();
        other.nonce = 8;
        openSubmitted(other);
        bytes[9] memory calls = [
            abi.encodeCall(IJobEscrow.poke, (t)),
            abi.encodeCall(IJobEscrow.poke, (other)),
            abi.encodeCall(IERC8183.claimRefund, (idOf(other))),
            abi.encodeCall(IJobEscrow.withdraw, (seller)),
            abi.encodeCall(
                IJobEscrow.open, (t, signTerms(BUYER_KEY, t), signTerms(SELLER_KEY, t), byAllowance())
            ),
            abi.encodeCall(
                IJobEscrow.settle,
                (other, RESULT, PRICE, sign(BUYER_KEY, settlementDigest(idOf(other), RESULT, PRICE)), "")
            ),
            abi.encodeCall(IERC8183.createJob, (seller, arbiter, START + 9 days, "", address(0))),
            abi.encodeCall(IJobEscrow.invalidate, (0, 1)),
            abi.encodeCall(IJobEscrow.cancel, (t))
        ];
        uint256 state = vm.snapshotState();
        for (uint256 i = 0; i < calls.length; ++i) {
            moody.attack(address(escrow), calls[i]);
            openSubmitted(t);
            vm.warp(START + t.disputeSecs + 1);
            escrow.poke(t);
            vm.assertTrue(!moody.reentered(), "got in");
            vm.assertEq(token.balanceOf(seller), 1_000_000 + PRICE, "paid once");
            vm.revertToState(state);
        }
    }

    // --------------------------------------------------------------------------------- helpers

    function _use(PlainToken weird) private {
        weird.mint(buyer, 1_000_000);
        weird.mint(seller, 1_000_000);
        useToken(address(weird));
    }

    function _openRefused(bytes4 selector) private {
        IJobEscrow.Terms memory t = someTerms();
        bytes memory sig = signTerms(SELLER_KEY, t);
        vm.prank(buyer);
        vm.expectPartialRevert(selector);
        escrow.open(t, "", sig, byAllowance());
        vm.assertEq(escrow.nonceBitmap(seller, 0), 0, "nothing is left of it");
    }
}

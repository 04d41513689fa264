// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";

import {IJobEscrow} from "../src/IJobEscrow.sol";
import {Base} from "./Base.sol";
import {vm} from "./Vm.sol";

/// @notice The three ways in which money gets here, and that it comes from nobody but a signer.
contract FundingTest is Base {
    function setUp() public override {
        super.setUp();
        _disallow(buyer);
        _disallow(seller);
    }

    function test_permit() public {
        IJobEscrow.Terms memory t = someTerms();
        _open(t, byPermit(BUYER_KEY, PRICE, START + 1));
        vm.assertEq(token.balanceOf(address(escrow)), PRICE, "locked");
        vm.assertEq(token.allowance(buyer, address(escrow)), 0, "and no more allowed");
    }

    function test_frontRunPermit() public {
        IJobEscrow.Terms memory t = someTerms();
        IJobEscrow.Funding memory funding = byPermit(BUYER_KEY, PRICE, START + 1);
        (uint8 v, bytes32 r, bytes32 s) = _split(funding.sig);
        vm.prank(stranger);
        IERC20Permit(address(token)).permit(buyer, address(escrow), PRICE, START + 1, v, r, s);
        _open(t, funding);
        vm.assertEq(token.balanceOf(address(escrow)), PRICE, "locked all the same");
    }

    function test_permitThatDoesNotFit() public {
        IJobEscrow.Terms memory t = someTerms();
        IJobEscrow.Funding memory late = byPermit(BUYER_KEY, PRICE, START - 1);
        _refused(t, late);
        _refused(t, byPermit(BUYER_KEY, PRICE - 1, START + 1));
        _refused(t, byPermit(STRANGER_KEY, PRICE, START + 1));
        _refused(t, byAllowance());
    }

    function test_authorization() public {
        IJobEscrow.Terms memory t = someTerms();
        _open(t, byAuthorization(BUYER_KEY, PRICE, bytes32(idOf(t))));
        vm.assertEq(token.balanceOf(address(escrow)), PRICE, "locked");
    }

    /// @notice An authorisation funds the deal whose id is its nonce, and no other.
    function test_authorizationOfAnotherDeal() public {
        IJobEscrow.Terms memory t = someTerms();
        IJobEscrow.Terms memory other = someTerms();
        other.nonce = 8;
        _refused(t, byAuthorization(BUYER_KEY, PRICE, bytes32(idOf(other))));
        _refused(t, byAuthorization(BUYER_KEY, PRICE + 1, bytes32(idOf(t))));
        _refused(t, byAuthorization(STRANGER_KEY, PRICE, bytes32(idOf(t))));
        IJobEscrow.Funding memory moved = byAuthorization(BUYER_KEY, PRICE, bytes32(idOf(t)));
        moved.deadline += 1;
        _refused(t, moved);
    }

    function test_authorizationTimes() public {
        IJobEscrow.Terms memory t = someTerms();
        IJobEscrow.Funding memory funding = byAuthorization(BUYER_KEY, PRICE, bytes32(idOf(t)));
        vm.warp(funding.deadline);
        _refused(t, funding);
        vm.warp(funding.deadline - 1);
        _open(t, funding);
    }

    function test_bondsByAuthorization() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = idOf(t);
        _open(t, byAuthorization(BUYER_KEY, PRICE, bytes32(id)));
        submit(id);
        IJobEscrow.Funding memory forAnswer = byAuthorization(BUYER_KEY, BOND, keccak256(abi.encode(id, uint256(2))));
        vm.prank(buyer);
        vm.expectRevert();
        escrow.dispute(t, EVIDENCE, "", forAnswer);
        IJobEscrow.Funding memory forDispute = byAuthorization(BUYER_KEY, BOND, keccak256(abi.encode(id, uint256(1))));
        vm.prank(buyer);
        escrow.dispute(t, EVIDENCE, "", forDispute);

        forDispute = byAuthorization(SELLER_KEY, BOND, keccak256(abi.encode(id, uint256(1))));
        vm.prank(seller);
        vm.expectRevert();
        escrow.answer(t, EVIDENCE, "", forDispute);
        forAnswer = byAuthorization(SELLER_KEY, BOND, keccak256(abi.encode(id, uint256(2))));
        vm.prank(seller);
        escrow.answer(t, EVIDENCE, "", forAnswer);
        vm.assertEq(token.balanceOf(address(escrow)), PRICE + 2 * BOND, "price and two bonds");
    }

    function test_bondsByPermit() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = idOf(t);
        _open(t, byPermit(BUYER_KEY, PRICE, START + 1));
        submit(id);
        bytes memory sig = sign(BUYER_KEY, disputeDigest(id, EVIDENCE));
        escrow.dispute(t, EVIDENCE, sig, byPermit(BUYER_KEY, BOND, START + 1));
        sig = sign(SELLER_KEY, answerDigest(id, EVIDENCE));
        escrow.answer(t, EVIDENCE, sig, byPermit(SELLER_KEY, BOND, START + 1));
        vm.assertEq(token.balanceOf(address(escrow)), PRICE + 2 * BOND, "price and two bonds");
    }

    function test_unknownKinds() public {
        IJobEscrow.Terms memory t = someTerms();
        bytes memory sig = signTerms(SELLER_KEY, t);
        IJobEscrow.Funding memory funding = byAuthorization(BUYER_KEY, PRICE, bytes32(idOf(t)));
        funding.kind = 3;
        vm.prank(buyer);
        vm.expectRevert(abi.encodeWithSelector(IJobEscrow.BadFunding.selector, 3, 65));
        escrow.open(t, "", sig, funding);
        funding.kind = 2;
        funding.sig = bytes.concat(funding.sig, hex"00");
        vm.prank(buyer);
        vm.expectRevert(abi.encodeWithSelector(IJobEscrow.BadFunding.selector, 2, 66));
        escrow.open(t, "", sig, funding);
    }

    /// @notice A standing allowance of somebody else is not touched, whatever the caller sends.
    function test_nobodyElsePays() public {
        token.transfer(stranger, 100_000);
        allow(stranger);
        IJobEscrow.Terms memory t = someTerms();
        bytes memory buyerSig = signTerms(BUYER_KEY, t);
        bytes memory sellerSig = signTerms(SELLER_KEY, t);
        vm.prank(stranger);
        vm.expectRevert();
        escrow.open(t, buyerSig, sellerSig, byAllowance());
        vm.assertEq(token.balanceOf(stranger), 100_000, "untouched");
    }

    // --------------------------------------------------------------------------------- helpers

    function _disallow(address from) private {
        vm.prank(from);
        token.approve(address(escrow), 0);
    }

    function _open(IJobEscrow.Terms memory t, IJobEscrow.Funding memory funding) private {
        bytes memory sig = signTerms(SELLER_KEY, t);
        vm.prank(buyer);
        escrow.open(t, "", sig, funding);
    }

    function _refused(IJobEscrow.Terms memory t, IJobEscrow.Funding memory funding) private {
        bytes memory sig = signTerms(SELLER_KEY, t);
        vm.prank(buyer);
        vm.expectRevert();
        escrow.open(t, "", sig, funding);
        vm.assertEq(token.balanceOf(address(escrow)), 0, "nothing came");
    }

    function _split(bytes memory sig) private pure returns (uint8 v, bytes32 r, bytes32 s) {
        return ECDSA.parse(sig);
    }
}

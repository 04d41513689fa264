// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IJobEscrow} from "../src/IJobEscrow.sol";
import {Base} from "./Base.sol";
import {Wallet, YesMan} from "./mocks/Wallets.sol";
import {vm} from "./Vm.sol";

/// @notice Whose signature counts for what: keys, contract wallets, delegated accounts, and all the
/// signatures that must not count.
contract SignaturesTest is Base {
    uint256 private constant ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141;

    function test_relayedThroughout() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = idOf(t);
        bytes memory buyerSig = signTerms(BUYER_KEY, t);
        bytes memory sellerSig = signTerms(SELLER_KEY, t);
        vm.startPrank(stranger);
        escrow.open(t, buyerSig, sellerSig, byAllowance());
        escrow.deliver(t, RESULT, sign(SELLER_KEY, deliveryDigest(id, RESULT)));
        escrow.dispute(t, EVIDENCE, sign(BUYER_KEY, disputeDigest(id, EVIDENCE)), byAllowance());
        escrow.answer(t, EVIDENCE, sign(SELLER_KEY, answerDigest(id, EVIDENCE)), byAllowance());
        escrow.rule(t, 600, 0, EVIDENCE, sign(ARBITER_KEY, rulingDigest(id, 600, 0, EVIDENCE)));
        vm.stopPrank();
        vm.assertEq(token.balanceOf(stranger), 0, "the relayer gets nothing and pays nothing");
    }

    function test_anotherSigner() public {
        IJobEscrow.Terms memory t = someTerms();
        _refused(t, signTerms(STRANGER_KEY, t), signTerms(SELLER_KEY, t), buyer);
        _refused(t, signTerms(BUYER_KEY, t), signTerms(STRANGER_KEY, t), seller);
        _refused(t, signTerms(SELLER_KEY, t), signTerms(BUYER_KEY, t), buyer);
        _refused(t, "", signTerms(SELLER_KEY, t), buyer);
        _refused(t, signTerms(BUYER_KEY, t), "", seller);
    }

    function test_anotherChain() public {
        IJobEscrow.Terms memory t = someTerms();
        bytes memory buyerSig = signTerms(BUYER_KEY, t);
        bytes memory sellerSig = signTerms(SELLER_KEY, t);
        vm.chainId(block.chainid + 1);
        _refused(t, buyerSig, sellerSig, buyer);
    }

    function test_anotherContract() public {
        IJobEscrow.Terms memory t = someTerms();
        IJobEscrow here = escrow;
        escrow = IJobEscrow(create("JobEscrow", abi.encode(address(token))));
        bytes memory buyerSig = signTerms(BUYER_KEY, t);
        bytes memory sellerSig = signTerms(SELLER_KEY, t);
        escrow = here;
        _refused(t, buyerSig, sellerSig, buyer);
    }

    /// @notice Signatures of one kind do not pass for another, nor for other content.
    function test_anotherMessage() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = openDisputed(t);
        bytes[4] memory wrong = [
            sign(SELLER_KEY, disputeDigest(id, EVIDENCE)),
            sign(SELLER_KEY, deliveryDigest(id, EVIDENCE)),
            sign(SELLER_KEY, answerDigest(id, RESULT)),
            sign(SELLER_KEY, answerDigest(id + 1, EVIDENCE))
        ];
        for (uint256 i = 0; i < wrong.length; ++i) {
            vm.expectRevert(abi.encodeWithSelector(IJobEscrow.BadSignature.selector, seller));
            escrow.answer(t, EVIDENCE, wrong[i], byAllowance());
        }
        escrow.answer(t, EVIDENCE, sign(SELLER_KEY, answerDigest(id, EVIDENCE)), byAllowance());
    }

    /// @notice One flipped bit anywhere in a signature, and it counts for nothing.
    function testFuzz_oneBit(uint256 bit) public {
        IJobEscrow.Terms memory t = someTerms();
        bytes memory sig = signTerms(BUYER_KEY, t);
        bit = bit % 520;
        sig[bit / 8] ^= bytes1(uint8(1 << (bit % 8)));
        _refused(t, sig, signTerms(SELLER_KEY, t), buyer);
    }

    function test_highS() public {
        IJobEscrow.Terms memory t = someTerms();
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(BUYER_KEY, bytes32(idOf(t)));
        bytes memory high = abi.encodePacked(r, bytes32(ORDER - uint256(s)), v == 27 ? uint8(28) : uint8(27));
        _refused(t, high, signTerms(SELLER_KEY, t), buyer);
    }

    function test_lengths() public {
        IJobEscrow.Terms memory t = someTerms();
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(BUYER_KEY, bytes32(idOf(t)));
        bytes32 compact = bytes32(uint256(s) | (uint256(v - 27) << 255));
        _refused(t, abi.encodePacked(r, compact), signTerms(SELLER_KEY, t), buyer);
        _refused(t, abi.encodePacked(r, s, v, uint8(0)), signTerms(SELLER_KEY, t), buyer);
        _refused(t, abi.encodePacked(r, s, v - 27), signTerms(SELLER_KEY, t), buyer);
    }

    // -------------------------------------------------------------------------------- contracts

    function test_contractWallets() public {
        Wallet wallet = new Wallet(vm.addr(0xAAA));
        token.transfer(address(wallet), 10_000);
        wallet.call(address(token), abi.encodeWithSignature("approve(address,uint256)", address(escrow), 10_000));
        IJobEscrow.Terms memory t = someTerms();
        t.buyer = address(wallet);
        bytes memory sig = sign(0xAAA, bytes32(idOf(t)));
        escrow.open(t, sig, signTerms(SELLER_KEY, t), byAllowance());
        submit(idOf(t));
        bytes32 digest = settlementDigest(idOf(t), RESULT, 300);
        bytes memory sellerSig = sign(SELLER_KEY, digest);
        bytes memory buyerSig = sign(0xAAA, digest);

        wallet.revoke();
        vm.expectRevert(abi.encodeWithSelector(IJobEscrow.BadSignature.selector, address(wallet)));
        escrow.settle(t, RESULT, 300, buyerSig, sellerSig);
        // A wallet that calls needs no signature, revoked or not.
        wallet.call(address(escrow), abi.encodeCall(IJobEscrow.settle, (t, RESULT, 300, "", sellerSig)));
        vm.assertEq(token.balanceOf(address(wallet)), 10_000 - 300, "the rest came back");
    }

    function test_contractThatAnswersEverything() public {
        YesMan yes = new YesMan();
        IJobEscrow.Terms memory t = someTerms();
        t.arbiter = address(yes);
        openAnswered(t);
        vm.expectRevert(abi.encodeWithSelector(IJobEscrow.BadSignature.selector, address(yes)));
        escrow.rule(t, 0, 0, EVIDENCE, "anything");
    }

    /// @notice EIP-7702: code that knows no ERC-1271 at the signer's address. The key still signs.
    function test_delegatedAccounts() public {
        vm.etch(buyer, address(new YesMan()).code);
        IJobEscrow.Terms memory t = someTerms();
        escrow.open(t, signTerms(BUYER_KEY, t), signTerms(SELLER_KEY, t), byAllowance());
    }

    function _refused(IJobEscrow.Terms memory t, bytes memory buyerSig, bytes memory sellerSig, address whose)
        private
    {
        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(IJobEscrow.BadSignature.selector, whose));
        escrow.open(t, buyerSig, sellerSig, byAllowance());
    }
}
